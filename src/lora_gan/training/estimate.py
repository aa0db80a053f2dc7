"""Query designs, the corrected reward and advantages. `gan` draws the queries; the generator uses the rest.

# B = responses, in group order

All arrays are float64 NumPy arrays of a few dozen numbers. NaN means "not queried" or "not answered".
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .. import randomness
from ..config import QueryDesign

DECAY = 0.9  # per step, of `DecayedMean`
HELD_FROM = 32  # differences after which `GroupSpread` no longer changes; its relative error is then about 12 %


@dataclass(frozen=True)
class Queries:
    """The responses drawn for a query of the true reward, and each response's inclusion probability."""

    asked_B: np.ndarray  # bool: drawn
    inclusion_B: np.ndarray  # float64: probability of being drawn, 0 to 1


def choose_queries(
    group_B: np.ndarray,
    rate: float,
    *,
    seed: int,
    step: int,
    design: QueryDesign = "uniform",
    left: int | None = None,
) -> Queries:
    """Draw the responses for which the true reward is queried, before any true reward is known.

    Each design is a systematic sample with known inclusion probabilities over a random order (Madow 1949). The number
    of draws is the probabilities' sum, rounded down or up, and at most `left`.

    Args:
        group_B: the prompt's index of each response.
        rate: share of all responses to query.
        design: uniform: each response with probability `rate`; the draws per group differ by at most one. groups: whole
            groups.
        left: remaining true-reward calls; None: no limit.
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
    inclusion_B = np.full(size, rate)
    order = np.lexsort((rng.random(size), group_B))  # group by group, shuffled within each group
    return Queries(_systematic(inclusion_B, order, rng.random()), inclusion_B)


def _systematic(inclusion: np.ndarray, order: np.ndarray, start: float) -> np.ndarray:
    """A systematic sample: one draw per unit of the probabilities' running sum along `order`, from offset `start`."""
    edges = np.concatenate([[0.0], np.cumsum(inclusion[order])])
    if abs(edges[-1] - round(edges[-1])) < 1e-9 * len(order):
        edges *= round(edges[-1]) / edges[-1]  # remove rounding from a whole sum: one draw more could exceed the budget
    drawn = np.zeros(len(inclusion), dtype=bool)
    drawn[order] = np.diff(np.floor(np.round(edges + start, 9))) > 0
    return drawn


def _whole_groups(group_B: np.ndarray, rate: float, left: int | None, rng: np.random.Generator) -> Queries:
    """Draw whole groups. If `left` is less than one group, draw that many responses of a single group."""
    labels, index_B, sizes = np.unique(group_B, return_inverse=True, return_counts=True)
    count, largest = len(labels), int(sizes.max())
    order, start = rng.permutation(count), rng.random()
    if left is not None and left < largest * np.ceil(rate * count - 1e-9):
        rate = min(rate, (left // largest) / count)
    if rate > 0:
        drawn = _systematic(np.full(count, rate), order, start)
        return Queries(drawn[index_B], np.full(len(group_B), rate))
    members = np.flatnonzero(index_B == order[0])
    asked_B = np.zeros(len(group_B), dtype=bool)
    asked_B[rng.permutation(members)[: left or 0]] = True
    return Queries(asked_B, np.minimum((left or 0) / sizes[index_B], 1.0) / count)


def corrected_reward(predicted_B: np.ndarray, true_B: np.ndarray, inclusion_B: np.ndarray | float) -> np.ndarray:
    """predicted + asked/p · (true − predicted), [B]: the doubly robust estimate (Dudík et al. 2011, arXiv:1103.4601).

    The estimate is unbiased for any predictions that were made without this response's reward, if every p is above 0.
    At p = 1 an answered response gets bitwise its true reward, so the update equals plain RLOO.
    """
    answered_B = ~np.isnan(true_B)
    inclusion_B = np.broadcast_to(np.asarray(inclusion_B, dtype=np.float64), true_B.shape)
    error_B = np.where(answered_B, np.nan_to_num(true_B) - predicted_B, 0.0)
    corrected_B = predicted_B + error_B / np.where(inclusion_B > 0, inclusion_B, 1.0)
    return np.where(answered_B & (inclusion_B >= 1), true_B, corrected_B)


def answered_inclusion(inclusion_B: np.ndarray, asked_B: np.ndarray, failed_B: np.ndarray) -> np.ndarray:
    """Probability that each response was queried and answered, [B]: the inclusion probability, corrected for failures.

    Assumption: failures do not depend on the response. The share of answered calls in this step then estimates the
    probability of an answer. Probabilities of 1 stay 1: there `corrected_reward` returns the true reward, and
    `Experience.dropped_B` excludes failed responses.

    Args:
        inclusion_B: probability that the response was queried.
        asked_B: bool: queried.
        failed_B: bool: queried without an answer.
    """
    if not failed_B.any():
        return inclusion_B
    answered = 1 - failed_B.sum() / asked_B.sum()
    return np.where(inclusion_B < 1, inclusion_B * answered, inclusion_B)


def scaled_by_trust(predicted_B: np.ndarray, group_B: np.ndarray, trust: float) -> np.ndarray:
    """The predictions that the generator learns from, [B].

    Trust (0 to 1) scales the differences from the group's mean. Only these differences reach the generator, so at trust
    0 it learns nothing from predictions.
    """
    if trust == 1:
        return predicted_B
    centered_B = centered_within_groups(predicted_B, group_B)
    return predicted_B - centered_B + trust * centered_B


def centered_within_groups(values_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Values minus their group's mean, [B]. Only these differences reach the generator."""
    _, index_B = np.unique(group_B, return_inverse=True)
    return values_B - (np.bincount(index_B, values_B) / np.bincount(index_B))[index_B]


@dataclass
class DecayedMean:
    """A weighted mean in which older values decay by `DECAY` per step.

    As the baseline for groups of one response, it is an exponential mean of past rewards with bias correction (Kingma
    and Ba 2015).
    """

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def add(self, total: float, weight: float) -> None:
        """Add one step: the weighted sum of its values, and the sum of their weights."""
        self.total, self.weight = DECAY * self.total + total, DECAY * self.weight + weight


@dataclass
class GroupSpread:
    """The standard deviation of the true reward within groups, over the first answers of a run: the unit of the loss.

    The loss divides the reward's term by this unit. `beta` and the other weights then mean the same for a reward of any
    scale. The unit is held after `HELD_FROM` differences: if it followed the policy, it would fall with the spread, and
    noise would be amplified.
    """

    squares: float = 0.0  # squared differences from the groups' means
    differences: float = 0.0  # answers minus groups

    @property
    def value(self) -> float | None:
        """In reward units. None: no difference is known yet."""
        return (self.squares / self.differences) ** 0.5 if self.squares > 0 else None

    @property
    def is_held(self) -> bool:
        return self.differences >= HELD_FROM and self.squares > 0

    def add(self, squares: float, differences: float) -> None:
        """Add one step's sums, the result of `squared_differences`."""
        if not self.is_held:
            self.squares, self.differences = self.squares + squares, self.differences + differences


def squared_differences(reward_B: np.ndarray, group_B: np.ndarray) -> tuple[float, int]:
    """The sum of squared differences from the groups' means, and their number: known rewards minus groups."""
    known_B = np.isfinite(reward_B)
    if not known_B.any():
        return 0.0, 0
    known, groups = reward_B[known_B], group_B[known_B]
    return float(np.square(centered_within_groups(known, groups)).sum()), len(known) - len(np.unique(groups))


class Calibration:
    """Regression of the true reward on fresh predictions within groups, over earlier steps.

    There are several predictions of each response, and the regression weights them. Older steps decay by `DECAY` per
    measured step. `trust` is the positive part of 1 − 1/F, with the F statistic of the regression (James and Stein
    1961). It is 0 while the data do not show that the predictions know anything.

    Args:
        predictions: number of predictions of each response.
    """

    def __init__(self, predictions: int) -> None:
        self.moments = np.zeros((1 + predictions, 1 + predictions))  # sums of products; the true reward is first
        self.differences = 0.0  # answers minus groups

    @property
    def is_measured(self) -> bool:
        return self.differences > 0

    def add(self, moments: np.ndarray, differences: float) -> None:
        """Add one step's sums, the result of `moments_within_groups`."""
        self.moments = DECAY * self.moments + moments
        self.differences = DECAY * self.differences + differences

    @property
    def weights(self) -> np.ndarray:
        """Least-squares weight of each prediction, 0 or more. They bring differences to the true reward's scale."""
        products, squares = self.moments[0, 1:], self.moments[1:, 1:]
        best, found = 0.0, np.zeros(len(products))
        for chosen in _subsets(len(products)):
            square = squares[np.ix_(chosen, chosen)]
            weights = np.linalg.lstsq(square, products[chosen], rcond=1e-9)[0]
            explained = float(weights @ products[chosen])
            if (weights >= 0).all() and explained > best * (1 + 1e-9):
                best, found = explained, np.zeros(len(products))
                found[chosen] = weights
        return found

    @property
    def _explained(self) -> float:
        return min(1.0, float(self.weights @ self.moments[0, 1:]) / self.moments[0, 0]) if self.moments[0, 0] else 0.0

    @property
    def trust(self) -> float:
        """Factor of the predictions, 0 to 1."""
        return shrinkage(self._explained, int((self.weights > 0).sum()), self.differences)


def shrinkage(explained: float, used: int, differences: float) -> float:
    """The positive part of 1 − 1/F, with the F statistic of a regression (James and Stein 1961).

    Args:
        explained: share of the variance that the regression explains, 0 to 1.
        used: number of predictors.
        differences: observations minus the number of means that were subtracted.
    """
    if explained <= 0 or differences <= used:
        return 0.0
    return float(max(0.0, 1 - used * (1 - explained) / explained / (differences - used)))


def explained_share(predicted_N: np.ndarray, true_N: np.ndarray) -> float:
    """Share of the variance of `true_N` that `predicted_N` explains, 0 to 1, both centred within groups.

    It is the squared correlation, and 0 if they disagree, or if predictions are rounding.
    """
    product, predicted, true = float(predicted_N @ true_N), float(predicted_N @ predicted_N), float(true_N @ true_N)
    if product <= 0 or predicted <= 1e-12 * true:
        return 0.0
    return min(1.0, product**2 / (predicted * true))


def _subsets(count: int) -> list[list[int]]:
    """Every non-empty set of indices, small sets first."""
    return [list(chosen) for size in range(1, count + 1) for chosen in combinations(range(count), size)]


def moments_within_groups(
    predictions_KB: np.ndarray, true_B: np.ndarray, group_B: np.ndarray
) -> tuple[np.ndarray, float]:
    """The sums that `Calibration` adds up. Responses without a true reward or a finite prediction are left out."""
    known_B = np.isfinite(true_B) & np.isfinite(predictions_KB).all(0)
    if not known_B.any():
        return np.zeros((1 + len(predictions_KB),) * 2), 0.0
    groups = group_B[known_B]
    centered = np.stack([centered_within_groups(row[known_B], groups) for row in (true_B, *predictions_KB)])
    return centered @ centered.T, float(len(groups) - len(np.unique(groups)))


def advantages(reward_B: np.ndarray, group_B: np.ndarray, baseline: float) -> np.ndarray:
    """Reward minus the mean reward of the rest of its group, [B] (leave-one-out, RLOO: Kool et al. 2019, Ahmadian et
    al. 2024).

    A response without others in its group gets reward − `baseline`. A NaN reward is left out of its group, and its
    advantage is 0.
    """
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
