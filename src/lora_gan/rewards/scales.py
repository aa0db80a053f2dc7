"""Several rewards in one sum. Each reward is divided by its own spread, so that the weights are comparable.

As TRL's `multi_objective_aggregation="normalize_then_sum"`, with two departures:

- The spread is a running estimate that is frozen after `window` answers. TRL uses the spread of the current batch. With
  that, the reward of a response would depend on the other responses: the corrected reward would be biased, and the
  target of the discriminator would change in every step.
- No mean is subtracted. The generator learns from differences within a group, and a constant does not change these.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .combine import Parts, checked_weights, weighted_total

EMPTY: dict[str, Any] = {"answers": 0, "mean": 0.0, "squares": 0.0, "freedom": 0}
ROUNDING = 1e-6  # relative to the mean of a reward; a smaller spread is rounding, for example of float32


class Scales:
    """The spread of each reward of a sum: its standard deviation within the groups of responses to one prompt.

    Only differences within groups reach the generator, and the spread between prompts is often several times larger.
    A single answer in a group counts by its distance from the mean of all answers before it (Welford 1962). If all
    groups have one answer, the spread is the standard deviation of all answers.

    Args:
        window: number of answers after which the scale of a reward is frozen. The update that reaches this number still
            counts completely.

    Raises:
        ValueError: window is less than 2.
    """

    def __init__(self, window: int = 512) -> None:
        if window < 2:
            raise ValueError(f"window={window} is not accepted: a spread needs 2 answers, so give at least 2")
        self.window = window
        self._stats: dict[str, dict[str, Any]] = {}

    def update(self, parts: Parts, groups: Sequence[Hashable] | None = None) -> None:
        """Update the spreads with the answers of one step.

        Args:
            parts: {name: one score or None per row}, as `score_parts` returns them.
            groups: the group of each row; None: each row is its own group.

        Raises:
            ValueError: `groups` and the scores differ in length.
        """
        for name, scores in parts.items():
            labels = range(len(scores)) if groups is None else groups
            grouped: dict[Hashable, list[float]] = {}
            for label, score in zip(labels, scores, strict=True):
                if score is not None:
                    grouped.setdefault(label, []).append(score)
            stats = self._stats.setdefault(name, dict(EMPTY))
            if stats["answers"] < self.window:
                for answers in grouped.values():
                    _add(stats, answers)

    def scale(self, name: str) -> float:
        """The divisor of a reward: its spread, or 1 until it has returned different answers."""
        stats = self._stats.get(name)
        if stats is None or stats["freedom"] == 0:
            return 1.0
        spread = math.sqrt(stats["squares"] / stats["freedom"])
        return spread if spread > ROUNDING * abs(stats["mean"]) else 1.0

    def total(self, parts: Parts, weights: Sequence[float] | None = None) -> list[float | None]:
        """The sum of weight · score / scale per row, over the rewards that apply to the row; None if none applies."""
        weights = checked_weights(weights, len(parts))
        return weighted_total(parts, [weight / self.scale(name) for weight, name in zip(weights, parts, strict=True)])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{name: {"answers", "mean", "squares", "freedom"}}, as ints and floats that JSON supports."""
        return {name: dict(stats) for name, stats in self._stats.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from a state_dict()."""
        self._stats = {
            name: {key: type(start)(stats[key]) for key, start in EMPTY.items()} for name, stats in state.items()
        }


def _add(stats: dict[str, Any], answers: list[float]) -> None:
    """Add the answers of one group: squared deviations from the mean of the group, or, for a single answer, from the
    running mean."""
    before = stats["mean"]
    for answer in answers:
        stats["answers"] += 1
        stats["mean"] += (answer - stats["mean"]) / stats["answers"]
    if len(answers) > 1:
        group_mean = math.fsum(answers) / len(answers)
        stats["squares"] += math.fsum((answer - group_mean) ** 2 for answer in answers)
        stats["freedom"] += len(answers) - 1
    elif stats["answers"] > 1:
        stats["squares"] += (answers[0] - before) * (answers[0] - stats["mean"])
        stats["freedom"] += 1
