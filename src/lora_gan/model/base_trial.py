"""The trial of a base: it reads one text of a few tokens in several ways, which must agree. `load_base` runs it.

A causal model that leaves padding alone gives a text the same logits alone, and behind padding without its last tokens.
One whose cache can be sampled with gives the last tokens the same logits with the cache, after its rows were repeated
and selected as sampling does.

# B = rows, L = tokens of a row, V = vocabulary
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..context import context_of
from . import base_checks
from .kv_cache import cache_inputs, select_rows
from .tokens import positions

TOKENS, PADS = 8, 3  # of the trial's text, and of the padding in front of it


@torch.no_grad()
def require_causal(lm: PreTrainedModel, called: str) -> None:
    """Run the trial.

    Args:
        called: the base's name, for messages.

    Raises:
        ValueError: it names the base and the difference that was found.
    """
    trial = _Trial(lm, called)
    whole_BLV = trial.run(trial.ids_BL, trial.mask_BL, use_cache=False)
    allowed = 1e-3 if trial.is_exact else 0.05
    if not _agree(whole_BLV[1, trial.pads :], whole_BLV[0, : trial.short], allowed):
        if trial.reads_later_tokens(allowed):
            raise ValueError(
                f"{called} cannot be the base, it is not a causal language model: what it says of a token depends "
                "on the tokens after it"
            )
        raise ValueError(
            f"{called} cannot be the base: padding on the left changes what it says of a text, and rows of "
            "different lengths could not stand in one batch"
        )
    # Cached steps run other kernels than a whole text does, and a router may choose another expert.
    if not _agree(trial.decoded(), whole_BLV[0], 1e-3 if trial.is_exact else 0.2):
        raise ValueError(
            f"{called} cannot be the base: read token by token with its cache, as sampling reads it, a text gets other "
            "logits than in one forward"
        )


class _Trial:
    """A batch of two rows: the text, and the same text behind padding, without its last tokens."""

    def __init__(self, lm: PreTrainedModel, called: str) -> None:
        self.lm, self.called = lm, called
        self.takes = inspect.signature(lm.forward).parameters
        self.rows = base_checks.embedding_rows(lm)
        # The whole text is read, and then as many tokens as the other row is padded with: all of them need a position.
        tokens = min(TOKENS, max(2, context_of(lm.config.get_text_config()) - PADS))
        self.pads = min(PADS, tokens // 2)
        self.short = tokens - self.pads  # tokens of the second row
        self.ids = (torch.arange(tokens) * 7 + 3) % self.rows
        device = next(lm.parameters()).device
        self.ids_BL = torch.stack([self.ids, self.ids.roll(self.pads)]).to(device)
        self.mask_BL = torch.ones_like(self.ids_BL)
        self.mask_BL[1, : self.pads] = 0
        # Far above rounding, far below what another context does; quantized products round like bfloat16.
        self.is_exact = lm.dtype == torch.float32 and getattr(lm, "hf_quantizer", None) is None

    def run(self, ids_BL: Tensor, mask_BL: Tensor, **options: Any) -> Tensor:
        """Logits of one forward, [B, L, V], finite; tokens that the base forbids get 0."""
        place_BL = positions(mask_BL)[:, -ids_BL.shape[1] :]
        place = {"position_ids": place_BL} if "position_ids" in self.takes else {}
        with base_checks.explaining_failure(self.called):
            logits: Tensor = self.lm(input_ids=ids_BL, **{"attention_mask": mask_BL, **place, **options}).logits.float()
        base_checks.require_finite(self.lm, logits, self.called)
        return logits.masked_fill(logits == -torch.inf, 0.0)

    def reads_later_tokens(self, allowed: float) -> bool:
        """Whether another last token changes the logits before it."""
        ids_BL = self.ids_BL[:1].repeat(2, 1)
        ids_BL[1, -1] = (ids_BL[1, -1] + 1) % self.rows
        logits_BLV = self.run(ids_BL, torch.ones_like(self.mask_BL), use_cache=False)
        return not _agree(logits_BLV[1, :-1], logits_BLV[0, :-1], allowed)

    def decoded(self) -> Tensor:
        """Logits of the second row's text, its last tokens read one by one, with the cache of a group's row."""
        ids, device = self.ids, self.ids_BL.device
        with base_checks.explaining_failure(self.called):
            cache = DynamicCache(config=self.lm.config)
        prefill = cache_inputs(self.takes, cache)
        logits = [self.run(self.ids_BL, self.mask_BL, use_cache=True, **prefill)[1, self.pads :]]
        with base_checks.explaining_failure(self.called):
            select_rows(cache, torch.arange(2, device=device).repeat_interleave(2))
        mask_BL = self.mask_BL.repeat_interleave(2, 0)
        ids_BL = torch.stack([ids.flip(0), ids.flip(0), ids, ids.flip(0)]).to(device)
        for place in range(self.short, len(ids)):
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], -1)
            inputs = {"attention_mask": None, **cache_inputs(self.takes, cache, mask_BL)}
            logits.append(self.run(ids_BL[:, place : place + 1], mask_BL, use_cache=True, **inputs)[-2])
            if place == self.short:  # the first prompt's rows leave
                keep = torch.tensor([0, 2, 3], device=device)
                with base_checks.explaining_failure(self.called):
                    select_rows(cache, keep)
                mask_BL, ids_BL = mask_BL[keep], ids_BL[keep]
        return torch.cat(logits)


def _agree(one: Tensor, other: Tensor, allowed: float) -> bool:
    return bool((one - other).square().mean().sqrt() <= allowed * other.std())
