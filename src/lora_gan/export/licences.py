"""The licence ids that model cards on the Hugging Face hub may have.

The hub refuses uploads with other ids (docs/hub/repositories-licenses). The library huggingface_hub has no such list.
"""

from __future__ import annotations

import difflib

from ..wording import shown

IDS = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openmdw-1.1", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
)  # fmt: skip


def licence_id(name: str) -> str:
    """The id in the hub's spelling, in lower case.

    Raises:
        ValueError: the hub has no such licence id. The message suggests similar ids.
    """
    lowered = name.strip().lower() if isinstance(name, str) else ""
    if lowered in IDS:
        return lowered
    nearest = difflib.get_close_matches(lowered, IDS, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(nearest)}?" if nearest else ", such as apache-2.0, mit, cc-by-4.0 or gemma."
    raise ValueError(
        f"license={shown(name)} is not a licence id of the hub{hint} For a licence that is not listed, give 'other' "
        "and add the licence text to the folder"
    )
