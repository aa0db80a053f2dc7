"""Sampling: the library's own decode loop over the model's forward and cache.

# B = responses (P prompts × K), L = prompt places + response places, T = response places, V = vocabulary

Not `generate()`: its draws come from one global stream, so that a response would change with what else is in the batch,
and it lets neither ended rows leave the batch nor a group share its prompt's cache. Here every token of every response
is the inverse of the model's distribution function at a keyed uniform number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .. import randomness
from .base import Base
from .fast_lora import merged
from .kv_cache import roomy_cache
from .packing import Batch
from .players import Players


@dataclass(frozen=True)
class Rollout:
    """P prompts with K responses each, rows in group order: response i of prompt j is row j·K + i."""

    ids_BL: Tensor  # prompts padded on the left, responses on the right
    mask_BL: Tensor  # 1 on prompt and response tokens, the end-of-text token included
    prompt_places: int  # L − T
    group_B: np.ndarray  # which prompt a row answers
    texts: list[str]  # the responses, as rewards see them
    _batch: list[Batch] = field(default_factory=list, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def response_ids_BT(self) -> Tensor:
        return self.ids_BL[:, self.prompt_places :]

    @property
    def response_mask_BT(self) -> Tensor:
        return self.mask_BL[:, self.prompt_places :]

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each response, the end-of-text token included."""
        return self.response_mask_BT.sum(-1).cpu().numpy()

    def parts(self) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
        """The prompts, each once; the responses; and which of these prompts each one answers, [B]."""
        ids, mask = self.ids_BL.cpu().numpy(), self.mask_BL.cpu().numpy().astype(bool)
        _, first, prompt_of = np.unique(self.group_B, return_index=True, return_inverse=True)
        left = self.prompt_places
        prompts = [ids[row, :left][mask[row, :left]].tolist() for row in first]
        responses = [row[left:][real[left:]].tolist() for row, real in zip(ids, mask, strict=True)]
        return prompts, responses, prompt_of

    def batch(self, players: Players, rows: slice | None = None) -> Batch:
        """The responses, or some of them, as the players' base reads them. All of them are laid out once: what the
        frozen layers say of them is then there for both players."""
        if rows is not None and range(len(self))[rows] != range(len(self)):
            return players.batch(*self.rows(rows).parts())
        if not self._batch:
            self._batch.append(players.batch(*self.parts()))
        return self._batch[0]

    def rows(self, index: np.ndarray | slice) -> Rollout:
        """Some of the rows, with places that none of them uses cut off."""
        where = torch.as_tensor(np.arange(len(self))[index], device=self.ids_BL.device)
        ids, mask = self.ids_BL[where], self.mask_BL[where]
        first = int((self.prompt_places - mask[:, : self.prompt_places].sum(-1)).min())
        last = self.prompt_places + max(1, int(mask[:, self.prompt_places :].sum(-1).max()))
        return replace(
            self,
            ids_BL=ids[:, first:last],
            mask_BL=mask[:, first:last],
            prompt_places=self.prompt_places - first,
            group_B=self.group_B[index],
            texts=[self.texts[int(i)] for i in where],
        )


def assemble(
    base: Base,
    device: torch.device,
    prompts: list[list[int]],
    responses: list[list[int]],
    texts: list[str] | None = None,
) -> Rollout:
    """Rows from token ids: one response to one prompt each, every row a group of its own.

    Args:
        texts: the responses' texts; None where nobody reads them.
    """
    left, right = max(map(len, prompts)), max(1, max(map(len, responses)))
    ids = np.full((len(prompts), left + right), base.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, left - len(prompt) : left] = prompt
        ids[row, left : left + len(response)] = response
        mask[row, left - len(prompt) : left + len(response)] = 1
    return Rollout(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        left,
        np.arange(len(prompts)),
        [""] * len(prompts) if texts is None else texts,
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
    base, device = players.base, players.device
    rows, length = uniforms_BT.shape
    per_prompt = rows // len(prompts)
    prompt = assemble(base, device, prompts, [[] for _ in prompts])
    places = prompt.prompt_places
    mask = prompt.mask_BL[:, :places]
    cache = roomy_cache(players.lm.config, places + length)
    logits = players.lm(
        input_ids=prompt.ids_BL[:, :places], attention_mask=mask, use_cache=True,
        **players.cached(cache), **players.keep(1), **players.positions(mask),
    ).logits[:, -1]  # fmt: skip
    if per_prompt > 1:
        cache.batch_repeat_interleave(per_prompt)
        logits, mask = logits.repeat_interleave(per_prompt, 0), mask.repeat_interleave(per_prompt, 0)

    uniforms_BT = uniforms_BT.to(device)
    eos = torch.tensor(base.eos_ids, device=device)
    sampled_BT = torch.full((rows, length), -1, dtype=torch.long, device=device)
    alive = torch.arange(rows, device=device)  # which row of the result each row of the batch is
    running = torch.ones(rows, dtype=torch.bool, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with merged(players.lm):
        for t in range(length):
            finite = finite & logits.amax(-1).isfinite().all()  # −∞ forbids a token; NaN and +∞ are no distribution
            token = choose(logits, uniforms_BT[alive, t], temperature, top_p)
            sampled_BT[alive[running], t] = token[running]
            running = running & ~torch.isin(token, eos)
            left = int(running.sum())
            if left == 0 or t == length - 1:
                break
            if left <= len(alive) // 2:  # halving keeps the copies of the cache below one more forward in total
                keep = running.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                alive, running, token, mask = alive[keep], running[keep], token[keep], mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            position = {name: value[:, -1:] for name, value in players.positions(mask).items()}
            logits = players.lm(
                input_ids=token[:, None], use_cache=True, **players.cached(cache, mask), **position
            ).logits[:, -1]

    if not finite:  # asked once: every question makes a GPU wait
        raise FloatingPointError(
            f"the {players.active}'s logits are not finite, so nothing can be sampled: its weights are broken (load an "
            "earlier checkpoint) or its base overflows (try dtype='float32')"
        )
    responses = [[i for i in row if i >= 0] for row in sampled_BT.tolist()]
    repeated = [ids for ids in prompts for _ in range(per_prompt)]
    rollout = assemble(base, device, repeated, responses, [decode(ids) for ids in responses])
    return replace(rollout, group_B=np.arange(rows) // per_prompt)


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
