"""What a model keeps from the tokens it has read: keys and values, convolution and recurrent states.

The cache itself is transformers' DynamicCache. Used by `sampling`, and by the trial of a base.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import LongTensor, Tensor
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


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Replace a cache's rows by these of its rows, in every layer; a row may be chosen several times.

    `batch_repeat_interleave` and `batch_select_indices` of transformers 5.23 leave recurrent states as they are.
    """
    cache.reorder_cache(cast(LongTensor, rows))


def has_other_than_full_attention(config: PretrainedConfig) -> bool:
    """Whether the model keeps anything but all keys and values: sliding windows, convolution or recurrent states."""
    return any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)


def has_state(layer: Any) -> bool:
    """Whether a cache layer keeps convolution or recurrent states."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def attention_layers(config: PretrainedConfig) -> int:
    """The layers of a model that keep keys and values."""
    return sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)


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
