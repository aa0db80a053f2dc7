"""Samples responses: the library's own decode loop over the model's forward and cache. Used by `LoraGAN`.

# B = responses (P prompts × K), T = maximum response length, L = tokens so far, V = vocabulary

Each token is drawn by inverse-transform sampling from a keyed uniform number. transformers' `generate()` is not used:

- Its draws come from one global stream, so a response would depend on the rest of the batch.
- It computes the prompt again for each response of a group.
- It keeps ended rows in the batch.
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
    """B responses to P prompts. With K responses per prompt, response i of prompt j has the index j·K + i."""

    players: Players  # used to build batches for this base
    prompts: list[list[int]]  # token ids of the P prompts; each prompt has at least one response
    responses: list[list[int]]  # token ids, with the end-of-text token
    group_B: np.ndarray  # index of each response's prompt
    texts: list[str]  # the decoded responses, as rewards get them

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each response, with the end-of-text token."""
        return np.array([len(ids) for ids in self.responses])

    def batch(self, rows: slice | None = None) -> Batch:
        """The responses, or a slice of them, as inputs of the base.

        The batch of all responses is built once, so both players share the cached outputs of the frozen layers.
        """
        if rows is None or range(len(self))[rows] == range(len(self)):
            return self._whole
        return self.rows(rows)._whole

    @cached_property
    def _whole(self) -> Batch:
        return self.players.batch(self.prompts, self.responses, self.group_B)

    def rows(self, index: np.ndarray | slice) -> Rollout:
        """A rollout of the selected responses and their prompts."""
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
    """Uniform random numbers for all responses, [P·K, T], float64.

    The key of a row contains the prompt's tokens, not its index in the batch. So the numbers depend neither on the rest
    of the batch, nor on how the batch is split over processes. The key also counts repetitions of a prompt.

    Args:
        responses: K, responses per prompt.
        length: T, numbers per response.
        seed, step, purpose: further parts of the key; see `randomness`.
    """
    occurrences: Counter[bytes] = Counter()
    rows = []
    for prompt in prompts:
        key = randomness.fingerprint(prompt)
        rows += [randomness.uniforms(length, seed, step, purpose, key, occurrences[key], i) for i in range(responses)]
        occurrences[key] += 1
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
    """Sample P·K responses of at most T tokens from the active player.

    Each prompt is computed once for its group. Ended rows leave the batch.

    Args:
        prompts: token ids of the P prompts.
        uniforms_BT: uniform random numbers, [P·K, T]. The shape sets K and T.
        decode: returns the text of a response's ids.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: sample from the smallest set of tokens with at least this total probability.

    Raises:
        FloatingPointError: the logits are not finite, so sampled tokens would be meaningless.
    """
    per_prompt = len(uniforms_BT) // len(prompts)
    cache, mask_BL, logits_BV = _prefill(players, prompts, per_prompt)
    responses = _decode(players, cache, mask_BL, logits_BV, uniforms_BT.to(players.device), temperature, top_p)
    group_B = np.arange(len(responses)) // per_prompt
    return Rollout(players, prompts, responses, group_B, [decode(ids) for ids in responses])


def _prefill(players: Players, prompts: list[list[int]], per_prompt: int) -> tuple[DynamicCache, Tensor, Tensor]:
    """Compute each prompt once. Returns cache, mask and the next token's logits, with `per_prompt` rows per prompt."""
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
    """Token ids of the responses. Each step of the loop samples one token for every row."""
    (rows, length), device = uniforms_BT.shape, players.device
    eos = torch.tensor(players.base.eos_ids, device=device)
    sampled_BT = torch.full((rows, length), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # index in the result of each row in the batch
    running = torch.ones(rows, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with merged_adapter(players.lm):
        for t in range(length):
            finite = finite & logits_BV.amax(-1).isfinite().all()  # −∞ forbids a token; NaN and +∞ are errors
            token = choose(logits_BV, uniforms_BT[alive, t], temperature, top_p)
            sampled_BT[alive[running], t] = token[running]
            running = running & ~torch.isin(token, eos)
            left = int(running.sum())
            if left == 0 or t == length - 1:
                break
            if left <= len(alive) // 2:  # only at halves, so that few copies of the cache are made
                keep = running.nonzero().squeeze(-1)
                select_rows(cache, keep)
                alive, running, token, mask_BL = alive[keep], running[keep], token[keep], mask_BL[keep]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], -1)
            position = {name: value[:, -1:] for name, value in players.positions(mask_BL).items()}
            logits_BV = players.lm(
                input_ids=token[:, None], use_cache=True, **players.cached(cache, mask_BL), **position
            ).logits[:, -1]
    if not finite:  # tested once, at the end: each test synchronizes a GPU
        raise FloatingPointError(
            f"the {players.active}'s logits are not finite, so it cannot sample: its weights are broken (load an "
            "earlier checkpoint), or its base overflows (try dtype='float32')"
        )
    return [[i for i in row if i >= 0] for row in sampled_BT.tolist()]


def choose(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Inverse-transform sampling: the first token with a cumulative probability above the uniform number, [B]."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p  # the token that reaches top_p stays in the set
        probs_BV = probs_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV), 0.0)
    cdf_BV = probs_BV.double().cumsum(-1)
    # right=True: strictly above the number, so that tokens of probability 0 are never sampled.
    token_B1 = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1]).unsqueeze(-1), right=True)
    return token_B1.squeeze(-1).clamp(max=logits_BV.shape[-1] - 1)


def chunks(total: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` rows, which cover `total` rows. `size` None gives one slice."""
    size = size or total
    return (slice(first, min(first + size, total)) for first in range(0, total, size))
