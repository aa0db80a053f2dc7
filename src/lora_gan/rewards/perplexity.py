"""A reward that asks the base itself: how probable it finds a response. It costs a forward and no further model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .messages import completion_text

if TYPE_CHECKING:
    from ..gan import LoraGAN


class Perplexity:
    """Mean log-probability of a response's tokens, given the prompt, under the untouched base: −log perplexity.

    In nats a token, at most 0, higher is better. The end-of-text token counts as one, so an empty response scores the
    log-probability of ending at once. Of TRL's form; `LoraGAN` binds it to its base.

    Args:
        batch_size: rows in one forward; changes memory, and scores only to rounding.
    """

    __name__ = "perplexity"  # what logs call this part of a sum of rewards

    def __init__(self, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        self.batch_size = batch_size
        self._gan: LoraGAN | None = None

    def bind(self, gan: "LoraGAN") -> None:
        """Score by this LoraGAN's base from now on; a second one must have the same base.

        Raises:
            ValueError: it is bound to another base already.
        """
        bound = self._gan
        if bound is not None and bound.players.base.fingerprint != gan.players.base.fingerprint:
            raise ValueError(
                f"this Perplexity scores by the base {bound.players.base.name!r} already, not by "
                f"{gan.players.base.name!r}: make one for each LoraGAN"
            )
        self._gan = gan

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completion i, an answer to prompt i; texts, or chat messages. None: the prompt leaves it no place.

        Raises:
            ValueError: it was never bound to a base, or prompt and response do not fit into the base's context.
        """
        import numpy as np
        import torch

        from .. import data
        from ..model import sampling
        from ..training import losses

        if self._gan is None:
            raise ValueError(
                "Perplexity has no base to score by: give it to LoraGAN(reward_funcs=[Perplexity(), ...]), which binds "
                "it to its own, or call bind(gan)"
            )
        players = self._gan.players
        options = {name: values for name, values in columns.items() if name in data.TEMPLATE_COLUMNS}
        rows = [
            data.Row(prompt, None, {name: values[i] for name, values in options.items()})
            for i, prompt in enumerate(prompts)
        ]
        scores: list[float | None] = []
        for part in sampling.chunks(len(prompts), self.batch_size):
            texts = [completion_text(completion) for completion in completions[part]]
            encoded = players.encoder.pairs(rows[part], texts)
            batch = players.batch(*encoded, np.arange(len(texts)))
            logprobs = [torch.zeros(0, device=players.device)]  # all responses may be empty
            with torch.no_grad(), players.playing("base"):
                hidden_RH = players.hidden(batch, batch.predicting_R)
                for some in sampling.chunks(len(hidden_RH), players.tokens_at_once):
                    logits_R1V = players.head(hidden_RH[some])[:, None]
                    logprobs.append(losses.token_logprobs(logits_R1V, batch.response_ids_R[some, None])[:, 0])
            total_B = torch.zeros(len(batch), device=players.device).index_add_(0, batch.row_R, torch.cat(logprobs))
            scores += [
                total / len(ids) if ids else None for total, ids in zip(total_B.tolist(), encoded[1], strict=True)
            ]
        return scores
