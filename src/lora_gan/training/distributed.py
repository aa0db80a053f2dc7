"""Several processes: each steps on its own prompts, and the players' gradients are averaged by hand.

Never DistributedDataParallel: around a model with two adapters that train in turn it raises, or silently never
synchronises the second. Randomness is keyed by content, so nothing else needs to be shared. This covers `step()`;
`fit()` takes rows and writes files as one process does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def processes() -> int:
    """How many processes step together; 1 where torch.distributed was not initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def total(tensor: Tensor) -> Tensor:
    """The tensor, replaced by its sum over all processes. All of them must call it, in the same order."""
    if processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes. A parameter without one counts as zero: all processes must take part."""
    if processes() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total(parameter.grad).div_(processes())
