"""One run a folder. The lock is the kernel's: it goes with the process that holds it, however that ends.

The `.lock` file says who writes there. It is removed while it is still held: filelock sees that a file it has locked
has no name any more, and begins again, so that no two runs hold a lock each.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

FILE = ".lock"
PATIENCE = 0.2  # seconds: for a lock whose file is just being removed
_held: dict[Path, object] = {}  # folders that this process writes to, and who does


@contextmanager
def writing_alone(folder: Path, owner: object) -> Iterator[None]:
    """Inside the block nobody but `owner`, in this process or another, writes to the folder, which is made.

    Raises:
        ValueError: another run writes there.
    """
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if _held.get(place) is owner:
        yield
        return
    lock = FileLock(place / FILE, timeout=PATIENCE, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run{_who(place / FILE)} writes to {folder}: give another output_dir, or wait until it has ended"
        ) from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{folder} cannot be locked ({error}): take care that no other run writes there", stacklevel=4)
        yield
        return
    _held[place] = owner
    try:
        with suppress(OSError):  # on Windows a locked file cannot be written to by another handle
            (place / FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        del _held[place]
        with suppress(OSError):  # Windows does not let go of what is open
            (place / FILE).unlink()
            if not there:
                place.rmdir()  # where nothing was written; else it is not empty, and stays
        lock.release()


def _who(file: Path) -> str:
    with suppress(OSError, ValueError):
        if text := file.read_text(encoding="utf-8").strip()[:80]:
            return f" ({text})"
    return ""
