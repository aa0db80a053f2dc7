"""Gradient checkpointing: each layer stores only its inputs for the backward, and is recomputed there.

Chen et al. 2016, arXiv:1604.06174. Used by `Players` under `gradient_checkpointing`. Two differences from transformers'
own gradient checkpointing:

- The base stays in eval mode, so its dropout stays off.
- Each layer is recomputed as the player that first ran it, with the same attention. The player that is active at the
  backward does not matter (peft#2832).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

RecomputeContext = Callable[[], AbstractContextManager[None]]


def checkpoint_layers(layers: nn.ModuleList, recompute_context: Callable[[], RecomputeContext]) -> None:
    """Make each layer store only its inputs.

    Args:
        recompute_context: called at each forward; returns a function that makes the context of the recomputation.
    """
    for layer in layers:
        layer.forward = CheckpointedForward(layer.forward, recompute_context)


class CheckpointedForward:
    """A layer's forward that is recomputed in the backward."""

    def __init__(self, forward: Callable[..., Any], recompute_context: Callable[[], RecomputeContext]) -> None:
        self.forward, self.recompute_context = forward, recompute_context

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **options)
        context = self.recompute_context()

        def run(*arguments: Any, **options: Any) -> Any:
            with context():  # in the first forward, this changes nothing
                return self.forward(*arguments, **options)

        # The random state need not be kept: in eval mode no layer draws random numbers.
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers store all activations, as without gradient checkpointing."""
    layers = [(module, module.forward) for module in model.modules() if isinstance(module.forward, CheckpointedForward)]
    try:
        for layer, checkpointed in layers:
            layer.forward = checkpointed.forward
        yield
    finally:
        for layer, checkpointed in layers:
            layer.forward = checkpointed
