"""How probable the untouched base finds given responses: what the reward `Perplexity` asks. Used by `gan`.

# B = responses of one forward, R = their tokens, V = vocabulary, H = hidden size
"""

from __future__ import annotations

import numpy as np
import torch

from ..data import Row
from ..model import sampling
from ..model.players import Players
from . import losses


def mean_logprobs(players: Players, rows: list[Row], texts: list[str], *, batch_size: int) -> list[float | None]:
    """Mean log-probability per token of each text as the response to its row, under the base, in nats.

    The end token counts. None: the prompt leaves the response no room.

    Args:
        rows: one per text.
        batch_size: rows in one forward; changes memory, and scores only to rounding.

    Raises:
        ValueError: prompt and response do not fit into the base's context.
    """
    scores: list[float | None] = []
    for part in sampling.chunks(len(rows), batch_size):
        encoded = players.encoder.pairs(rows[part], texts[part])
        batch = players.batch(*encoded, np.arange(len(texts[part])))
        logprobs = [torch.zeros(0, device=players.device)]  # all responses may be empty
        with torch.no_grad(), players.use_adapter("base"):
            hidden_RH = players.hidden(batch, batch.predicting_R)
            for some in sampling.chunks(len(hidden_RH), players.tokens_at_once):
                logprobs.append(losses.token_logprobs(players.head(hidden_RH[some]), batch.response_ids_R[some]))
        total_B = torch.zeros(len(batch), device=players.device).index_add_(0, batch.row_R, torch.cat(logprobs))
        scores += [total / len(ids) if ids else None for total, ids in zip(total_B.tolist(), encoded[1], strict=True)]
    return scores
