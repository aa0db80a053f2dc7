"""Files with one JSON object per line. They stay readable after a crash in the middle of a line.

`JsonLines` is the log of a run, which can continue from a step. `open_lines` and `append_line` store paid answers.
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
    """A file with one JSON object per line, each with a `step`. Lines are always written completely.

    A run from step 0 starts with an empty file. A run that continues after step N keeps the lines up to N, because it
    writes the lines between the checkpoint and a crash again. The file is changed only when the first line is written.

    Args:
        path: the file.
        after: N.
        see: called with each existing line, also if the line is not kept.

    Attributes:
        kept: the lines to keep, until the first line is written.
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
        self.kept = []  # they are in the file now
        file.write("".join(map(as_line, values)))
        file.flush()

    def begin(self) -> TextIO:
        """The file with the kept lines, open for more lines."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = rewritten(self.path, self.kept)
        return self.file

    def go_back(self, after: int) -> None:
        """Drop the lines after step `after`, to which the run has returned."""
        file, self.file = self.file, None
        if file is None:
            self.kept = _up_to(after, self.kept)
        else:
            file.close()
            self.kept = _up_to(after, read_lines(self.path))
            self.begin()

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def _up_to(after: int, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= after]


def as_line(values: Mapping[str, Any]) -> str:
    """One line of a JSON Lines file, with its line break."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def rewritten(path: Path, lines: Iterable[Mapping[str, Any]]) -> TextIO:
    """Replace the content of a file by these lines. After a crash it holds the old or the new lines.

    Returns:
        the file, open for more lines.
    """
    durable.replace_file(path, "".join(map(as_line, lines)).encode("utf-8", "backslashreplace"))
    return path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a small file of JSON lines. A crash may leave it incomplete."""
    path.write_text("".join(map(as_line, lines)), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a small file of one JSON value, indented. A crash may leave it incomplete."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The objects in a JSON Lines file. Incomplete lines of a killed process are skipped."""
    return _objects(path.read_bytes().split(b"\n"))


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line, object_pairs_hook=_interned)
        except (ValueError, RecursionError):  # an incomplete line of a killed process
            continue
        if isinstance(entry, dict):
            yield entry


def _interned(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object with interned names. All lines have the same names, so interning saves memory in long runs."""
    return {sys.intern(name): value for name, value in pairs}


def open_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file's lines, in order. A missing file is created, so that an unwritable path fails early.

    Lines that are not JSON objects are skipped. A crash leaves part of a line at the end, or in the middle if the run
    continued.

    Raises:
        OSError: the file cannot be opened for writing.
        ValueError: the file has more than one line, and no line is a JSON object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        lines = [line for line in file.read().split(b"\n") if line.strip()]
    entries = list(_objects(lines))
    if len(lines) > 1 and not entries:
        raise ValueError(f"{path} is not a JSON Lines file: none of its {len(lines)} lines is a JSON object")
    return entries


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one line, and pass it to the operating system before returning. After an incomplete line, the new line
    starts with a line break."""
    line = as_line(entry).encode("utf-8", "backslashreplace")  # a lone surrogate becomes \udc80, which is valid JSON
    with path.open("ab+") as file:
        if file.seek(0, 2) > 0:
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
