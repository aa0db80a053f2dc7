"""Callbacks: transformers' own see of fit() what they see of Trainer.

Oracle: Trainer itself, run on a toy model with the same callbacks and intervals.
"""

import json
import re

import pytest
import torch
from helpers import PROMPTS, TARGETS, read_json, small_gan
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lora_gan.data import read_rows
from lora_gan.run.callbacks import Arguments

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]
EVENTS = [
    "on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate",
    "on_save", "on_epoch_end", "on_train_end",
]  # fmt: skip


class Recorder(TrainerCallback):
    """Notes every event and its step; `then` may set what `control` says at an (event, step)."""

    def __init__(self, then=None):
        self.seen, self.arguments, self.then = [], {}, then or {}

    def note(self, event, args, state, control, values):
        self.seen.append((event, state.global_step))
        self.arguments[event] = (args, state, values)
        for name, value in self.then.get((event, state.global_step), {}).items():
            setattr(control, name, value)


for _event in EVENTS:
    setattr(
        Recorder, _event, lambda self, args, state, control, _e=_event, **kw: self.note(_e, args, state, control, kw)
    )


def fitted(tmp_path, *callbacks, steps=5, evaluates=True, **settings):
    gan = small_gan(output_dir=str(tmp_path), callbacks=list(callbacks), **settings)
    records = gan.fit(ROWS, steps=steps, eval_dataset=ROWS[:2] if evaluates else None, progress=False)
    return gan, records


def trained(tmp_path, *callbacks, steps=5, **settings):
    """The same intervals with Trainer: six rows, two a step."""

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            return {"loss": (self.weight * x).mean(), "logits": x}

    rows = [{"x": torch.tensor([float(i)]), "labels": torch.tensor([0.0])} for i in range(6)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        eval_strategy="steps", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(Toy(), args, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def without_epochs(seen: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [entry for entry in seen if "epoch" not in entry[0]]


@pytest.mark.parametrize("intervals", [(1, 2, 3, True), (2, 5, 2, False), (3, 4, 100, True)])
def test_events_come_as_from_trainer(intervals, tmp_path):
    settings = dict(zip(("logging_steps", "eval_steps", "save_steps", "eval_on_start"), intervals, strict=True))
    ours, theirs = Recorder(), Recorder()
    fitted(tmp_path / "ours", ours, **settings)
    trained(tmp_path / "theirs", theirs, **settings)
    expected = without_epochs(theirs.seen)
    last = max(i for i, entry in enumerate(expected) if entry[0] == "on_log")
    assert expected[last:] == [("on_log", 5), ("on_train_end", 5)]
    del expected[last]  # Trainer logs its run time at the end
    assert without_epochs(ours.seen) == expected
    epochs = [[entry for entry in seen if "epoch" in entry[0]] for seen in (ours.seen, theirs.seen)]
    assert epochs[0] == epochs[1] == [
        ("on_epoch_begin", 0), ("on_epoch_end", 3), ("on_epoch_begin", 3), ("on_epoch_end", 5),
    ]  # fmt: skip


def test_callbacks_get_what_trainers_do(tmp_path):
    recorder = Recorder()
    gan, _ = fitted(tmp_path, recorder, eval_steps=2, logging_steps=2)
    args, state, values = recorder.arguments["on_train_end"]
    assert values["model"] is gan.players.peft and values["processing_class"] is gan.players.base.tokenizer
    assert values["optimizer"] is gan.generator.optimizer.adamw
    assert values["lr_scheduler"] is gan.generator.optimizer.schedule
    assert (args.output_dir, args.max_steps, args.logging_steps, args.eval_steps) == (str(tmp_path), 5, 2, 2)
    assert (state.global_step, state.max_steps, state.epoch) == (5, 5, 5 / 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert state.log_history == lines
    logs = recorder.arguments["on_log"][2]["logs"]
    assert logs == {name: value for name, value in lines[-1].items() if name != "step"}
    assert state.num_input_tokens_seen >= max(line.get("num_tokens", 0) for line in lines)
    metrics = recorder.arguments["on_evaluate"][2]["metrics"]
    assert metrics["eval_true_reward"] == lines[-1]["eval_true_reward"]
    with pytest.raises(AttributeError, match="args.deepspeed"):
        args.deepspeed  # noqa: B018


def test_the_evaluation_is_the_one_evaluate_makes(tmp_path):
    recorder = Recorder()
    gan, _ = fitted(tmp_path, recorder, steps=2)
    found = gan.evaluate(ROWS[:2])
    metrics = recorder.arguments["on_evaluate"][2]["metrics"]
    means = {f"eval_{name}": metric["mean"] for name, metric in found["metrics"].items()}
    assert metrics == means | {"eval_distinct_2": found["distinct_2"]}


def test_evaluations_leave_training_as_it_is(tmp_path):
    _, once = fitted(tmp_path / "a", eval_steps=1)
    _, never = fitted(tmp_path / "b", evaluates=False)
    assert once == never


def test_control_is_honoured(tmp_path):
    recorder = Recorder({
        ("on_step_end", 1): {"should_log": True, "should_evaluate": True, "should_save": True},
        ("on_epoch_end", 3): {"should_save": True},
        ("on_step_begin", 3): {"should_training_stop": True},
    })  # fmt: skip
    gan, records = fitted(tmp_path, recorder, steps=9, logging_steps=100, save_steps=None, eval_on_start=False)
    assert without_epochs(recorder.seen) == [
        ("on_init_end", 0), ("on_train_begin", 0),
        ("on_step_begin", 0), ("on_step_end", 1), ("on_log", 1), ("on_log", 1), ("on_evaluate", 1), ("on_save", 1),
        ("on_step_begin", 1), ("on_step_end", 2),
        ("on_step_begin", 2), ("on_step_end", 3), ("on_save", 3),
        ("on_step_begin", 3), ("on_step_end", 4), ("on_log", 4), ("on_evaluate", 4), ("on_save", 4),
        ("on_train_end", 4),
    ]  # fmt: skip
    assert len(records) == gan.global_step == 4, "told to stop when the fourth began; judged and saved as it was then"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-3", "step-4"]


@pytest.mark.parametrize(("metric", "sign"), [("true_reward", 1), ("-true_reward", -1), ("-eval_true_reward", -1)])
def test_early_stopping_stops_when_the_metric_stops_improving(metric, sign, tmp_path, monkeypatch):
    # The first is from before the first step, and does not count.
    values = iter([sign * value for value in (0.95, 0.1, 0.3, 0.2, 0.25, 0.9)])
    result = {"metrics": {"true_reward": {"mean": 0.0}}, "distinct_2": 0.5, "samples": []}

    def judged(*_, **__):
        result["metrics"]["true_reward"]["mean"] = next(values)
        return result

    monkeypatch.setattr("lora_gan.run.evaluation.evaluate", judged)
    recorder = Recorder()
    gan, _ = fitted(
        tmp_path,
        EarlyStoppingCallback(2),
        recorder,
        steps=9,
        eval_steps=1,
        save_steps=None,
        metric_for_best_model=metric,
    )
    assert gan.global_step == 4, "two evaluations without a better one"
    state = recorder.arguments["on_train_end"][1]
    assert (state.best_metric, state.best_global_step) == (sign * 0.3, 2)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-4"], "saved where it stopped"
    assert recorder.seen[-1] == ("on_train_end", 4)

    again = small_gan(output_dir=str(tmp_path), callbacks=[recorder], metric_for_best_model=metric)
    again.load_checkpoint()
    again.fit(ROWS, steps=1, progress=False)
    state = recorder.arguments["on_train_begin"][1]
    assert (state.best_metric, state.best_global_step) == (sign * 0.3, 2), "known to a run that goes on"


def test_stock_callbacks_run(tmp_path, capsys):
    gan, _ = fitted(tmp_path, PrinterCallback, ProgressCallback(), DefaultFlowCallback, steps=2)
    said = capsys.readouterr()
    assert said.out.count("'reward': ") >= 2 and "2/2" in said.err
    gan.fit(ROWS, steps=1)
    said = capsys.readouterr().err
    assert "3/3" in said and "step 3: " not in said, "ProgressCallback shows the progress instead"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3], "DefaultFlowCallback is there already"


def test_a_stock_reporter_finds_what_it_reads(tmp_path):
    pytest.importorskip("tensorboard", reason="what it reports to is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    fitted(tmp_path, TensorBoardCallback, steps=2)
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/true_reward")] == [0, 2]


def test_what_a_callback_raises_is_passed_on(tmp_path):
    class Raises(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyError("mine")

    recorder = Recorder()
    with pytest.raises(KeyError, match="mine"):
        fitted(tmp_path, recorder, Raises())
    assert recorder.seen[-1] == ("on_step_end", 1), "and the training has no regular end"


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([print], "TrainerCallback"),
        ([EarlyStoppingCallback()], "eval_dataset"),
        ([Recorder({("on_step_end", 1): {"should_evaluate": True}})], "eval_dataset"),
        ([Recorder({("on_step_end", 1): {"should_epoch_stop": True}})], "should_epoch_stop"),
    ],
)
def test_what_cannot_work_is_said(callbacks, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        fitted(tmp_path, *callbacks, evaluates=False)


def test_a_metric_that_is_not_measured_is_named(tmp_path, monkeypatch):
    result = {"metrics": {"pred_reward": {"mean": 0.0}}, "distinct_2": 0.5, "samples": []}
    monkeypatch.setattr("lora_gan.run.evaluation.evaluate", lambda *_, **__: result)
    with pytest.raises(ValueError, match=re.escape("'true_reward' was not measured: the evaluation has pred_reward")):
        fitted(tmp_path, EarlyStoppingCallback(), steps=1)


def test_streamed_rows_have_no_epochs(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recorder = Recorder()
    gan = small_gan(output_dir=str(tmp_path), callbacks=[recorder])
    gan.fit(read_rows(tmp_path / "rows.jsonl", streaming=True), steps=4, progress=False)
    assert without_epochs(recorder.seen) == recorder.seen
    assert "epoch" not in (tmp_path / "metrics.jsonl").read_text()


def test_no_steps_call_no_steps(tmp_path):
    recorder = Recorder()
    fitted(tmp_path, recorder, steps=0)
    assert recorder.seen == [("on_init_end", 0), ("on_train_begin", 0), ("on_train_end", 0)]
    assert list(tmp_path.glob("step-*")) == []


def test_arguments_have_every_setting(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    args = Arguments(gan.config, max_steps=7, evaluates=False)
    for name, value in gan.config.to_dict().items():
        if name not in ("max_steps", "save_steps", "eval_steps") and not isinstance(value, list):
            assert getattr(args, name) == value
    assert (args.max_steps, args.eval_steps, args.eval_strategy) == (7, 7, "no")
    (tmp_path / "args.json").write_text(args.to_json_string())
    assert read_json(tmp_path / "args.json") == gan.config.to_dict()
