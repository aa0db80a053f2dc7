"""The decode cache: preallocated keys and values, and recurrent states that follow their rows.

transformers' cache copies itself at each token to grow. Over a response, this cost is quadratic in its length. So a
layer with full attention gets room for all tokens when the rows of the groups are made from the prompts. Other layers
(sliding windows, convolution and recurrent states) stay as transformers has them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

# The argument of a model's forward that takes the cache. Mamba swallows `past_key_values` and decodes without a state.
CACHE_ARGUMENTS = ("past_key_values", "cache_params")


def cache_argument(takes: Collection[str]) -> str | None:
    """The name of the argument that takes the cache, from the parameters of a model's forward; None without one."""
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)


def cache_inputs(takes: Collection[str], cache: DynamicCache, mask_BL: Tensor | None = None) -> dict[str, Any]:
    """The arguments of a forward that hand over the cache.

    Args:
        takes: the parameters of the model's forward.
        mask_BL: for a cached step, the mask of all tokens so far. Models that take `cache_params` get none: they keep
            no keys that a mask could hide, and would read it as the mask of the new tokens alone. transformers' own
            generate() leaves it out, too.
    """
    name = cache_argument(takes)
    assert name is not None  # a base without one is refused when it is opened
    mask = {} if mask_BL is None or name == "cache_params" else {"attention_mask": mask_BL}
    return {name: cache, **mask}


def has_other_than_full_attention(config: PretrainedConfig) -> bool:
    """Whether the model keeps anything but all keys and values: sliding windows, convolution or recurrent states."""
    return any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)


def has_state(layer: Any) -> bool:
    """Whether a cache layer keeps convolution or recurrent states."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def attention_layers(config: PretrainedConfig) -> int:
    """The layers of a model that keep keys and values."""
    return sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)


class RowCache(DynamicCache):
    """transformers' cache with `batch_repeat_interleave` and `batch_select_indices` for all kinds of layers.

    transformers 5.23 has neither for layers with a recurrent state. A layer with both attention and a recurrent state
    (Falcon-H1) inherits those of attention, which leave the state as it is. `reorder_cache` moves all tensors of every
    kind of layer.
    """

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self._any_layers:
            if not has_state(layer):
                layer.batch_repeat_interleave(repeats)
            elif states := state_tensors(layer):
                rows = torch.arange(len(states[0]), device=states[0].device)
                layer.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self._any_layers:
            if has_state(layer):
                layer.reorder_cache(indices)
            else:
                layer.batch_select_indices(indices)

    @property
    def _any_layers(self) -> list[Any]:
        """The layers. Their types in transformers lack methods that those without a state have."""
        return cast(list[Any], self.layers)


def state_tensors(layer: Any) -> list[Tensor]:
    """The convolution and recurrent states of a cache layer, each [rows, ...]; empty before the first forward, and for
    layers that keep keys and values alone."""
    if not has_state(layer):
        return []
    return [
        state
        for states in (layer.conv_states, layer.recurrent_states)
        for state in states.values()
        if state is not None
    ]


def preallocated_cache(config: PretrainedConfig, places: int) -> RowCache:
    """A cache for rows of at most `places` tokens."""
    cache = RowCache(config=config)
    cache.layers = [PreallocatedLayer(places) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers with room for all tokens; `keys` and `values` are views of the filled part, each
    [rows, heads, tokens, head width]."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.buffers: tuple[Tensor, Tensor] | None = None  # of keys and of values; None until the prompts are read

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # the prompts: one row each, before the groups are made of them
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        if self.buffers is None:
            self.batch_repeat_interleave(1)
        assert self.buffers is not None
        first = self._filled()[0].shape[-2]
        last = first + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., first:last, :] = states
        return self._fill(*self.buffers, last)

    def _filled(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None  # set by the first update
        return self.keys, self.values

    def _fill(self, keys: Tensor, values: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Take these buffers, filled with so many tokens."""
        self.buffers = keys, values
        self.keys, self.values = keys[..., :tokens, :], values[..., :tokens, :]
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        keys, values = self._filled()
        tokens = keys.shape[-2]

        def buffer(states: Tensor) -> Tensor:
            rows, heads, _, width = states.shape
            buffer = states.new_empty(rows, repeats, heads, self.places, width)
            buffer[..., :tokens, :] = states[:, None]
            return buffer.flatten(0, 1)

        self._fill(buffer(keys), buffer(values), tokens)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffers is None:
            super().batch_select_indices(indices)
            return
        tokens = self._filled()[0].shape[-2]

        def selected(buffer: Tensor) -> Tensor:
            kept = buffer.new_empty(len(indices), *buffer.shape[1:])
            kept[..., :tokens, :] = buffer[..., :tokens, :].index_select(0, indices)
            return kept

        keys, values = self.buffers
        self._fill(selected(keys), selected(values), tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)
