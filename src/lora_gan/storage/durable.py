"""Folders that exist completely or not at all, also after a crash. A new folder is written under a temporary name,
synced, and renamed. Its manifest lists all files.

    step-100/manifest.json    {"format": 1, "files": {"generator/optimizer.pt": {"size": 1234, "sha256": "…"}, …}}

To replace a folder, the old folder first gets a temporary name. It stays until the new folder has its final name, and
`find_folders` also finds it under the temporary name. So readers always find the old or the new folder.

The guarantees rely on rename and fsync as POSIX defines them. On a file system with an unreliable fsync, a power loss
may damage the newest folder. Its manifest then reveals the damage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
LARGEST_JSON = 16 * 2**20  # bytes; the maximum size of a JSON file in a checkpoint


class Damaged(ValueError):
    """A folder or a file does not match its manifest, or has invalid content. The message names it."""


# --- writing


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Write {name within the folder: content} as the folder `final`. An existing folder is replaced.

    Raises:
        OSError: the folder could not be written. An existing folder is unchanged.
    """
    with _new_folder(final) as (writing, entries):
        for name, data in files.items():
            (writing / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(writing / name, data)
            entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill. After the block it is synced, gets a manifest, and becomes or replaces `final`.

    For folders that are too large for `write_folder`, or that another library writes. If the block raises (also for
    Ctrl-C), the new folder is removed and `final` is unchanged. If the process is killed, `tidy` removes the folder.
    """
    with _new_folder(final) as (writing, entries):
        yield writing
        for file in sorted(path for path in writing.rglob("*") if path.is_file()):
            _sync(file, os.O_RDWR)  # Windows syncs only files that are open for writing
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            entries[file.relative_to(writing).as_posix()] = {"size": file.stat().st_size, "sha256": digest}


@contextmanager
def _new_folder(final: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder for synced files, and the entries of its manifest. After the block the folder becomes `final`."""
    entries: dict[str, Any] = {}
    with replacing(final) as writing:
        yield writing, entries
        write_synced(writing / MANIFEST, (json.dumps({"format": 1, "files": entries}, indent=2) + "\n").encode())
        for folder in sorted({(writing / name).parent for name in entries} | {writing}, reverse=True):
            sync_folder(folder)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder next to `final` to write in. It replaces `final` at the end of the block, unless the block raises."""
    writing = _sibling(final, "writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        _put_in_place(writing, final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _remove_replaced(final)


def _put_in_place(writing: Path, final: Path) -> None:
    replaced = _sibling(final, "replaced")
    if final.exists():  # otherwise a replaced folder of an earlier process may be the only one
        _remove_replaced(final)
        os.rename(final, replaced)
    try:
        os.rename(writing, final)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder. No reader ever finds a half-removed folder under its name."""
    _remove_replaced(folder)
    removing = _sibling(folder, "removing")
    os.rename(folder, removing)
    shutil.rmtree(removing, ignore_errors=True)


def _remove_replaced(folder: Path) -> None:
    """Remove replaced folders of this name that any process has left. Call it only while `folder` exists."""
    for path in folder.parent.glob(f".{folder.name}.replaced-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file, and sync it to the disk before returning."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]  # os.write may write less than the data
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Replace the content of a file. After a crash the file holds the old or the new content."""
    writing = _sibling(path, "writing")
    write_synced(writing, data)
    os.replace(writing, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk before returning. Windows has no such call: the names are synced later."""
    if os.name != "nt":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path, state: str) -> Path:
    """The temporary name next to a folder or file while it is being written, replaced or removed."""
    return path.with_name(f".{path.name}.{state}-{os.getpid()}")


# --- after interrupted writing


def find_folders(parent: Path) -> dict[str, Path]:
    """{name: folder} in `parent`. If a process ended while it replaced a folder, the old folder is found under its
    name, at its temporary path."""
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return {}
    found = {path.name: path for path in entries if not path.name.startswith(".") and path.is_dir()}
    for path in entries:
        match = re.fullmatch(r"\.(.+)\.replaced-\d+", path.name)
        if match and path.is_dir():
            found.setdefault(match[1], path)
    return found


def tidy(parent: Path) -> None:
    """Rename replaced folders back if they have no successor, and remove incomplete folders and files. The caller must
    be the only writer in `parent`."""
    for name, path in find_folders(parent).items():
        if path.name != name:
            os.rename(path, parent / name)
    for path in parent.glob(".*"):
        if not re.fullmatch(r"\.(.+)\.(writing|replaced|removing)-\d+", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # a log file that was being rewritten
            path.unlink(missing_ok=True)


# --- reading


class Folder:
    """The files of a folder. Each file is read once, so the checked bytes are the bytes that are used.

    With a manifest, all its names are checked first: every file must be inside the folder, and no folder on its path
    may be a link. Each file must have the size and SHA-256 of the manifest. A folder from another tool has none.
    """

    def __init__(self, path: Path, *, manifest: bool) -> None:
        self.path = path
        self.files: dict[str, Any] | None = _read_manifest(path) if manifest else None

    def has(self, name: str) -> bool:
        return name in self.files if self.files is not None else (self.path / name).is_file()

    def part(self, name: str) -> Folder:
        """A subfolder. Its file names do not include its own name."""
        inner = Folder(self.path / name, manifest=False)
        if self.files is not None:
            prefix = f"{name}/"
            inner.files = {key.removeprefix(prefix): self.files[key] for key in self.files if key.startswith(prefix)}
        return inner

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes.

        Raises:
            Damaged: the file is missing, is not a plain file, is too large, or does not match the manifest.
        """
        path = self.path / name
        entry = None if self.files is None else self.files.get(name)
        if self.files is not None and entry is None:
            raise Damaged(f"{path} is not in the manifest, so it is not part of the checkpoint")
        data = _read_plain(path, limit=limit, follow=entry is None)
        if entry is not None and (len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]):
            raise Damaged(f"{path} is not what its manifest says (size or SHA-256): it was damaged or changed")
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of at most LARGEST_JSON bytes. Raises Damaged as `read`, and for invalid JSON."""
        return _json_object(self.read(name, limit=LARGEST_JSON), self.path / name)

    def verify(self, *, deep: bool) -> None:
        """Raise Damaged if a file of the manifest is missing or has another size or, if `deep`, another SHA-256."""
        for name, entry in (self.files or {}).items():
            if deep:
                self.read(name, limit=entry["size"])
            else:
                _lstat(self.path / name, size=entry["size"])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    manifest = _json_object(_read_plain(file, limit=LARGEST_JSON, follow=False), file)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict):
        raise Damaged(f"{file} is no manifest of format 1, the format that this version reads")
    for name, entry in files.items():
        if not re.fullmatch(r"([A-Za-z0-9_-]+/)*[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise Damaged(f"{file} names {name[:80]!r}, which is no file within the folder")
        has_keys = isinstance(entry, dict) and set(entry) == {"size", "sha256"}
        if not has_keys or type(entry["size"]) is not int or entry["size"] < 0 or not isinstance(entry["sha256"], str):
            raise Damaged(f"{file} has no size and SHA-256 of {name!r}")
        for folder in (path / name).parents:
            if folder == path:
                break
            if folder.is_symlink():
                raise Damaged(f"{folder} is a link; a checkpoint must not contain links")
    return files


def _json_object(data: bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file} could not be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{file} is no JSON object: {str(value)[:60]!r}")
    return value


def _lstat(path: Path, *, size: int) -> None:
    try:
        status = path.lstat()
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is missing ({error.__class__.__name__})") from error
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is a link, or no plain file")
    if status.st_size != size:
        raise Damaged(f"{path} has {status.st_size:,} bytes, its manifest says {size:,}")


def _read_plain(path: Path, *, limit: int, follow: bool) -> bytes:
    """The content of a plain file. Pipes and devices are refused without waiting; links are refused unless `follow`."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not follow and path.is_symlink():
            raise Damaged(f"{path} is a link; a checkpoint must not contain links")
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        raise Damaged(f"{path} could not be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no plain file")
        if status.st_size > limit:
            raise Damaged(f"{path} has {status.st_size:,} bytes, but at most {limit:,} are possible")
        try:
            # Not limit + 1: a read first allocates memory, and the limit may exceed the available memory.
            data = file.read(status.st_size + 1)
        except OSError as error:
            raise Damaged(f"{path} could not be read: {error.strerror}") from error
    if len(data) > status.st_size:
        raise Damaged(f"{path} grew while it was read")
    return data
