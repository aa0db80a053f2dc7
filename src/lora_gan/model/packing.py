"""A batch as the base reads it: real tokens in one row, each group's prompt once, no padding. Used by `Players`.

# N = tokens of a batch, P = prompts, B = responses, S = prompt places, T = response places,
# A = attention heads, D = width of a head, H = hidden size

A batch of responses is laid out as one row: the prompts, one after another, then the responses. All that a language
model does to a token on its own (embedding, norms, linear layers, their adapters) is done once for each real token.
Only attention looks at others, so only attention is told where they are: through transformers' attention interface, it
takes the row apart into prompts and responses, lets each response see its prompt and itself, and puts the row together
again. Numbers are the padded batch's to rounding.

Bases whose attention cannot be told (recurrent layers, windows, biases of their own, sinks) are read as padded rows;
`Players` finds out which by trying.
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
    """Where the tokens of a row stand among the places of its prompts, [P, S], and of its responses, [B, T]."""

    prompts: tuple[int, int]  # P, S
    responses: tuple[int, int]  # B, T
    token_N: Tensor  # each token's place in the flattened [P·S + B·T]
    prompt_B: Tensor | None  # which prompt a response answers; None = each prompt has equally many, in order
    seen_B1TK: Tensor  # what each response place sees of its prompt's S places and its own T


@dataclass(frozen=True)
class Batch:
    """Responses to prompts, as a base reads them: packed into one row, or as padded rows."""

    inputs: dict[str, Any]  # for the base's forward; `ids` aside
    ids: Tensor  # [1, N] packed, [B, L] padded
    # Places among the tokens of `ids`, flattened. R = tokens of all responses, row by row.
    response_R: Tensor  # the response tokens
    predicting_R: Tensor  # the tokens before them, whose logits predict them
    pooled_B: Tensor  # what the score is read off
    row_R: Tensor  # which response a token is of
    packed: bool
    # Outputs of frozen parts of the base, which both players use: of the lower layers, of the reference.
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
    """Lay out responses and the prompts they answer.

    Args:
        prompts: token ids of each prompt, one or more.
        responses: token ids of each response, the end-of-text token included.
        prompt_of: [B] which prompt each response answers.
        packs: whether the base can read one packed row.
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
    pooled_B = []
    for answer, first, before, prompt in zip(responses, first_B, before_B, prompt_of, strict=True):
        place = pooled([*prompts[prompt], *answer], pad_on_disk)
        own = place - len(prompts[prompt])
        pooled_B.append(first + own if own >= 0 else before + 1 + own)

    return Batch(
        inputs,
        ids,
        response_R=_tensor(np.concatenate(response), device),
        predicting_R=_tensor(np.concatenate(predicting), device),
        pooled_B=_tensor(np.array(pooled_B), device),
        row_R=_tensor(np.repeat(np.arange(len(responses)), [len(row) for row in response]), device),
        packed=packs,
    )


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def pooled(ids: list[int], pad_on_disk: int | None) -> int:
    """The place that stock sequence classification reads in a row: its last token that is not the pad id.

    Stock transformers looks at ids alone. With pad = end-of-text, the habit for GPT-2, that is the token before the
    end; without a pad id it is the last token of the row. A row of pad ids alone is read at its first.
    """
    place = len(ids) - 1
    while place > 0 and ids[place] == pad_on_disk:
        place -= 1
    return place


# Inputs, ids, each response's first place, and the place before it.
Layout = tuple[dict[str, Any], Tensor, np.ndarray, np.ndarray]


def _padded(prompts: Rows, responses: Rows, prompt_of: np.ndarray, pad_id: int, device: torch.device) -> Layout:
    """Rows, each with its own copy of the prompt, padded on the left, and the response, padded on the right."""
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
    ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in (*prompts, *responses)])
    counted = [np.arange(length) for length in prompt_lengths]
    counted += [np.arange(length) + prompt_lengths[j] for length, j in zip(lengths, prompt_of, strict=True)]

    wide, long = prompt_lengths.max(), max(1, lengths.max())
    of_prompt_PS = np.arange(wide) < prompt_lengths[:, None]
    of_response_BT = np.arange(long) < lengths[:, None]
    token_N = np.concatenate([np.flatnonzero(of_prompt_PS), np.flatnonzero(of_response_BT) + of_prompt_PS.size])
    own_TT = np.tril(np.ones((long, long), dtype=bool))
    seen_BTK = np.concatenate(
        [
            np.broadcast_to(of_prompt_PS[prompt_of][:, None], (len(responses), long, wide)),
            np.broadcast_to(own_TT, (len(responses), long, long)),
        ],
        axis=-1,
    )
    even = np.array_equal(prompt_of, np.arange(len(prompts)).repeat(len(responses) // len(prompts)))
    layout = PackedLayout(
        of_prompt_PS.shape,
        of_response_BT.shape,
        _tensor(token_N, device),
        None if even else _tensor(prompt_of, device),
        _tensor(seen_BTK[:, None], device),
    )
    inputs = {
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=device),  # some bases warn without one
        "position_ids": _tensor(np.concatenate(counted)[None], device),
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
    """Attention over a packed row, by transformers' attention interface: query, key and value [1, A, N, D].

    Raises:
        NotImplementedError: attention that knows more than queries and keys.
    """
    special = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if packing is None or special or attention_mask is not None or dropout or len(query) != 1:
        raise NotImplementedError(f"{type(module).__name__} cannot read a packed row: {special or 'no places'}")
    (P, S), (B, T) = packing.prompts, packing.responses

    def apart(x_1AND: Tensor) -> tuple[Tensor, Tensor]:
        x_NAD = x_1AND[0].transpose(0, 1)
        if x_NAD.shape[1] != query.shape[1]:  # fewer heads of keys and values than of queries
            x_NAD = x_NAD.repeat_interleave(query.shape[1] // x_NAD.shape[1], 1)
        places = x_NAD.new_zeros(P * S + B * T, *x_NAD.shape[1:]).index_copy_(0, packing.token_N, x_NAD)
        of_prompts, of_responses = places.split([P * S, B * T])
        return of_prompts.unflatten(0, (P, S)), of_responses.unflatten(0, (B, T))

    def with_prompt(of_prompts: Tensor, of_responses: Tensor) -> Tensor:
        if packing.prompt_B is None:
            before = of_prompts.unsqueeze(1).expand(P, B // P, *of_prompts.shape[1:]).flatten(0, 1)
        else:
            before = of_prompts.index_select(0, packing.prompt_B)
        return torch.cat([before, of_responses], 1)

    (query_PSAD, query_BTAD), (key_PSAD, key_BTAD), (value_PSAD, value_BTAD) = map(apart, (query, key, value))
    sdpa = nn.functional.scaled_dot_product_attention
    out_PSAD = sdpa(
        query_PSAD.transpose(1, 2), key_PSAD.transpose(1, 2), value_PSAD.transpose(1, 2), scale=scaling, is_causal=S > 1
    ).transpose(1, 2)
    out_BTAD = sdpa(
        query_BTAD.transpose(1, 2),
        with_prompt(key_PSAD, key_BTAD).transpose(1, 2),
        with_prompt(value_PSAD, value_BTAD).transpose(1, 2),
        attn_mask=packing.seen_B1TK,
        scale=scaling,
    ).transpose(1, 2)
    out = torch.cat([out_PSAD.flatten(0, 1), out_BTAD.flatten(0, 1)])
    return out.index_select(0, packing.token_N)[None], None  # [1, N, A, D]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
