"""Keys and values of the tokens so far, in room that is taken once.

transformers' cache grows by copying itself at each token: over a response that is the square of its length. A layer
that sees all of the past is given its room when the group's rows are made of the prompt's; others (windows, recurrent
states) stay as transformers has them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: PretrainedConfig, places: int) -> DynamicCache:
    """A cache for rows of at most `places` tokens."""
    cache = DynamicCache(config=config)
    cache.layers = [_Roomy(places) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Roomy(DynamicLayer):
    """`keys` and `values` are what is filled of the room, [rows, heads, tokens, head width]."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self.room: list[Tensor] = []  # keys', values'

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:  # the prompts: one row each, before the groups are made of them
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if not self.room:
            self.batch_repeat_interleave(1)
        first, last = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., first:last, :] = states
        self._fill(last)
        return self.keys, self.values

    def _fill(self, tokens: int) -> None:
        self.keys, self.values = (room[..., :tokens, :] for room in self.room)

    def batch_repeat_interleave(self, repeats: int) -> None:
        tokens = self.keys.shape[-2]
        self.room = []
        for states in (self.keys, self.values):
            rows, heads, _, width = states.shape
            room = states.new_empty(rows, repeats, heads, self.places, width)
            room[..., :tokens, :] = states[:, None]
            self.room.append(room.flatten(0, 1))
        self._fill(tokens)

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.room:
            super().batch_select_indices(indices)
            return
        tokens = self.keys.shape[-2]
        rooms = []
        for room in self.room:
            kept = room.new_empty(len(indices), *room.shape[1:])
            kept[..., :tokens, :] = room[..., :tokens, :].index_select(0, indices)
            rooms.append(kept)
        self.room = rooms
        self._fill(tokens)
