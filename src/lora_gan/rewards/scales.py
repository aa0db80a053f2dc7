"""Several rewards in one sum: each divided by its own spread, so that the weights compare parts of different units.

As TRL's `multi_objective_aggregation="normalize_then_sum"`, with two departures:

- The spread is a running one, frozen after `window` answers, where TRL takes that of the batch at hand. A batch's own
  spread would make the reward of a response depend on its neighbours: the corrected reward would no longer be unbiased,
  and the discriminator's target would never hold still.
- No mean is subtracted. The generator learns from differences within a group, which no constant changes.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .combine import Parts, checked_weights, weighted_total

EMPTY: dict[str, Any] = {"answers": 0, "mean": 0.0, "squares": 0.0, "freedom": 0}
ROUNDING = 1e-6  # of a part's mean: a smaller spread is rounding (of float32, say), not a difference


class Scales:
    """The spread of each part of the reward: its standard deviation within the groups of responses to one prompt.

    Within groups, because only such differences reach the generator, and the spread between prompts is often several
    times larger. An answer that stands alone in its group counts by its distance from the mean of all before it
    (Welford 1962); where all do, the spread is the standard deviation of all answers.

    Args:
        window: answers of a part after which its scale is frozen; the update that reaches it still counts whole.
    """

    def __init__(self, window: int = 512) -> None:
        if window < 2:
            raise ValueError(f"window is {window}; a spread needs 2 answers or more")
        self.window = window
        self._parts: dict[str, dict[str, Any]] = {}

    def update(self, parts: Parts, groups: Sequence[Hashable] | None = None) -> None:
        """Take in one step's answers.

        Args:
            parts: {name: score of each row, or None}, as `score_parts` returns them.
            groups: which group each row belongs to; None = every row is a group of its own.

        Raises:
            ValueError: `groups` and a part differ in length.
        """
        for name, scores in parts.items():
            labels = range(len(scores)) if groups is None else groups
            grouped: dict[Hashable, list[float]] = {}
            for label, score in zip(labels, scores, strict=True):
                if score is not None:
                    grouped.setdefault(label, []).append(score)
            part = self._parts.setdefault(name, dict(EMPTY))
            if part["answers"] < self.window:
                for answers in grouped.values():
                    _take(part, answers)

    def scale(self, name: str) -> float:
        """What a part is divided by; 1 until it has had answers that differ."""
        part = self._parts.get(name)
        if part is None or part["freedom"] == 0:
            return 1.0
        spread = math.sqrt(part["squares"] / part["freedom"])
        return spread if spread > ROUNDING * abs(part["mean"]) else 1.0

    def total(self, parts: Parts, weights: Sequence[float] | None = None) -> list[float | None]:
        """The sum of weight · score / scale over the parts that apply to a row; None where none does."""
        weights = checked_weights(weights, len(parts))
        return weighted_total(parts, [weight / self.scale(name) for weight, name in zip(weights, parts, strict=True)])

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """{part: {"answers", "mean", "squares", "freedom"}}, plain ints and floats, as JSON can hold them."""
        return {name: dict(part) for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state_dict()."""
        self._parts = {
            name: {key: type(start)(part[key]) for key, start in EMPTY.items()} for name, part in state.items()
        }


def _take(part: dict[str, Any], answers: list[float]) -> None:
    """Add one group's answers: squared deviations from the group's mean, or from the mean so far for a lone one."""
    before = part["mean"]
    for answer in answers:
        part["answers"] += 1
        part["mean"] += (answer - part["mean"]) / part["answers"]
    if len(answers) > 1:
        middle = math.fsum(answers) / len(answers)
        part["squares"] += math.fsum((answer - middle) ** 2 for answer in answers)
        part["freedom"] += len(answers) - 1
    elif part["answers"] > 1:
        part["squares"] += (answers[0] - before) * (answers[0] - part["mean"])
        part["freedom"] += 1
