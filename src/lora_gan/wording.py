"""Formats values, names, counts, sizes and times for messages."""

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any, length: int = 60) -> str:
    """The beginning of a value's repr. If repr() fails (nested too deep, a number too long), the value's type."""
    try:
        return shortened(repr(value), length)
    except Exception:  # a user's __repr__ may raise any error
        return f"a value of type {type(value).__name__}"


def shortened(text: str, length: int) -> str:
    """The text, cut to at most `length` characters, of which the last is then an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def error_line(error: BaseException, length: int = 400) -> str:
    """The message of an error in one line, or the name of its type if the message is empty."""
    return shortened(" ".join(str(error).split()), length) or type(error).__name__


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'bleu'?)" with the most similar known name; empty if no name is similar."""
    nearest = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A count with its noun, such as "1 row" or "1,200 rows". `plural`: None adds an s to the noun."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def size(count: float) -> str:
    """A size in bytes, such as "37 kB", "542 MB", "1.7 GB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{1 if count < 10 else 0}f} {unit}"
    return f"{count / 1000:.1f} GB"


def duration(seconds: float) -> str:
    """A time in seconds, such as "0.4 ms", "25 ms", "3.6 s", "95 s", "12 min", "3.4 h"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
