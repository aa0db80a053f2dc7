"""Data parallelism: each process steps on its own prompts, and the players' gradients are averaged explicitly.

DistributedDataParallel does not work here. Around a model with two adapters that train in turn it raises an error, or
silently leaves the second adapter unsynchronized. Random draws are keyed by content, so only gradients are shared.
`step()` supports several processes; `fit()` reads rows and writes files as a single process does.
"""

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")


def processes() -> int:
    """Number of processes that train together; 1 if torch.distributed is not initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def total(tensor: Tensor) -> Tensor:
    """Sum the tensor over all processes, in place, and return it. All processes must call this in the same order."""
    if processes() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """The value of each process, in the order of the processes. All processes must call this in the same order."""
    if processes() == 1:
        return [value]
    values: list[T | None] = [None] * processes()
    torch.distributed.all_gather_object(values, value)
    return cast(list[T], values)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes, in place. A missing gradient counts as zero. All processes must call it."""
    if processes() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total(parameter.grad).div_(processes())
