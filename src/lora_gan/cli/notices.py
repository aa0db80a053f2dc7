"""Warnings on the command line: one line each, without the path and the source line that Python prints beside them.

The library does not change `warnings`; only `cli.main` does, for as long as a command runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def one_line_each() -> Iterator[None]:
    """Within, a UserWarning is printed as "lora-gan: warning: …"; other categories, which address developers, stay."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is not UserWarning:
                usual(message, category, filename, lineno, file, line)
                return
            # sys.stderr as it is now: a live display stands in for it.
            (file or sys.stderr).write(f"lora-gan: warning: {' '.join(str(message).split())}\n")

        warnings.showwarning = show
        yield
