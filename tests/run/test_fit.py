"""fit(), evaluate() and what they read and write.

Oracles: step() called by hand on the same rows; NumPy's bootstrap; the file that was written, read back as JSON.
"""

import json

import numpy as np
import pytest
from helpers import PROMPTS, TARGETS, differences, player_state, reward, small_gan

from lora_gan import data
from lora_gan.rewards import RewardUnavailable, chrf
from lora_gan.run import evaluation

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]


def test_fit_is_step_on_shuffled_rows_each_once_an_epoch(tmp_path):
    seen = []
    gan, by_hand = small_gan(output_dir=str(tmp_path)), small_gan()
    records = gan.fit(ROWS, steps=6, progress=False, on_step=seen.append)
    assert records == seen and len(records) == gan.global_step == 6
    prompts = [prompt for record in records for prompt in record["prompt"]]
    for epoch in (prompts[:6], prompts[6:]):
        assert sorted(epoch) == sorted(row["prompt"] for row in ROWS)
    assert prompts[:6] != prompts[6:]
    targets = {row["prompt"]: row["target"] for row in ROWS}
    for record in records:
        assert by_hand.step(record["prompt"], [targets[prompt] for prompt in record["prompt"]]) == record
    for player in ("generator", "discriminator"):
        assert differences(player_state(by_hand, player), player_state(gan, player)) == []


def test_fit_twice_goes_on_where_it_stood(tmp_path):
    once, twice = small_gan(output_dir=str(tmp_path / "a")), small_gan(output_dir=str(tmp_path / "b"))
    whole = once.fit(ROWS, steps=4, progress=False)
    assert twice.fit(ROWS, steps=1, progress=False) + twice.fit(ROWS, steps=3, progress=False) == whole


def test_fit_runs_up_to_max_steps(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), max_steps=3)
    gan.step(PROMPTS[0])
    assert len(gan.fit(ROWS, progress=False)) == 2 and gan.global_step == 3
    assert gan.fit(ROWS, progress=False) == []


def test_fit_counts_steps_by_epochs_where_it_is_not_told(tmp_path):
    rows = [{"prompt": f"the cat {i}"} for i in range(5)]
    gan = small_gan(output_dir=str(tmp_path), num_train_epochs=1.5)  # 7.5 prompts, two a step
    assert len(gan.fit(rows, progress=False)) == 4 and gan.fit(rows, progress=False) == []
    with pytest.raises(ValueError, match="max_steps"):
        gan.fit(data.read_rows(lambda: rows, streaming=True), progress=False)


def test_fit_trains_whom_it_is_told_to(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    before = player_state(gan, "generator")
    gan.fit(ROWS, steps=2, train_gen=False, progress=False)
    assert differences(before, player_state(gan, "generator")) == []
    assert len(gan.discriminator.replay) > 0


def test_metrics_are_lines_of_json_with_every_number_and_no_text(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), logging_steps=2, query_rate=0.5)
    records = gan.fit(ROWS, steps=5, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (notice,) = [line for line in lines if "notices" in line]
    assert list(notice) == ["step", "notices"] and notice["step"] == 3, "responses without an end are told of"
    lines.remove(notice)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        pair = records[line["step"] - 2 : line["step"]]
        assert all(isinstance(value, int | float) for value in line.values())
        assert line["reward"] == pytest.approx(np.mean([record["reward_mean"] for record in pair]))
        assert line["loss"] == pytest.approx(np.mean([record["gen_loss"] for record in pair]))
        assert line["reward_calls"] == pair[1]["reward_calls"] and line["step_time"] > 0
    gan.fit(ROWS, steps=1, progress=False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4, "appended"


def test_columns_reach_the_reward(tmp_path):
    seen = []

    def by_length(prompts, completions, target, level, **columns):
        seen.extend(zip(prompts, target, level, strict=True))
        return [float(len(completion)) for completion in completions]

    gan = small_gan(output_dir=str(tmp_path), reward_funcs=[by_length])
    rows = [row | {"level": i} for i, row in enumerate(ROWS)]
    gan.fit(rows, steps=3, progress=False)
    assert set(seen) == {(row["prompt"], row["target"], row["level"]) for row in rows}


def test_rows_are_read_from_mappings_and_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "a", "target": "b"}\n\n{"prompt": "c", "completion": "d", "level": 3}\n{"prompt": "\\u2028é"}\n',
        encoding="utf-8",
    )
    rows = data.read_rows(file)
    assert rows == [data.Row("a", "b"), data.Row("c", "d", {"level": 3}), data.Row("\u2028é")]
    assert data.read_rows([{"prompt": "a", "target_text": "b"}]) == rows[:1]
    file.write_text('{"prompt": "one\u2028line"}\n', encoding="utf-8")
    assert data.read_rows(file) == [data.Row("one\u2028line")], "JSON allows this separator inside a text"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": }\n', "line 2"),
        ("[1]\n", "line 1"),
        ('{"text": "a"}\n', "prompt"),
        ("", "no rows"),
    ],
)
def test_rows_that_cannot_be_read_raise(text, said, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        data.read_rows(file)


def test_evaluate_says_what_each_judge_says_of_the_same_texts():
    gan = small_gan()
    gan.step(PROMPTS[:2], TARGETS[:2])
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    result = gan.evaluate(ROWS, temperature=0.7, seed=5, batch_size=4)
    responses = gan.generate([row["prompt"] for row in ROWS], temperature=0.7, seed=5)
    assert [sample["response"] for sample in result["samples"]] == responses
    assert [sample["true_reward"] for sample in result["samples"]] == [reward(response) for response in responses]
    scores = gan.score([row["prompt"] for row in ROWS], responses)
    assert [sample["pred_reward"] for sample in result["samples"]] == pytest.approx(scores, abs=1e-5)
    means = {name: np.mean([sample[name] for sample in result["samples"]]) for name in ("true_reward", "pred_reward")}
    for name, mean in means.items():
        found = result["metrics"][name]
        assert found["mean"] == pytest.approx(mean) and found["low"] <= mean <= found["high"]
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []
    assert gan.reward_calls == 8, "calls that train are counted, those that judge are not"


def test_the_interval_covers_as_a_bootstrap_does():
    values = np.random.default_rng(0).normal(3, 2, size=200)
    found = evaluation.interval([*values.tolist(), None])
    half = 1.96 * values.std() / np.sqrt(200)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.05)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.05)


# --- what goes wrong late costs no step that was done


@pytest.mark.parametrize(
    ("held_out", "said"),
    [([{"prompt": "x"}], "target"), ([{"prompt": "x " * 300, "target": "y"}], "96 tokens")],
)
def test_held_out_rows_are_checked_before_the_first_step(tmp_path, held_out, said):
    gan = small_gan(output_dir=str(tmp_path), reward=chrf)
    with pytest.raises(ValueError, match=said):
        gan.fit(ROWS, steps=2, eval_dataset=held_out, progress=False)
    assert (gan.global_step, gan.reward_calls) == (0, 0)


def test_a_row_or_a_reward_that_fails_leaves_the_last_whole_step(tmp_path):
    whole = small_gan(output_dir=str(tmp_path / "whole"))
    whole.fit(ROWS, steps=4, progress=False)
    answers = 0

    def dies(response, target):
        nonlocal answers
        answers += 1
        if answers > 2 * 8:
            raise ConnectionError("the service is down")
        return reward(response, target)

    gan = small_gan(output_dir=str(tmp_path / "run"), reward=dies)
    with pytest.raises(ValueError, match="the service is down"):
        gan.fit(ROWS, steps=4, progress=False)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-2"]
    again = small_gan(output_dir=str(tmp_path / "run"))
    again.load_checkpoint()
    again.fit(ROWS, steps=2, progress=False)
    for player in ("generator", "discriminator"):
        assert differences(player_state(whole, player), player_state(again, player)) == []


def test_a_first_step_that_fails_leaves_nothing(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), reward=lambda response, target: "good")
    with pytest.raises(ValueError, match="'good'"):
        gan.fit(ROWS, steps=2, progress=False)
    assert list(tmp_path.glob("[!.]*")) == []


# --- what is known before the first step is said before it; what goes wrong late is saved first


def test_a_late_row_without_a_target_is_named_before_the_first_step(tmp_path):
    asked = []

    def compares(response, target):
        asked.append(target)
        return 1.0

    compares.needs_target = True
    gan = small_gan(output_dir=str(tmp_path), reward=compares)
    rows = [*ROWS, {"prompt": "without one"}]
    with pytest.raises(ValueError, match="'without one' has none"):
        gan.fit(rows, steps=1, progress=False)
    assert not asked and gan.global_step == 0
    adversarial = small_gan(output_dir=str(tmp_path), reward=compares, adversarial=True)
    assert len(adversarial.fit(rows, steps=1, train_disc=False, progress=False)) == 1 and not asked  # nothing compares


def test_evaluation_names_a_missing_target_before_it_samples(monkeypatch):
    gan = small_gan(reward=chrf)
    monkeypatch.setattr(gan, "generate", lambda *_, **__: pytest.fail("sampled before"))
    with pytest.raises(ValueError, match="'x' has none"):
        gan.evaluate([{"prompt": "x"}])


def test_steps_below_zero_are_refused_and_a_run_past_its_end_has_none_left(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(ValueError, match="steps=-1"):
        gan.fit(ROWS, steps=-1, progress=False)
    gan.fit(ROWS, steps=2, progress=False)
    assert gan.steps_left(gan.check_rows(ROWS, asks=False)) == 0 and gan.fit(ROWS, progress=False) == []


def test_a_reward_that_cannot_run_any_more_leaves_the_last_whole_step(tmp_path):
    answers = []

    def gone(response, target):
        answers.append(response)
        if len(answers) > 8:
            raise RewardUnavailable("its model is gone")
        return reward(response, target)

    with pytest.raises(RewardUnavailable, match="its model is gone"):
        small_gan(output_dir=str(tmp_path), reward=gone).fit(ROWS, steps=3, progress=False)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


# --- what evaluate() measures


def test_the_best_of_several_and_the_reference_are_those_of_generate():
    gan = small_gan()
    for _ in range(3):
        gan.step(PROMPTS[:2])
    prompts = [row["prompt"] for row in ROWS]
    answers = [[s["response"] for s in gan.evaluate(ROWS, **options)["samples"]]
               for options in ({}, {"best_of": 5}, {"player": "reference"})]  # fmt: skip
    assert answers[1] == gan.generate(prompts, 5) != answers[0]
    assert answers[2] == gan.generate(prompts, player="reference") != answers[0]


def test_metrics_that_need_targets_and_rewards_that_do_not_answer():
    def sometimes(response, target):
        return None if target == TARGETS[0] else 2.0

    gan = small_gan(reward=sometimes)
    responses = ["le chat", "", "French food"]
    gan.generate = lambda prompts, *_, **__: responses[: len(prompts)]
    rows = [{"prompt": p, "target": t} for p, t in zip("abc", (TARGETS[0], "le", "French food"), strict=True)]
    found = gan.evaluate(rows)["metrics"]
    assert found["true_reward"] == {"mean": 2.0, "low": 2.0, "high": 2.0}  # of the two that were answered
    assert found["exact_match"]["mean"] == pytest.approx(1 / 3)
    assert found["length"]["mean"] == pytest.approx(4 / 3)  # words
    if "chrf" in found:
        scores = [chrf(response, row["target"]) for response, row in zip(responses, rows, strict=True)]
        assert found["chrf"]["mean"] == pytest.approx(100 * sum(scores) / 3) and scores[2] == 1.0
    assert not any(name.startswith("rewards/") for name in found)  # one reward is the whole
    assert "exact_match" not in gan.evaluate([*rows[:2], {"prompt": "c"}])["metrics"]


def test_the_interval_holds_95_percent():
    values = np.arange(100.0)
    found = evaluation.interval(values.tolist(), draws=20_000)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.02)


def test_a_step_measures_the_scales_that_rewards_are_normalized_by():
    gan = small_gan(multi_objective_aggregation="normalize_then_sum")
    before = json.dumps(gan.reward_scales.state_dict())
    gan.step(PROMPTS[:2])
    assert json.dumps(gan.reward_scales.state_dict()) != before


def test_a_reward_that_answers_some_does_not_warn(recwarn):
    answers = iter([None, 1.0] * 8)
    small_gan(reward=lambda response, target: next(answers)).step(PROMPTS[:2])
    assert not [warning for warning in recwarn if "answered for none" in str(warning.message)]
