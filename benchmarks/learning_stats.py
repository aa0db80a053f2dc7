"""Intervals of the learning benchmark: bootstrap over seeds and prompts, paired where arms are compared.

# S = seeds, P = held-out prompts, D = bootstrap draws, M = marks of a run

All seeds are evaluated on the same prompts. Each bootstrap draw therefore draws the prompts once, for all seeds and for
both arms. An interval then covers other seeds AND other prompts (hierarchical, crossed; Efron and Tibshirani 1993,
chapter 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from lora_gan import randomness

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 2.5 and 97.5 percentiles."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        if not np.isfinite(self.mean):
            return "–"
        if self.low == self.high:  # one run
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Draws:
    """How often each bootstrap draw contains each seed and each prompt."""

    seeds_DS: np.ndarray
    prompts_DP: np.ndarray

    def means(self, values_SP: np.ndarray) -> np.ndarray:
        """The mean over seeds and prompts of each draw, [D]."""
        seeds, prompts = values_SP.shape
        return ((self.seeds_DS @ values_SP) * self.prompts_DP).sum(-1) / (seeds * prompts)


def draws(seeds: int, prompts: int, count: int = DRAWS) -> Draws:
    """Bootstrap draws. They depend only on the numbers of seeds and prompts, so the draws of two arms are paired."""
    return Draws(_counts(seeds, count, "seeds"), _counts(prompts, count, "prompts"))


def _counts(size: int, count: int, purpose: str) -> np.ndarray:
    picks_DN = randomness.generator(0, size, f"bootstrap {purpose}").integers(size, size=(count, size))
    counts_DN = np.zeros((count, size))
    np.add.at(counts_DN, (np.arange(count)[:, None], picks_DN), 1.0)
    return counts_DN


def interval(values_SP: np.ndarray, count: int = DRAWS) -> Interval:
    """Mean over seeds and prompts, with its interval. With one seed the interval is over prompts only."""
    return of(float(values_SP.mean()), draws(*values_SP.shape, count).means(values_SP))


def of(estimate: float, drawn_D: np.ndarray) -> Interval:
    low, high = np.quantile(drawn_D, (0.025, 0.975))
    return Interval(estimate, float(low), float(high))


def over_seeds(values: Sequence[float | None], count: int = DRAWS) -> Interval | None:
    """Interval of a metric with one number per run. None if no run measured it."""
    known = np.array([value for value in values if value is not None], dtype=float)
    return interval(known[:, None], count) if len(known) else None


def calls_to_reach(calls_M: np.ndarray, values_M: np.ndarray, level: float) -> float:
    """Calls at which the line through the marks first reaches the level. Infinite if the line never does."""
    return float(_crossing(calls_M, values_M[None], np.array([level]))[0])


def _crossing(calls_M: np.ndarray, values_DM: np.ndarray, level_D: np.ndarray) -> np.ndarray:
    reached_DM = values_DM >= level_D[:, None]
    at_D = np.where(reached_DM.any(-1), reached_DM.argmax(-1), -1)
    found_D = np.full(len(values_DM), np.inf)
    for d, m in enumerate(at_D):
        if m == 0:
            found_D[d] = calls_M[0]
        elif m > 0:
            before, after = values_DM[d, m - 1], values_DM[d, m]
            share = (level_D[d] - before) / (after - before)
            found_D[d] = calls_M[m - 1] + share * (calls_M[m] - calls_M[m - 1])
    return found_D


def saving(
    calls_M: np.ndarray, marks_MSP: np.ndarray, level_calls: float, level_SP: np.ndarray, count: int = DRAWS
) -> Interval:
    """How many times fewer calls an arm needs for the level of another arm at `level_calls`. 0: it never reaches it.

    Draws pair the two arms' prompts. They also pair their seeds, if both have the same number of seeds.
    """
    arm, other = draws(*marks_MSP.shape[1:], count), draws(*level_SP.shape, count)
    values_DM = np.stack([arm.means(values_SP) for values_SP in marks_MSP], -1)
    estimate = calls_to_reach(calls_M, marks_MSP.mean((1, 2)), float(level_SP.mean()))
    found_D = _crossing(calls_M, values_DM, other.means(level_SP))
    return of(_ratio(level_calls, estimate), np.array([_ratio(level_calls, found) for found in found_D]))


def _ratio(level_calls: float, calls: float) -> float:
    return level_calls / max(calls, 1.0)  # an arm that starts above the level needs no call; one call bounds the ratio


def gap_closed(first_SP: np.ndarray, picked_SP: np.ndarray, oracle_SP: np.ndarray, count: int = DRAWS) -> Interval:
    """The share of the oracle's gain over one sample that the discriminator's pick achieves."""
    drawn = draws(*first_SP.shape, count)
    gain_D, gap_D = drawn.means(picked_SP - first_SP), drawn.means(oracle_SP - first_SP)
    return of(float((picked_SP - first_SP).mean() / (oracle_SP - first_SP).mean()), gain_D / gap_D)


def paired_bound(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences, and the lower end of its one-sided 95 % interval by Student's t.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(differences) < 2:
        raise ValueError(f"a bound needs two pairs or more, and there are {len(differences)}")
    mean, error = float(np.mean(differences)), float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    return mean, mean - float(student_t.ppf(0.95, len(differences) - 1)) * error


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t; the value twice if there is only one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = float(student_t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half
