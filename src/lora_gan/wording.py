"""Values, names, counts, sizes and times in messages: one form each, wherever a message is written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any, length: int = 60) -> str:
    """The beginning of a value's repr; of one that has none (nested too deep, a number too long), its type."""
    try:
        return shortened(repr(value), length)
    except Exception:  # a stranger's __repr__ may raise anything
        return f"a value of type {type(value).__name__}"


def shortened(text: str, length: int) -> str:
    """The text, or its first characters with an ellipsis: `length` characters in all."""
    return text if len(text) <= length else text[: length - 1] + "…"


def error_line(error: BaseException, length: int = 400) -> str:
    """What an error says, in one line; the name of its type where it says nothing."""
    return shortened(" ".join(str(error).split()), length) or type(error).__name__


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """As in " (did you mean 'bleu'?)": the known name nearest to a wrong one; empty where none is near."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """As in "1 row", "1,200 rows"; `plural` where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """Bytes, as in "37 kB", "542 MB", "1.7 GB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{1 if count < 10 else 0}f} {unit}"
    return f"{count / 1000:.1f} GB"


def duration(seconds: float) -> str:
    """As in "0.4 ms", "25 ms", "3.6 s", "95 s", "12 min", "3.4 h"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
