"""The user's cache of converted bases. Each folder in it exists completely or not at all.

    CACHE/bases/smollm2/      bases from `lora-gan fetch`, by name
    CACHE/gguf/SHA256/        bases converted from GGUF files, by the SHA-256 of the file

CACHE is the platform's cache folder for "lora-gan". The environment variable LORA_GAN_CACHE sets another folder. If
several processes need the same folder, one process makes it and the others wait.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from ..wording import size
from . import durable
from .durable import Damaged, Folder

VARIABLE = "LORA_GAN_CACHE"


def cache_folder() -> Path:
    """The absolute path of the cache, which may not exist yet."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("lora-gan", appauthor=False)


def is_whole(folder: Path) -> bool:
    """Whether the folder has every file of its manifest, each with the size in the manifest."""
    try:
        Folder(folder, manifest=True).verify(deep=False)
    except Damaged:
        return False
    return True


def get(final: Path, fill: Callable[[Path], None], *, needs: int) -> Path:
    """The folder `final`. If it does not exist completely, `fill(new_folder)` makes it.

    Args:
        final: the path of the folder in the cache.
        fill: writes the files into an empty folder. If it raises, the new folder is removed.
        needs: maximum disk space that `fill` uses, in bytes.

    Raises:
        ValueError: the cache cannot be written, or the disk has too little free space.
    """
    if is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(final.parent / ".lock")  # the kernel frees the lock of a process that ends
        try:
            alone = lock.acquire(timeout=0)
        except Timeout:
            warnings.warn(f"another process writes to {final.parent}: waiting until it has finished", stacklevel=4)
            alone = lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"the cache {final.parent} cannot be made or locked ({error}): {_elsewhere()}") from error
    with alone:
        durable.tidy(final.parent)  # remove files of killed processes
        if is_whole(final):  # another process made it in the meantime
            return final
        free = shutil.disk_usage(final.parent).free
        if free < needs:
            raise ValueError(
                f"{final.parent} has {size(free)} free, and {size(needs)} are needed: free space, or {_elsewhere()}"
            )
        with durable.whole_folder(final) as folder:
            fill(folder)
    return final


def _elsewhere() -> str:
    return f"set the environment variable {VARIABLE} to another folder"
