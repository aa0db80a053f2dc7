"""Warnings on the command line: one line each, without the path and the source line that Python prints beside them.

What a library logs about itself, and no user can act on, is not printed. The library does not change `warnings` or
`logging`; only `cli.main` does, for as long as a command runs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

#: Messages that no user can act on, by the logger that they come from: how they begin.
POINTLESS = {
    # On CPUs with AVX512-BF16, at import: a faster kernel for bases in 4 bits. It could not be used here, see
    # `model.base`.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(POINTLESS[record.name])


@contextmanager
def one_line_each() -> Iterator[None]:
    """Within, a UserWarning is printed as "lora-gan: warning: …"; other categories, which address developers, stay."""
    with warnings.catch_warnings(), ExitStack() as stack:
        for logger in map(logging.getLogger, POINTLESS):
            logger.addFilter(_is_of_use)
            stack.callback(logger.removeFilter, _is_of_use)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UserWarning:  # to sys.stderr as it is now: a live display stands in for it
                sys.stderr.write(f"lora-gan: warning: {' '.join(str(message).split())}\n")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield
