"""The trial of a base: the base reads one short text in several ways, and the logits must agree. Used by `load_base`.

Two comparisons:

- The text alone, and the same text behind padding without its last tokens. They agree if the model is causal and
  ignores padding.
- One forward over the text, and decoding token by token with the cache. The rows of the cache are repeated and selected
  as in sampling.

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

TOKENS, PADS = 8, 3  # tokens of the text, and of the padding in front of the text


@torch.no_grad()
def require_causal(lm: PreTrainedModel, label: str) -> None:
    """Run the trial.

    Args:
        label: the base's name in messages.

    Raises:
        ValueError: it names the base and the difference.
    """
    trial = _Trial(lm, label)
    whole_BLV = trial.run(trial.ids_BL, trial.mask_BL, use_cache=False)
    allowed = 1e-3 if trial.is_exact else 0.05
    if not _agree(whole_BLV[1, trial.pads :], whole_BLV[0, : trial.short], allowed):
        if trial.reads_later_tokens(allowed):
            raise ValueError(
                f"{label} cannot be the base, it is not a causal language model: the logits at a token depend "
                "on later tokens. Give a causal language model"
            )
        raise ValueError(
            f"{label} cannot be the base: padding on the left changes the logits of a text, so rows of "
            "different lengths cannot be in one batch. Give another base"
        )
    # Cached steps run other kernels than one forward over the text, and a router may choose another expert.
    if not _agree(trial.decoded(), whole_BLV[0], 1e-3 if trial.is_exact else 0.2):
        raise ValueError(
            f"{label} cannot be the base: decoding a text token by token with its cache, as in sampling, gives other "
            "logits than one forward over the text. Give another base"
        )


class _Trial:
    """A batch of two rows: the text, and the same text behind padding, without its last tokens."""

    def __init__(self, lm: PreTrainedModel, label: str) -> None:
        self.lm, self.label = lm, label
        self.takes = inspect.signature(lm.forward).parameters
        self.rows = base_checks.embedding_rows(lm)
        # Decoding reads the text and then PADS more tokens; each token needs a position within the context.
        tokens = min(TOKENS, max(2, context_of(lm.config.get_text_config()) - PADS))
        self.pads = min(PADS, tokens // 2)
        self.short = tokens - self.pads  # tokens of the second row
        self.ids = (torch.arange(tokens) * 7 + 3) % self.rows
        device = next(lm.parameters()).device
        self.ids_BL = torch.stack([self.ids, self.ids.roll(self.pads)]).to(device)
        self.mask_BL = torch.ones_like(self.ids_BL)
        self.mask_BL[1, : self.pads] = 0
        # The tolerance is far above rounding errors, and far below the effect of another context. Quantized products
        # round like bfloat16.
        self.is_exact = lm.dtype == torch.float32 and getattr(lm, "hf_quantizer", None) is None

    def run(self, ids_BL: Tensor, mask_BL: Tensor, **options: Any) -> Tensor:
        """Logits of one forward, [B, L, V], finite; tokens that the base forbids get 0."""
        inputs = {"attention_mask": mask_BL}
        if "position_ids" in self.takes:
            inputs["position_ids"] = positions(mask_BL)[:, -ids_BL.shape[1] :]
        with base_checks.explaining_failure(self.label):
            logits: Tensor = self.lm(input_ids=ids_BL, **(inputs | options)).logits.float()
        base_checks.require_finite(self.lm, logits, self.label)
        return logits.masked_fill(logits == -torch.inf, 0.0)

    def reads_later_tokens(self, allowed: float) -> bool:
        """Whether replacing the last token changes the logits of earlier tokens."""
        ids_BL = self.ids_BL[:1].repeat(2, 1)
        ids_BL[1, -1] = (ids_BL[1, -1] + 1) % self.rows
        logits_BLV = self.run(ids_BL, torch.ones_like(self.mask_BL), use_cache=False)
        return not _agree(logits_BLV[1, :-1], logits_BLV[0, :-1], allowed)

    def decoded(self) -> Tensor:
        """Logits of the whole text: a prefill of the second row, then the last tokens one by one with the cache."""
        ids, device = self.ids, self.ids_BL.device
        with base_checks.explaining_failure(self.label):
            cache = DynamicCache(config=self.lm.config)
        prefill = cache_inputs(self.takes, cache)
        logits = [self.run(self.ids_BL, self.mask_BL, use_cache=True, **prefill)[1, self.pads :]]
        with base_checks.explaining_failure(self.label):
            select_rows(cache, torch.arange(2, device=device).repeat_interleave(2))
        mask_BL = self.mask_BL.repeat_interleave(2, 0)
        ids_BL = torch.stack([ids.flip(0), ids.flip(0), ids, ids.flip(0)]).to(device)
        for t in range(self.short, len(ids)):
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], -1)
            inputs = {"attention_mask": None, **cache_inputs(self.takes, cache, mask_BL)}
            logits.append(self.run(ids_BL[:, t : t + 1], mask_BL, use_cache=True, **inputs)[-2])
            if t == self.short:  # one row leaves the batch, as ended responses do
                keep = torch.tensor([0, 2, 3], device=device)
                with base_checks.explaining_failure(self.label):
                    select_rows(cache, keep)
                mask_BL, ids_BL = mask_BL[keep], ids_BL[keep]
        return torch.cat(logits)


def _agree(one: Tensor, other: Tensor, allowed: float) -> bool:
    return bool((one - other).square().mean().sqrt() <= allowed * other.std())
