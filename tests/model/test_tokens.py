"""Padding of id lists and positions, against rows written by hand."""

import numpy as np
import torch

from lora_gan.model.tokens import pad, positions


def test_rows_are_padded_on_either_side():
    rows = [[5, 6, 7], [], [8]]
    ids, mask = pad(rows, 1, side="right")
    assert ids.tolist() == [[5, 6, 7], [1, 1, 1], [8, 1, 1]] and ids.dtype == np.int64
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    ids, mask = pad(rows, 1, side="left")
    assert ids.tolist() == [[5, 6, 7], [1, 1, 1], [1, 1, 8]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [False, False, True]]


def test_rows_without_tokens_have_one_place():
    ids, mask = pad([[], []], 3, side="right")
    assert ids.tolist() == [[3], [3]] and not mask.any()


def test_positions_begin_at_the_first_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
