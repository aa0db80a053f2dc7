"""A loss or gradient that is not finite: the update is skipped and counted; too many in a row stop the run or take it
back.

Oracle: the same run whose poisoned update is left out by hand, bitwise equal.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, copies, differences, player_state, reward, small_gan

from lora_gan import LoraGAN
from lora_gan.run import recovery
from lora_gan.storage.json_lines import JsonLines
from lora_gan.training import monitor
from lora_gan.training.fresh_metrics import fresh_metrics
from lora_gan.training.optimizer import PlayerOptimizer

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(8)]


def poison(monkeypatch, gan, player, which, *, kind="gradient"):
    """Spoil these updates of a player, counted from 0: one number of the gradient, or the loss alone."""
    holder = gan.generator if player == "generator" else gan.discriminator
    count, parameter = [0], gan.players.parameters(player)[0]
    name = "_backward" if player == "generator" else "_learn"
    whole = getattr(holder, name)

    def spoiled(*arguments):
        answer = whole(*arguments)
        if count[0] in which:
            if kind == "gradient":
                parameter.grad.view(-1)[0] = math.inf
            elif player == "generator":
                answer = (math.nan, *answer[1:])
            else:
                answer = math.nan
        count[0] += 1
        return answer

    monkeypatch.setattr(holder, name, spoiled)


def leave_out(monkeypatch, gan, player, which):
    """The oracle: these updates' gradients are thrown away, and nothing else of them is done."""
    optimizer = (gan.generator if player == "generator" else gan.discriminator).optimizer
    count, step = [0], PlayerOptimizer.step

    def chosen(self, loss):
        if self is optimizer:
            count[0] += 1
            if count[0] - 1 in which:
                self.zero_grad()
                return None
        return step(self, loss)

    monkeypatch.setattr(PlayerOptimizer, "step", chosen)


def state_of(gan, player):
    state = player_state(gan, player)
    return state | {"optimizer": {k: v for k, v in state["optimizer"].items() if k != "skipped"}}


SETTINGS = [
    {},
    {"num_generations": 1, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 8},
    {"num_iterations": 2, "micro_batch_size": 3, "kl_target": 0.5},
]


@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.filterwarnings("ignore:num_generations=1")
def test_the_run_goes_on_as_if_the_poisoned_update_had_been_left_out(monkeypatch, settings, player, kind):
    spoiled, oracle = small_gan(**settings), small_gan(**settings)
    which = {2, 3}
    poison(monkeypatch, spoiled, player, which, kind=kind)
    name, skipped = f"{player[:3] if player == 'generator' else 'disc'}_skipped", 0
    for step in range(4):
        skipped += spoiled.step(PROMPTS[step % 2 :: 2], TARGETS[step % 2 :: 2])[name]
    assert skipped == 2
    with monkeypatch.context() as patched:
        leave_out(patched, oracle, player, which)
        for step in range(4):
            oracle.step(PROMPTS[step % 2 :: 2], TARGETS[step % 2 :: 2])
    for one in ("generator", "discriminator"):
        assert differences(state_of(spoiled, one), state_of(oracle, one)) == []
    assert spoiled.generator.beta_scale == oracle.generator.beta_scale
    assert differences(spoiled.monitor.state_dict(), oracle.monitor.state_dict()) == []


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_skipped_update_leaves_its_player_bitwise_as_it_was(monkeypatch, kind):
    gan = small_gan(disc_updates=1, disc_replay_groups=0, lr_scheduler_type="linear", max_steps=9)
    for _ in range(2):
        gan.step(PROMPTS[:2])
    before = {player: state_of(gan, player) for player in ("generator", "discriminator")}
    unit = gan.players.reward_unit
    for player in before:
        poison(monkeypatch, gan, player, {0}, kind=kind)
    record = gan.step(PROMPTS[:2])
    assert (record["gen_skipped"], record["disc_skipped"]) == (1, 1)
    assert record["gen_grad_norm"] is None and record["disc_grad_norm"] is None
    assert (record["gen_loss"] is None) == (record["disc_loss"] is None) == (kind == "loss")
    after = {player: state_of(gan, player) for player in before}
    for state in (before, after):  # what was measured of the step, not learned
        for name in ("correlation", "calibration", "probe", "replay"):
            del state["discriminator"]["rest"][name]
    assert unit == gan.players.reward_unit
    assert differences(before, after) == []
    assert all(p.grad is None for player in before for p in gan.players.parameters(player))


def test_one_poisoned_micro_batch_skips_all_of_the_update(monkeypatch):
    gan = small_gan(micro_batch_size=2)
    gan.step(PROMPTS[:2])
    before, count, hidden = copies(gan.players.parameters("generator")), [0], gan.players.hidden

    def third(*arguments, **options):
        answer = hidden(*arguments, **options)
        count[0] += answer.requires_grad
        return answer * math.nan if count[0] == 3 and answer.requires_grad else answer

    monkeypatch.setattr(gan.players, "hidden", third)
    assert gan.step(PROMPTS[:2], train_disc=False)["gen_skipped"] == 1
    assert count[0] == 4
    assert differences(before, copies(gan.players.parameters("generator"))) == []


def test_metrics_and_monitor_hold_no_nan(monkeypatch, tmp_path):
    monkeypatch.setattr(monitor, "WINDOW", 2)
    gan = small_gan(output_dir=str(tmp_path), kl_target=0.5)
    whole = gan.generator._reinforce
    monkeypatch.setattr(gan.generator, "_reinforce", lambda *a: replace(whole(*a), policy=math.nan, kl=math.inf))
    with torch.no_grad():
        gan.players.heads_MH.fill_(math.nan)
    records = gan.fit(ROWS, steps=3, progress=False)
    assert [(r["gen_skipped"], r["disc_skipped"]) for r in records] == [(1, 2)] * 3
    assert [(r["gen_loss"], r["kl"], r["disc_loss"], r["rank_correlation_within"]) for r in records] == [
        (None,) * 4
    ] * 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["gen_skipped"] for line in lines] == [1, 1, 1]
    kept = [gan.monitor.state_dict(), gan.generator.beta_scale, gan.discriminator.correlation.total]
    json.dumps(kept, allow_nan=False)
    assert gan.generator.beta_scale == 1.0 and gan.generator.baseline.weight == 0


def test_predictions_that_are_not_finite_are_not_taken_for_unknown_rewards():
    """As NaN they would have no part in their group, and the generator would be taught by the KL alone."""
    gan = small_gan(adversarial=True)
    gan.step(PROMPTS[:2])
    before = copies(gan.players.parameters("generator"))
    with torch.no_grad():
        gan.players.heads_MH[0, 0] = math.nan
    record = gan.step(PROMPTS[:2])
    assert (record["gen_skipped"], record["disc_skipped"]) == (1, 2)
    assert differences(before, copies(gan.players.parameters("generator"))) == []


def test_the_true_reward_teaches_beside_a_broken_discriminator():
    gan, oracle = small_gan(adversarial=False), small_gan(adversarial=False)
    with torch.no_grad():
        gan.players.heads_MH.fill_(math.nan)
    records = [one.step(PROMPTS[:2], TARGETS[:2]) for one in (gan, oracle)]
    assert [record["gen_skipped"] for record in records] == [0, 0]
    assert differences(*(player_state(one, "generator") for one in (gan, oracle))) == []


def test_heads_that_are_not_finite_are_not_put_in_place(monkeypatch):
    gan, oracle = small_gan(), small_gan()
    features, broken = gan.players.pooled_hidden, [True]
    monkeypatch.setattr(gan.players, "pooled_hidden", lambda *a: features(*a) * (math.nan if broken[0] else 1.0))
    assert gan.step(PROMPTS[:2], train_gen=False)["disc_skipped"] == 2
    assert not gan.players.heads_MH.any()
    broken[0] = False
    oracle.step(PROMPTS[:2], train_gen=False, train_disc=False)
    assert gan.step(PROMPTS[:2], train_gen=False)["disc_skipped"] == 0
    oracle.step(PROMPTS[:2], train_gen=False)
    assert gan.players.heads_MH.isfinite().all() and gan.players.heads_MH.any()


def test_fresh_metrics_from_predictions_that_are_not_finite():
    group = np.repeat([0, 1], 4)
    rng = np.random.default_rng(0)
    predicted, true = rng.normal(size=(2, 8)), rng.normal(size=8)
    predicted[0, [2, 5]] = np.nan, np.inf
    kept = np.isfinite(predicted).all(0)
    assert fresh_metrics(predicted, true, group) == fresh_metrics(predicted[:, kept], true[kept], group[kept])
    assert fresh_metrics(np.full((2, 8), np.nan), true, group) == dict.fromkeys(fresh_metrics(predicted, true, group))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_not_sampled_from(temperature):
    gan = small_gan()
    gan.generate(PROMPTS[:2], temperature=temperature)
    with torch.no_grad():
        gan.players.parameters("generator")[1].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="generator's logits.*earlier checkpoint.*float32"):
        gan.generate(PROMPTS[:2], temperature=temperature)
    with pytest.raises(FloatingPointError):
        gan.step(PROMPTS[:2])
    assert gan.global_step == 0


# --- too many in a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_step_raises_after_so_many_in_a_row(monkeypatch, player):
    """Of the generator's one update a step, and the discriminator's two."""
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 3)
    gan = small_gan()
    poison(monkeypatch, gan, player, {0, 1, 3, 4, 5} if player == "generator" else {0, 2, 3, 4, 5})
    steps = []
    with pytest.raises(FloatingPointError, match=f"{player}'s last .*learning_rate.*float32"):
        for _ in range(9):
            steps.append(gan.step(PROMPTS[:2])["step"])
    assert steps == list(range(1, len(steps) + 1)) and gan.global_step == len(steps) + 1
    assert len(steps) == (5 if player == "generator" else 2)
    assert gan.step(PROMPTS[:2], train_gen=player != "generator", train_disc=player != "discriminator")


def test_the_count_in_a_row_continues_from_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 3)
    gan = small_gan(output_dir=str(tmp_path))
    poison(monkeypatch, gan, "generator", range(9))
    for _ in range(2):
        gan.step(PROMPTS[:2])
    path = gan.save_checkpoint()
    other = LoraGAN.from_checkpoint(path, reward=reward)
    assert other.generator.optimizer.skipped == 2
    poison(monkeypatch, other, "generator", range(9))
    with pytest.raises(FloatingPointError, match="last 3 updates"):
        other.step(PROMPTS[:2])
    state = torch.load(path / "generator" / "optimizer.pt", weights_only=True)
    assert type(state["skipped"]) is int


def test_fit_stops_without_a_new_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 2)
    gan = small_gan(save_steps=2, output_dir=str(tmp_path))
    poison(monkeypatch, gan, "generator", {3, 4})
    with pytest.raises(FloatingPointError, match=r"step 5: .*learning_rate.*float32"):
        gan.fit(ROWS, steps=8, progress=False)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-4"]


def test_broken_weights_are_never_saved(tmp_path):
    gan = small_gan(save_steps=2, output_dir=str(tmp_path))

    def break_it(record):
        if record["step"] == 3:
            gan.players.parameters("generator")[1].data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match="logits"):
        gan.fit(ROWS, steps=8, progress=False, on_step=break_it)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-2"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("broken", ["updates", "weights"])
def test_rollback_goes_on_from_the_last_good_checkpoint_at_half_the_learning_rates(monkeypatch, tmp_path, broken):
    """Oracle: a new process that loads that checkpoint with half the learning rates, and is not poisoned."""
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 2)
    settings = {"save_steps": 4, "on_nonfinite": "rollback"}
    gan = small_gan(**settings, output_dir=str(tmp_path / "run"))
    if broken == "updates":
        poison(monkeypatch, gan, "generator", {5, 6})
    steps = []

    def watch(record):
        steps.append(record["step"])
        if broken == "weights" and steps == [1, 2, 3, 4, 5, 6]:
            gan.players.parameters("generator")[1].data.fill_(math.nan)

    with pytest.warns(UserWarning, match="back at step 4, with both learning rates halved"):
        records = gan.fit(ROWS, steps=8, progress=False, on_step=watch)
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert [record["step"] for record in records] == list(range(1, 9))
    for name in ("metrics", "completions"):
        found = [line["step"] for line in lines_of(tmp_path / "run" / f"{name}.jsonl")]
        assert sorted(set(found)) == list(range(1, 9)) and found == sorted(found)
        assert name != "metrics" or len(found) == 8
    rates = [record["gen_learning_rate"] for record in records]
    assert rates == [5e-3] * 4 + [2.5e-3] * 4
    assert records[-1]["disc_learning_rate"] == 2.5e-3

    halved = {"learning_rate": 2.5e-3, "disc_learning_rate": 2.5e-3}
    oracle = LoraGAN.from_checkpoint(
        tmp_path / "run" / "step-4", reward=reward, output_dir=str(tmp_path / "oracle"), **halved
    )
    oracle.fit(ROWS, steps=4, progress=False)
    for player in ("generator", "discriminator"):
        ours, theirs = (player_state(one, player) for one in (gan, oracle))
        assert ours["optimizer"].pop("scale") == 0.5 and theirs["optimizer"].pop("scale") == 1.0
        assert differences(ours, theirs) == []
    assert gan.reward_calls > oracle.reward_calls, "the calls of the steps that came again were made"

    # And the halved rate continues from the last checkpoint.
    again = LoraGAN.from_checkpoint(tmp_path / "run", reward=reward)
    assert again.generator.optimizer.learning_rate == again.discriminator.optimizer.learning_rate == 2.5e-3


def test_a_run_that_went_on_goes_back_to_before_it(monkeypatch, tmp_path):
    """The checkpoint that it began from was taken amid the trouble."""
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 4)
    settings = {"save_steps": 2, "on_nonfinite": "rollback"}
    gan = small_gan(**settings, output_dir=str(tmp_path))
    poison(monkeypatch, gan, "generator", {2, 3})
    gan.fit(ROWS, steps=4, progress=False)
    again = LoraGAN.from_checkpoint(tmp_path, reward=reward)
    assert again.global_step == 4
    poison(monkeypatch, again, "generator", {0, 1})
    with pytest.warns(UserWarning, match="back at step 2,"):
        again.fit(ROWS, steps=4, progress=True)
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_a_checkpoint_from_within_the_trouble_is_not_gone_back_to(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 4)
    gan = small_gan(save_steps=2, on_nonfinite="rollback", output_dir=str(tmp_path))
    poison(monkeypatch, gan, "generator", {2, 3, 4, 5})
    with pytest.warns(UserWarning, match="back at step 2,"):
        gan.fit(ROWS, steps=8, progress=False)
    assert gan.global_step == 8


def test_a_second_rollback_without_progress_stops(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 2)
    gan = small_gan(save_steps=3, on_nonfinite="rollback", output_dir=str(tmp_path))
    poison(monkeypatch, gan, "discriminator", range(6, 99))
    with (
        pytest.warns(UserWarning, match="back at step 3") as told,
        pytest.raises(FloatingPointError, match="went back to step 3 before, and came no further"),
    ):
        gan.fit(ROWS, steps=8, progress=False)
    assert sum("back at step" in str(one.message) for one in told) == 1


def test_rollback_with_nothing_to_go_back_to_stops(monkeypatch, tmp_path):
    """A checkpoint that another run has left in the folder is not this run's."""
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=1, progress=False)
    monkeypatch.setattr(recovery, "MOST_SKIPPED", 2)
    gan = small_gan(on_nonfinite="rollback", output_dir=str(tmp_path))
    poison(monkeypatch, gan, "generator", range(1, 9))
    with pytest.raises(FloatingPointError, match="nothing to go back to.*save_steps"):
        gan.fit(ROWS, steps=8, progress=False)


def test_lines_after_the_step_gone_back_to_are_dropped(tmp_path):
    with JsonLines(tmp_path / "x.jsonl", after=0) as lines:
        lines.go_back(0)
        assert not (tmp_path / "x.jsonl").exists(), "nothing is touched before there is a line to write"
        for step in (1, 2, 3):
            lines.write({"step": step})
        lines.go_back(1)
        assert [line["step"] for line in lines_of(tmp_path / "x.jsonl")] == [1], "at once: the run may end here"
        lines.write({"step": 2, "again": True})
    assert lines_of(tmp_path / "x.jsonl") == [{"step": 1}, {"step": 2, "again": True}]


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="on_nonfinite"):
        small_gan(base_folder(), on_nonfinite="warn")
