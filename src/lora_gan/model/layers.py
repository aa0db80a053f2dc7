"""The layers of a base, and modules that replace layers during one forward.

The base's own forward can run without some of its layers: only the layers above the frozen ones, only those below, or
only the vocabulary head. The modules here replace the layers that are left out. Used by `players` and `peft_config`.

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
    """The name and the module list of a causal LM's layers; None unless there is exactly one such list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def require_layer_list(model: PreTrainedModel, setting: str, instead: str) -> tuple[str, nn.ModuleList]:
    """`layer_list` for a setting that needs the layers.

    Raises:
        ValueError: the model has no such list. The message ends with `instead`.
    """
    named = layer_list(model)
    if named is None:
        raise ValueError(f"{setting} cannot be used, {type(model).__name__} has no single list of layers: {instead}")
    return named


def body_of(model: PreTrainedModel) -> nn.Module:
    """A causal LM without its vocabulary head.

    Raises:
        ValueError: the model has no attribute with the name in its class's `base_model_prefix`.
    """
    body = getattr(model, model.base_model_prefix, None)
    if body is None:
        raise ValueError(
            f"{type(model).__name__} cannot be the base: it has no body, which the score heads need, under the name "
            f"{model.base_model_prefix!r} of its base_model_prefix. Give another base"
        )
    return body


def has_adapter(module: nn.Module, player: str) -> bool:
    """Whether a module is a PEFT layer with this player's adapter."""
    return isinstance(module, BaseTunerLayer) and any(
        player in getattr(module, name, ()) for name in module.adapter_layer_names
    )


def frozen_layers(model: PreTrainedModel, body: nn.Module) -> tuple[nn.ModuleList, int] | None:
    """All layers of the base, and the number of layers below the discriminator's first adapter.

    None if this number is 0, if no layer has such an adapter, or if the body has one outside its layers.
    """
    named = layer_list(model)
    if named is None:
        return None
    adapted = [_adapters(layer) > 0 for layer in named[1]]
    if not any(adapted) or adapted[0] or _adapters(named[1]) < _adapters(body):
        return None
    return named[1], adapted.index(True)


def _adapters(module: nn.Module) -> int:
    """The number of modules with a discriminator's adapter."""
    return sum(has_adapter(inner, "discriminator") for inner in module.modules())


@contextmanager
def replaced(layers: nn.ModuleList, by: dict[int, nn.Module]) -> Iterator[None]:
    """Inside the block, `layers` has these modules at these indices."""
    before = {i: layers[i] for i in by}
    try:
        for i, layer in by.items():
            layers[i] = layer
        yield
    finally:
        for i, layer in before.items():
            layers[i] = layer


class InputRecorder(nn.Module):
    """Replaces layers by the identity, and records the input of the first one."""

    input: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.input is None:
            self.input = hidden_states
        return hidden_states


class FixedOutput(nn.Module):
    """Replaces layers if their output is known."""

    def __init__(self, hidden_BLH: Tensor) -> None:
        super().__init__()
        self.hidden_BLH = hidden_BLH

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden_BLH


class FixedBody(nn.Module):
    """Replaces the body, and returns given hidden states."""

    def __init__(self, hidden_BLH: Tensor, body: nn.Module | None) -> None:
        super().__init__()
        self.output = _BodyOutput(last_hidden_state=hidden_BLH)
        self.__dict__["body"] = body  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Attributes of the real body: Falcon-H1's causal LM reads a multiplier from it."""
        return getattr(self.__dict__["body"], name)

    @property
    def decoder(self) -> FixedBody:
        """OPT's causal LM calls its body's decoder."""
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return self.output


class _BodyOutput(BaseModelOutputWithPast):
    """Other fields, which some bodies return, are None: the logits do not depend on them."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)
