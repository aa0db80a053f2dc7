"""The probe: ridge regression on frozen features, and how far fresh predictions are trusted.

Oracles: NumPy's least squares, stock PEFT's hidden states, simulated rewards.
"""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, PROMPTS, TARGETS, base_folder, play, small_gan
from transformers import AutoModelForCausalLM

from lora_gan.data import rows_of
from lora_gan.training import estimate
from lora_gan.training.probe import MOST_ROWS, RIDGES, Probe

RNG = np.random.default_rng(5)


def centred(values, group_N):
    return np.stack([values[i] - values[group_N == group_N[i]].mean(0) for i in range(len(values))])


def data_of(groups, size=6, width=9, noise=0.0, knows=1.0, seed=0):
    """Features, rewards and groups; the reward is linear in the features up to a constant per group, and noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(groups * size, width)).astype(np.float32)
    group_N = np.repeat(np.arange(groups), size)
    level = rng.normal(size=groups)[group_N] * 10
    return features, knows * features[:, 0] + level + noise * rng.normal(size=len(features)), group_N


def ridge_regressions(features, true, group_N):
    """Centred features and rewards, and {ridge: weights} by NumPy's solver in the primal form."""
    x, y = centred(features.astype(np.float64), group_N), centred(true, group_N)
    scale = np.trace(x @ x.T) / len(x)
    systems = {ridge: x.T @ x + ridge * scale * np.eye(x.shape[1]) for ridge in RIDGES}
    return x, y, scale, {ridge: np.linalg.solve(system, x.T @ y) for ridge, system in systems.items()}


def fitted(groups, noise, width):
    """A probe that has learned from `data_of`, the groups, and the result of `ridge_regressions` on the same data."""
    features, true, group_N = data_of(groups, noise=noise, width=width)
    probe = Probe()
    probe.learn(features, true, group_N)
    return probe, group_N, *ridge_regressions(features, true, group_N)


# --- the regression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [9, 40], ids=["more labels than features", "fewer"])
@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_the_weights_are_those_of_ridge_regression_on_centred_values(noise, width):
    probe, _, x, y, scale, candidates = fitted(5, noise, width)
    errors = {}
    for ridge, weights in candidates.items():
        used = np.trace(x @ np.linalg.solve(x.T @ x + ridge * scale * np.eye(x.shape[1]), x.T))
        errors[ridge] = np.square(y - x @ weights).sum() / (len(x) - 5 - used) ** 2
    np.testing.assert_allclose(probe.weights_H, candidates[min(errors, key=errors.get)], rtol=1e-6)


def test_noisy_labels_take_a_stronger_ridge():
    lengths = []
    for noise in (0.0, 5.0):
        probe = Probe()
        probe.learn(*data_of(5, noise=noise))
        lengths.append(np.linalg.norm(probe.weights_H[1:]) / max(abs(probe.weights_H[0]), 1e-9))
    assert lengths[0] < lengths[1]


def test_a_constant_per_group_changes_nothing():
    features, true, group_N = data_of(4, noise=0.5)
    one, other = Probe(), Probe()
    one.learn(features, true, group_N)
    other.learn(features, true + 100.0 * group_N, group_N)
    np.testing.assert_allclose(one.weights_H, other.weights_H, rtol=1e-8)


def test_groups_without_two_answers_teach_nothing():
    probe = Probe()
    true = np.full(8, np.nan)
    true[[0, 5]] = 1.0
    probe.learn(RNG.normal(size=(8, 3)), true, np.repeat([0, 1], 4))
    assert probe.predict(np.zeros((2, 3))) is None and probe.rewards == []


def test_equal_rewards_predict_no_difference():
    probe = Probe()
    probe.learn(RNG.normal(size=(8, 3)), np.ones(8), np.repeat([0, 1], 4))
    assert not probe.predict(RNG.normal(size=(5, 3))).any()


def test_the_oldest_groups_go():
    probe = Probe()
    for seed in range(MOST_ROWS // 60 + 3):
        probe.learn(*data_of(10, seed=seed))
    assert sum(map(len, probe.rewards)) <= MOST_ROWS
    newest = data_of(10, seed=MOST_ROWS // 60 + 2)
    np.testing.assert_array_equal(probe.features[-1], newest[0][-6:])


def test_a_saved_probe_predicts_bitwise_the_same():
    probe, other = Probe(), Probe()
    probe.learn(*data_of(4, noise=1.0))
    other.load_state_dict(probe.state_dict())
    x = RNG.normal(size=(7, 9)).astype(np.float32)
    np.testing.assert_array_equal(probe.predict(x), other.predict(x))
    probe.learn(*data_of(2, seed=3))
    other.learn(*data_of(2, seed=3))
    np.testing.assert_array_equal(probe.weights_H, other.weights_H)


# --- the features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disc_layers", [None, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_means_of_the_stock_bases_hidden_states(architecture, disc_layers):
    """After two thirds of two layers, so after one; with one layer adapted, after the frozen one. Trained adapters."""
    folder = base_folder(architecture)
    gan = small_gan(folder, disc_layers=disc_layers)
    gan.step(PROMPTS[:2], TARGETS[:2])
    experience = play(gan, rows_of(PROMPTS[:2], TARGETS[:2], {}))
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    for i, group in enumerate(experience.group_B):
        prompt, response = experience.prompts[group], experience.rollout.responses[i]
        with torch.no_grad():
            output = stock(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
        mean = output.hidden_states[1][0, len(prompt) :].mean(0)
        np.testing.assert_allclose(experience.probed.features_BH[i], (mean / mean.norm()).numpy(), atol=1e-5)


def test_the_reference_computed_with_the_features_is_the_reference():
    """The features' forward keeps the base's last hidden states: the KL is that of a run without the probe."""
    losses = []
    for _ in range(2):
        gan = small_gan(beta=0.5, learning_rate=1e-2)
        if losses:
            gan.players.__dict__["_shares_frozen_layers"] = False
            type(gan.discriminator).uses_probe, before = False, type(gan.discriminator).uses_probe
        out = [gan.step(PROMPTS[:2], TARGETS[:2]) for _ in range(3)]
        if losses:
            type(gan.discriminator).uses_probe = before
        losses.append([(o["kl"], o["gen_loss"]) for o in out])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=1e-7)


# --- calibration ------------------------------------------------------------------------------------------------------


def calibrated(predictions, true, group_N):
    calibration = estimate.Calibration(len(predictions))
    calibration.add(*estimate.moments_within_groups(np.asarray(predictions), true, group_N))
    return calibration


def test_weights_are_least_squares_within_groups():
    group_N = np.repeat(np.arange(20), 5)
    one, other = RNG.normal(size=(2, 100))
    true = 2 * one + 0.5 * other + RNG.normal(size=100) + 10 * group_N
    calibration = calibrated([one, other], true, group_N)
    x = centred(np.stack([one, other], 1), group_N)
    expected, residual = np.linalg.lstsq(x, centred(true, group_N), rcond=None)[:2]
    np.testing.assert_allclose(calibration.weights, expected)
    r_squared = 1 - residual[0] / np.square(centred(true, group_N)).sum()
    f = r_squared / (1 - r_squared) * (80 - 2) / 2
    assert calibration.trust == pytest.approx(1 - 1 / f)


def test_a_prediction_that_misleads_has_weight_zero():
    group_N = np.repeat(np.arange(20), 5)
    good, noise = np.random.default_rng(1).normal(size=(2, 100))
    misleading, true = -good + noise, good + 0.1 * noise  # least squares would give the first a negative weight
    centred_x = np.stack([centred(x, group_N) for x in (misleading - 0.2 * noise, good)], 1)
    assert np.linalg.lstsq(centred_x, centred(good - 0.1 * noise, group_N), rcond=None)[0][0] < 0
    calibration = calibrated([misleading - 0.2 * noise, good], good - 0.1 * noise, group_N)
    assert calibration.weights[0] == 0 and calibration.weights[1] == pytest.approx(1.0, abs=0.1)
    assert calibrated([-good], true, group_N).trust == 0


def test_predictions_of_pure_noise_are_seldom_trusted():
    """40 answers in 5 groups. The mean trust of noise is small, and that of a correlation of 0.6 is large."""
    group_N, rng = np.repeat(np.arange(5), 8), np.random.default_rng(0)
    trust = {0.0: [], 0.75: []}
    for knows in trust:
        for _ in range(400):
            one, noise = rng.normal(size=(2, 40))
            trust[knows].append(calibrated([one], knows * one + noise, group_N).trust)
    assert np.mean(trust[0.0]) < 0.12 and np.mean(trust[0.75]) > 0.85


# --- in a run ---------------------------------------------------------------------------------------------------------


def mixed_of(trust, updated_B, true_B):
    gan = small_gan(reward_signal="mixed", num_generations=4)
    experience = play(gan, rows_of(PROMPTS[:2], TARGETS[:2], {}))
    experience = dataclasses.replace(
        experience, true_B=np.array(true_B), updated_B=np.array(updated_B), updated_trust=trust
    )
    return gan.generator, experience, gan.generator.rewards(experience, "mixed")


def test_the_mixed_reward_by_hand():
    """Two groups of four; the first is known. A known reward has at least half of the weight."""
    updated, true = [1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 4.0, 4.0], [5.0, 5.0, 7.0, 7.0, *[np.nan] * 4]
    _, _, reward_B = mixed_of(0.25, updated, true)
    first = 0.25 * np.array([-2, -1, 0, 3]) + 0.75 * np.array([-1, -1, 1, 1])
    np.testing.assert_allclose(reward_B, [*first, *(0.25 * np.array([-2, -2, 2, 2]))])
    _, _, reward_B = mixed_of(0.9, updated, true)
    first = 0.5 * np.array([-2, -1, 0, 3]) + 0.5 * np.array([-1, -1, 1, 1])
    np.testing.assert_allclose(reward_B, [*first, *(0.9 * np.array([-2, -2, 2, 2]))])
    _, _, reward_B = mixed_of(0.0, updated, true)
    np.testing.assert_allclose(reward_B, [-1, -1, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(("trust", "share"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_the_unit_of_the_mixed_reward_follows_the_responses_that_count(trust, share):
    generator, experience, reward_B = mixed_of(trust, range(8), [5.0, 5.0, 7.0, 7.0, *[np.nan] * 4])
    generator.spread.add(40.0, 10.0)
    assert generator.reward_unit(experience, "mixed", reward_B) == pytest.approx(2.0 * share)


def test_a_group_of_one_with_a_known_reward_keeps_it():
    gan = small_gan(reward_signal="mixed", num_generations=1)
    experience = play(gan, rows_of(PROMPTS[:2], TARGETS[:2], {}))
    np.testing.assert_allclose(gan.generator.rewards(experience, "mixed"), experience.true_B)


@pytest.mark.parametrize("width", [9, 45], ids=["more labels than features", "fewer"])
@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_trust_is_that_of_predictions_without_the_own_group(noise, width):
    """Oracle: the regression solved again without each group, with the same ridge."""
    probe, group_N, x, y, scale, ridges = fitted(6, noise, width)
    ridge = min(ridges, key=lambda ridge: np.abs(ridges[ridge] - probe.weights_H).max())
    left_out = np.zeros(len(y))
    for group in range(6):
        own = group_N == group
        system = x[~own].T @ x[~own] + ridge * scale * np.eye(x.shape[1])
        left_out[own] = x[own] @ np.linalg.solve(system, x[~own].T @ y[~own])
    explained = (left_out @ y) ** 2 / (left_out @ left_out) / (y @ y)
    assert probe.explained == pytest.approx(explained)
    assert probe.trust == pytest.approx(max(0.0, 1 - (1 - explained) / explained / (len(y) - 6 - 1)))
    fitted_N = x @ probe.weights_H
    assert probe.amplitude == pytest.approx(np.sqrt((fitted_N @ fitted_N) / (y @ y)))


def test_shuffled_labels_are_seldom_trusted():
    trust = {0.0: [], 1.0: []}
    for knows in trust:
        for seed in range(200):
            probe = Probe()
            probe.learn(*data_of(8, noise=1.0, knows=knows, seed=seed))
            trust[knows].append(probe.trust)
    assert np.mean(trust[0.0]) < 0.15 and np.mean(trust[1.0]) > 0.85


def test_one_group_alone_is_not_trusted():
    probe = Probe()
    probe.learn(*data_of(1, noise=0.0))
    assert probe.trust == 0 and probe.weights_H.any()


def test_the_probe_learns_in_a_step_and_the_next_step_predicts_with_it():
    gan = small_gan(reward_signal="mixed")
    gan.step(PROMPTS, TARGETS)
    experience = play(gan, rows_of(PROMPTS, TARGETS, {}))
    expected = experience.probed.features_BH.astype(np.float64) @ gan.discriminator.probe.weights_H
    np.testing.assert_array_equal(experience.probed.probe_B, expected)
    assert not gan.discriminator.calibration.is_measured, "the first step had nothing to measure"
    gan.step(PROMPTS, TARGETS)
    assert gan.discriminator.calibration.is_measured


@pytest.mark.parametrize("settings", [{"gradient_path": "straight_through"}, {"disc_objective": "real_vs_generated"}])
def test_paths_without_the_probe(settings):
    gan = small_gan(adversarial=True, **settings)
    gan.step(PROMPTS[:2], TARGETS[:2])
    assert gan.discriminator.probe.weights_H is None
    experience = play(gan, rows_of(PROMPTS[:2], TARGETS[:2], {}))
    assert experience.probed is None and experience.trust == 1
