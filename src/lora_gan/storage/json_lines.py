"""Files of JSON objects, a line each, that a crash in the middle of a line does not spoil.

`JsonLines` is a run's log, which goes on from a step; `open_lines` and `append_line` keep answers that were paid for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from . import durable


class JsonLines(AbstractContextManager["JsonLines"]):
    """A file of JSON objects with a `step`, a line each, written as whole lines.

    At step 0 the file is emptied. A run that goes on after step N keeps the lines up to N: what was written between the
    checkpoint and a crash comes again. `kept` holds them. Nothing is touched before there is a line to write.

    Args:
        path: the file.
        after: N.
        see: called with each line that is there before, also with those that are not kept.
    """

    def __init__(self, path: Path, *, after: int, see: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
        self.path = path
        self.file: TextIO | None = None
        lines = list(read_lines(path)) if after and path.exists() else []
        for line in lines:
            see(line)
        self.kept = _up_to(after, lines)

    def write(self, *values: Mapping[str, Any]) -> None:
        file = self.begin()
        self.kept = []  # they stand in the file
        file.write("".join(map(as_line, values)))
        file.flush()

    def begin(self) -> TextIO:
        """The file with the lines that are kept, open for more."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = rewritten(self.path, self.kept)
        return self.file

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

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _up_to(after: int, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= after]


def as_line(values: Mapping[str, Any]) -> str:
    """One line of such a file."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def rewritten(path: Path, lines: Iterable[Mapping[str, Any]]) -> TextIO:
    """A file that holds these lines, or what it held before if writing breaks off; open for more lines."""
    durable.replace_file(path, "".join(map(as_line, lines)).encode("utf-8", "backslashreplace"))
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A small new file of such lines."""
    path.write_text("".join(map(as_line, lines)), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """A small file of one JSON value, for people too."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


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
    line = as_line(entry).encode("utf-8", "backslashreplace")  # \udc80 is JSON as well
    with path.open("ab+") as file:
        if file.seek(0, 2) > 0:
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
