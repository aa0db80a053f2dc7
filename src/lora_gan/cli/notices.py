"""Prints each warning of a command on one line, without the path and the source line that Python adds.

Log messages of other libraries that no user can act on are hidden. Only `cli.main` changes `warnings` and `logging`,
and only while a command runs; the library does not.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

#: Messages that no user can act on: logger -> start of the message.
HIDDEN = {
    # Logged at import on CPUs with AVX512-BF16: a faster kernel for 4-bit bases is missing. This library could not use
    # that kernel; `model.base` has the reason.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(HIDDEN[record.name])


@contextmanager
def one_line_each() -> Iterator[None]:
    """Within the block, print a UserWarning as "lora-gan: warning: …". Warnings of other categories, which address
    developers, do not change."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for logger in map(logging.getLogger, HIDDEN):
            logger.addFilter(_is_useful)
            stack.callback(logger.removeFilter, _is_useful)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UserWarning:  # to the current sys.stderr: a live display may have replaced it
                sys.stderr.write(f"lora-gan: warning: {' '.join(str(message).split())}\n")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield
