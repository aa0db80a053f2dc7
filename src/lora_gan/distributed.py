"""Several processes: each steps on its own prompts, and the players' gradients are averaged by hand.

Never DistributedDataParallel: around a model with two adapters that train in turn it raises, or silently never
synchronises the second. Randomness is keyed by content, so nothing else needs to be shared.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def average(tensor: Tensor) -> None:
    """Replace a tensor by its mean over all processes; does nothing in a single one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor.data)
        tensor.data /= torch.distributed.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all processes. A parameter without one counts as nought: all processes must take part."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            average(parameter.grad)
