"""How values stand in messages."""

from __future__ import annotations

from typing import Any


def one_line(error: BaseException, length: int = 600) -> str:
    """The beginning of an error's message in one line; without a message, the error's type."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def shown(value: Any, length: int = 60) -> str:
    """The beginning of a value's repr; of one that has none (nested too deep, a number too long), its type."""
    try:
        return repr(value)[:length]
    except Exception:  # a stranger's __repr__ may raise anything
        return f"a value of type {type(value).__name__}"
