"""Libraries that only an extra installs: imported where they are used, and named with their extra where they lack."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, why: str, extra: str) -> Any:
    """The module.

    Args:
        module: its dotted name.
        why: what needs it, as the begin of a message.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{why}: pip install "lora-gan[{extra}]"') from error
