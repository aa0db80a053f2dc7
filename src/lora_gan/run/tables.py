"""Numbers as a table of text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 80
JOINT = "\ue000"  # replaces a space at which rich must not break a line; a private-use character, absent from texts


def cell(figures: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 3) -> str:
    """A mean and its interval, as in "0.305 [0.195, 0.404]"; a dash if nothing was measured."""
    if figures is None or figures["mean"] is None:
        return "–"
    mean, low, high = (f"{scale * figures[end]:.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with column names; the first column has none. Cells that are too wide continue on the next line."""
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column(no_wrap=True)
    for name in head:
        drawn.add_column(Text(name), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(text.replace(", ", f",{JOINT}")) for text in row))
    console = Console(file=StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().replace(JOINT, " ").splitlines())
