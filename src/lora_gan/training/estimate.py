"""Which responses to ask the true reward for, and what the generator then learns from. `LoraGAN` draws the queries;
the generator's update computes rewards and advantages.

# B = responses, in group order; plain float64 NumPy, since all of it is bookkeeping on a few dozen numbers
NaN stands for "not asked" or "not answered".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import randomness
from ..config import QueryDesign

DECAY = 0.9  # per step, of `DecayedMean`


@dataclass(frozen=True)
class Queries:
    """Whom to ask: a draw, and the probability each response had of being in it."""

    asked_B: np.ndarray  # bool
    inclusion_B: np.ndarray  # float64, in [0, 1]


def choose_queries(
    group_B: np.ndarray,
    rate: float,
    *,
    seed: int,
    step: int,
    design: QueryDesign = "uniform",
    spread_B: np.ndarray | None = None,
    floor: float = 0.25,
    left: int | None = None,
) -> Queries:
    """Draw which responses the true reward is asked for, before anything is scored.

    Every design is a systematic sample of known inclusion probabilities over a random order (Madow 1949): the total is
    their sum rounded down or up, and where only `left` calls are left, never more than these.

    Args:
        group_B: which prompt a response answers.
        rate: share of all responses that is asked for.
        design: uniform: each response with probability `rate`, each group its share to within one. groups: whole
            groups. uncertain: in proportion to `spread_B`, not below floor · rate, not above 1.
        spread_B: how far the heads disagree, where the design is uncertain; all zero, or not finite, is as uniform.
        floor: least probability under the uncertain design, as a share of `rate`: 1/p is bounded by 1 / (floor · rate).
        left: true-reward calls that may still be made; None: no limit.
    """
    size = len(group_B)
    if left is not None and left < np.ceil(rate * size - 1e-9):
        rate = left / size
    rng = randomness.generator(seed, step, "query")
    if rate >= 1:
        return Queries(np.ones(size, dtype=bool), np.ones(size))
    if rate <= 0:
        return Queries(np.zeros(size, dtype=bool), np.zeros(size))
    if design == "groups":
        return _whole_groups(group_B, rate, left, rng)
    if design == "uncertain" and spread_B is not None and spread_B.any() and np.isfinite(spread_B).all():
        inclusion_B = _proportional(spread_B, rate, floor)
    else:
        inclusion_B = np.full(size, rate)
    order = np.lexsort((rng.random(size), group_B))  # group by group, shuffled inside each
    return Queries(_systematic(inclusion_B, order, rng.random()), inclusion_B)


def _systematic(inclusion: np.ndarray, order: np.ndarray, start: float) -> np.ndarray:
    """A fixed-size draw with these probabilities: one in every unit of their running sum along `order`."""
    edges = np.concatenate([[0.0], np.cumsum(inclusion[order])])
    if abs(edges[-1] - round(edges[-1])) < 1e-9 * len(order):
        edges *= round(edges[-1]) / edges[-1]  # a whole number stays one, or a budget could be passed by one
    drawn = np.zeros(len(inclusion), dtype=bool)
    drawn[order] = np.diff(np.floor(np.round(edges + start, 9))) > 0
    return drawn


def _whole_groups(group_B: np.ndarray, rate: float, left: int | None, rng: np.random.Generator) -> Queries:
    """Groups drawn whole. Where the calls left do not pay for one, part of a single one is asked for."""
    labels, index_B, sizes = np.unique(group_B, return_inverse=True, return_counts=True)
    count, largest = len(labels), int(sizes.max())
    order, start = rng.permutation(count), rng.random()
    if left is not None and left < largest * np.ceil(rate * count - 1e-9):
        rate = min(rate, (left // largest) / count)
    if rate > 0:
        drawn = _systematic(np.full(count, rate), order, start)
        return Queries(drawn[index_B], np.full(len(group_B), rate))
    members = np.flatnonzero(index_B == order[0])
    some = rng.permutation(members)[: min(left or 0, len(members))]
    asked_B = np.zeros(len(group_B), dtype=bool)
    asked_B[some] = True
    return Queries(asked_B, np.minimum((left or 0) / sizes[index_B], 1.0) / count)


def _proportional(spread_B: np.ndarray, rate: float, floor: float) -> np.ndarray:
    """Probabilities that sum to rate · B: the floor for all, the rest in proportion to the spread, none above 1."""
    total, least = rate * len(spread_B), floor * rate
    inclusion_B = np.full(len(spread_B), least)
    open_B = np.ones(len(spread_B), dtype=bool)
    while True:
        rest = total - inclusion_B[~open_B].sum() - least * open_B.sum()
        weight_B = np.where(open_B, spread_B, 0.0)
        share_B = weight_B / weight_B.sum() if weight_B.any() else open_B / open_B.sum()
        inclusion_B = np.where(open_B, least + rest * share_B, inclusion_B)
        over_B = open_B & (inclusion_B > 1)
        if not over_B.any():
            return inclusion_B
        inclusion_B[over_B], open_B = 1.0, open_B & ~over_B


def corrected_reward(predicted_B: np.ndarray, true_B: np.ndarray, inclusion_B: np.ndarray | float) -> np.ndarray:
    """predicted + asked/p · (true − predicted): the doubly robust estimate (Dudík et al. 2011, arXiv:1103.4601).

    Unbiased for the true reward however wrong the predictions are, when they have not seen this response's reward, and
    every response had a probability above zero. Where it was 1, an answered response's value is the true reward to
    the last bit, so that plain RLOO is reached exactly.
    """
    answered_B = ~np.isnan(true_B)
    inclusion_B = np.broadcast_to(np.asarray(inclusion_B, dtype=np.float64), true_B.shape)
    error_B = np.where(answered_B, np.nan_to_num(true_B) - predicted_B, 0.0)
    corrected_B = predicted_B + error_B / np.where(inclusion_B > 0, inclusion_B, 1.0)
    return np.where(answered_B & (inclusion_B >= 1), true_B, corrected_B)


def answered_inclusion(inclusion_B: np.ndarray, asked_B: np.ndarray, failed_B: np.ndarray) -> np.ndarray:
    """Probabilities with which each response was asked for and answered, where calls failed, [B].

    Assumption: whether a call fails does not depend on the response. The probability of an answer is then estimated by
    the share of this step's calls that were answered. Probabilities of 1 stay 1: there `corrected_reward` is the true
    reward, and a failed response has no reward at all (`Experience.dropped_B`), which needs no weight.
    """
    if not failed_B.any():
        return inclusion_B
    answered = 1 - failed_B.sum() / asked_B.sum()
    return np.where(inclusion_B < 1, inclusion_B * answered, inclusion_B)


def gated_lower_bound(predicted_MB: np.ndarray, group_B: np.ndarray, *, penalty: float, gate: float) -> np.ndarray:
    """The predictions that the generator learns from, [B]: a lower confidence bound over the heads, moved to its
    group's mean by the share 1 − gate. Only differences within a group reach the generator; a gate of zero leaves
    none."""
    bound_B = predicted_MB.mean(0)
    if penalty:
        bound_B = bound_B - penalty * predicted_MB.std(0)
    if gate >= 1:
        return bound_B
    left_B = centered_within_groups(bound_B, group_B)
    return bound_B - left_B + gate * left_B


def centered_within_groups(values_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Values minus their group's mean, [B]: all that reaches the generator."""
    _, index_B = np.unique(group_B, return_inverse=True)
    return values_B - (np.bincount(index_B, values_B) / np.bincount(index_B))[index_B]


@dataclass
class DecayedMean:
    """A weighted mean in which older values count less. As the baseline of groups of one, an exponential mean of past
    rewards with bias correction (Kingma and Ba 2015)."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def add(self, total: float, weight: float) -> None:
        """Add a weighted sum of values, and their weight."""
        self.total, self.weight = DECAY * self.total + total, DECAY * self.weight + weight


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
