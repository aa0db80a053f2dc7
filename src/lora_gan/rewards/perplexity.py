"""A reward by the base: the probability of a response under the base. It costs one forward and no further model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..messages import completion_text

if TYPE_CHECKING:
    from ..data import Row


class BaseScorer(Protocol):
    """An object that scores by a base, such as a LoraGAN."""

    @property
    def base_name(self) -> str: ...
    @property
    def base_fingerprint(self) -> str: ...
    def base_logprobs(self, rows: list[Row], texts: list[str], *, batch_size: int) -> list[float | None]: ...


class Perplexity:
    """Mean log-probability of a response's tokens, given the prompt, under the untouched base: −log perplexity.

    In nats per token, at most 0, higher is better. The end-of-text token counts as a token, so the score of an empty
    response is the log-probability of this token. A reward of TRL's form. `LoraGAN` binds it to its base.

    Args:
        batch_size: rows per forward. It affects memory, and scores only by rounding.

    Raises:
        ValueError: batch_size is less than 1.
    """

    __name__ = "perplexity"  # the name in logs

    def __init__(self, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        self.batch_size = batch_size
        self._scorer: BaseScorer | None = None

    def bind(self, gan: BaseScorer) -> None:
        """Score by the base of this LoraGAN. A second LoraGAN must have the same base.

        Raises:
            ValueError: this reward is already bound to another base.
        """
        bound = self._scorer
        if bound is not None and bound.base_fingerprint != gan.base_fingerprint:
            raise ValueError(
                f"this Perplexity already scores by the base {bound.base_name!r}, not by {gan.base_name!r}: make one "
                "Perplexity per LoraGAN"
            )
        self._scorer = gan

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completion i as the response to prompt i. Both are texts or chat messages.

        Returns:
            one float per completion; None if the prompt leaves no room for a response in the base's context.

        Raises:
            ValueError: this reward is not bound to a base, or prompt and response exceed the base's context.
        """
        from .. import data

        if self._scorer is None:
            raise ValueError(
                "Perplexity has no base: pass it to LoraGAN(reward_funcs=[Perplexity(), ...]), which binds it to its "
                "base, or call bind(gan)"
            )
        options = {name: values for name, values in columns.items() if name in data.TEMPLATE_COLUMNS}
        rows = [
            data.Row(prompt, None, {name: values[i] for name, values in options.items()})
            for i, prompt in enumerate(prompts)
        ]
        texts = [completion_text(completion) for completion in completions]
        return self._scorer.base_logprobs(rows, texts, batch_size=self.batch_size)
