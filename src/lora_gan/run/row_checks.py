"""Checks every row before the first step, so that an unusable row cannot end the run later.

A row is unusable if the base's chat template rejects it, or if its prompt leaves no room for a response. Such a row
would end the run at its step, and again after each resume. Rows of a list are checked before step 1, rows of a stream
when they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from tqdm.auto import tqdm

from ..data import Row, Stream
from ..model.encoding import TooLong

#: Raises ValueError for a row that cannot be used, TooLong for a prompt that leaves no room for its response.
Check = Callable[[Row], object]


class CheckedRows(list[Row]):
    """Rows that have passed; they are not checked again."""


def checked(rows: list[Row] | Stream, check: Check, *, drop_long: bool, progress: bool) -> list[Row] | Stream:
    """The usable rows.

    Args:
        rows: a list is checked now; a stream checks each row when the row is read.
        check: raises for an unusable row.
        drop_long: drop prompts that are too long, with a warning, instead of raising.
        progress: show a progress bar if the check takes more than two seconds.

    Raises:
        ValueError: a row cannot be used, or no row is left; the message names the row.
    """
    long: list[str] = []

    def is_usable(row: Row) -> bool:
        try:
            check(row)
        except TooLong as error:
            if not drop_long:
                raise
            if isinstance(rows, Stream) and not long:  # the number of dropped rows is unknown
                warnings.warn(f"rows are dropped (on_long_prompt='drop'); the first: {error}", stacklevel=2)
            long.append(str(error))
            return False
        return True

    if isinstance(rows, Stream):
        if drop_long:
            rows.only(is_usable)
        return rows
    with tqdm(rows, desc="checking rows", unit="row", delay=2, leave=False, disable=not progress) as bar:
        kept = CheckedRows(filter(is_usable, bar))
    if long:
        warnings.warn(
            f"{len(long)} of {len(rows)} rows are dropped (on_long_prompt='drop'); the first: {long[0]}", stacklevel=4
        )
    if rows and not kept:
        raise ValueError(f"no row is left: every prompt is too long; the first: {long[0]}")
    return kept
