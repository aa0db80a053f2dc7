"""Which responses to ask the true reward for, and what the generator then learns from.

# B = responses, in group order; plain float64 NumPy, since all of it is bookkeeping on a few dozen numbers
NaN stands for "not asked" or "not answered".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import randomness


def choose_queries(group_B: np.ndarray, rate: float, *, seed: int, step: int) -> np.ndarray:
    """Draw which responses the true reward is asked for, before anything is scored; bool [B].

    Systematic sampling over a random order within each group: every response is included with probability exactly
    `rate`, the total is ⌊rate·B⌋ or ⌈rate·B⌉, and each group gets its share to within one (Madow 1949).
    """
    if rate >= 1:
        return np.ones(len(group_B), dtype=bool)
    rng = randomness.generator(seed, step, "query")
    order = np.lexsort((rng.random(len(group_B)), group_B))  # group by group, shuffled inside each
    edges = np.floor(np.arange(len(group_B) + 1) * rate + rng.random())
    asked_B = np.zeros(len(group_B), dtype=bool)
    asked_B[order] = np.diff(edges) > 0
    return asked_B


def corrected_reward(predicted_B: np.ndarray, true_B: np.ndarray, rate: float) -> np.ndarray:
    """predicted + asked/p · (true − predicted): the doubly robust estimate (Dudík et al. 2011, arXiv:1103.4601).

    Unbiased for the true reward however wrong the predictions are, when they have not seen this response's reward.
    At rate 1 an answered response's value is the true reward to the last bit, so that plain RLOO is reached exactly.
    """
    answered_B = ~np.isnan(true_B)
    if rate >= 1:
        return np.where(answered_B, true_B, predicted_B)
    return predicted_B + np.where(answered_B, (np.nan_to_num(true_B) - predicted_B) / rate, 0.0)


@dataclass
class RunningMean:
    """The baseline for groups of one: an exponential mean of past rewards, bias-corrected (Kingma and Ba 2015)."""

    decay: float = 0.9
    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def update(self, reward: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * reward
        self.weight = self.decay * self.weight + (1 - self.decay)


def advantages(reward_B: np.ndarray, group_B: np.ndarray, baseline: float) -> np.ndarray:
    """Reward minus the mean reward of the rest of its group (leave-one-out: RLOO, Kool et al. 2019, Ahmadian et al.
    2024); where the rest is empty, minus `baseline`. A NaN reward has no part in its group, and advantage 0."""
    known_B = ~np.isnan(reward_B)
    advantage_B = np.zeros_like(reward_B)
    for group in np.unique(group_B):
        members = np.flatnonzero((group_B == group) & known_B)
        if len(members) > 1:
            others = (reward_B[members].sum() - reward_B[members]) / (len(members) - 1)
        else:
            others = baseline
        advantage_B[members] = reward_B[members] - others
    return advantage_B
