"""Folders that are there whole or not at all, whatever breaks off: written beside, synced, renamed, with a manifest.

    step-100/manifest.json    {"format": 1, "files": {"generator/optimizer.pt": {"size": 1234, "sha256": "…"}, …}}

Of a folder that is replaced, the old one is set aside under a name of its own until the new one stands, and readers
take it from there (`standing`): at no moment is there neither. Rename and fsync promise what POSIX says of them; on a
file system that lies about fsync, a loss of power may cost the newest folder, and its manifest then says so.
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
LARGEST_JSON = 16 * 2**20  # bytes: of settings and manifests, whoever wrote them


class Damaged(ValueError):
    """A folder or a file is not what its manifest says; the message names it."""


# --- writing


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Write files, by their names within the folder, as the folder `final`, which may exist and is then replaced.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    with _new_folder(final) as (writing, entries):
        for name, data in files.items():
            (writing / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(writing / name, data)
            entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill. After the block it is synced, gets a manifest, and becomes `final`, which it may replace.

    For folders that are too large for `write_folder`, or that another library writes. Whatever ends the block early
    (an exception, Ctrl-C) removes the new folder and leaves `final` as it was. A process that is killed leaves a folder
    that `tidy` removes.
    """
    with _new_folder(final) as (writing, entries):
        yield writing
        for file in sorted(path for path in writing.rglob("*") if path.is_file()):
            _sync(file, os.O_RDWR)  # Windows syncs only what is open for writing
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            entries[file.relative_to(writing).as_posix()] = {"size": file.stat().st_size, "sha256": digest}


@contextmanager
def _new_folder(final: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to write synced files into, and the entries of its manifest. After the block it becomes `final`."""
    entries: dict[str, Any] = {}
    with replacing(final) as writing:
        yield writing, entries
        write_synced(writing / MANIFEST, (json.dumps({"format": 1, "files": entries}, indent=2) + "\n").encode())
        for folder in sorted({(writing / name).parent for name in entries} | {writing}, reverse=True):
            sync_folder(folder)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write in. It replaces `final` at the end of the block, unless the block raises."""
    writing = _beside(final, "writing")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        _put_in_place(writing, final)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _drop_set_aside(final)


def _put_in_place(writing: Path, final: Path) -> None:
    replaced = _beside(final, "replaced")
    if final.exists():  # else what was set aside before may be all there is
        _drop_set_aside(final)
        os.rename(final, replaced)
    try:
        os.rename(writing, final)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name."""
    _drop_set_aside(folder)
    removing = _beside(folder, "removing")
    os.rename(folder, removing)
    shutil.rmtree(removing, ignore_errors=True)


def _drop_set_aside(folder: Path) -> None:
    """Remove older folders of this name, whichever process left them: the name stands without them."""
    for path in folder.parent.glob(f".{folder.name}.replaced-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]  # the system may take less than it was given
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """The file holds this, or, whatever breaks off, what it held before."""
    beside = _beside(path, "writing")
    write_synced(beside, data)
    os.replace(beside, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names in a folder are on the disk when this returns; on Windows, which has no such call, when it likes."""
    if os.name != "nt":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(folder: Path, doing: str) -> Path:
    return folder.with_name(f".{folder.name}.{doing}-{os.getpid()}")


# --- what broken-off writing leaves


def standing(parent: Path) -> dict[str, Path]:
    """The folders in `parent` by name; one that was set aside and whose successor never came stands where it is."""
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
    """Put back what was set aside, remove what is left half-written. Only for who alone writes into `parent`."""
    there = standing(parent)
    for name, path in there.items():
        if path.name != name:
            os.rename(path, parent / name)
    for path in parent.glob(".*"):
        if not re.fullmatch(r"\.(.+)\.(writing|replaced|removing)-\d+", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # of a log that was being rewritten
            path.unlink(missing_ok=True)


# --- reading


class Folder:
    """The files of a folder, each read once, so that what was checked is what is used.

    With a manifest, every name in it is checked before anything is read: none leaves the folder, none is a link, and a
    file has the size and the SHA-256 that the manifest says. A folder that another tool wrote has no manifest.
    """

    def __init__(self, path: Path, *, manifest: bool) -> None:
        self.path = path
        self.files: dict[str, Any] | None = _read_manifest(path) if manifest else None

    def has(self, name: str) -> bool:
        return name in self.files if self.files is not None else (self.path / name).is_file()

    def part(self, name: str) -> Folder:
        """A folder within it, whose files are called without its name."""
        part = Folder(self.path / name, manifest=False)
        if self.files is not None:
            prefix = f"{name}/"
            part.files = {
                key.removeprefix(prefix): entry for key, entry in self.files.items() if key.startswith(prefix)
            }
        return part

    def read(self, name: str, *, limit: int) -> bytes:
        """A file's bytes, of which there may be `limit`.

        Raises:
            Damaged: it is not there, no plain file, too large, or not what the manifest says.
        """
        path = self.path / name
        entry = None if self.files is None else self.files.get(name)
        if self.files is not None and entry is None:
            raise Damaged(f"{path} is not in the manifest, so it is no part of the checkpoint")
        data = _read_plain(path, limit=limit, follow=entry is None)
        if entry is not None and (len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]):
            raise Damaged(
                f"{path} is not what its manifest says: its size or SHA-256 differs, it was damaged or changed"
            )
        return data

    def read_json(self, name: str) -> dict[str, Any]:
        """A file that holds a JSON object."""
        return _json_object(self.read(name, limit=LARGEST_JSON), self.path / name)

    def verify(self, *, deep: bool) -> None:
        """Raises Damaged where a file of the manifest is missing or has another size; `deep`: or another SHA-256."""
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
        raise Damaged(f"{file} is no manifest of format 1, which is what this version reads")
    for name, entry in files.items():
        if not re.fullmatch(r"([A-Za-z0-9_-]+/)*[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise Damaged(f"{file} names {name[:80]!r}, which is no file within the folder")
        wanted = isinstance(entry, dict) and set(entry) == {"size", "sha256"}
        if not wanted or type(entry["size"]) is not int or entry["size"] < 0 or not isinstance(entry["sha256"], str):
            raise Damaged(f"{file} does not say the size and SHA-256 of {name!r}")
        for folder in (path / name).parents:
            if folder == path:
                break
            if folder.is_symlink():
                raise Damaged(f"{folder} is a link, which a checkpoint has none of")
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
    """A plain file's bytes; a pipe or a device is refused without waiting for it, a link unless `follow`."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not follow and path.is_symlink():
            raise Damaged(f"{path} is a link, which a checkpoint has none of")
        descriptor = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    except OSError as error:
        raise Damaged(f"{path} could not be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no plain file")
        if status.st_size > limit:
            raise Damaged(f"{path} has {status.st_size:,} bytes, where at most {limit:,} can belong")
        try:
            # Not limit + 1: a read asks for memory first, and the limit may be far above what there is.
            data = file.read(status.st_size + 1)
        except OSError as error:
            raise Damaged(f"{path} could not be read: {error.strerror}") from error
    if len(data) > status.st_size:
        raise Damaged(f"{path} grew while it was read")
    return data
