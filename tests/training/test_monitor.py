"""What keeps the discriminator useful and the generator honest: budget, monitor, replay."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, differences, play, player_state, small_gan

from lora_gan import Config, LoraGAN, data
from lora_gan.gan import BudgetSpent
from lora_gan.model import sampling
from lora_gan.training import estimate, losses
from lora_gan.training.discriminator import Discriminator
from lora_gan.training.monitor import repetition
from lora_gan.training.plan import plan_step
from lora_gan.training.replay import Group, Replay


def _rows(count):
    return data.rows_of(PROMPTS[:count], TARGETS[:count], {})


# --- trust ------------------------------------------------------------------------------------------------------------


def test_what_the_generator_sees_of_the_predictions():
    predicted, groups = np.array([2.0, 3.0, 5.0, 7.0]), np.array([0, 0, 1, 1])
    np.testing.assert_array_equal(estimate.scaled_by_trust(predicted, groups, 1.0), predicted)
    np.testing.assert_array_equal(estimate.scaled_by_trust(predicted, groups, 0.5), [2.25, 2.75, 5.5, 6.5])
    shut = estimate.scaled_by_trust(predicted, groups, 0.0)
    assert not estimate.advantages(shut, groups, 0.0).any(), "trust 0 leaves no differences"


# --- whom to ask, and the budget --------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["uniform", "groups"])
def test_every_designs_probabilities_are_what_it_says(design):
    groups = np.repeat(np.arange(4), 4)
    draws = [estimate.choose_queries(groups, 0.3, seed=1, step=step, design=design) for step in range(4000)]
    inclusion = draws[0].inclusion_B
    assert inclusion == pytest.approx(np.full(16, 0.3))
    asked = np.array([draw.asked_B for draw in draws])
    error = np.sqrt(inclusion * (1 - inclusion) / 4000)
    assert (np.abs(asked.mean(0) - inclusion) < 5 * error + 1e-12).all()
    if design == "groups":
        assert all(len(set(row[groups == g])) == 1 for row in asked for g in range(4))


@pytest.mark.parametrize("design", ["uniform", "groups"])
@pytest.mark.parametrize("left", [0, 1, 3, 5, 8])
def test_the_calls_left_are_never_passed_and_the_correction_stays_unbiased(design, left):
    groups, rng = np.repeat(np.arange(3), 4), np.random.default_rng(4)
    true, predicted = rng.normal(size=12), 3 * rng.normal(size=12)
    values = []
    for step in range(4000):
        draw = estimate.choose_queries(groups, 0.75, seed=2, step=step, design=design, left=left)
        assert draw.asked_B.sum() <= left
        values.append(estimate.corrected_reward(predicted, np.where(draw.asked_B, true, np.nan), draw.inclusion_B))
    if left == 0:
        assert (np.array(values) == predicted).all()
        return
    error = np.std(values, 0) / np.sqrt(4000)
    assert (np.abs(np.mean(values, 0) - true) < 5 * error + 1e-9).all()


@pytest.mark.parametrize("design", ["uniform", "groups"])
@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_the_budget_is_kept_to_exactly(design):
    gan = small_gan(reward_budget=13, query_rate=0.5, query_design=design, num_generations=4, on_exploit="warn")
    for _ in range(8):
        gan.step(PROMPTS[:2], TARGETS[:2])
    assert gan.reward_calls == 13
    before = player_state(gan, "generator")["parameters"]
    out = gan.step(PROMPTS[:2], TARGETS[:2])
    assert out["asked"] == 0 and out["true_reward"] == [None, None]
    assert differences(before, player_state(gan, "generator")["parameters"]) != [], "it goes on by prediction"


@pytest.mark.parametrize("settings", [{"after_budget": "stop"}, {"adversarial": False}], ids=str)
def test_when_the_budget_is_spent_it_stops_where_it_must(settings, tmp_path):
    gan = small_gan(
        reward_budget=10, query_rate=1.0, num_generations=4, output_dir=str(tmp_path), prompts_per_step=2, **settings
    )
    rows = [{"prompt": p, "target": t} for p, t in zip(PROMPTS[:2], TARGETS[:2], strict=True)]
    assert len(gan.fit(rows, steps=9, progress=False)) == 2 and gan.reward_calls == 10
    with pytest.raises(BudgetSpent, match="reward_budget"):
        gan.step(PROMPTS[:2], TARGETS[:2])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_clipped_surrogate_against_a_loop_and_at_ratio_one():
    rng = np.random.default_rng(5)
    now, then, advantage = rng.normal(size=(3, 12))
    expected = np.zeros(12)
    for r in range(12):
        ratio = np.exp(now[r] - then[r])
        expected[r] = -min(ratio * advantage[r], min(max(ratio, 0.8), 1.2) * advantage[r])
    tensors = [torch.tensor(x) for x in (now, then, advantage)]
    ours = losses.clipped_policy_gradient(*tensors, epsilon=0.2)
    np.testing.assert_allclose(ours.numpy(), expected)
    at_one = torch.tensor(now, requires_grad=True)
    losses.clipped_policy_gradient(at_one, at_one.detach(), tensors[2], epsilon=0.2).sum().backward()
    plain = torch.tensor(now, requires_grad=True)
    losses.policy_gradient(plain, tensors[2]).sum().backward()
    torch.testing.assert_close(at_one.grad, plain.grad)


def test_several_updates_a_roll_out_begin_with_the_single_one():
    norms = []
    for iterations in (1, 3):
        gan = small_gan(num_iterations=iterations)
        norms.append([gan.step(PROMPTS[:2], TARGETS[:2])["gen_grad_norm"], gan.generator.optimizer.schedule.last_epoch])
    assert norms[0][0] == norms[1][0] and [n[1] for n in norms] == [1, 3]


def test_beta_moves_towards_the_target():
    for target, grows in ((1e-9, True), (1e9, False)):
        gan = small_gan(kl_target=target, beta=0.1)
        for _ in range(3):
            gan.step(PROMPTS[:2], TARGETS[:2])
        assert (gan.generator.beta > 0.1) == grows and gan.generator.beta != 0.1


@pytest.mark.parametrize(("weight", "expected"), [(0.5, [0.5, 0.5, 0.5, 0.5]), (0.0, [1.0, 1.0, 0.0, 0.0])])
def test_in_the_warm_up_the_generator_imitates_alone(weight, expected):
    config = Config(imitation_weight=weight, imitation_warmup_steps=2)
    plans = [plan_step(config, step, "corrected", train_gen=True, train_disc=True) for step in range(4)]
    assert [plan.imitation_weight for plan in plans] == expected
    assert [plan.reinforces for plan in plans] == [False, False, True, True]


# --- no reward at all -------------------------------------------------------------------------------------------------


def test_real_against_generated_asks_for_no_reward_and_learns_to_tell_them_apart():
    def never(response, target):
        raise AssertionError("no true reward is asked for")

    gan = small_gan(
        reward=never, adversarial=True, disc_objective="real_vs_generated", disc_learning_rate=2e-2, disc_updates=4
    )
    told = [gan.step(PROMPTS[:2], TARGETS[:2], train_gen=False) for _ in range(12)]
    assert gan.reward_calls == 0 and told[-1]["true_reward"] == [None, None]
    assert told[-1]["disc_accuracy"] > 0.9 and told[-1]["disc_loss"] < told[0]["disc_loss"]
    with pytest.raises(ValueError, match="adversarial=True"):
        small_gan(disc_objective="real_vs_generated")


def test_replay_keeps_the_latest_groups():
    groups = [Group([i], [[1]], [0.0], [True]) for i in range(20)]
    for capacity in (0, 1, 8):
        replay, sizes = Replay(capacity), iter((3, 6, 11))
        rest = iter(groups)
        for size in sizes:
            replay.extend([next(rest) for _ in range(size)])
        assert replay.groups == groups[20 - capacity :]


# --- the monitor ------------------------------------------------------------------------------------------------------


def exploited(gan, steps, true, predicted):
    """Feed the monitor steps whose means are these; its alarms."""
    experience, alarms = play(gan, _rows(2)), []
    for step in range(steps):
        size = len(experience.true_B)
        now = dataclasses.replace(
            experience, true_B=np.full(size, true(step)), predicted_MB=np.full((2, size), predicted(step)), probed=None
        )
        alarms += gan.monitor.watch(now, None, gan.generator)
    return alarms


def test_the_alarm_goes_off_once_when_the_true_reward_falls():
    gan = small_gan()
    alarms = exploited(gan, 60, lambda s: 0.5 - 0.01 * s, lambda s: 0.5 + 0.01 * s)
    assert len(alarms) == 1 and "exploits" in alarms[0] and "evidence" in alarms[0]


def test_a_fall_with_predictions_that_fall_too_is_no_exploitation():
    gan = small_gan()
    alarms = exploited(gan, 60, lambda s: 0.5 - 0.01 * s, lambda s: 0.5 - 0.01 * s)
    assert len(alarms) == 1 and "fell" in alarms[0] and "exploits" not in alarms[0]


@pytest.mark.parametrize("drift", [0.01, 0.0])
def test_no_alarm_where_both_rise_or_nothing_moves(drift):
    gan = small_gan()
    assert exploited(gan, 30, lambda s: 0.5 + drift * s, lambda s: 0.5 + drift * s) == []


def test_rollback_brings_the_best_generator_back():
    gan = small_gan(on_exploit="rollback")
    exploited(gan, 10, lambda s: 0.5, lambda s: 0.5)
    best = player_state(gan, "generator")
    for _ in range(2):
        gan.generator.update(_rows(2), play(gan, _rows(2)), "true", 0.0)
    assert differences(best["parameters"], player_state(gan, "generator")["parameters"]) != []
    alarms = exploited(gan, 15, lambda s: 0.1, lambda s: 0.9)
    assert len(alarms) == 1 and "back" in alarms[0]
    found = player_state(gan, "generator")
    assert differences(best["parameters"], found["parameters"]) == []
    assert differences(best["optimizer"], found["optimizer"]) == []


# --- audits -----------------------------------------------------------------------------------------------------------

ALONE = dict(reward_budget=80, num_generations=4, prompts_per_step=2, beta=0.0)  # 76 labels, then 2 audits of 2 calls


@pytest.fixture
def trusted(monkeypatch):
    """A probe that allows 38 steps on predictions alone after 19 steps with labels."""
    monkeypatch.setattr(Discriminator, "explained", property(lambda self: 2.0))


def with_budget(**settings):
    """A run with a budget; a longer response has a higher reward."""
    gan = small_gan(**ALONE | settings)
    gan.compute_reward = lambda response, target: len(response) / 50
    return gan


def alone(**settings):
    """A run whose labels are spent: 4 of 8 responses are queried in each of 19 steps."""
    gan = with_budget(**settings)
    for _ in range(19):
        gan.step(PROMPTS[:2], TARGETS[:2])
    assert gan.budget.left() == 0 and gan.budget.left(audit=True) == 4
    return gan


def until_over(gan):
    """Steps until the run is over; their records."""
    records = []
    while gan.state.why_over("mixed") is None:
        records.append(gan.step(PROMPTS[:2], TARGETS[:2]))
    with pytest.raises(BudgetSpent, match="without audits"):
        gan.step(PROMPTS[:2], TARGETS[:2])
    return records


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_steps_on_predictions_pause_for_audits_and_end_with_the_calls(trusted):
    gan = alone()
    records = until_over(gan)
    for record in records:
        if record["asked"]:
            assert all(sum(value is not None for value in group) == 1 for group in record["true_rewards"])
            assert record["audit_passed"] == 1.0
    assert [record["asked"] for record in records] == [0] * 8 + [2] + [0] * 7 + [2]
    assert [record["gen_loss"] is None for record in records] == [False] * 16 + [True], "the last audit ends the run"
    assert gan.reward_calls == 80 and "those for audits" in gan.state.why_over("mixed")


@pytest.mark.parametrize(("explained", "steps"), [(0.25, 5), (0.5, 10)])
@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_the_explained_share_limits_the_steps_on_predictions_and_the_last_is_audited(explained, steps, monkeypatch):
    monkeypatch.setattr(Discriminator, "explained", property(lambda self: explained))
    gan = with_budget()
    records = until_over(gan)
    alone = [record for record in records if not record["asked"] or "audit_passed" in record]
    learned = [record["gen_loss"] is not None for record in alone]
    assert sum(learned) == steps == gan.monitor.audits.alone
    assert alone[-1]["audit_passed"] == 1.0 and not learned[-1]
    assert f"good enough for {steps} steps without labels" in gan.state.why_over("mixed")


@pytest.mark.parametrize(("explained", "labels"), [(0.0, 80), (0.25, 78), (0.5, 76)])
@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_calls_that_audits_do_not_need_become_labels(explained, labels, monkeypatch):
    monkeypatch.setattr(Discriminator, "explained", property(lambda self: explained))
    gan = with_budget()
    records = until_over(gan)
    assert sum(record["asked"] for record in records if "audit_passed" not in record) == labels
    assert gan.reward_calls == 80


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_an_audit_is_due_earlier_when_the_kl_has_doubled(trusted):
    gan = alone()
    gan.step(PROMPTS[:2], TARGETS[:2])
    gan.monitor.audits.now = 2 * gan.monitor.audits.kl + 0.6
    assert gan.step(PROMPTS[:2], TARGETS[:2])["asked"] == 2


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_the_generator_does_not_learn_from_an_audits_rewards(trusted):
    """Oracle: the same step with an audit that gets other answers above the reference."""
    found = []
    for answer in (1.0, 2.0):
        gan = alone()
        gan.monitor.audits.since = 8
        gan.compute_reward = lambda response, target, answer=answer: answer
        record = gan.step(PROMPTS[:2], TARGETS[:2])
        assert record["audit_passed"] == 1.0 and record["gen_loss"] is not None
        found.append(player_state(gan, "generator")["parameters"])
    assert differences(*found) == []


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_a_failed_audit_brings_the_last_audited_generator_back_and_ends_the_run(trusted):
    gan = alone()
    kept = player_state(gan, "generator")
    for _ in range(8):
        gan.step(PROMPTS[:2], TARGETS[:2])
    assert differences(kept["parameters"], player_state(gan, "generator")["parameters"]) != []
    gan.compute_reward = lambda response, target: -100.0
    with pytest.warns(UserWarning, match="an audit failed"):
        record = gan.step(PROMPTS[:2], TARGETS[:2])
    assert record["audit_passed"] == 0.0 and record["gen_loss"] is None and "back" in record["alarms"][0]
    found = player_state(gan, "generator")
    assert differences(kept["parameters"], found["parameters"]) == []
    assert differences(kept["optimizer"], found["optimizer"]) == []
    with pytest.raises(BudgetSpent, match="an audit failed"):
        gan.step(PROMPTS[:2], TARGETS[:2])


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_a_larger_budget_continues_after_the_last_audit(trusted, tmp_path):
    gan = alone(output_dir=str(tmp_path))
    until_over(gan)
    gan.save_checkpoint(ckpt_dir=str(tmp_path))
    more = LoraGAN.from_checkpoint(tmp_path, reward=gan.compute_reward, reward_budget=160)
    assert more.state.why_over("mixed") is None
    assert more.step(PROMPTS[:2], TARGETS[:2])["asked"] == 4 and more.monitor.audits.limit is None


@pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent")
def test_a_run_resumes_exactly_between_two_audits(trusted, tmp_path):
    gan = alone(output_dir=str(tmp_path))
    for _ in range(5):
        gan.step(PROMPTS[:2], TARGETS[:2])
    gan.save_checkpoint(step=24, ckpt_dir=str(tmp_path))
    other = small_gan(**ALONE, output_dir=str(tmp_path))
    other.compute_reward = gan.compute_reward
    other.load_checkpoint(step=24, ckpt_dir=str(tmp_path))
    for _ in range(6):
        one, two = (each.step(PROMPTS[:2], TARGETS[:2]) for each in (gan, other))
        assert one | {"notices": []} == two | {"notices": []}  # a new object says once that the labels are spent
    assert other.monitor.audits == gan.monitor.audits and other.monitor.audits.since == 3
    assert other.monitor.test == gan.monitor.test


def test_without_a_rollback_no_call_is_kept_for_audits():
    assert Config(reward_budget=80).audit_calls == 4
    assert Config(reward_budget=80, on_exploit="warn").audit_calls == 0
    assert Config(reward_budget=80, after_budget="stop").audit_calls == 0
    assert Config(reward_budget=80, adversarial=False).audit_calls == 0
    assert Config().audit_calls == 0


def test_repetition_is_the_share_of_pairs_seen_before():
    gan = small_gan()
    experience = play(gan, _rows(1), asks=False)
    responses = [[7, 8, 7, 8, 7], [7, 8, 9]]
    rows = sampling.Rollout(gan.players, [[5], [5]], responses, np.arange(2), ["", ""])
    assert repetition(dataclasses.replace(experience, rollout=rows)) == pytest.approx((0.5 + 0.0) / 2)


def test_stop_ends_fit(tmp_path, monkeypatch):
    gan = small_gan(on_exploit="stop", output_dir=str(tmp_path), prompts_per_step=2)
    monkeypatch.setattr(gan.monitor, "watch", lambda *_: ["the reward is being exploited"])
    rows = [{"prompt": p, "target": t} for p, t in zip(PROMPTS[:2], TARGETS[:2], strict=True)]
    with pytest.warns(UserWarning, match="exploited"):
        assert len(gan.fit(rows, steps=5, progress=False)) == 1


def test_plain_rl_which_predicts_nothing_can_be_taken_back():
    gan = small_gan(adversarial=False, on_exploit="rollback")
    for _ in range(10):
        gan.step(PROMPTS[:2], TARGETS[:2], train_disc=False)
    assert gan.monitor.kept is not None
    assert np.isfinite(dataclasses.astuple(gan.monitor.test.reference)).all()
