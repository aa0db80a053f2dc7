"""Log-probabilities of given responses under the base, with both adapters off. `gan` serves them to `Perplexity`.

# B = responses in one forward pass, R = tokens of these responses, V = vocabulary, H = hidden size
"""

import numpy as np
import torch

from ..data import Row
from ..model import sampling
from ..model.players import Players
from . import losses


def mean_logprobs(players: Players, rows: list[Row], texts: list[str], *, batch_size: int) -> list[float | None]:
    """Mean log-probability per token of each text under the base, in nats, with the text as the response to its row.

    The end token counts. A score is None if the prompt fills the whole context.

    Args:
        rows: one row per text.
        batch_size: rows in one forward pass. It changes the memory use, and the scores only to rounding.

    Raises:
        ValueError: prompt and response do not fit into the base's context.
    """
    scores: list[float | None] = []
    for chunk in sampling.chunks(len(rows), batch_size):
        encoded = players.encoder.pairs(rows[chunk], texts[chunk])
        batch = players.batch(*encoded, np.arange(len(texts[chunk])))
        logprobs = [torch.zeros(0, device=players.device)]  # all responses may be empty
        with torch.no_grad(), players.use_adapter("base"):
            hidden_RH = players.hidden(batch, batch.predicting_R)
            for tokens in sampling.chunks(len(hidden_RH), players.tokens_at_once):
                logprobs.append(losses.token_logprobs(players.lm_head(hidden_RH[tokens]), batch.response_ids_R[tokens]))
        total_B = torch.zeros(len(batch), device=players.device).index_add_(0, batch.row_R, torch.cat(logprobs))
        scores += [total / len(ids) if ids else None for total, ids in zip(total_B.tolist(), encoded[1], strict=True)]
    return scores
