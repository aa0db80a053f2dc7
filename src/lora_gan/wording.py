"""How values stand in messages."""

from __future__ import annotations

from typing import Any


def shown(value: Any, length: int = 60) -> str:
    """The beginning of a value's repr; of one that has none (nested too deep, a number too long), its type."""
    try:
        return repr(value)[:length]
    except Exception:  # a stranger's __repr__ may raise anything
        return f"a value of type {type(value).__name__}"
