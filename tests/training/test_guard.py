"""The test that the true reward has fallen, against the products of its bets and simulated runs."""

import dataclasses

import numpy as np
import pytest

from lora_gan.training import guard
from lora_gan.training.guard import LevelTest


def fed(rewards, unit=None):
    test = LevelTest()
    for reward in rewards:
        test.add(float(reward), 0.0, unit)
    return test


def first_alarm(rewards):
    test = LevelTest()
    for step, reward in enumerate(rewards):
        test.add(float(reward), 0.0, None)
        if test.evidence >= test.limit:
            return step
    return None


def test_the_evidence_is_the_weighted_sum_of_every_starts_products():
    """Oracle: the mixture as it is defined, with one product of bets per start."""
    rng = np.random.default_rng(0)
    rewards = np.r_[rng.normal(size=40), rng.normal(size=25) - 1.0]
    test, steps, bets, x = LevelTest(), 0, [], []
    for reward in rewards:
        if test.reference is not None:
            difference = np.clip((reward - test.reference.level) / (2.0 * test.reference.spread), -1, 1)
            past = np.array(x)
            decay = 0.8 ** np.arange(len(past))[::-1]
            mean = (decay * past).sum()
            bets.append(min(0.9, -mean / (decay * past**2).sum()) if len(past) and mean < 0 else 0.0)
            x.append(difference)
            steps += 1
        test.add(float(reward), 0.0, None)
    factors = 1 - np.array(bets) * np.array(x)
    starts = range(0, steps, guard.WINDOW)
    parts = [1 / (k + 1) - 1 / (k + 2) for k in range(len(starts))]
    expected = sum(part * factors[start:].prod() for part, start in zip(parts, starts, strict=True)) + 1 - sum(parts)
    assert test.evidence == pytest.approx(expected, rel=1e-9)
    assert test.evidence > 1


def test_the_reference_is_the_highest_lower_bound_less_the_margin():
    rewards = np.random.default_rng(1).normal(size=30)
    test = fed(rewards, unit=2.0)
    windows = np.lib.stride_tricks.sliding_window_view(rewards, guard.WINDOW)
    pooled = np.cumsum(windows.var(1, ddof=1)) / np.arange(1, len(windows) + 1)
    spreads = np.sqrt(np.maximum(windows.var(1, ddof=1), pooled))
    levels = windows.mean(1) - guard.ERRORS * spreads / guard.WINDOW**0.5 - guard.MARGIN * 2.0
    assert test.reference.level == pytest.approx(levels.max())
    assert test.reference.mean == pytest.approx(windows.mean(1)[levels.argmax()])


@pytest.mark.parametrize("rising", [0.0, 3.0])
def test_streams_without_a_fall_seldom_set_the_alarm_off(rising):
    rng, trend = np.random.default_rng(3), 1 - np.exp(-np.arange(120) / 20)
    alarms = sum(first_alarm(rng.normal(size=120) + rising * trend) is not None for _ in range(200))
    assert alarms <= 18  # 5 % are 10; 19 or more would come once in 200 such tests


def test_a_fall_is_found_within_a_few_steps():
    rng = np.random.default_rng(4)
    delays = [first_alarm(np.r_[rng.normal(size=50), rng.normal(size=50) - 1.5]) for _ in range(40)]
    assert all(delay is not None and delay >= 50 for delay in delays)
    assert np.median(delays) - 50 <= 20


def test_equal_rewards_and_a_fall_without_any_noise():
    assert first_alarm([0.5] * 60) is None
    assert first_alarm([0.5] * 20 + [0.4] * 20) is not None


def test_after_a_return_half_of_alpha_is_left_and_the_reference_stays():
    test = fed(np.r_[np.ones(20), np.zeros(10)])
    reference = test.reference
    assert test.evidence >= test.limit == 20
    test.restart()
    assert test.limit == 80 and test.reference == reference and test.evidence == pytest.approx(1.0)
    test.restart()
    assert test.limit == 160


def test_the_state_continues_exactly():
    rewards = np.random.default_rng(5).normal(size=60)
    whole, half = fed(rewards), fed(rewards[:33])
    copy = LevelTest.from_dict(dataclasses.asdict(half))
    for reward in rewards[33:]:
        copy.add(float(reward), 0.0, None)
    assert copy == whole
