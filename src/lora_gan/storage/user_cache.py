"""The user's cache of bases that this library converted: each folder is there whole, or not at all.

    CACHE/bases/smollm2/      bases that `lora-gan fetch` brought, by name
    CACHE/gguf/SHA256/        bases that were GGUF files, by the SHA-256 of the file

CACHE is the platform's cache folder for "lora-gan"; the environment variable LORA_GAN_CACHE names another one.
Several processes may want the same folder: one makes it, and the others wait.
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
    """The cache's absolute path. It need not exist yet."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("lora-gan", appauthor=False)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds every file of its manifest at its full size."""
    try:
        Folder(folder, manifest=True).verify(deep=False)
    except Damaged:
        return False
    return True


def get(final: Path, fill: Callable[[Path], None], *, needs: int) -> Path:
    """The folder `final`, made by `fill(new_folder)` where it is not there whole yet.

    Args:
        final: where it is to be, within the cache.
        fill: writes the files into an empty folder. If it raises, nothing stays behind.
        needs: bytes of free disk space that `fill` takes at most.

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
            warnings.warn(f"another process writes to {final.parent}: waiting until it is done", stacklevel=4)
            alone = lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ValueError(f"the cache {final.parent} cannot be made or locked ({error}): {_elsewhere()}") from error
    with alone:
        durable.tidy(final.parent)  # what a killed process left
        if is_whole(final):  # another process made it in the meantime
            return final
        free = shutil.disk_usage(final.parent).free
        if free < needs:
            raise ValueError(
                f"{final.parent} has {size(free)} free, and {size(needs)} are needed: make room, or {_elsewhere()}"
            )
        with durable.whole_folder(final) as folder:
            fill(folder)
    return final


def _elsewhere() -> str:
    return f"set the environment variable {VARIABLE} to another folder"
