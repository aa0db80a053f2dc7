"""Gradient checkpointing: what a layer computes is not kept for the backward, but computed again there.

Chen et al. 2016, arXiv:1604.06174. Not transformers' own switch: that one asks for train mode, in which a base's
dropout would draw. And a layer must be run again as it was run: by the same player, with attention that reads the same
kind of rows, whatever holds when its backward comes (peft#2832).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Again = Callable[[], AbstractContextManager[None]]


def recomputing(layers: nn.ModuleList, as_now: Callable[[], Again]) -> None:
    """Let each of the layers keep nothing but what it was given.

    Args:
        as_now: called at each forward; returns what makes the context in which the layer is run again.
    """
    for layer in layers:
        layer.forward = _Recomputed(layer.forward, as_now)


class _Recomputed:
    """A layer's forward."""

    def __init__(self, forward: Callable[..., Any], as_now: Callable[[], Again]) -> None:
        self.forward, self.as_now = forward, as_now

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **options)
        again = self.as_now()

        def run(*arguments: Any, **options: Any) -> Any:
            with again():  # now, this changes nothing
                return self.forward(*arguments, **options)

        # The state of random numbers is not kept: nothing draws, the base is in eval mode.
        return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def without_recomputing(model: nn.Module) -> Iterator[None]:
    """Inside the block layers keep all that they compute, as without gradient checkpointing."""
    layers = [(module, module.forward) for module in model.modules() if isinstance(module.forward, _Recomputed)]
    try:
        for layer, recomputed in layers:
            layer.forward = recomputed.forward
        yield
    finally:
        for layer, recomputed in layers:
            layer.forward = recomputed
