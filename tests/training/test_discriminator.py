"""The discriminator's unit, start and replay, against hand-made cases and NumPy."""

import weakref

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, play, small_gan

from lora_gan import data
from lora_gan.training.discriminator import reward_unit
from lora_gan.training.experience import RetainedFeatures
from lora_gan.training.fresh_metrics import fresh_metrics
from lora_gan.training.replay import Group, micro_batches


def group(rewards: list[float], prompt: int = 5, heads: int = 4) -> Group:
    return Group([prompt, 6], [[7 + i, 8] for i in range(len(rewards))], rewards, [True] * heads)


def test_the_unit_is_the_spread_of_the_first_rewards():
    assert reward_unit([1.0, 3.0]) == pytest.approx(1.0)
    assert reward_unit([80.0, 80.0]) == 80.0  # all alike: their size
    assert reward_unit([0.0, 0.0]) == 1.0


def test_the_unit_follows_rewards_that_spread_later_and_predictions_stay():
    gan = small_gan(base_folder("llama"))
    disc = gan.discriminator
    disc._update_reward_unit([group([0.0, 0.0, 0.0])])
    assert gan.players.reward_unit == 1.0
    with torch.no_grad():
        gan.players.heads_MH.normal_()
    before = gan.score("a", "b")
    disc._update_reward_unit([group([0.0, 100.0, 50.0])])
    assert gan.players.reward_unit == pytest.approx(np.std([0.0, 100.0, 50.0]))
    assert gan.score("a", "b") == pytest.approx(before, rel=1e-5)
    disc._update_reward_unit([group([1.0, 1.0])])  # a quieter time changes nothing
    assert gan.players.reward_unit == pytest.approx(np.std([0.0, 100.0, 50.0]))


def test_heads_begin_with_the_ridge_solution():
    gan = small_gan(base_folder("llama"))
    groups = [group([0.1, 0.5, 0.9], prompt=5), group([0.2, 0.4], prompt=9)]
    gan.discriminator._update_reward_unit(groups)
    gan.discriminator._init_heads(groups)
    batch, (true_B, *_) = gan.discriminator._batch(groups), gan.discriminator._labels(groups)
    with torch.no_grad(), gan.players.use_adapter("discriminator"):
        features = gan.players.pooled_hidden(batch).double().numpy()
    target = true_B.double().numpy() / gan.players.reward_unit
    penalty = 0.1 * np.mean(np.sum(features**2, axis=1))
    primal = np.linalg.solve(features.T @ features + penalty * np.eye(features.shape[1]), features.T @ target)
    for head in gan.players.heads_MH.detach().numpy():
        np.testing.assert_allclose(head, primal, rtol=1e-4, atol=1e-6)


def test_one_learning_rate_serves_any_unit_of_reward():
    """The same rewards in other units give the same predictions, in those units."""
    scores = []
    for unit in (1.0, 100.0):
        gan = small_gan(base_folder("llama"), reward=lambda r, t, unit=unit: unit * len(r) / 10, beta=0.0)
        for _ in range(3):
            gan.step(["ab", "cd"], train_gen=False)
        scores.append(gan.score(["ab", "cd"], ["x", "yz"]))
    np.testing.assert_allclose(scores[1], 100 * np.array(scores[0]), rtol=1e-3)


def test_micro_batches_keep_groups_whole():
    groups = [group([0.0] * size) for size in (3, 2, 4, 1)]
    assert [[len(g.rewards) for g in batch] for batch in micro_batches(groups, 5)] == [[3, 2], [4, 1]]
    assert [[len(g.rewards) for g in batch] for batch in micro_batches(groups, 2)] == [[3], [2], [4], [1]]
    assert micro_batches(groups, None) == [groups]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"disc_objective": "real_vs_generated", "adversarial": True}, {"disc_layers": 1}], ids=str
)
def test_a_group_larger_than_a_micro_batch_is_learned_as_a_whole(monkeypatch, settings, size):
    gan, whole = (small_gan(micro_batch_size=its, **settings) for its in (size, None))
    for its in (gan, whole):
        its.step(["ab", "cd"], ["x", "yz"])
    graphs, hidden = [], gan.players.hidden

    def counted(batch, *arguments):
        graphs.append(len(batch) if torch.is_grad_enabled() else 0)
        return hidden(batch, *arguments)

    monkeypatch.setattr(gan.players, "hidden", counted)
    groups = [group([0.1, 0.9, 0.4, 0.2]), group([0.5, 0.1], prompt=8)]
    gan.discriminator._learn([([one], None) for one in groups])
    whole.discriminator._learn([(groups, None)])
    for ours, theirs in zip(*(its.players.parameters("discriminator") for its in (gan, whole)), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    assert any(theirs.grad is not None and theirs.grad.any() for theirs in whole.players.parameters("discriminator"))
    assert max(graphs) == {1: 1, 3: 2}[size], "parts of much the same size"


def test_within_group_correlation_sees_what_the_overall_one_does_not():
    true = np.array([0.1, 0.2, 0.3, 0.9, 1.0, 1.1])
    groups = np.array([0, 0, 0, 1, 1, 1])
    predicted = np.array([[0.3, 0.2, 0.1, 1.1, 1.0, 0.9]])  # knows the easy prompt, orders each group backwards
    metrics = fresh_metrics(predicted, true, groups)
    assert metrics["rank_correlation"] > 0.5
    assert metrics["rank_correlation_within"] == pytest.approx(-1.0)
    assert metrics["disc_mse"] == pytest.approx(np.mean((predicted[0] - true) ** 2))


def test_metrics_say_nothing_where_there_is_nothing_to_say():
    nothing = fresh_metrics(np.zeros((2, 3)), np.full(3, np.nan), np.zeros(3, dtype=int))
    names = ["rank_correlation", "rank_correlation_within", "disc_mse", "calibration_slope", "uncertainty_correlation"]
    assert nothing == dict.fromkeys(names)


@pytest.mark.parametrize("query_rate", [1.0, 0.75])
def test_learning_from_the_predictions_own_forward_is_learning_from_another_one(monkeypatch, query_rate):
    """Replay, and a response that got no answer, beside what is fresh."""
    gan, oracle = (small_gan(query_rate=query_rate, query_design="uniform") for _ in range(2))
    kept, learn = [], gan.discriminator._learn
    monkeypatch.setattr(gan.discriminator, "_learn", lambda parts: kept.append(parts[0][1] is not None) or learn(parts))
    predict = oracle.discriminator.predict
    monkeypatch.setattr(oracle.discriminator, "predict_to_learn", lambda rows: (predict(rows), RetainedFeatures()))
    for _ in range(3):
        one, other = (g.step(PROMPTS[:2], TARGETS[:2]) for g in (gan, oracle))
        assert one["pred_rewards"] == [pytest.approx(p, abs=1e-4) for p in other["pred_rewards"]]
        assert one["disc_loss"] == pytest.approx(other["disc_loss"], rel=1e-4)
    assert kept == [True, False] * 3, "the first of the step's two updates"
    for a, b in zip(gan.players.parameters("discriminator"), oracle.players.parameters("discriminator"), strict=True):
        assert (a - b).abs().max() < 2e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 3},
        {"query_rate": 0.5},
        {"reward_budget": 8},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_no_forward_is_kept_that_the_update_would_not_begin_with(settings):
    gan = small_gan(**settings)
    gan.step(PROMPTS[:2], TARGETS[:2])
    rows = data.rows_of(PROMPTS[:2], TARGETS[:2], {})
    assert play(gan, rows, learns=True).features.take() is None
    assert play(small_gan(), rows, learns=True).features.take() is not None


def test_the_graph_is_gone_when_it_has_served_and_before_memory_is_tried_again(monkeypatch):
    gan = small_gan()
    experience = play(gan, data.rows_of(PROMPTS[:2], TARGETS[:2], {}), learns=True)
    graph, learn, alive = weakref.ref(experience.features._features_BH), gan.discriminator._learn, []

    def full(parts):
        alive.append(graph() is not None)
        if len(alive) == 1:
            raise torch.OutOfMemoryError("simulated")
        return learn(parts)

    monkeypatch.setattr(gan.discriminator, "_learn", full)
    with pytest.warns(UserWarning, match="out of memory"):
        gan.discriminator.update(experience)
    assert len(alive) == 3 and not any(alive[1:]) and experience.features.take() is None


def test_plain_rl_asks_the_discriminator_nothing(monkeypatch):
    gan = small_gan(adversarial=False)
    monkeypatch.setattr(gan.players, "predict", lambda *_: 1 / 0)
    out = gan.step(PROMPTS[0], TARGETS[0], train_disc=False)
    assert out["pred_reward"] is None and out["pred_rewards"] == [None] * 4 and out["pred_reward_mean"] is None
    assert out["true_reward"] is not None and out["gen_loss"] is not None
    with pytest.raises(ZeroDivisionError):  # who looks on sees what it predicts
        gan.step(PROMPTS[0], TARGETS[0], train_gen=False, train_disc=False)
