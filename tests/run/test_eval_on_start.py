"""The evaluation before the first step: logged as step 0, only in a fresh run, and never the best checkpoint.

Oracles: `evaluate()` of the untrained generator, and the number of calls of a counting reward.
"""

import json

import pytest
from helpers import PROMPTS, TARGETS, reward, small_gan

from lora_gan import LoraGAN
from lora_gan.config import Config

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, response, target=None):
        self.calls += 1
        return reward(response, target)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_the_untrained_generators_evaluation_at_step_0(tmp_path, capsys):
    expected = small_gan().evaluate(ROWS[:3])
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=2, eval_dataset=ROWS[:3])
    first, *_, last = lines_of(tmp_path)
    means = {f"eval_{name}": metric["mean"] for name, metric in expected["metrics"].items()}
    calls = {"reward_calls": 0, "reward_calls/evaluation": 3, "reward_calls/total": 3}
    assert first == {"step": 0, "epoch": 0.0, "eval_distinct_2": expected["distinct_2"], **means, **calls}
    assert last["step"] == 2 and last["eval_true_reward"] != first["eval_true_reward"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert said[0] == f"step 0: held-out reward {means['eval_true_reward']:.3f}"


@pytest.mark.parametrize(("on_start", "calls"), [(True, 2 * 8 + 2 * 3), (False, 2 * 8 + 3)])
def test_it_costs_one_call_per_row_and_can_be_turned_off(tmp_path, on_start, calls):
    counting = Counting()
    gan = small_gan(output_dir=str(tmp_path), reward=counting, eval_on_start=on_start)
    gan.fit(ROWS, steps=2, eval_dataset=ROWS[:3], progress=False)
    assert counting.calls == calls
    assert gan.reward_calls == 2 * 8, "training calls alone"
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2, 2][not on_start :]


def test_it_leaves_training_as_it_is(tmp_path):
    with_it, without = (
        small_gan(output_dir=str(tmp_path / str(on)), eval_on_start=on).fit(
            ROWS, steps=2, eval_dataset=ROWS[:3], progress=False
        )
        for on in (True, False)
    )
    assert with_it == without


def test_a_run_that_goes_on_keeps_its_line_and_makes_no_other(tmp_path):
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=1, eval_dataset=ROWS[:3], progress=False)
    first = lines_of(tmp_path)[0]
    counting = Counting()
    again = LoraGAN.from_checkpoint(tmp_path, reward=counting)
    again.fit(ROWS, steps=1, eval_dataset=ROWS[:3], progress=False)
    assert counting.calls == 8 + 3
    assert lines_of(tmp_path)[0] == first
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 1, 2, 2]


def test_no_rows_no_steps_no_evaluation(tmp_path):
    counting = Counting()
    gan = small_gan(output_dir=str(tmp_path), reward=counting)
    gan.fit(ROWS, steps=0, eval_dataset=ROWS[:3], progress=False)
    assert counting.calls == 0
    gan.fit(ROWS, steps=1, progress=False)
    assert counting.calls == 8


def test_a_metric_that_is_not_measured_ends_the_run_before_it_begins(tmp_path):
    counting = Counting()
    gan = small_gan(output_dir=str(tmp_path), reward=counting, save_best=True, metric_for_best_model="bleu")
    with pytest.raises(ValueError, match="'bleu' was not measured"):
        gan.fit(ROWS, steps=2, eval_dataset=ROWS[:3], progress=False)
    assert counting.calls == 3 and gan.global_step == 0


def test_the_setting_is_true_or_false():
    assert Config().eval_on_start is True
    with pytest.raises(ValueError, match="eval_on_start='yes' is not accepted"):
        Config(eval_on_start="yes")
