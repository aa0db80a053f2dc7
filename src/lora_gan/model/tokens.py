"""Pads lists of token ids to arrays, and computes positions. Used by packing, sampling and the trial of a base.

# B = rows, L = padded length
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import numpy as np
from torch import Tensor


def pad(rows: Sequence[list[int]], pad_id: int, *, side: Literal["left", "right"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array.

    Args:
        rows: token ids, at least one row; a row may be empty.
        pad_id: fills the padding.
        side: side of the padding.

    Returns:
        The ids, int64 [B, L], and the mask, bool [B, L]: True on tokens. L is the longest row's length, at least 1.
    """
    lengths_B1 = np.array([[len(row)] for row in rows])
    width = max(1, lengths_B1.max())
    mask_BL = np.arange(width) < lengths_B1 if side == "right" else np.arange(width) >= width - lengths_B1
    ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    ids_BL[mask_BL] = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    return ids_BL, mask_BL


def positions(mask_BL: Tensor) -> Tensor:
    """Positions [B, L] of left-padded rows, counted from the first real token of each row."""
    return (mask_BL.cumsum(-1) - 1).clamp(min=0)
