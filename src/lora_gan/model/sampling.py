"""Sampling: the library's own decode loop over the model's forward and cache. `LoraGAN` samples every response here.

# B = responses (P prompts × K), T = response places, V = vocabulary

Not `generate()`: its draws come from one global stream, so that a response would change with what else is in the batch,
and it lets neither ended rows leave the batch nor a group share its prompt's cache. Here every token of every response
is the inverse of the model's distribution function at a keyed uniform number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from .. import randomness
from .fast_lora import merged_adapter
from .kv_cache import select_rows
from .packing import Batch
from .players import Players
from .tokens import pad


@dataclass(frozen=True, eq=False)
class Rollout:
    """B responses and the P prompts that they answer; of K responses each, response i of prompt j is j·K + i."""

    players: Players  # on whose base they are read
    prompts: list[list[int]]  # token ids, P in all; each has a response
    responses: list[list[int]]  # token ids, the end-of-text token included
    group_B: np.ndarray  # which prompt a response answers
    texts: list[str]  # the responses, as rewards see them

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each response, the end-of-text token included."""
        return np.array([len(ids) for ids in self.responses])

    def batch(self, rows: slice | None = None) -> Batch:
        """The responses, or some of them, as the base reads them. All of them are laid out once, so that both players
        share the cached outputs of the frozen layers."""
        if rows is None or range(len(self))[rows] == range(len(self)):
            return self._whole
        return self.rows(rows)._whole

    @cached_property
    def _whole(self) -> Batch:
        return self.players.batch(self.prompts, self.responses, self.group_B)

    def rows(self, index: np.ndarray | slice) -> Rollout:
        """Some of the responses, and the prompts that they answer."""
        chosen = np.arange(len(self))[index]
        answered, group_B = np.unique(self.group_B[chosen], return_inverse=True)
        return replace(
            self,
            prompts=[self.prompts[j] for j in answered],
            responses=[self.responses[i] for i in chosen],
            group_B=group_B,
            texts=[self.texts[i] for i in chosen],
        )


def keyed_uniforms(
    prompts: list[list[int]], responses: int, length: int, *, seed: int, step: int, purpose: str
) -> Tensor:
    """The uniform numbers of every response, [P·K, T], float64.

    A row's key is its prompt's tokens, not its place: whatever else is in the batch, and however the batch is split
    over processes, it draws the same. A prompt that stands in the batch twice is told apart by its count.
    """
    seen: Counter[bytes] = Counter()
    rows = []
    for prompt in prompts:
        name = randomness.fingerprint(prompt)
        rows += [randomness.uniforms(length, seed, step, purpose, name, seen[name], i) for i in range(responses)]
        seen[name] += 1
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(
    players: Players,
    prompts: list[list[int]],
    uniforms_BT: Tensor,
    *,
    decode: Callable[[list[int]], str],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollout:
    """Sample P·K responses of at most T tokens from the active player; K and T are read off `uniforms_BT`.

    Temperature 0 is greedy decoding. A prompt is computed once for its group; ended rows leave the batch.

    Args:
        decode: makes a response's text of its ids.

    Raises:
        FloatingPointError: logits that are not finite, from which any token could be read.
    """
    per_prompt = len(uniforms_BT) // len(prompts)
    cache, mask_BL, logits_BV = _prefill(players, prompts, per_prompt)
    responses = _decode(players, cache, mask_BL, logits_BV, uniforms_BT.to(players.device), temperature, top_p)
    group_B = np.arange(len(responses)) // per_prompt
    return Rollout(players, prompts, responses, group_B, [decode(ids) for ids in responses])


def _prefill(players: Players, prompts: list[list[int]], per_prompt: int) -> tuple[DynamicCache, Tensor, Tensor]:
    """Read each prompt once; the cache, the mask and the next token's logits of its `per_prompt` rows."""
    ids, mask = pad(prompts, players.base.pad_id, side="left")
    ids_BL = torch.from_numpy(ids).to(players.device)
    mask_BL = torch.from_numpy(mask.astype(np.int64)).to(players.device)
    cache = DynamicCache(config=players.lm.config)
    logits_BV = players.lm(
        input_ids=ids_BL, attention_mask=mask_BL, use_cache=True,
        **players.cached(cache), **players.keep(1), **players.positions(mask_BL),
    ).logits[:, -1]  # fmt: skip
    if per_prompt > 1:
        rows = torch.arange(len(prompts), device=players.device).repeat_interleave(per_prompt)
        select_rows(cache, rows)
        mask_BL, logits_BV = mask_BL[rows], logits_BV[rows]
    return cache, mask_BL, logits_BV


def _decode(
    players: Players,
    cache: DynamicCache,
    mask_BL: Tensor,
    logits_BV: Tensor,
    uniforms_BT: Tensor,
    temperature: float,
    top_p: float,
) -> list[list[int]]:
    """Token ids of the responses, one token of all rows at a time."""
    (rows, length), device = uniforms_BT.shape, players.device
    eos = torch.tensor(players.base.eos_ids, device=device)
    sampled_BT = torch.full((rows, length), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # which row of the result each row of the batch is
    running = torch.ones(rows, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with merged_adapter(players.lm):
        for t in range(length):
            finite = finite & logits_BV.amax(-1).isfinite().all()  # −∞ forbids a token; NaN, +∞ are no distribution
            token = choose(logits_BV, uniforms_BT[alive, t], temperature, top_p)
            sampled_BT[alive[running], t] = token[running]
            running = running & ~torch.isin(token, eos)
            left = int(running.sum())
            if left == 0 or t == length - 1:
                break
            if left <= len(alive) // 2:  # halving keeps the copies of the cache below one more forward in total
                keep = running.nonzero().squeeze(-1)
                select_rows(cache, keep)
                alive, running, token, mask_BL = alive[keep], running[keep], token[keep], mask_BL[keep]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], -1)
            position = {name: value[:, -1:] for name, value in players.positions(mask_BL).items()}
            logits_BV = players.lm(
                input_ids=token[:, None], use_cache=True, **players.cached(cache, mask_BL), **position
            ).logits[:, -1]
    if not finite:  # asked once: every question makes a GPU wait
        raise FloatingPointError(
            f"the {players.active}'s logits are not finite, so nothing can be sampled: its weights are broken (load an "
            "earlier checkpoint) or its base overflows (try dtype='float32')"
        )
    return [[i for i in row if i >= 0] for row in sampled_BT.tolist()]


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token at which the distribution function passes the uniform number, [B]: inverse-transform sampling."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the token that passes top_p is still in
        probs_BV = probs_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV), 0.0)
    cdf_BV = probs_BV.double().cumsum(-1)
    # right=True: the first token whose cumulated probability is above the number, so never one of probability 0.
    token_B1 = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1]).unsqueeze(-1), right=True)
    return token_B1.squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


def chunks(total: int, size: int | None) -> Iterator[slice]:
    """Micro-batches: slices of at most `size` rows; one of all where size is None."""
    size = size or total
    return (slice(first, min(first + size, total)) for first in range(0, total, size))
