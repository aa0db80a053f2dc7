"""The learning benchmark: its settings, resuming, rewards, and the statistics of its report, shrunken."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "defaults": {"max_completion_length": 6, "num_generations": 2, "prompts_per_step": 1, "heldout": 3, "train": 16},
    "arms": {
        "rloo": {
            "train_disc": False,
            "settings": {"adversarial": False, "learning_rate": 1e-3},
            "by_task": {"tiny": {"learning_rate": 2e-3}},
            "by_reward": {"noisy": {"learning_rate": 3e-3}},
            "by_budget": {"4": {"beta": 0.1}},
            "by_reward_budget": {"noisy/4": {"beta": 0.2}},
        },
        "predicted": {
            "sweep": True, "best_of": True, "extra_steps": 1, "step_marks": [1],
            "settings": {"reward_signal": "predicted", "after_budget": "predicted"},
        },
        "null": {"kind": "null", "settings": {"reward_signal": "predicted"}},
        "sft": {"kind": "sft", "max_steps": 2},
    },
    "experiments": [
        {
            "name": "small", "task": "style", "rewards": ["noisy"], "budgets": [4],
            "arms": ["rloo", "predicted"], "seeds": [0],
        },
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _resolved(**experiment):
    from learning_settings import expand

    given = {"name": "x", "task": "tiny", "rewards": ["exact"], "budgets": [8], "arms": ["rloo"], "seeds": [0]}
    return expand(SETTINGS | {"experiments": [given | experiment]})


def test_later_settings_override_earlier_ones():
    (plain,) = _resolved(task="style")
    assert plain.key == "x/style/exact/rloo/8/0"
    assert plain.settings["learning_rate"] == 1e-3 and "heldout" not in plain.settings
    assert plain.options["heldout"] == 3 and plain.options["train_disc"] is False
    assert _resolved()[0].settings["learning_rate"] == 2e-3
    assert _resolved(rewards=["noisy"])[0].settings["learning_rate"] == 3e-3
    assert _resolved(budgets=[4])[0].settings["beta"] == 0.1
    assert _resolved(budgets=[4], rewards=["noisy"])[0].settings["beta"] == 0.2
    assert _resolved(budgets=[4], settings={"beta": 0.3}, split="validation")[0].settings["beta"] == 0.3
    assert _resolved(split="validation")[0].options["split"] == "validation"


def test_the_hash_follows_what_decides_the_result_and_not_the_names():
    (run,) = _resolved()
    assert run.hash == _resolved(name="y")[0].hash
    assert run.hash != _resolved(settings={"beta": 0.3})[0].hash
    assert run.hash != _resolved(heldout=4)[0].hash
    assert run.hash != _resolved(seeds=[1])[0].hash


def test_an_arm_like_another_has_all_but_what_it_says_itself():
    from learning_settings import like

    first = {"kind": "null", "extra_steps": 3, "settings": {"beta": 0.1, "seed": 1}, "by_budget": {"4": {"beta": 0.2}}}
    arms = {"a": first, "b": {"like": "a", "extra_steps": 5, "settings": {"beta": 0.3}}, "c": {"like": "b"}}
    assert like(arms, "a") == first
    assert like(arms, "b") == first | {"extra_steps": 5, "settings": {"beta": 0.3, "seed": 1}}
    with pytest.raises(ValueError, match="no arm of its own"):
        like(arms, "c")


def test_unknown_names_are_refused():
    from learning_settings import expand

    with pytest.raises(ValueError, match="names the arm 'rlo'"):
        _resolved(arms=["rlo"])
    with pytest.raises(ValueError, match="setings"):
        expand({"arms": {"rloo": {"setings": {}}}, "experiments": _experiments("rloo")})
    with pytest.raises(ValueError, match="kind 'rll'"):
        expand({"arms": {"rloo": {"kind": "rll"}}, "experiments": _experiments("rloo")})
    with pytest.raises(ValueError, match="different names"):
        expand({"arms": {"rloo": {}}, "experiments": _experiments("rloo") * 2})


def _experiments(arm):
    return [{"name": "x", "task": "tiny", "rewards": ["exact"], "budgets": [8], "arms": [arm], "seeds": [0]}]


def test_the_committed_settings_are_accepted_by_the_library():
    from learning_settings import expand, read_settings

    from lora_gan import Config

    for run in expand(read_settings(ROOT / "benchmarks" / "learning.json"), seeds=[0]):
        Config(**run.settings)


def test_rewards_are_functions_of_seed_and_call():
    from learning_tasks import Memo, Reward

    asked = []

    def score(responses, targets):
        asked.append(list(responses))
        return [float(len(response)) / 10 for response in responses]

    def told(kind, seed=0, parts=(("a", "bb", "a"),)):
        reward = Reward(kind, Memo(score), seed=seed, sigma=0.9)
        return [value for part in parts for value in reward(["p"] * len(part), part)]

    assert told("exact") == [0.1, 0.2, 0.1]
    assert asked == [["a", "bb"]]  # equal texts are scored once
    noisy = told("noisy")
    assert noisy == told("noisy", parts=(("a",), ("bb", "a")))  # whatever batches they came in
    assert noisy[0] != noisy[2] and noisy != told("noisy", seed=1)
    assert set(told("thumbs", parts=[["a" * 5] * 50])) == {0.0, 1.0}
    assert told("thumbs", parts=[["a" * 20] * 9, [""] * 9]) == [1.0] * 9 + [0.0] * 9
    many = np.array(told("noisy", parts=[["a" * 5] * 4000]))
    assert many.mean() == pytest.approx(0.5, abs=0.05) and many.std() == pytest.approx(0.9, abs=0.05)
    with pytest.raises(ValueError, match="no reward 'nosy'"):
        told("nosy")


def test_the_style_rule_accepts_denials_and_nothing_less():
    from learning_tasks import DENIAL, denies, french

    texts = french(400, "heldout")
    found = [bool(DENIAL.search(text)) for text in texts]
    assert 0.1 < np.mean(found) < 0.4
    assert [bool(denies(text)) for text in texts] == found
    assert not any(map(denies, ("ne mange pas", "Le chat ne ne mange pas pas", "The cat does not eat an apple", "")))


def test_the_null_shuffles_the_discriminators_labels_alone():
    from learning_run import with_shuffled_labels

    from lora_gan.training.experience import Experience

    fields = dict.fromkeys(Experience.__dataclass_fields__)
    true_B = np.array([1.0, np.nan, 3.0, 4.0, np.nan, 6.0])
    experience = Experience(**fields | {"true_B": true_B.copy(), "step": 3})
    orders = set()
    for seed in range(20):
        shuffled = with_shuffled_labels(experience, seed).true_B
        assert np.array_equal(np.isnan(shuffled), np.isnan(true_B))
        assert sorted(shuffled[~np.isnan(shuffled)]) == [1.0, 3.0, 4.0, 6.0]
        orders.add(tuple(shuffled[~np.isnan(shuffled)]))
    assert len(orders) > 8
    assert np.array_equal(experience.true_B, true_B, equal_nan=True)


def _command(settings, out, *more, command="run"):
    line = [sys.executable, ROOT / "benchmarks" / "learning.py", command, "--settings", settings, "--out", out, *more]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=280, env=_environment())


def _environment():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_runs_go_on_where_they_were_and_a_failure_stops_no_other(tmp_path):
    settings, out = tmp_path / "settings.json", tmp_path / "docs" / "results.jsonl"
    broken = {"name": "broken", "task": "style", "rewards": ["nosy"], "budgets": [4], "arms": ["rloo"], "seeds": [0]}
    settings.write_text(json.dumps(SETTINGS | {"experiments": [broken, *SETTINGS["experiments"]]}))
    first = _command(settings, out, "--workers", 2)
    assert first.returncode == 1 and "FAILED broken/" in first.stdout and "no reward 'nosy'" in first.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    runs = {line["arm"]: line for line in lines}
    assert sorted(runs) == ["predicted", "rloo"]
    assert runs["rloo"]["calls"] == 4 and runs["rloo"]["steps"] == 2
    assert [mark["at"] for mark in runs["rloo"]["marks"]] == ["0", "2", "4"]
    assert [len(mark["reward"]) for mark in runs["rloo"]["marks"]] == [3, 3, 3]
    assert runs["rloo"]["marks"][0]["kl"] == 0 and runs["rloo"]["marks"][-1]["kl"] > 0
    assert runs["predicted"]["steps"] == 3 and len(runs["predicted"]["sweep"]) == 6
    chosen = runs["predicted"]["best_of"]
    assert all(low <= high for low, high in zip(chosen["picked"], chosen["oracle"], strict=True))

    with out.open("a") as file:
        file.write('{"key": "small/st')  # what a killed process leaves
    before = out.read_bytes()
    again = _command(settings, out, "--only", "^small/")
    assert again.returncode == 0 and "2 runs, 2 of them done" in again.stdout
    assert out.read_bytes() == before
    listed = _command(settings, out, command="list").stdout
    assert re.findall(r"^(\w+) +(\w+)/.*?/(\w+)/4/0$", listed, re.MULTILINE) == [
        ("missing", "broken", "rloo"),
        ("done", "small", "rloo"),
        ("done", "small", "predicted"),
    ]

    renamed = [experiment | {"name": "again"} for experiment in SETTINGS["experiments"]]
    settings.write_text(json.dumps(SETTINGS | {"experiments": renamed}))
    assert "2 runs, 2 of them done" in _command(settings, out).stdout  # only names differ
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert [(line["experiment"], line["arm"]) for line in lines[2:]] == [("again", "rloo"), ("again", "predicted")]
    assert all(line["key"].startswith("again/") for line in lines[2:])
    assert lines[2]["marks"] == lines[0 if lines[0]["arm"] == "rloo" else 1]["marks"]

    changed = SETTINGS | {"defaults": SETTINGS["defaults"] | {"heldout": 2}}
    settings.write_text(json.dumps(changed))
    assert _command(settings, out, "--only", "/rloo/").returncode == 0
    lines = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    assert [len(line["marks"][0]["reward"]) for line in lines if line["arm"] == "rloo"] == [3, 3, 2]

    report = _command(settings, out, "--docs", tmp_path / "docs", "--only", "/predicted/", command="report")
    assert report.returncode == 0, report.stderr
    assert "Best of 8" in (tmp_path / "docs" / "table.md").read_text()
    assert (tmp_path / "docs" / "small-4-calls.png").stat().st_size > 5000


# --- the report's statistics ------------------------------------------------------------------------------------------


def test_draws_of_seeds_and_prompts_by_hand():
    from learning_stats import Draws, draws, interval

    values_SP = np.array([[1.0, 2.0, 4.0], [0.0, 5.0, 3.0]])
    by_hand = Draws(np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]]))
    # Twice the first seed, every prompt; then both seeds, three times the second prompt.
    assert by_hand.means(values_SP) == pytest.approx([values_SP[[0, 0]].mean(), values_SP[:, [1, 1, 1]].mean()])
    drawn = draws(2, 3, 500)
    assert (drawn.seeds_DS.sum(-1) == 2).all() and (drawn.prompts_DP.sum(-1) == 3).all()
    looped = []
    for seeds_S, prompts_P in zip(drawn.seeds_DS.astype(int), drawn.prompts_DP.astype(int), strict=True):
        picked = values_SP[np.repeat(np.arange(2), seeds_S)][:, np.repeat(np.arange(3), prompts_P)]
        looped.append(picked.mean())
    its = interval(values_SP, 500)
    assert its.mean == pytest.approx(values_SP.mean())
    assert [its.low, its.high] == pytest.approx(np.quantile(looped, (0.025, 0.975)))


def test_intervals_cover_prompts_and_seeds():
    from learning_stats import interval

    values_SP = np.random.Generator(np.random.Philox(0)).normal(size=(1, 400))
    its = interval(values_SP)
    assert its.high - its.low == pytest.approx(2 * 1.96 / 20, rel=0.15)  # one seed: over prompts alone
    between_SP = np.repeat(np.random.Generator(np.random.Philox(1)).normal(size=(40, 1)), 5, axis=1)
    its = interval(between_SP)
    assert its.high - its.low == pytest.approx(2 * 1.96 * between_SP[:, 0].std() / np.sqrt(40), rel=0.15)


def test_calls_to_reach_are_read_off_the_line_through_the_marks():
    from learning_stats import calls_to_reach

    calls_M, values_M = np.array([0.0, 100.0, 200.0, 200.0]), np.array([0.2, 0.4, 0.3, 0.8])
    assert calls_to_reach(calls_M, values_M, 0.3) == pytest.approx(50)
    assert calls_to_reach(calls_M, values_M, 0.2) == 0
    assert calls_to_reach(calls_M, values_M, 0.5) == 200  # in the steps after the budget was spent
    assert calls_to_reach(calls_M, values_M, 0.9) == np.inf


def test_saving_is_a_ratio_whose_draws_pair_both_arms():
    from learning_stats import saving

    level_SP = np.array([[0.5, 0.7], [0.6, 0.8]])
    marks_MSP = np.stack([level_SP - 0.4, level_SP + 0.4])  # the level stands half way, in every draw
    its = saving(np.array([0.0, 500.0]), marks_MSP, 1000, level_SP)
    assert (its.mean, its.low, its.high) == pytest.approx((4.0, 4.0, 4.0))
    never = saving(np.array([0.0, 500.0]), marks_MSP - 1, 1000, level_SP)
    assert (never.mean, never.low, never.high) == (0.0, 0.0, 0.0)


def test_the_paired_bound_is_that_of_scipys_one_sided_test():
    """Oracle: at the bound, the one-sided paired t test has p = 0.05."""
    from learning_stats import paired_bound
    from scipy.stats import ttest_1samp

    differences = [0.02, -0.01, 0.07, 0.03, 0.05]
    mean, bound = paired_bound(differences)
    assert mean == pytest.approx(0.032)
    assert ttest_1samp(differences, bound, alternative="greater").pvalue == pytest.approx(0.05)
    with pytest.raises(ValueError, match="two pairs or more, and there are 1"):
        paired_bound([1.0])


def test_the_t_interval_is_scipys():
    from learning_stats import t_interval
    from scipy.stats import ttest_1samp

    values = [0.7, 0.9, 0.8, 0.85]
    known = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((known.low, known.high))
    assert t_interval([0.5]) == (0.5, 0.5)


def test_the_plot_of_seeds_is_drawn(tmp_path):
    from learning_report import plot_seeds

    marks = {100: [0.5, 0.7]}
    lines = [_line(arm, seed, marks) for arm in ("mixed", "rloo") for seed in (0, 1, 2)]
    plot_seeds(lines, tmp_path / "seeds.png")
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_the_share_of_the_gap():
    from learning_stats import gap_closed

    first_SP = np.array([[0.2, 0.4, 0.1]])
    its = gap_closed(first_SP, first_SP + 0.1, first_SP + 0.4)
    assert (its.mean, its.low, its.high) == pytest.approx((0.25, 0.25, 0.25))


def _line(arm, seed, marks, budget=100, reward="noisy"):
    its = [
        {
            "at": str(calls), "calls": calls, "step": calls, "seconds": calls / 10, "alarms": 0, "kl": 0.1,
            "reward": values, "chrf": [50.0] * len(values), "length": [3] * len(values),
            "distinct_2": 0.9, "rank_correlation_within": None,
        }
        for calls, values in marks.items()
    ]  # fmt: skip
    return {
        "key": f"core/tiny/{reward}/{arm}/{budget}/{seed}", "experiment": "core", "task": "tiny", "reward": reward,
        "arm": arm, "budget": budget, "seed": seed, "calls": its[-1]["calls"], "steps": 1, "marks": its, "curve": [],
        "options": {"train_disc": False, "kind": "rl"},
    }  # fmt: skip


def test_the_table_pairs_seeds_and_the_last_line_of_a_key_counts(tmp_path):
    from learning_report import cells, paired, write_report

    lines = [
        _line("rloo", 0, {0: [0.0, 0.0], 1000: [9.0, 9.0]}, budget=1000),  # replaced below
        _line("rloo", 0, {0: [0.1, 0.3], 1000: [0.5, 0.7]}, budget=1000),
        _line("rloo", 1, {0: [0.1, 0.3], 1000: [0.6, 0.6]}, budget=1000),
        _line("better", 1, {0: [0.1, 0.3], 500: [0.8, 0.8]}, budget=1000),
        _line("better", 2, {0: [0.1, 0.3], 500: [0.9, 0.9]}, budget=1000),
    ]
    rloo, better = cells(lines)
    assert rloo.values("reward").tolist() == [[0.5, 0.7], [0.6, 0.6]]
    assert rloo.labels == ["0", "last"] and rloo.seeds == [0, 1]
    difference = paired(better, rloo, "reward")
    assert difference.mean == pytest.approx(0.2)  # seed 1 alone is in both
    page, *plots = write_report(lines, tmp_path, "", None, tmp_path / "none.json", tmp_path / "results.jsonl")
    text = page.read_text()
    assert "| better | 2 | 0.850 [0.800, 0.900] | 0.200 |" in text
    assert "1,000 (0.600, rloo) | better, 1,000 | 308 | 3.25" in text  # 0.2 to 0.85 over 500 calls
    assert len(plots) == 2 and all(plot.stat().st_size > 5000 for plot in plots)
