"""Recovery from out-of-memory errors: halve the micro-batch and repeat the update.

Micro-batches only split a sum, so the update stays equal to rounding. The player's optimizer stores the smaller size
and saves it in checkpoints, so a resumed run sums in the same order. Both trainers run their forward passes this way.
"""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .optimizer import PlayerOptimizer

Result = TypeVar("Result")


def within_memory(compute: Callable[[], Result], optimizer: PlayerOptimizer, rows: int) -> Result:
    """Call `compute` and return its result. If memory runs out, halve the micro-batch and call `compute` again.

    Args:
        compute: runs forward and backward of one update, with at most `optimizer.micro_batch_size` responses per pass.
        optimizer: the player's optimizer. Its gradients are cleared before each retry.
        rows: number of responses in the update.

    Raises:
        torch.OutOfMemoryError: a micro-batch of one response does not fit into memory.
    """
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError:
            size = min(optimizer.micro_batch_size or rows, rows)
            if size <= 1:
                raise
        # Outside the except block, the error's traceback is freed, and with it the graph that filled the memory.
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        optimizer.largest_micro_batch = size // 2
        warnings.warn(
            f"out of memory: continuing with micro_batch_size={size // 2}; set this value to start with it",
            stacklevel=3,
        )
