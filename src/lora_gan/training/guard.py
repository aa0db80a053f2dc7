"""An anytime-valid test that the true reward has fallen: evidence of exploitation, which may be read after each step.

The generator exploits the discriminator when predictions rise and the true reward falls. The order of predictions does
not show it: in exploited runs on `tiny`, predicted and true rewards still agreed on the order of a prompt's responses
while the mean true reward fell by half (docs/decisions.md). So the test is about the level of the true reward.

The reference level is a lower confidence bound of the best window of steps so far. The null hypothesis is that the
expected true reward of a step is not below it. The test bets against the null hypothesis with a capital of 1. Under the
null hypothesis the capital exceeds 1/α with a probability of at most α, at any time (Ville 1939; Ramdas et al. 2023,
arXiv:2210.01948). A part of the capital is bet from each start on, so that a late fall is found, too (Shin, Ramdas and
Rinaldo 2022, arXiv:2203.03532). The reference is an estimate. So the error rate was also measured on simulated runs
(tests/training/test_guard.py). Used by `monitor`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..storage.untrusted import NUMBER, WHOLE

ALPHA = 0.05  # probability of a false alarm in a run; halved after each return to a kept generator
WINDOW = 10  # measured steps; a shorter window is noisier, and a longer one finds a fall later
ERRORS = 2.6  # standard errors from the best window's mean to the reference level; many windows compete to be the best
MARGIN = 0.1  # of the reward's spread within groups: a smaller fall is no exploitation
SCALE = 2.0  # standard deviations of a step's mean reward that count as 1 in a bet
LARGEST_BET = 0.9  # share of the capital
DECAY = 0.8  # per step, of the statistics from which the next bet is chosen


@dataclass
class Reference:
    """The level with which later steps are compared.

    Attributes:
        mean, predicted: mean true and predicted reward of the best window.
        level: the lower confidence bound, less the margin.
        spread: standard deviation of a step's mean true reward.
    """

    mean: float
    predicted: float
    level: float
    spread: float


@dataclass
class LevelTest:
    """The test of one run. `add` takes each measured step before any player learns from it.

    Attributes:
        recent: mean true and predicted reward of the last measured steps.
        reference: None during the first window.
        variances: sum of the windows' variances, and the number of windows.
        steps: steps of this segment that were compared with a reference.
        capital: of all starts so far. A start to come still has its part of the first capital.
        bets: decayed sums of X, X² and 1, where X is a step's difference from the level, −1 to 1.
        returns: how many times the generator was returned. Each segment has half of the α of the segment before.
    """

    recent: list[list[float]] = field(default_factory=list)
    reference: Reference | None = None
    variances: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: int = 0
    capital: float = 0.0
    bets: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    returns: int = 0

    def add(self, true: float, predicted: float, unit: float | None) -> bool:
        """Add a measured step.

        Args:
            true, predicted: the step's means over answered responses.
            unit: the reward's spread within groups; None if unknown.

        Returns:
            Whether the last window is the new reference.
        """
        if self.reference is not None:
            scale = max(SCALE * self.reference.spread, 1e-9 * max(1.0, abs(self.reference.mean)))
            self._bet((true - self.reference.level) / scale)
        self.recent = [*self.recent, [true, predicted]][-WINDOW:]
        return len(self.recent) == WINDOW and self._may_become_reference(unit or 0.0)

    def _bet(self, difference: float) -> None:
        if self.steps % WINDOW == 0:
            start = self.steps // WINDOW + 1
            self.capital += 1 / start - 1 / (start + 1)  # the parts of all starts sum to 1
        self.steps += 1
        x = min(max(difference, -1.0), 1.0)
        mean, square, weight = self.bets
        if weight and mean < 0:  # the growth-optimal bet for the recent steps, to second order
            self.capital *= 1 - min(LARGEST_BET, -mean / square) * x
        self.bets = [DECAY * mean + x, DECAY * square + x * x, DECAY * weight + 1]

    def _may_become_reference(self, unit: float) -> bool:
        true_T, predicted_T = np.array(self.recent).T
        variance, (total, windows) = float(true_T.var(ddof=1)), self.variances
        self.variances = [total + variance, windows + 1]
        spread = max(variance, self.variances[0] / self.variances[1]) ** 0.5
        level = float(true_T.mean()) - ERRORS * spread / WINDOW**0.5 - MARGIN * unit
        if self.reference is not None and level <= self.reference.level:
            return False
        self.reference = Reference(float(true_T.mean()), float(predicted_T.mean()), level, spread)
        return True

    @property
    def evidence(self) -> float:
        """The capital: how many times more likely the steps are under a fall than without one, in favour of a fall."""
        starts = -(-self.steps // WINDOW)
        return self.capital + 1 / (starts + 1)

    @property
    def limit(self) -> float:
        """The evidence at which the alarm is raised: 1/α."""
        return (2 ** (self.returns + 1) if self.returns else 1) / ALPHA

    def restart(self) -> None:
        """Start a new segment, after the generator was returned to the kept one. The reference stays."""
        self.recent, self.bets = [], [0.0, 0.0, 0.0]
        self.steps, self.capital, self.returns = 0, 0.0, self.returns + 1

    @property
    def spread(self) -> float:
        """Standard deviation of a step's mean true reward."""
        if self.reference is not None:
            return self.reference.spread
        return float(np.std([true for true, _ in self.recent], ddof=1)) if len(self.recent) > 1 else 0.0

    @property
    def level(self) -> float | None:
        """The level below which the expected true reward has fallen; None: it was never measured.

        Before there is a whole window, it is the lower confidence bound of the steps so far.
        """
        if self.reference is not None or not self.recent:
            return None if self.reference is None else self.reference.level
        return float(np.mean([true for true, _ in self.recent])) - ERRORS * self.spread / len(self.recent) ** 0.5

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "LevelTest":
        """The test from the result of `dataclasses.asdict`."""
        reference = state["reference"]
        return cls(**{**state, "reference": None if reference is None else Reference(**reference)})


#: The form of a LevelTest as a dict, and that of its reference, for `untrusted.require`.
SHAPE: dict[str, Any] = {
    "recent": [(float, float)],
    "reference": dict | None,
    "variances": (NUMBER, NUMBER),
    "steps": WHOLE,
    "capital": NUMBER,
    "bets": (float, NUMBER, NUMBER),
    "returns": WHOLE,
}
REFERENCE: dict[str, Any] = {"mean": float, "predicted": float, "level": float, "spread": NUMBER}
