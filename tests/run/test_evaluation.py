"""The paired difference of two evaluations: generator − reference, row by row.

Oracles: NumPy on the rows' own values, and responses that are known.
"""

import json
import re

import numpy as np
import pytest
from helpers import PROMPTS, TARGETS, base_folder, small_gan

from lora_gan.cli import main as cli
from lora_gan.run import evaluation

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(12)]


def result(values, distinct=0.5, **logged):
    columns = {"true_reward": values}
    metrics = {name: evaluation.interval(column) for name, column in columns.items()}
    return {"metrics": metrics, "distinct_2": distinct, "per_row": columns, "logged": logged, "samples": []}


def test_it_is_the_bootstrap_of_the_rows_differences():
    draw = np.random.default_rng(3)
    prompts = 5 * draw.normal(size=200)  # what the rows have in common
    one, other = prompts + 0.3 + 0.1 * draw.normal(size=200), prompts + 0.1 * draw.normal(size=200)
    found = evaluation.difference(result(one.tolist(), 0.75, a=2.0, b=1.0), result(other.tolist(), 0.5, a=0.5))
    metric, paired = found["metrics"]["true_reward"], one - other
    assert metric["mean"] == pytest.approx(paired.mean())
    half = 1.96 * paired.std() / np.sqrt(200)
    assert metric["high"] - metric["mean"] == pytest.approx(half, rel=0.1)
    assert metric["mean"] - metric["low"] == pytest.approx(half, rel=0.1)
    alone = evaluation.interval(one.tolist())
    assert metric["high"] - metric["low"] < 0.1 * (alone["high"] - alone["low"]), "what is in common is removed"
    assert (found["distinct_2"], found["logged"]) == (0.25, {"a": 1.5})


def test_rows_without_a_pair_are_left_out():
    found = evaluation.difference(result([1.0, None, 3.0, 5.0]), result([0.5, 9.0, None, 4.0]))["metrics"]
    assert found["true_reward"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    none = evaluation.difference(result([None, 1.0]), result([1.0, None]))["metrics"]
    assert none["true_reward"] == {"mean": None, "low": None, "high": None}


def test_other_rows_cannot_be_paired():
    with pytest.raises(ValueError, match="2 and 3 rows: compare two evaluations of the same rows"):
        evaluation.difference(result([1.0, 2.0]), result([1.0, 2.0, 3.0]))


def test_every_metric_has_its_value_of_every_row():
    gan = small_gan()
    gan.step(PROMPTS[:2])
    found = gan.evaluate(ROWS)
    assert found["per_row"].keys() == found["metrics"].keys()
    for name, column in found["per_row"].items():
        assert len(column) == len(ROWS) and found["metrics"][name] == evaluation.interval(column)
    assert found["per_row"]["length"] == [len(sample["response"].split()) for sample in found["samples"]]
    same = evaluation.difference(found, found)["metrics"]
    assert all(metric == {"mean": 0.0, "low": 0.0, "high": 0.0} for metric in same.values())


def test_eval_reference_prints_it_and_writes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text("def length(response):\n    return float(len(response))\n")
    small = ["--num_generations", "4", "--max_completion_length", "6", "--prompts_per_step", "2"]
    words = ["--model", str(base_folder()), "--data", "rows.jsonl", "--reward", "mine.py:length", "--output_dir", "run"]
    assert cli.main(["train", *words, *small, "--max_steps", "2", "--learning_rate", "0.05"]) == 0
    capsys.readouterr()
    options = ["eval", "--checkpoint", "run", "--data", "rows.jsonl", "--output", "judged.json"]
    assert cli.main([*options, "--reference"]) == 0
    out, judged = capsys.readouterr().out, json.loads((tmp_path / "judged.json").read_text())
    assert list(judged) == ["generator", "reference", "difference"]
    lengths = {
        player: np.array([len(sample["response"]) for sample in judged[player]["samples"]], dtype=float)
        for player in ("generator", "reference")
    }
    paired = lengths["generator"] - lengths["reference"]
    metric = judged["difference"]["metrics"]["true_reward"]
    assert metric == pytest.approx(evaluation.interval(paired.tolist())) and metric["mean"] == pytest.approx(
        paired.mean()
    )
    lines = out.splitlines()
    assert lines[1].split("  ")[-1] == "difference per row"
    (first,) = [i for i, line in enumerate(lines) if line.startswith("true_reward")]
    row = " ".join(lines[first : first + (1 if lines[first + 1][0] != " " else 2)])  # a wide cell has two lines
    assert f"[{metric['low']:.3f}, {metric['high']:.3f}]" in row and f"{metric['mean']:.3f}" in row.split()
    assert len(re.findall(r"\[", row)) == 3
    below = lines.index("difference per row: generator − reference")
    assert lines[below + 1].startswith("reference: the base. Both sample new responses")
    assert max(map(len, lines)) <= 80
    contains_zero = metric["low"] <= 0 <= metric["high"]
    assert ("The interval of the difference in true_reward contains 0" in out) == contains_zero
    assert lines[-1] == f"True-reward calls: {2 * len(ROWS)} in evaluation"
    assert cli.main(options) == 0
    assert "reference" not in capsys.readouterr().out
    assert list(json.loads((tmp_path / "judged.json").read_text())) == ["generator"]
