"""The demo on SmolLM2: its tables by hand, its help, and (slow) two steps on the real base."""

import json
from pathlib import Path

import pytest
from helpers import load_script

from lora_gan.cli import demo_chat
from lora_gan.cli import main as cli
from lora_gan.cli.demo_chat import Judged
from lora_gan.rewards import instructions

ROOT = Path(__file__).parents[2]


def judged(name: str, share: list[float]) -> Judged:
    count = len(share)
    full = [float(value == 1) for value in share]
    return Judged(name, ["a b c"] * count, share, full, [-2.0] * count, [3.0] * count, {"no_comma": 0.5}, 1.0)


def test_help_names_the_options_and_the_base(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo-chat", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("--steps", "--seed", "--heldout", "--output_dir", "lora-gan fetch smollm2"):
        assert words in " ".join(said.split())


def test_without_the_base_the_command_that_brings_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_GAN_CACHE", str(tmp_path / "cache"))
    assert cli.main(["demo-chat", "--output-dir", str(tmp_path / "run")]) == 2
    assert "lora-gan fetch smollm2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_table_shows_means_and_intervals():
    said = demo_chat.table([judged("base", [0.0, 1.0, 0.5, 0.5]), judged("trained", [1.0] * 4)]).splitlines()
    head, _, share, full, logprob, *_ = [line.split("  ") for line in said]
    assert head[0] == "" and [name.strip() for name in head if name] == ["base", "trained"]
    assert share[0] == "constraints met %" and share[-1].strip() == "100 [100, 100]" and "50 [" in "".join(share)
    assert "25 [" in "".join(full) and full[-1].strip() == "100 [100, 100]"
    assert "".join(logprob).count("-2.00 [-2.00, -2.00]") == 2


def test_answers_side_by_side_are_marked_by_what_they_meet():
    rows = [{"prompt": [{"role": "user", "content": "Ask."}], "constraints": ["question", "no_comma"]}]
    before, after = judged("base", [0.0]), judged("trained", [1.0])
    before.answers, after.answers = ["Red, or\nblue."], ["Blue?"]
    said = demo_chat.side_by_side(rows, before, after)
    assert "base:    ✗✗ Red, or ⏎ blue." in said and "trained: ✓✓ Blue?" in said


def script():
    return load_script(ROOT / "benchmarks" / "demo_chat_table.py")


def line(seed: int, base: list[float], trained: list[float]) -> dict:
    fluency = {"base_logprob": [-2.0] * len(base), "words": [3.0] * len(base), "distinct_2": 0.5}
    models = [
        {"name": name, "share": share, "full": [float(value == 1) for value in share], **fluency}
        for name, share in (("base", base), ("trained", trained))
    ]
    return {"seed": seed, "models": models, "reward_calls": 256, "seconds": {"training": 1.0, "all": 2.0}}


def test_the_gain_is_the_mean_over_seeds_and_its_interval_covers_both():
    table = script()
    same = [line(seed, [0.0, 0.5], [0.5, 1.0]) for seed in range(3)]
    assert table.gain(same, "trained", "share") == pytest.approx((0.5, 0.5, 0.5))
    mean, low, high = table.gain([line(0, [0.0, 0.0], [0.0, 0.0]), line(1, [0.0, 0.0], [1.0, 1.0])], "trained", "share")
    assert (mean, low, high) == (0.5, 0.0, 1.0)  # a seed may be drawn twice


@pytest.mark.slow
def test_two_steps_on_the_real_base_leave_what_the_demo_says(smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_chat, "BEST_OF", 2)
    monkeypatch.setattr(demo_chat, "RECIPE", {**demo_chat.RECIPE, "max_completion_length": 8})
    folder = tmp_path / "run"
    assert cli.main(["demo-chat", "--steps", "2", "--heldout", "6", "--output-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    for words in ("base", "trained, best of 2", "constraints met %", "The first 6 held-out prompts", "lora-gan eval"):
        assert words in said
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    recipe = demo_chat.RECIPE
    assert result["reward_calls"] == 2 * recipe["prompts_per_step"] * recipe["num_generations"] * recipe.get(
        "query_rate", 1
    )
    assert [model["name"] for model in result["models"]] == ["base", "trained", "trained, best of 2"]
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    for model in result["models"]:
        oracle = [
            instructions.share_met(row["constraints"], answer)
            for row, answer in zip(rows, model["answers"], strict=True)
        ]
        assert model["share"] == oracle
        assert all(value < 0 for value in model["base_logprob"])
    lines = (folder / "answers.held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * 6
    assert (folder / "step-2" / "generator" / "adapter_model.bin").is_file()
    command = ["eval", "--checkpoint", str(folder), "--data", str(folder / "held_out.jsonl")]
    assert cli.main([*command, "--reward", "lora_gan.rewards.instructions:reward"]) == 0
    assert "true_reward" in capsys.readouterr().out
