"""The layers of a base, and modules that stand in for some of them during one forward.

A forward can begin above the frozen layers, stop below them, or run the head alone: the base's own forward runs, with
stand-ins in the places of what is left out. Used by `players` and `peft_config`.

# B = rows, L = tokens of a row, H = hidden size
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """A causal LM's layers, and the name they stand under; None if there is not exactly one such list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def require_layer_list(model: PreTrainedModel, setting: str, instead: str) -> tuple[str, nn.ModuleList]:
    """`layer_list`, for a setting that needs it.

    Raises:
        ValueError: the model has none; the message ends with what to set instead.
    """
    named = layer_list(model)
    if named is None:
        raise ValueError(f"{setting} cannot tell what the layers of {type(model).__name__} are: {instead}")
    return named


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM below its head.

    Raises:
        ValueError: the model has none under the name that its class says.
    """
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        raise ValueError(
            f"{type(model).__name__} cannot be the base: its body, which the scores are read off, does not stand under "
            f"its name {model.base_model_prefix!r}"
        )
    return body


def has_adapter(module: nn.Module, player: str) -> bool:
    return isinstance(module, BaseTunerLayer) and any(
        player in getattr(module, name, ()) for name in module.adapter_layer_names
    )


@contextmanager
def replaced(layers: nn.ModuleList, by: dict[int, nn.Module]) -> Iterator[None]:
    before = {i: layers[i] for i in by}
    try:
        for i, layer in by.items():
            layers[i] = layer
        yield
    finally:
        for i, layer in before.items():
            layers[i] = layer


class InputRecorder(nn.Module):
    """Stands in the places of layers that are left out, and keeps what the first of them was given."""

    input: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.input is None:
            self.input = hidden_states
        return hidden_states


class FixedOutput(nn.Module):
    """Stands in the places of layers whose outcome is known."""

    def __init__(self, hidden_BLH: Tensor) -> None:
        super().__init__()
        self.hidden_BLH = hidden_BLH

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden_BLH


class FixedBody(nn.Module):
    """Stands in a body's place, and returns the hidden states that it was given."""

    def __init__(self, hidden_BLH: Tensor, body: nn.Module | None) -> None:
        super().__init__()
        self.output = _BodyOutput(last_hidden_state=hidden_BLH)
        self.__dict__["body"] = body  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Attributes of the real body: Falcon-H1's causal LM asks for a multiplier."""
        return getattr(self.__dict__["body"], name)

    @property
    def decoder(self) -> FixedBody:
        """OPT's causal LM asks its body's decoder."""
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return self.output


class _BodyOutput(BaseModelOutputWithPast):
    """Some bodies say more (cross-attention, a router's logits), none of which the logits are made of."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
