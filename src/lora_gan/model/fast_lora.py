"""Faster forwards: plain LoRA layers in three matrix products, and GELU in one pass. Used by `Players`.

On each call, PEFT's layer checks which kind of adapter is active, and adds the adapter's output in three passes. With
small bases, and in decoding, this is a large share of the time. This module computes the same sum in one pass for plain
LoRA in the base's own dtype. In all other cases PEFT's forward runs.

# N = tokens, I = inputs, O = outputs, R = rank
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D


def use_fast_forwards(model: nn.Module) -> None:
    """Replace the forwards of plain LoRA layers and of GELU. Outputs stay equal to rounding."""
    for module in list(model.modules()):
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.forward = PlainLoraForward(module)  # type: ignore[method-assign]  # replaced on purpose
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:  # the same formula, in eight passes
                setattr(module, name, nn.GELU(approximate="tanh"))


class PlainLoraForward:
    """A LoRA layer's forward with at most one active adapter: base(x) + scaling · (x Aᵀ) Bᵀ."""

    def __init__(self, layer: Linear) -> None:
        self.layer = layer
        self.merged: Tensor | None = None  # base weight + active adapter; set inside `merged_adapter`

    @property
    def base(self) -> nn.Linear | Conv1D:
        return cast("nn.Linear | Conv1D", self.layer.base_layer)

    def _matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The adapter's A [R, I] and B [O, R]."""
        return cast(Tensor, self.layer.lora_A[name].weight), cast(Tensor, self.layer.lora_B[name].weight)

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        layer = self.layer
        active = layer._active_adapter
        if arguments or options or layer.merged or layer.disable_adapters or len(active) > 1:
            return Linear.forward(layer, x, *arguments, **options)
        if self.merged is not None:
            return nn.functional.linear(x, self.merged, self.base.bias)
        result: Tensor = self.base(x)
        if not active or active[0] not in layer.lora_A:
            return result
        name = active[0]
        a_RI, b_OR = self._matrices(name)
        if name in layer.lora_variant or layer.lora_bias[name] or not x.dtype == a_RI.dtype == result.dtype:
            return Linear.forward(layer, x)
        low_NR = nn.functional.linear(x.flatten(0, -2), a_RI)
        wide_NO = torch.addmm(result.flatten(0, -2), low_NR, b_OR.t(), alpha=layer.scaling[name])
        return wide_NO.view_as(result)

    def merge(self) -> None:
        """Merge the active adapter into a copy of the base weight. Adapters that are not plain LoRA stay unmerged."""
        layer, active = self.layer, self.layer._active_adapter
        if len(active) != 1 or active[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
            return
        a_RI, b_OR = self._matrices(active[0])
        weight = self.base.weight
        is_plain = active[0] not in layer.lora_variant and not layer.lora_bias[active[0]]
        if is_plain and weight.dtype == a_RI.dtype:
            base_OI = weight.t() if isinstance(self.base, Conv1D) else weight
            self.merged = torch.addmm(base_OI, b_OR, a_RI, alpha=layer.scaling[active[0]])


MERGE_LIMIT = 2**24  # the maximum number of weights in adapted layers that are copied: 64 MB in float32


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block, the layers of a small base use copies of their weights with the active adapter merged in.

    Used in decoding, where the number of matrix products takes the time, not their size. Merging leaves one product of
    three. The base's own weights stay unchanged, so no unmerging is needed.
    """
    forwards = _fast_forwards(model)
    if torch.is_grad_enabled() or sum(forward.base.weight.numel() for forward in forwards) > MERGE_LIMIT:
        yield
        return
    try:
        for forward in forwards:
            forward.merge()
        yield
    finally:
        for forward in forwards:
            forward.merged = None


def merged_bytes(model: nn.Module) -> int:
    """Bytes of the copies that `merged_adapter` makes; 0 for a base above MERGE_LIMIT."""
    weights = [forward.base.weight for forward in _fast_forwards(model)]
    return sum(weight.nbytes for weight in weights) if sum(weight.numel() for weight in weights) <= MERGE_LIMIT else 0


def _fast_forwards(model: nn.Module) -> list[PlainLoraForward]:
    forwards = (getattr(module, "forward", None) for module in model.modules())
    return [forward for forward in forwards if isinstance(forward, PlainLoraForward)]
