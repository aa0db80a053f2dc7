"""Packs a batch into one row without padding: each prompt once per group, then the responses. Used by `Players`.

# N = tokens of a batch, P = prompts, B = responses, S = padded prompt length, T = padded response length,
# K = S + T = keys of a response, A = attention heads, D = width of a head

Embeddings, norms, linear layers and adapters work on single tokens, so each real token is computed once. Only attention
connects tokens. The attention of this module, registered in transformers' attention interface, splits the row into
prompts and responses. Each response attends to its prompt and to itself. The results equal those of a padded batch to
rounding.

Some bases cannot use this attention: those with recurrent layers, sliding windows, biases or sinks. They read padded
rows. `Players` finds out by a trial which bases can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .tokens import pad, positions

Rows = Sequence[list[int]]  # token ids, row by row
ATTENTION = "lora_gan_packed"  # its name in transformers' attention interface


@dataclass(frozen=True)
class PackedLayout:
    """The indices of a row's tokens in the padded arrays of its prompts, [P, S], and of its responses, [B, T]."""

    prompts: tuple[int, int]  # P, S
    responses: tuple[int, int]  # B, T
    token_N: Tensor  # index of each token in the flattened [P·S + B·T]
    prompt_B: Tensor | None  # index of each response's prompt; None if all prompts have equally many, in order
    mask_B1TK: Tensor  # True where a response token attends to a key


@dataclass(frozen=True)
class Batch:
    """Responses and their prompts as inputs of the base: packed into one row, or as padded rows."""

    inputs: dict[str, Any]  # arguments of the base's forward, without `ids`
    ids: Tensor  # [1, N] packed, [B, L] padded
    # Indices into the flattened `ids`. R = tokens of all responses, row by row.
    response_R: Tensor  # the response tokens
    predicting_R: Tensor  # the tokens before the response tokens: their logits predict the response tokens
    pooled_B: Tensor  # the token of each response at which the score is read
    row_R: Tensor  # index of the response of each token
    packed: bool
    # Cached outputs of the frozen lower layers and of the reference, which both players use.
    frozen_outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def response_ids_R(self) -> Tensor:
        return self.ids.reshape(-1)[self.response_R]

    def __len__(self) -> int:
        return len(self.pooled_B)


def build_batch(
    prompts: Rows,
    responses: Rows,
    prompt_of: np.ndarray,
    *,
    packs: bool,
    pad_id: int,
    pad_on_disk: int | None,
    device: torch.device,
) -> Batch:
    """Build the inputs for responses and their prompts.

    Args:
        prompts: token ids of each prompt, at least one per prompt.
        responses: token ids of each response, with the end-of-text token.
        prompt_of: [B], index of each response's prompt.
        packs: True for one packed row, False for padded rows.
        pad_id: fills padded rows.
        pad_on_disk: the pad id in the base's config, which stock sequence classification skips; see `pooled`.
    """
    if packs:
        inputs, ids, first_B, before_B = _packed(prompts, responses, prompt_of, device)
    else:
        inputs, ids, first_B, before_B = _padded(prompts, responses, prompt_of, pad_id, device)
    response = [np.arange(len(answer)) + first for answer, first in zip(responses, first_B, strict=True)]
    predicting = [
        np.concatenate([[before], row[:-1]])[: len(row)] for before, row in zip(before_B, response, strict=True)
    ]
    texts = [(prompts[j], answer) for j, answer in zip(prompt_of, responses, strict=True)]
    offset_B = np.array([pooled([*prompt, *answer], pad_on_disk) - len(prompt) for prompt, answer in texts])
    pooled_B = np.where(offset_B >= 0, first_B + offset_B, before_B + 1 + offset_B)
    return Batch(
        inputs,
        ids,
        response_R=_tensor(np.concatenate(response), device),
        predicting_R=_tensor(np.concatenate(predicting), device),
        pooled_B=_tensor(pooled_B, device),
        row_R=_tensor(np.repeat(np.arange(len(responses)), [len(row) for row in response]), device),
        packed=packs,
    )


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def pooled(ids: list[int], pad_on_disk: int | None) -> int:
    """The index of the token at which stock sequence classification reads a row: the last one that is not the pad id.

    Stock transformers compares ids only. With pad = end-of-text, which is common for GPT-2, the result is the token
    before the end. Without a pad id it is the last token. It is 0 if the row contains only pad ids.
    """
    return next((index for index in reversed(range(len(ids))) if ids[index] != pad_on_disk), 0)


# Inputs, ids, the index of each response's first token, and the index of the token before it.
Layout = tuple[dict[str, Any], Tensor, np.ndarray, np.ndarray]


def _padded(prompts: Rows, responses: Rows, prompt_of: np.ndarray, pad_id: int, device: torch.device) -> Layout:
    """Rows of a prompt, padded on the left, and a response, padded on the right."""
    prompt_ids, prompt_mask = pad([prompts[j] for j in prompt_of], pad_id, side="left")
    response_ids, response_mask = pad(responses, pad_id, side="right")
    ids_BL = _tensor(np.concatenate([prompt_ids, response_ids], -1), device)
    mask_BL = _tensor(np.concatenate([prompt_mask, response_mask], -1).astype(np.int64), device)
    inputs = {"attention_mask": mask_BL, "position_ids": positions(mask_BL)}
    first_B = np.arange(len(responses)) * ids_BL.shape[1] + prompt_ids.shape[1]
    return inputs, ids_BL, first_B, first_B - 1


def _packed(prompts: Rows, responses: Rows, prompt_of: np.ndarray, device: torch.device) -> Layout:
    """One row: prompts, then responses."""
    prompt_lengths, lengths = np.array([len(p) for p in prompts]), np.array([len(r) for r in responses])
    starts = np.concatenate([[0], np.cumsum(np.concatenate([prompt_lengths, lengths]))])
    prompt_starts, first_B = starts[: len(prompts)], starts[len(prompts) : -1]
    ids = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in (*prompts, *responses)])
    position_ids = [np.arange(length) for length in prompt_lengths]
    position_ids += [np.arange(length) + prompt_lengths[j] for length, j in zip(lengths, prompt_of, strict=True)]

    S, T = prompt_lengths.max(), max(1, lengths.max())
    is_prompt_PS = np.arange(S) < prompt_lengths[:, None]
    is_response_BT = np.arange(T) < lengths[:, None]
    token_N = np.concatenate([np.flatnonzero(is_prompt_PS), np.flatnonzero(is_response_BT) + is_prompt_PS.size])
    prompt_mask_BTS = np.broadcast_to(is_prompt_PS[prompt_of][:, None], (len(responses), T, S))
    causal_mask_BTT = np.broadcast_to(np.tril(np.ones((T, T), dtype=bool)), (len(responses), T, T))
    mask_BTK = np.concatenate([prompt_mask_BTS, causal_mask_BTT], axis=-1)
    is_even = np.array_equal(prompt_of, np.arange(len(prompts)).repeat(len(responses) // len(prompts)))
    layout = PackedLayout(
        is_prompt_PS.shape,
        is_response_BT.shape,
        _tensor(token_N, device),
        None if is_even else _tensor(prompt_of, device),
        _tensor(mask_BTK[:, None], device),
    )
    inputs = {
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=device),  # some bases warn without a mask
        "position_ids": _tensor(np.concatenate(position_ids)[None], device),
        "packing": layout,
    }
    return inputs, _tensor(ids[None], device), first_B, prompt_starts[prompt_of] + prompt_lengths[prompt_of] - 1


# --- attention --------------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row for transformers' attention interface: query, key and value are [1, A, N, D].

    Returns:
        The output, [1, N, A, D], and None in place of the attention weights.

    Raises:
        NotImplementedError: this module's attention has a mask, window, bias or other input that is not supported.
    """
    special = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if packing is None or special or attention_mask is not None or dropout or len(query) != 1:
        raise NotImplementedError(f"{type(module).__name__} cannot read a packed row: {special or 'no layout'}")
    (P, S), (B, T) = packing.prompts, packing.responses

    def split(x_1AND: Tensor) -> tuple[Tensor, Tensor]:
        """The padded arrays of prompts, [P, S, A, D], and of responses, [B, T, A, D]."""
        x_NAD = x_1AND[0].transpose(0, 1)
        if x_NAD.shape[1] != query.shape[1]:  # grouped-query attention: fewer key and value heads
            x_NAD = x_NAD.repeat_interleave(query.shape[1] // x_NAD.shape[1], 1)
        padded = x_NAD.new_zeros(P * S + B * T, *x_NAD.shape[1:]).index_copy_(0, packing.token_N, x_NAD)
        x_prompts, x_responses = padded.split([P * S, B * T])
        return x_prompts.unflatten(0, (P, S)), x_responses.unflatten(0, (B, T))

    def with_prompt(x_PSAD: Tensor, x_BTAD: Tensor) -> Tensor:
        if packing.prompt_B is None:
            x_BSAD = x_PSAD.unsqueeze(1).expand(P, B // P, *x_PSAD.shape[1:]).flatten(0, 1)
        else:
            x_BSAD = x_PSAD.index_select(0, packing.prompt_B)
        return torch.cat([x_BSAD, x_BTAD], 1)

    (query_PSAD, query_BTAD), (key_PSAD, key_BTAD), (value_PSAD, value_BTAD) = map(split, (query, key, value))
    sdpa = nn.functional.scaled_dot_product_attention
    out_PSAD = sdpa(
        query_PSAD.transpose(1, 2), key_PSAD.transpose(1, 2), value_PSAD.transpose(1, 2), scale=scaling, is_causal=S > 1
    ).transpose(1, 2)
    out_BTAD = sdpa(
        query_BTAD.transpose(1, 2),
        with_prompt(key_PSAD, key_BTAD).transpose(1, 2),
        with_prompt(value_PSAD, value_BTAD).transpose(1, 2),
        attn_mask=packing.mask_B1TK,
        scale=scaling,
    ).transpose(1, 2)
    out = torch.cat([out_PSAD.flatten(0, 1), out_BTAD.flatten(0, 1)])
    return out.index_select(0, packing.token_N)[None], None  # [1, N, A, D]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
