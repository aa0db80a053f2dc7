"""A linear layer with plain LoRA in three matrix products, and an activation in one pass.

PEFT's layer asks itself on each call which of its many kinds of adapter are in play, and adds the adapter's part in
three passes over the output. For small bases, and while decoding, that is much of the time. Where the adapter is plain
LoRA in the base's own dtype the same sum is made here with one pass; in all other cases PEFT's forward runs.

# N = tokens, I = inputs, O = outputs, R = rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D


def quicken(model: nn.Module) -> None:
    """Let plain LoRA layers and activations take the short way; numbers stay as they are to rounding."""
    for module in list(model.modules()):
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.forward = _Plain(module)
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:  # the same formula, written out as eight passes
                setattr(module, name, nn.GELU(approximate="tanh"))


class _Plain:
    """A LoRA layer's forward: base(x) + scaling · (x Aᵀ) Bᵀ, for the one adapter that is active, or none."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        # The base's weight with the active adapter's part in it, while it is asked for.
        self.merged: Tensor | None = None

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        layer = self.layer
        active = layer._active_adapter
        if arguments or options or layer.merged or layer.disable_adapters or len(active) > 1:
            return Linear.forward(layer, x, *arguments, **options)
        if self.merged is not None:
            return nn.functional.linear(x, self.merged, layer.base_layer.bias)
        result: Tensor = layer.base_layer(x)
        if not active or active[0] not in layer.lora_A:
            return result
        name = active[0]
        a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
        if name in layer.lora_variant or layer.lora_bias[name] or not x.dtype == a_RI.dtype == result.dtype:
            return Linear.forward(layer, x)
        low_NR = nn.functional.linear(x.flatten(0, -2), a_RI)
        wide_NO = torch.addmm(result.flatten(0, -2), low_NR, b_OR.t(), alpha=layer.scaling[name])
        return wide_NO.view_as(result)

    def merge(self) -> None:
        layer, active = self.layer, self.layer._active_adapter
        if len(active) != 1 or active[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
            return
        a_RI, b_OR = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
        base = layer.base_layer.weight
        plain = active[0] not in layer.lora_variant and not layer.lora_bias[active[0]]
        if plain and base.dtype == a_RI.dtype:
            base_OI = base.t() if isinstance(layer.base_layer, Conv1D) else base
            self.merged = torch.addmm(base_OI, b_OR, a_RI, alpha=layer.scaling[active[0]])


MERGED = 2**24  # weights of the layers of a base that is merged: 64 MB in float32


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside the block a small base's layers have the active adapter in a copy of their weights.

    For decoding: there it is the number of products, not their size, that takes the time, and a third of them remain.
    The base's own weights stay untouched, so nothing has to be taken out of them again.
    """
    layers = _plain(model)
    if torch.is_grad_enabled() or sum(plain.layer.base_layer.weight.numel() for plain in layers) > MERGED:
        yield
        return
    try:
        for plain in layers:
            plain.merge()
        yield
    finally:
        for plain in layers:
            plain.merged = None


def merged_bytes(model: nn.Module) -> int:
    """Bytes of the copies that `merged` makes; 0 for a base that is too large for them."""
    weights = [plain.layer.base_layer.weight for plain in _plain(model)]
    return sum(weight.nbytes for weight in weights) if sum(weight.numel() for weight in weights) <= MERGED else 0


def _plain(model: nn.Module) -> list[_Plain]:
    return [m.forward for m in model.modules() if isinstance(getattr(m, "forward", None), _Plain)]
