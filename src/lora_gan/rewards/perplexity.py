"""A reward that asks the base itself: how probable it finds a response. It costs a forward and no further model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..messages import completion_text

if TYPE_CHECKING:
    from ..data import Row


class BaseScorer(Protocol):
    """What scores by a base: a LoraGAN."""

    @property
    def base_name(self) -> str: ...
    @property
    def base_fingerprint(self) -> str: ...
    def base_logprobs(self, rows: list[Row], texts: list[str], *, batch_size: int) -> list[float | None]: ...


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
        self._scorer: BaseScorer | None = None

    def bind(self, gan: BaseScorer) -> None:
        """Score by this LoraGAN's base from now on; a second one must have the same base.

        Raises:
            ValueError: it is bound to another base already.
        """
        bound = self._scorer
        if bound is not None and bound.base_fingerprint != gan.base_fingerprint:
            raise ValueError(
                f"this Perplexity scores by the base {bound.base_name!r} already, not by {gan.base_name!r}: make one "
                "for each LoraGAN"
            )
        self._scorer = gan

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completion i, an answer to prompt i; texts, or chat messages. None: the prompt leaves it no place.

        Raises:
            ValueError: it was never bound to a base, or prompt and response do not fit into the base's context.
        """
        from .. import data

        if self._scorer is None:
            raise ValueError(
                "Perplexity has no base to score by: give it to LoraGAN(reward_funcs=[Perplexity(), ...]), which binds "
                "it to its own, or call bind(gan)"
            )
        options = {name: values for name, values in columns.items() if name in data.TEMPLATE_COLUMNS}
        rows = [
            data.Row(prompt, None, {name: values[i] for name, values in options.items()})
            for i, prompt in enumerate(prompts)
        ]
        texts = [completion_text(completion) for completion in completions]
        return self._scorer.base_logprobs(rows, texts, batch_size=self.batch_size)
