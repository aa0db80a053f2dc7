"""Why a run ended: fit() notes it, the display and the command print it.

Oracle: the cause that each test sets up, and the step at which it must act.
"""

import signal

import pytest
from helpers import PROMPTS, TARGETS, base_folder, small_gan
from transformers import EarlyStoppingCallback, TrainerCallback

from lora_gan.cli import main as cli
from lora_gan.run import display
from lora_gan.run.ending import Ending

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]  # a step: 2 × 4 responses


def ended(tmp_path, capsys, *, steps=6, eval_dataset=None, **settings):
    """The ending of a run, and its last line on stderr."""
    gan = small_gan(output_dir=str(tmp_path), log_completions=False, **settings)
    gan.fit(ROWS, steps=steps, eval_dataset=eval_dataset)
    return gan.ending, capsys.readouterr().err.splitlines()[-1]


def test_all_steps(tmp_path, capsys):
    ending, line = ended(tmp_path, capsys, steps=2)
    assert ending == Ending(2, 2, "all steps are done")
    assert line.startswith("step 2: ") and line.endswith(", done")


def test_no_steps_are_all_steps(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.fit(ROWS, steps=0, progress=False)
    assert gan.ending == Ending(0, 0, "all steps are done")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"after_budget": "stop"}, "after_budget is 'stop'"),
        ({"adversarial": False}, "reward_signal 'true' needs more"),
    ],
)
def test_a_budget(tmp_path, capsys, settings, why):
    ending, line = ended(tmp_path, capsys, reward_budget=20, query_rate=1.0, **settings)  # 8 + 8 + 4
    assert ending == Ending(3, 6, f"all 20 calls of reward_budget are spent, and {why}")
    assert line == f"Ended at step 3 of 6: {ending.reason}"


def test_a_budget_that_is_spent_with_the_last_step(tmp_path, capsys):
    ending, _ = ended(tmp_path, capsys, steps=2, reward_budget=16, query_rate=1.0, after_budget="stop")
    assert ending == Ending(2, 2, "all steps are done")


def test_early_stopping(tmp_path, capsys, monkeypatch):
    values = iter([0.95, 0.1, 0.3, 0.2, 0.25])  # the first is from before the first step, and does not count
    monkeypatch.setattr(
        "lora_gan.run.evaluation.evaluate",
        lambda *_, **__: {"metrics": {"true_reward": {"mean": next(values)}}, "distinct_2": 0.5, "samples": []},
    )
    ending, line = ended(tmp_path, capsys, eval_dataset=ROWS[:2], eval_steps=1, callbacks=[EarlyStoppingCallback(2)])
    reason = "early stopping: eval_true_reward did not improve in 2 evaluations; the best was 0.3 at step 2"
    assert ending == Ending(4, 6, reason) and line == f"Ended at step 4 of 6: {reason}"


class Quits(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


def test_a_callback(tmp_path, capsys):
    ending, line = ended(tmp_path, capsys, callbacks=[TrainerCallback(), Quits, TrainerCallback()])
    assert ending == Ending(2, 6, "the callback Quits asked for it")
    assert line == f"Ended at step 2 of 6: {ending.reason}"


def test_an_alarm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_gan.training.monitor.Monitor.watch", lambda *_: ["responses repeat themselves"])
    with pytest.warns(UserWarning, match="repeat themselves"):
        ending, _ = ended(tmp_path, capsys, on_exploit="stop")
    assert ending == Ending(1, 6, "alarm, and on_exploit is 'stop': responses repeat themselves")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal(tmp_path, number, name):
    gan = small_gan(output_dir=str(tmp_path))
    with pytest.raises(BaseException, match=rf"^stopped by {name} after 2 of 6 steps: step 2 is saved in .*step-2$"):
        gan.fit(ROWS, steps=6, progress=False, on_step=lambda r: r["step"] == 2 and signal.raise_signal(number))
    assert gan.ending == Ending(2, 6, f"stopped by {name}")


def test_a_later_run_has_an_ending_of_its_own(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), callbacks=[Quits])
    gan.fit(ROWS, steps=6, progress=False)
    gan.fit(ROWS, steps=1, progress=False)
    assert gan.ending == Ending(3, 3, "all steps are done")


def test_a_display_names_no_time_left_once_the_run_has_ended(capsys):
    with display.Display(0, 6) as shown:
        shown.update(3, {"reward": 1.0})
        shown.ending = Ending(3, 6, "the reason")
    assert capsys.readouterr().err == "step 3: reward 1.000, ended early\nEnded at step 3 of 6: the reason\n"


@pytest.mark.parametrize(
    ("budget", "words"),
    [("4", "Ended at step 1 of 2: all 4 calls of reward_budget are spent, and after_budget is 'stop'. True-reward"),
     ("99", "Done at step 2 of 2: all steps are done. True-reward")],
)  # fmt: skip
def test_the_command_says_it(tmp_path, monkeypatch, capsys, budget, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt\nthe cat\nthe dog\n")
    options = {
        "model": base_folder(), "data": "pairs.csv", "reward": "repetition", "output_dir": "run", "max_steps": 2,
        "num_generations": 4, "max_completion_length": 6, "prompts_per_step": 1, "reward_budget": budget,
        "after_budget": "stop",
    }  # fmt: skip
    assert cli.main(["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]) == 0
    assert f"{words} calls: {min(int(budget), 8)} in training.\nIn run: step-" in capsys.readouterr().out
