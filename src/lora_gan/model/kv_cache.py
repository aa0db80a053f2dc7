"""Helpers for transformers' DynamicCache: keys and values, convolution and recurrent states.

Used by `sampling` and by the trial of a base.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import LongTensor, Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

# The argument of a model's forward that takes the cache. Mamba ignores `past_key_values` without an error.
CACHE_ARGUMENTS = ("past_key_values", "cache_params")


def cache_argument(takes: Collection[str]) -> str | None:
    """The name of the cache argument among the parameters of a model's forward; None without one."""
    return next((name for name in CACHE_ARGUMENTS if name in takes), None)


def cache_inputs(takes: Collection[str], cache: DynamicCache, mask_BL: Tensor | None = None) -> dict[str, Any]:
    """The arguments of a forward that pass the cache.

    Args:
        takes: the parameters of the model's forward.
        mask_BL: for a cached step, the mask of all tokens so far. Models with `cache_params` get no mask, as in
            transformers' generate(): they have no keys to hide, and would read the mask as that of the new tokens.
    """
    name = cache_argument(takes)
    assert name is not None  # a base without a cache argument is refused when it is opened
    mask = {} if mask_BL is None or name == "cache_params" else {"attention_mask": mask_BL}
    return {name: cache, **mask}


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Replace the rows of a cache by the selected rows, in every layer. A row may be selected several times.

    `batch_repeat_interleave` and `batch_select_indices` of transformers 5.23 do not change recurrent states.
    """
    cache.reorder_cache(cast(LongTensor, rows))


def has_other_than_full_attention(config: PretrainedConfig) -> bool:
    """Whether any layer of the model has a sliding window, or convolution or recurrent states."""
    return any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers)


def has_state(layer: Any) -> bool:
    """Whether a cache layer has convolution or recurrent states."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def attention_layers(config: PretrainedConfig) -> int:
    """The number of layers that store keys and values."""
    return sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)


def state_tensors(layer: Any) -> list[Tensor]:
    """The convolution and recurrent states of a cache layer, each [rows, ...].

    Empty before the first forward, and for layers that store only keys and values.
    """
    if not has_state(layer):
        return []
    states = (*layer.conv_states.values(), *layer.recurrent_states.values())
    return [state for state in states if state is not None]
