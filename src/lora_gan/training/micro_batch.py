"""Out of memory in the middle of an update: the micro-batch is halved, and the update made again.

The update is the same to rounding, since micro-batches only split a sum. The player's optimizer remembers the smaller
size, and a checkpoint holds it: a run that goes on sums in the same order. Both trainers run their forwards this way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from .optimizer import PlayerOptimizer

Result = TypeVar("Result")


def within_memory(compute: Callable[[], Result], optimizer: PlayerOptimizer, rows: int) -> Result:
    """Call `compute` and return its result; where memory runs out, halve the micro-batch and call it again.

    Args:
        compute: forward and backward of one update over its `rows` responses, in `optimizer.micro_batch_size` at most.
        optimizer: the player's; its gradients are cleared before another try.
        rows: responses of the update.

    Raises:
        torch.OutOfMemoryError: the smallest micro-batch does not fit either.
    """
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError:
            together = min(optimizer.micro_batch_size or rows, rows)
            if together <= 1:
                raise
        # Out here the error is gone, and with its traceback the graph that filled the memory.
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        optimizer.largest_micro_batch = together // 2
        warnings.warn(
            f"out of memory: going on with micro_batch_size={optimizer.largest_micro_batch}; set it to begin with that",
            stacklevel=3,
        )
