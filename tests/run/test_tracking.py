"""What a step returns and what is kept of it: names, means, files, trackers, the display, the picture.

Oracles: the standard library's statistics, NumPy, TRL's own functions, an uninterrupted run, TensorBoard's and W&B's
own readers of the files they left.
"""

import io
import json
import logging
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import PROMPTS, ROOT, TARGETS, reward, small_gan
from rich.console import Console

from lora_gan import Config
from lora_gan.data import Row
from lora_gan.model.sampling import Rollout
from lora_gan.run import callbacks, display, tracking
from lora_gan.run.plots import plot_run
from lora_gan.storage.json_lines import JsonLines, read_lines
from lora_gan.training.experience import Experience

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]
NAN = math.nan


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_time(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "step_time"} for line in lines]


# --- the record and its summary ---------------------------------------------------------------------------------------


def hand_made() -> tuple[Experience, int]:
    """Two groups of three: one reward not answered; one group all alike; responses of 3, 1, 2 and 3 tokens."""
    gan = small_gan()
    eos = gan.players.base.eos_ids[0]
    prompts = [[7, 8], [9]]
    responses = [[7, 8, eos], [eos], [9, eos], [7, 7, 7], [8, 8, eos], [9, 9, 9]]
    rollout = Rollout(gan.players, prompts, responses, np.arange(6) // 3, [""] * 6)
    true_B = np.array([1.0, 2.0, NAN, 5.0, 5.0, 5.0])
    parts = {"one": true_B - 1, "std": np.array([NAN, NAN, NAN, NAN, 4.0, NAN])}
    predicted_MB = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    rows = [Row("a", "x"), Row("b")]
    experience = Experience(
        step=0,
        rows=rows,
        prompts=prompts,
        rollout=rollout,
        predicted_MB=predicted_MB,
        asked_B=np.ones(6, dtype=bool),
        true_B=true_B,
        inclusion_B=np.ones(6),
        parts=parts,
    )
    return experience, eos


def recorded(**gen) -> dict:
    experience, eos = hand_made()
    return tracking.step_record(
        experience.rows, experience, gen, {}, step=3, reward_calls=9, eos_ids=(eos,), single=False
    )


def test_logged_names_are_trls_and_mean_what_they_mean_there():
    logged = tracking.summary(recorded(gen_loss=0.5, kl=0.13, gen_grad_norm=2.0, gen_learning_rate=1e-3))
    answered = [1.0, 2.0, 5.0, 5.0, 5.0]
    lengths, ended = [3, 1, 2, 3, 3, 3], [3, 1, 2, 3]
    assert logged["reward"] == pytest.approx(statistics.mean(answered))
    assert logged["reward_std"] == pytest.approx(statistics.stdev(answered))
    assert logged["frac_reward_zero_std"] == 0.5
    assert logged["rewards/one/mean"] == pytest.approx(statistics.mean(answered) - 1)
    assert logged["rewards/one/std"] == pytest.approx(statistics.stdev(answered))
    assert logged["rewards/std/mean"] == 4 and "rewards/std/std" not in logged, "one value has no deviation"
    assert logged["completions/mean_length"] == pytest.approx(statistics.mean(lengths))
    assert (logged["completions/min_length"], logged["completions/max_length"]) == (1, 3)
    assert logged["completions/clipped_ratio"] == pytest.approx(2 / 6)
    assert logged["completions/mean_terminated_length"] == pytest.approx(statistics.mean(ended))
    assert logged["step_tokens"] == sum(lengths) + 3 * 2 + 3 * 1
    assert logged["kl"] == pytest.approx(0.13 * 6 / sum(lengths)), "the mean over tokens"
    assert (logged["kl_per_response"], logged["loss"]) == (0.13, 0.5)
    assert (logged["grad_norm"], logged["learning_rate"]) == (2.0, 1e-3)
    assert (logged["asked"], logged["unanswered"], logged["frac_asked"]) == (6, 1, 1.0)
    assert logged["pred_reward"] == pytest.approx(3.5)
    assert not any(isinstance(value, str | list) or value is None for value in logged.values())


def test_the_standard_deviation_is_trls():
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    experience, _ = hand_made()
    assert recorded()["reward_std"] == pytest.approx(float(nanstd(torch.tensor(experience.true_B))))


def test_what_was_not_measured_is_absent():
    logged = tracking.summary(recorded(kl=None))
    assert "kl" not in logged and "kl_per_response" not in logged and "loss" not in logged
    imitation = tracking.step_record(
        [Row("a", "x")], None, {"gen_loss": 1.0}, {}, step=1, reward_calls=0, eos_ids=(0,), single=False
    )
    assert tracking.summary(imitation) == {"loss": 1.0, "step": 1, "reward_calls": 0}
    assert tracking.measured({"a": NAN, "b": math.inf, "c": None, "d": 0}) == {"d": 0}


def test_every_name_that_is_logged_is_documented(tmp_path):
    table = ROOT / "docs" / "reference" / "metrics.md"
    if not table.exists():
        pytest.skip("docs/ is not part of this copy")
    documented = set(re.findall(r"`([\w/<>]+)`", table.read_text(encoding="utf-8")))
    gan = small_gan(output_dir=str(tmp_path), imitation_weight=0.1)
    gan.budget.counts |= {"retries": 1, "other": 2}
    gan.budget.cached = 3
    gan.fit(ROWS, steps=3, eval_dataset=ROWS[:2], progress=False)
    logged = {name for line in lines_of(tmp_path / "metrics.jsonl") for name in line}
    assert {"reward", "kl", "imitation_loss", "rank_correlation_within", "eval_true_reward"} <= logged
    assert {re.sub(r"^rewards/\w+/", "rewards/<name>/", name) for name in logged} <= documented


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_line_is_the_mean_since_the_last_one_and_totals_are_the_latest(tmp_path):
    for steps, folder in ((1, "each"), (3, "thirds")):
        gan = small_gan(output_dir=str(tmp_path / folder), logging_steps=steps)
        gan.fit(ROWS, steps=6, progress=False)
    each, thirds = (lines_of(tmp_path / folder / "metrics.jsonl") for folder in ("each", "thirds"))
    assert [line["step"] for line in thirds] == [3, 6]
    for line, part in zip(thirds, (each[:3], each[3:]), strict=True):
        for name in ("reward", "loss", "kl", "completions/mean_length", "grad_norm"):
            assert line[name] == pytest.approx(np.mean([one[name] for one in part])), name
        for name in ("reward_calls", "num_tokens", "learning_rate", "epoch"):
            assert line[name] == part[-1][name], name
        known = [one["rank_correlation"] for one in part if "rank_correlation" in one]
        assert line["rank_correlation"] == pytest.approx(np.mean(known))
    assert each[-1]["epoch"] == 2 and each[-1]["reward_calls"] == 6 * 8


def test_a_resumed_run_leaves_the_lines_of_one_that_never_stopped(tmp_path):
    options = {"save_steps": 2, "eval_steps": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    small_gan(output_dir=str(whole), **options).fit(ROWS, steps=5, eval_dataset=ROWS[:2], progress=False)
    small_gan(output_dir=str(broken), **options).fit(ROWS, steps=3, eval_dataset=ROWS[:2], progress=False)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (broken / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 4, "rew')  # killed while it wrote
    again = small_gan(output_dir=str(broken), **options)
    again.load_checkpoint(2)
    again.fit(ROWS, steps=3, eval_dataset=ROWS[:2], progress=False)
    found, expected = (without_time(lines_of(folder / "metrics.jsonl")) for folder in (broken, whole))
    # The evaluation of step 3 was paid for before the run broke off.
    assert [line.pop("reward_calls/evaluation") for line in found] == [2, 2, 2, 4, 6, 6, 8, 8, 10]
    assert [line.pop("reward_calls/evaluation") for line in expected] == [2, 2, 2, 4, 4, 4, 6, 6, 8]
    assert all(line.pop("reward_calls/total") for line in found + expected)
    assert found == expected
    assert [line["step"] for line in found] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert lines_of(broken / "completions.jsonl") == lines_of(whole / "completions.jsonl")


def test_completions_are_every_response_with_its_rewards(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), query_rate=0.5)
    rows = [ROWS[0], {"prompt": "no target"}]
    records = gan.fit(rows, steps=5, progress=False)
    found = lines_of(tmp_path / "completions.jsonl")
    expected = []
    for record in records:
        for j, prompt in enumerate(record["prompt"]):
            for i in range(4):
                sample = {
                    "step": record["step"], "prompt": prompt, "completion": record["responses"][j][i],
                    "true_reward": record["true_rewards"][j][i], "pred_reward": record["pred_rewards"][j][i],
                }  # fmt: skip
                expected.append(sample if prompt == "no target" else sample | {"target": ROWS[0]["target"]})
    assert found == expected
    assert any(sample["true_reward"] is None for sample in found), "half were not asked for"


def test_the_display_shows_the_last_step_of_a_run_that_ends_early(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "SAMPLES_SHOWN", 1)

    def stops(record):
        if record["step"] == 3:
            raise ValueError("a reward that is not as it should be")

    gan = small_gan(output_dir=str(tmp_path))
    with pytest.raises(ValueError):
        gan.fit(ROWS, steps=5, on_step=stops)
    assert [line["step"] for line in lines_of(tmp_path / "completions.jsonl")] == [1] * 8 + [2] * 8 + [3] * 8
    shown_steps = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines() if "→" in line]
    assert shown_steps == ["step 1", "step 3"]


def test_lines_of_steps_that_come_again_are_cut(tmp_path):
    """A run that continues from step 2 drops the lines of step 3, at which the earlier run ended."""
    options = {"output_dir": str(tmp_path), "save_steps": 2}
    small_gan(**options).fit(ROWS, steps=3, progress=False)
    again = small_gan(**options)
    again.load_checkpoint(2)
    again.fit(ROWS, steps=4, progress=False)
    assert [line["step"] for line in lines_of(tmp_path / "completions.jsonl")[::8]] == [1, 2, 3, 4, 5, 6]


def test_no_completions_where_they_are_off(tmp_path):
    small_gan(output_dir=str(tmp_path), log_completions=False).fit(ROWS, steps=1, progress=False)
    assert not (tmp_path / "completions.jsonl").exists()


def test_lines_hold_any_text_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    texts = ["two\nlines", "\u2028", "é \ud800", '"\\']
    with JsonLines(path, after=0) as lines:
        lines.write(*({"step": i, "text": text} for i, text in enumerate(texts)))
        assert [line["text"] for line in lines_of(path)] == texts, "written at once"
    with JsonLines(path, after=1) as lines:
        assert [line["text"] for line in lines.kept] == texts[:2]
        assert [line["text"] for line in lines_of(path)] == texts, "nothing is touched before there is a line to write"
        lines.write({"step": 2, "text": "new"})
    assert [line["text"] for line in lines_of(path)] == [*texts[:2], "new"]
    with pytest.raises(ValueError, match="JSON"), JsonLines(path, after=0) as lines:
        lines.write({"step": NAN})


# --- trackers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report_to", "said"),
    [("tensorbord", "did you mean 'tensorboard'"), (("none", "wandb"), "'none'"), ("mlflow", "all")],
)
def test_trackers_that_do_not_exist_are_named(report_to, said, tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"), report_to=report_to)
    with pytest.raises(ValueError, match=re.escape(said)):
        gan.fit(ROWS, steps=1, progress=False)
    assert gan.global_step == 0 and not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    gan = small_gan(output_dir=str(tmp_path / "run"), report_to=("tensorboard", "wandb"))
    with pytest.raises(ValueError, match="pip install wandb"):
        gan.fit(ROWS, steps=1, progress=False)
    assert gan.global_step == 0 and not (tmp_path / "run").exists()
    assert tracking.trackers_of("none") == [] and "wandb" not in tracking.trackers_of("all")


def test_a_tracker_that_cannot_start_is_named_and_the_others_are_closed(tmp_path, monkeypatch):
    closed = []
    whole = SimpleNamespace(start=bool, store_init_configuration=bool, finish=lambda: closed.append(True))

    def start(name, *_):
        if name == "wandb":
            raise RuntimeError("no key")
        return whole

    monkeypatch.setattr(whole, "start", lambda: None)
    monkeypatch.setattr(tracking, "_tracker", start)
    monkeypatch.setattr(tracking, "find_spec", bool)
    with pytest.raises(ValueError, match="the tracker wandb could not start: no key"):
        tracking.Trackers(Config(report_to=("tensorboard", "wandb")), {}, after=0)
    assert closed == [True]


def test_tensorboard_has_every_number_at_its_step(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the tracker is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(callbacks, "SAMPLES_EVERY", 2)
    options = {"report_to": "tensorboard", "save_steps": 2}
    gan = small_gan(output_dir=str(tmp_path), **options)
    gan.fit(ROWS, steps=3, eval_dataset=ROWS[:2], progress=False)
    gan = small_gan(output_dir=str(tmp_path), **options)
    gan.load_checkpoint(2)
    gan.fit(ROWS, steps=2, progress=False)

    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name), size_guidance={"tensors": 0}).Reload()
    for name in ("reward", "kl", "completions/mean_length", "learning_rate"):
        logged = [(line["step"], line[name]) for line in lines_of(tmp_path / "metrics.jsonl") if name in line]
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in found] == [1, 2, 3, 4], "goes on where it stood, each step once"
        assert found == [(step, pytest.approx(value)) for step, value in logged]
    assert [event.step for event in events.Scalars("eval/true_reward")] == [0]  # step 3's was after the checkpoint
    (texts,) = [tag for tag in events.Tags()["tensors"] if "completions" in tag]
    table = events.Tensors(texts)[0].tensor_proto.string_val[0].decode()
    first = next(line for line in lines_of(tmp_path / "completions.jsonl") if line["step"] == 2)
    assert f"| {first['step']} | {first['prompt']} |" in table
    settings = list((tmp_path / "tensorboard" / tmp_path.name).glob("*/hparams.yml"))
    assert settings and "num_generations: 4" in settings[0].read_text()


def wandb_records(data: bytes):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KB) after a header of 7 bytes."""
    at, pieces = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_wandb_has_every_number_at_its_step(own, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the tracker is not installed")
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path), "CONFIG_DIR": str(tmp_path),
                        "DATA_DIR": str(tmp_path), "ERROR_REPORTING": "false", "CONSOLE": "off"}.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name, value in (("PROJECT", "theirs"), ("NAME", "mine")):
        if own:
            monkeypatch.setenv(f"WANDB_{name}", value)
        else:
            monkeypatch.delenv(f"WANDB_{name}", raising=False)
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setattr(callbacks, "SAMPLES_EVERY", 2)
    gan = small_gan(output_dir=str(tmp_path / "run"), report_to="wandb")
    gan.fit(ROWS, steps=3, eval_dataset=ROWS[:2], progress=False)

    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    history, runs, records, patience = {}, [], [], time.monotonic() + 30
    while not any(record.HasField("exit") for record in records) and time.monotonic() < patience:
        records = [wandb_internal_pb2.Record.FromString(data) for data in wandb_records(file.read_bytes())]
        time.sleep(0.1)  # W&B's own process may still be writing when finish() has returned
    for record in records:
        if record.WhichOneof("record_type") == "run":
            runs.append(record.run)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            history.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    assert (runs[0].project, runs[0].display_name) == (("theirs", "mine") if own else ("lora-gan", "run"))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    for name in ("reward", "kl"):
        assert history[f"train/{name}"] == [(line["step"], line[name]) for line in lines if name in line]
    assert history["eval/true_reward"] == [(step, lines[step and -1]["eval_true_reward"]) for step in (0, 3)]
    assert history["completions/nrows"] == [(2, 8)]


def trackio_works() -> bool:
    try:
        return tuple(int(part) for part in version("trackio").split(".")[:2]) >= (0, 30)
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not trackio_works(), reason="trackio 0.30 or newer is not installed")
def test_trackio_has_every_number_at_its_step(tmp_path):
    """In a process of its own: trackio reads its folder when it is imported, and starts threads."""
    code = f"""
import json
from helpers import small_gan
from lora_gan.run import callbacks
from test_tracking import ROWS
callbacks.SAMPLES_EVERY = 2
options = dict(output_dir={str(tmp_path / "run")!r}, report_to="trackio")
gan = small_gan(save_steps=2, **options)
gan.fit(ROWS, steps=3, progress=False)
gan = small_gan(**options)
gan.load_checkpoint(3)
gan.fit(ROWS, steps=1, progress=False)
from trackio.sqlite_storage import SQLiteStorage
assert SQLiteStorage.get_runs("lora-gan") == ["run"], SQLiteStorage.get_runs("lora-gan")
logs = SQLiteStorage.get_logs("lora-gan", "run")
print("LOGS", json.dumps([[log["step"], log["train/reward"]] for log in logs if "train/reward" in log]))
print("TABLES", [log["step"] for log in logs if "completions" in log])
"""
    environment = os.environ | {
        "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(re.findall(r"^(LOGS|TABLES) (.*)$", done.stdout, flags=re.MULTILINE))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert json.loads(said["LOGS"]) == [[line["step"], line["reward"]] for line in lines]
    assert said["TABLES"] == "[2, 4]"


# --- the display ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def live(width: int = 100, **options) -> display.Display:
    console = Console(file=Terminal(), force_terminal=True, width=width, height=40, _environ={"TERM": "xterm"})
    return display.Display(0, 20, console=console, **options)


def shown_on(shown: display.Display) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.console.file.getvalue())


def test_a_series_knows_where_it_began_and_where_it_is():
    values, series = np.random.default_rng(0).normal(size=1000).tolist(), display.Series()
    for count, value in enumerate(values, 1):
        series.add(value, count)
        window = max(1, min(10, count // 2))
        assert series.now == pytest.approx(np.mean(values[max(0, count - window) : count]))
        if count > 1:
            assert series.change == pytest.approx(series.now - np.mean(values[:window]))
    assert len(series.points) < 32
    blocks = 1000 // len(series.points)
    assert series.points[0] == pytest.approx(np.mean(values[: 2 ** int(math.log2(blocks))]))
    assert display.sparkline([0, 1, 0.5]) == "▁█▄" and display.sparkline([2, 2]) == "▄▄"


def test_on_80_columns_nothing_of_a_number_is_cut():
    numbers = {name: 1000.25 for name in display.WATCHED if name != "reward_calls"}
    calls = {"reward_calls/evaluation": 1000, "reward_calls/retries": 20, "reward_calls/cached": 100}
    with live(80) as shown:
        for step in range(1, 41):
            parts = {"rewards/format_of_the_answer/mean": 1.0, "rewards/b/mean": 3.0}
            shown.update(step, numbers | parts | calls | {"reward_calls": 12_000 + step})
        shown.update(41, {"reward": 0.5})
    text = shown_on(shown)
    lines = text[text.rindex("step 41/20") :].splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    for label in (*(display.WATCHED[name] for name in numbers), "format_of_the_answer", "b"):
        (line,) = [line for line in lines if line.startswith(f"{label} ")]
        assert re.search(r"\d +[+-]\d+\.\d{3} +[▁▂▃▄▅▆▇█]{8,}", line), "now, change, and the trend"
    assert "calls 12,040 (plus 1,000 in evaluation, 20 retries, 100 from a cache)" in " ".join(lines)


@pytest.mark.parametrize("width", [20, 44, 100])
def test_the_live_display_shows_steps_numbers_and_samples(width):
    samples = [
        {
            "step": 2,
            "prompt": "the [bold]prompt",
            "completion": "one\x1b[2J\nline",
            "true_reward": None,
            "pred_reward": 0.25,
        }
    ]
    with live(width) as shown:
        shown.update(1, {"reward": 0.5, "reward_calls": 8, "rewards/a/mean": 1.0, "rewards/b/mean": 3.0, "loss": 7.77})
        shown.update(
            2, {"reward": 0.75, "reward_calls": 16, "rewards/a/mean": 1.0, "rewards/b/mean": 3.0, "loss": 7.77}
        )
        shown.show(samples)
    text = shown_on(shown)
    frame = text[text.rindex("step 2/20") :]
    assert all(len(line) <= width for line in frame.splitlines())
    assert "7.77" not in frame
    assert "about" in frame and "0.750" in frame
    if width >= 44:
        assert "+0.250" in frame
        assert frame.index("reward ") < frame.index("\na ") < frame.index("\nb ") < frame.index("calls")
    if width == 100:
        assert "the [bold]prompt" in frame and "one[2J line" in frame and "–" in frame and "0.250" in frame


def test_what_a_reward_says_stands_above_the_display_in_whole_lines(monkeypatch, capsys):
    handler, logger = logging.StreamHandler(), logging.getLogger("a reward")
    logger.addHandler(handler)
    logger.propagate = False
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    before = sys.stderr
    try:
        with live() as shown:
            print("printed")
            logger.warning("logged")
            sys.stderr.write("half ")
            sys.stderr.write("a line\n")
        assert sys.stderr is before and handler.stream is before
    finally:
        logger.removeHandler(handler)
    lines = [line.strip("\r") for line in shown_on(shown).splitlines()]
    assert {"printed", "logged", "half a line"} <= {line.strip() for line in lines}
    assert capsys.readouterr() == ("", "")


def test_output_that_goes_to_a_file_stays_there(capsys):
    with live() as shown:
        print("for the file")  # pytest's stdout is no terminal
    assert capsys.readouterr().out == "for the file\n" and "for the file" not in shown_on(shown)


def test_the_display_steps_aside_for_a_person(tmp_path, monkeypatch):
    shown, at = live(), []
    monkeypatch.setattr("lora_gan.run.callbacks.Display", lambda *_, **__: shown)
    stderr = sys.stderr

    class Asks:
        interactive = True

        def __call__(self, response, target):
            at.append((shown._live is None, sys.stderr is stderr))
            return reward(response)

    gan = small_gan(output_dir=str(tmp_path), reward=Asks())
    gan.fit(ROWS, steps=2, on_step=lambda record: at.append((shown._live is None, sys.stderr is stderr)))
    assert at == 2 * [*8 * [(True, True)], (False, False)]
    Asks.interactive = False
    at.clear()
    gan.fit(ROWS, steps=1)
    assert at == 8 * [(False, False)]
    with display.aside_for([Asks()]):  # no display: nothing to do
        pass


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pty") is None, reason="this system has no pseudo-terminals")
def test_a_person_answers_at_a_terminal(tmp_path):
    """On a real (pseudo-)terminal: input() works as always, and what is printed stands in lines of its own."""
    import pty

    code = f"""
import warnings
from helpers import small_gan
from lora_gan.run import callbacks
from test_tracking import ROWS
callbacks.SAMPLES_EVERY = 2
class Person:
    interactive = True
    def __call__(self, response, target):
        return float(input("score? "))
gan = small_gan(output_dir={str(tmp_path)!r}, reward=Person(), num_generations=2, prompts_per_step=1)
gan.fit(ROWS, steps=2, on_step=lambda record: warnings.warn("WARNED %d" % record["step"]))
print("DONE")
"""
    pid, terminal = pty.fork()
    if pid == 0:
        paths = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])
        environment = os.environ | {"PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
        os.execve(sys.executable, [sys.executable, "-c", code], environment)
    raw, answers = b"", iter((1, 2, 3, 4))
    while True:
        try:
            said = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not said:
            break
        raw += said
        if raw.endswith(b"score? "):
            os.write(terminal, b"%d\n" % next(answers))
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", raw.decode(errors="replace")).splitlines()
    assert status == 0, lines
    assert [line["reward"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1.5, 3.5]
    assert [line for line in lines if line.startswith("score?")] == [f"score? {i}" for i in (1, 2, 3, 4)]
    assert [line[-8:] for line in lines if line.endswith(("WARNED 1", "WARNED 2"))] == ["WARNED 1", "WARNED 2"]
    assert any(line.startswith("step 2/2 ") for line in lines) and lines[-1] == "DONE"


def test_the_display_is_gone_after_an_error():
    stderr = sys.stderr
    with pytest.raises(RuntimeError), live() as shown:
        assert sys.stderr is not stderr
        raise RuntimeError
    assert sys.stderr is stderr and shown._live is None and display._current is None


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_whole_lines_without_a_terminal(environment, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(callbacks, "SAMPLES_EVERY", 2)
    monkeypatch.setattr(callbacks, "SAMPLES_SHOWN", 1)
    gan = small_gan(output_dir=str(tmp_path))
    gan.fit(ROWS, steps=3, eval_dataset=ROWS[:2])
    lines = capsys.readouterr().err.splitlines()
    assert not any("\x1b" in line or "\r" in line for line in lines)
    assert [line.partition(":")[0] for line in lines] == [f"step {step}" for step in (0, 1, 1, 2, 2, 3, 3, 3)]
    before, first, *_ = lines_of(tmp_path / "metrics.jsonl")
    assert lines.pop(0) == f"step 0: held-out reward {before['eval_true_reward']:.3f}"
    reward_1 = first["reward"]
    assert lines[0].startswith(f"step 1: reward {reward_1:.3f}, predicted 0.000") and lines[0].endswith(" left")
    sample = lines_of(tmp_path / "completions.jsonl")[8]
    assert sample["prompt"] in lines[3] and f"(true {sample['true_reward']:.3f}" in lines[3]
    assert lines[4].endswith("done") and lines[6].startswith("step 3: held-out reward ")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert display.Display(0, 1).is_live
    monkeypatch.setenv("TERM", "dumb")
    assert not display.Display(0, 1).is_live
    assert not display.Display(0, 1, shown=False).is_live


def test_nothing_is_said_where_progress_is_off(tmp_path, capsys):
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=2, progress=False)
    assert capsys.readouterr() == ("", "")


# --- the picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("funcs", [1, 2])
def test_the_picture_draws_what_was_logged(funcs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from matplotlib.figure import Figure

    def length(prompts, completions, **_):
        return [float(len(completion)) for completion in completions]

    def letters(prompts, completions, **_):
        return [float(sum(map(str.isalpha, completion))) for completion in completions]

    gan = small_gan(output_dir=str(tmp_path), reward_funcs=[length, letters][:funcs])
    gan.fit(ROWS, steps=4, eval_dataset=ROWS[:2], progress=False)
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    picture = plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = {
        (axes.get_title(), line.get_label()): dict(zip(*line.get_data(), strict=True))
        for axes in figures[0].axes
        for line in axes.lines
    }
    lines = lines_of(tmp_path / "metrics.jsonl")

    def logged(name):
        return {line["step"]: line[name] for line in lines if name in line}

    assert drawn["reward", "true"] == logged("reward")
    assert drawn["reward", "true, held out"] == logged("eval_true_reward")
    titles = [axes.get_title() for axes in figures[0].axes]
    parts = ["parts of the true reward"] if funcs == 2 else []
    assert titles == [
        "reward", *parts, "true-reward calls so far", "rank correlation in the group, fresh",
        "KL to the reference, nats per response", "length, tokens", "share of responses cut at the limit",
        "generator loss, in units of the reward", "discriminator loss",
    ]  # fmt: skip
    assert figures[0].get_suptitle() == tmp_path.name
    for title, name in (
        ("true-reward calls so far", "reward_calls"),
        ("share of responses cut at the limit", "completions/clipped_ratio"),
        ("generator loss, in units of the reward", "loss"), ("discriminator loss", "disc_loss"),
    ):  # fmt: skip
        (values,) = [values for (panel, _), values in drawn.items() if panel == title]
        assert values == logged(name) != {}
    if funcs == 2:
        assert drawn["parts of the true reward", "letters"] == logged("rewards/letters/mean")


def test_a_total_has_no_running_mean_and_what_was_not_measured_says_so(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    from matplotlib.figure import Figure

    lines = [{"step": i, "reward": float(i % 2), "reward_calls": 8 * i} for i in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert figures[0].get_suptitle() == tmp_path.name
    by_title = {axes.get_title(): axes for axes in figures[0].axes}
    (calls,) = by_title["true-reward calls so far"].lines
    assert list(calls.get_ydata()) == [8 * i for i in range(1, 41)]
    pale, mean = by_title["reward"].lines
    assert len(pale.get_ydata()) == 40 and list(mean.get_ydata()) == pytest.approx([0.5] * 33)
    assert [text.get_text() for text in by_title["discriminator loss"].texts] == ["not measured"]
    assert len({axes.get_xlim() for axes in figures[0].axes if axes.lines}) == 1, "steps stand below each other"


def test_samples_of_another_run_do_not_stay(tmp_path):
    """Nor of steps that come again: both files begin together."""
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=3, progress=False)
    records = small_gan(output_dir=str(tmp_path)).fit(ROWS[:1], steps=1, progress=False)
    samples = lines_of(tmp_path / "completions.jsonl")
    assert [sample["completion"] for sample in samples] == sum(records[0]["responses"], [])


def test_a_token_for_the_hub_reaches_no_tracker(tmp_path, monkeypatch):
    seen = {}
    start = tracking.Trackers.__init__
    monkeypatch.setattr(
        tracking.Trackers,
        "__init__",
        lambda self, config, settings, after: seen.update(settings) or start(self, config, settings, after=after),
    )
    small_gan(output_dir=str(tmp_path), model_init_kwargs={"token": "hf_secret"}).fit(ROWS, steps=1, progress=False)
    assert seen["seed"] == 0 and "hf_secret" not in str(seen)


def test_the_picture_and_the_card_read_past_a_line_that_a_crash_left(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{"step": 1, "reward": 0.5}]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert (tmp_path / "run.png").is_file()
