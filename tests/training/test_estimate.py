"""Whom to ask, the corrected reward, advantages: against inclusion probabilities by count, exact enumeration and NumPy.

Counts are of keyed draws, so that the tests are deterministic; the bounds are five standard errors.
"""

import itertools

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, reward, small_gan

from lora_gan.training import estimate


def choose(group_B, rate, **options):
    return estimate.choose_queries(group_B, rate, **options).asked_B


STEPS = 4000
DESIGNS = [(0.25, [4, 4]), (0.5, [8]), (0.1, [8, 8, 8, 8]), (0.3, [1, 2, 3, 5]), (0.9, [3, 3]), (0.01, [2, 2])]


def groups(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(("rate", "sizes"), DESIGNS)
def test_every_response_is_asked_for_with_probability_rate(rate, sizes):
    group_B = groups(sizes)
    asked = np.array([choose(group_B, rate, seed=1, step=step) for step in range(STEPS)])
    assert asked.dtype == bool
    error = np.sqrt(rate * (1 - rate) / STEPS)
    assert np.abs(asked.mean(0) - rate).max() < 5 * error
    totals, expected = asked.sum(1), rate * len(group_B)
    assert set(totals) <= {np.floor(expected), np.ceil(expected)}
    for group, size in enumerate(sizes):
        share = asked[:, group_B == group].sum(1)
        assert (np.abs(share - rate * size) < 1).all(), "a group's share, to within one"
    repeated = choose(group_B, rate, seed=1, step=3)
    assert (repeated == asked[3]).all()


def test_pairs_of_a_group_are_asked_alike():
    """Which two of a group are asked does not depend on their places in it."""
    asked = np.array([choose(groups([4]), 0.5, seed=2, step=step) for step in range(STEPS)])
    for i, j in itertools.combinations(range(4), 2):
        assert abs((asked[:, i] & asked[:, j]).mean() - 1 / 6) < 5 * np.sqrt(1 / 6 * 5 / 6 / STEPS)


@pytest.mark.parametrize("labels", [[3, 1, 3, 1, 3, 1, 3, 1], [0, 0, 0, 0, 7, 7, 7, 7]])
def test_group_labels_may_be_any_and_in_any_order(labels):
    group_B = np.array(labels)
    for step in range(200):
        asked = choose(group_B, 0.5, seed=0, step=step)
        assert all(asked[group_B == label].sum() == 2 for label in set(labels))


def test_rate_one_asks_for_all_and_seeds_and_steps_differ():
    assert choose(groups([3, 2]), 1.0, seed=0, step=0).all()
    draws = {tuple(choose(groups([8, 8]), 0.5, seed=seed, step=step)) for seed in (0, 1) for step in range(20)}
    assert len(draws) > 35


@pytest.mark.parametrize(("rate", "sizes"), [(0.25, [4, 4]), (0.5, [3, 5]), (0.1, [5])])
def test_the_corrected_reward_is_unbiased_however_wrong_the_prediction(rate, sizes):
    group_B = groups(sizes)
    rng = np.random.default_rng(5)
    true, predicted = rng.normal(size=len(group_B)), 10 + 4 * rng.normal(size=len(group_B))
    values = []
    for step in range(STEPS):
        asked = choose(group_B, rate, seed=3, step=step)
        values.append(estimate.corrected_reward(predicted, np.where(asked, true, np.nan), rate))
    values = np.array(values)
    error = values.std(0) / np.sqrt(STEPS)
    assert (np.abs(values.mean(0) - true) < 5 * error).all()
    assert (np.abs(predicted - true) > 5 * error).all(), "the prediction itself would pass"


def test_the_corrected_reward_is_exact_over_its_two_outcomes():
    predicted, true, rate = np.array([3.0, -1.0]), np.array([0.5, 4.0]), 0.2
    answered = estimate.corrected_reward(predicted, true, rate)
    silent = estimate.corrected_reward(predicted, np.full(2, np.nan), rate)
    assert (silent == predicted).all()
    assert rate * answered + (1 - rate) * silent == pytest.approx(true)


def test_at_rate_one_it_is_the_true_reward_to_the_last_bit():
    rng = np.random.default_rng(1)
    true, predicted = rng.normal(size=1000), 1e8 * rng.normal(size=1000)
    assert (estimate.corrected_reward(predicted, true, 1.0) == true).all()
    true[3] = np.nan
    assert estimate.corrected_reward(predicted, true, 1.0)[3] == predicted[3]


def test_a_perfect_prediction_has_no_variance():
    rng = np.random.default_rng(1)
    true = rng.normal(size=20)
    asked = rng.random(20) < 0.3
    assert estimate.corrected_reward(true, np.where(asked, true, np.nan), 0.3) == pytest.approx(true)


def test_advantages_are_leave_one_out():
    rng = np.random.default_rng(2)
    group_B = np.array([5, 0, 5, 5, 0, 2])
    reward_B = rng.normal(size=6)
    expected = []
    for i in range(6):
        others = [reward_B[j] for j in range(6) if group_B[j] == group_B[i] and j != i]
        expected.append(reward_B[i] - (np.mean(others) if others else 0.7))
    ours = estimate.advantages(reward_B, group_B, baseline=0.7)
    assert ours == pytest.approx(np.array(expected)) and ours.dtype == np.float64
    for label in (5, 0):
        assert ours[group_B == label].sum() == pytest.approx(0.0)


def test_advantages_leave_out_what_is_not_known():
    reward_B = np.array([1.0, np.nan, 4.0, 2.0, np.nan, np.nan])
    ours = estimate.advantages(reward_B, np.array([0, 0, 0, 1, 1, 2]), baseline=0.5)
    assert ours.tolist() == [1.0 - 4.0, 0.0, 4.0 - 1.0, 2.0 - 0.5, 0.0, 0.0]
    assert np.isnan(reward_B[1]), "the rewards given are left as they are"


def test_the_baseline_never_contains_the_reward_it_is_taken_from():
    """An advantage is linear in its own reward with slope one: leave-one-out has no part of it."""
    reward_B, group_B = np.array([1.0, 2.0, 4.0, 3.0]), np.array([0, 0, 0, 1])
    before = estimate.advantages(reward_B, group_B, 0.0)
    for i in range(4):
        moved = reward_B.copy()
        moved[i] += 10
        assert estimate.advantages(moved, group_B, 0.0)[i] - before[i] == pytest.approx(10)


def test_the_decayed_mean():
    mean = estimate.DecayedMean()
    assert mean.value == 0.0
    rewards = np.random.default_rng(3).normal(size=30) + 5
    for count, value in enumerate(rewards, 1):
        mean.add(0.1 * value, 0.1)
        weights = 0.9 ** np.arange(count)[::-1]
        assert mean.value == pytest.approx((weights * rewards[:count]).sum() / weights.sum())


# --- the unit of the loss ---------------------------------------------------------------------------------------------


def test_the_spread_is_the_pooled_standard_deviation_of_the_first_answers_and_then_held():
    rng, spread, groups = np.random.default_rng(2), estimate.GroupSpread(), np.repeat([0, 1], 8)
    assert spread.value is None
    squares = differences = 0
    for step in range(9):
        true_B = rng.normal(size=16) * (1 + step) + 7 * groups
        true_B[step % 4] = np.nan
        if differences < estimate.HELD_FROM:  # NumPy's deviation of each group, weighted by its degrees of freedom
            for one in (true_B[1:8] if step % 4 == 0 else np.delete(true_B[:8], step % 4), true_B[8:]):
                squares, differences = squares + one.var(ddof=1) * (len(one) - 1), differences + len(one) - 1
        spread.add(*estimate.squared_differences(true_B, groups))
        assert spread.value == pytest.approx((squares / differences) ** 0.5)
    assert spread.is_held and differences == 39


def test_equal_rewards_give_no_spread():
    spread = estimate.GroupSpread()
    spread.add(*estimate.squared_differences(np.ones(40), np.zeros(40)))
    assert spread.value is None and not spread.is_held


@pytest.mark.parametrize("signal", ["true", "mixed"])
def test_the_rewards_scale_and_level_do_not_matter(signal):
    """A reward times 20 plus 3: the generator learns the same, with the KL, and beta is not changed."""
    weights = []
    for scale, level in ((1.0, 0.0), (20.0, 3.0)):
        gan = small_gan(
            reward=lambda response, target, s=scale, c=level: s * reward(response, target) + c,
            reward_signal=signal, query_rate=1.0 if signal == "true" else 0.5, beta=0.5, num_generations=4,
        )  # fmt: skip
        records = [gan.step(PROMPTS[:2], TARGETS[:2], train_disc=signal == "mixed") for _ in range(3)]
        weights.append(torch.cat([p.detach().flatten() for p in gan.players.parameters("generator")]))
    assert records[-1]["reward_spread"] > 0
    assert (weights[0] - weights[1]).norm() < 1e-3 * weights[0].norm()
