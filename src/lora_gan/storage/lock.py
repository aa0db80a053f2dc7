"""One run per folder, by a lock of the kernel. The kernel releases the lock when its process ends, also after a crash.

The `.lock` file names the process that writes to the folder. The file is removed before the lock is released. If
another process locks the removed file, filelock notices that it has no name any more and tries again. So two runs never
hold the lock of one folder.
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
PATIENCE = 0.2  # seconds; time for another process to remove its lock file
_held: dict[Path, object] = {}  # {folder that this process has locked: owner}


@contextmanager
def writing_alone(folder: Path, owner: object) -> Iterator[None]:
    """Inside the block only `owner` writes to the folder, in this process and in all others. The folder is created.

    Raises:
        ValueError: another run writes to the folder.
    """
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    resolved = folder.resolve()
    if _held.get(resolved) is owner:
        yield
        return
    file = resolved / FILE
    lock = FileLock(file, timeout=PATIENCE, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run{_writer(file)} writes to {folder}: give another output_dir, or wait until it has ended"
        ) from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{folder} cannot be locked ({error}): make sure that no other run writes to it", stacklevel=4)
        yield
        return
    _held[resolved] = owner
    try:
        with suppress(OSError):  # on Windows another handle cannot write to a locked file
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        del _held[resolved]
        with suppress(OSError):  # Windows does not remove open files
            file.unlink()
            if not existed:
                resolved.rmdir()  # fails if the folder is not empty, and the folder then remains
        lock.release()


def _writer(file: Path) -> str:
    """The process that the lock file names, in brackets; empty if it cannot be read."""
    with suppress(OSError, ValueError):
        if text := file.read_text(encoding="utf-8").strip()[:80]:
            return f" ({text})"
    return ""
