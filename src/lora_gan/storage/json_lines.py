"""Files of JSON objects, a line each, that a crash in the middle of a line does not spoil.

`JsonLines` is a run's log, which goes on from a step; `open_lines` and `append_line` keep answers that were paid for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from . import durable


class JsonLines:
    """A file of JSON objects with a `step`, a line each, written as whole lines.

    At step 0 it begins anew. A run that goes on after step N keeps the lines up to N: what was written between the
    checkpoint and a crash comes again. `kept` holds them. Nothing is touched before there is a line to write.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        self.path = path
        self.file: TextIO | None = None
        self.kept = _up_to(after, read_lines(path)) if after and path.exists() else []

    def write(self, *values: Mapping[str, Any]) -> None:
        self.begin()
        self.kept = []  # they stand in the file
        self.file.write("".join(map(_line, values)))
        self.file.flush()

    def begin(self) -> None:
        """The file with the lines that are kept, written beside and renamed, open for more."""
        if self.file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_file(self.path, "".join(map(_line, self.kept)).encode("utf-8", "backslashreplace"))
        self.file = self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def go_back(self, after: int) -> None:
        """Drop the lines after a step that the run went back to."""
        lines = self.kept
        if self.file is not None:
            self.file.close()
            lines = list(read_lines(self.path))
        self.kept = _up_to(after, lines)
        if self.file is not None:
            self.file = None
            self.begin()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _up_to(after: int, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= after]


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects in such a file, without what a killed process left half-written."""
    return _objects(path.read_bytes().split(b"\n"))


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line, object_pairs_hook=_interned)
        except (ValueError, RecursionError):  # the last one, if the process was killed while it wrote
            continue
        if isinstance(entry, dict):
            yield entry


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A line's names are every line's: kept once, they are not what a long run's memory goes into."""
    return {sys.intern(name): value for name, value in pairs}


def open_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file's lines, in order; the file is made where there is none, so that a path that cannot be
    written to fails now.

    Lines that are no JSON are left out: a crash leaves part of one at the end, or in the middle if a run went on.

    Raises:
        OSError: the file cannot be opened for writing.
        ValueError: no line can be read, and there is more than one: this is another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        lines = [line for line in file.read().split(b"\n") if line.strip()]
    entries = list(_objects(lines))
    if len(lines) > 1 and not entries:
        raise ValueError(f"{path} is no JSON Lines file: none of its {len(lines)} lines is a JSON object")
    return entries


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line, and hand it to the system before returning; what a crash left unfinished is closed first."""
    line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"  # \udc80 is JSON as well
    with path.open("ab+") as file:
        if file.seek(0, 2) > 0:
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
