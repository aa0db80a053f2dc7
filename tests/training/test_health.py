"""Notices of what is wrong and can still be mended: each once, with its figure and the setting to change.

Oracle: records with known figures, and runs that are made ill on purpose; a healthy run of `tiny` is told nothing.
"""

import json
import random
import warnings

import numpy as np
import pytest
from helpers import PROMPTS, TARGETS, read_json, reward, sign, small_gan

from lora_gan import Config, LoraGAN, tiny
from lora_gan.storage.json_lines import read_lines
from lora_gan.training import health
from lora_gan.training.health import Health
from lora_gan.training.plan import plan_step

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]


def record(number=0, **changes):
    """A healthy step's: two groups of four different responses."""
    responses = [[f"answer {number} {j} {i}" for i in range(4)] for j in range(2)]
    return {
        "responses": responses, "asked": 8, "unanswered": 0, "reward_mean": 0.5, "reward_std": 0.2,
        "frac_reward_zero_std": 0.0, "completions/clipped_ratio": 0.1, "completion_length": 10.0, "kl": 0.5,
        "rank_correlation_within": 0.4,
    } | changes  # fmt: skip


def told(steps, learns_to_predict=False, **settings):
    """[(step, notice)] of these records, counted from 1."""
    watch = Health(Config(**{"num_generations": 4, "temperature": 0.7, **settings}))
    return [
        (number, words)
        for number, step in enumerate(steps, 1)
        for words in watch.watch(step, learns_to_predict=learns_to_predict)
    ]


# --- the rules --------------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_told_nothing():
    rng = np.random.default_rng(0)
    steps = [
        record(i, reward_mean=0.3 + 0.01 * i + rng.normal(0, 0.05), kl=0.05 * i,
               rank_correlation_within=rng.normal(0.3, 0.4))
        for i in range(60)
    ]  # fmt: skip
    assert told(steps, learns_to_predict=True) == []


def test_a_constant_reward_is_said_once_with_its_value():
    constant = dict(reward_mean=0.25, reward_std=0.0, frac_reward_zero_std=1.0)
    assert told([record(i, **constant) for i in range(9)]) == [
        (
            3,
            "the true reward was 0.25 for all 24 responses of the last 3 steps, so it teaches nothing: check "
            "what the reward returns for different responses; use a reward with finer levels, or raise num_generations "
            "(now 4) or temperature (now 0.7)",
        )
    ]
    broken = [record(i, **(constant if i % 3 else {})) for i in range(9)]
    assert told(broken) == [], "never three steps in a row"
    assert told([record(i, **constant, asked=2) for i in range(12)])[0][0] == 8, "16 answers, not 6"
    alone = dict(constant, frac_reward_zero_std=None)
    assert told([record(i, **alone) for i in range(9)], num_generations=1)[0][0] == 3, "groups of one have no spread"


def test_rewards_that_are_equal_within_every_group_are_said():
    equal = dict(reward_mean=0.5, reward_std=0.5, frac_reward_zero_std=1.0)
    ((step, words),) = told([record(i, **equal) for i in range(9)])
    assert step == 3 and words.startswith(
        "the true reward was equal within every group of the last 3 steps (24 responses), so it teaches "
        "nothing: use a reward with finer levels, or raise num_generations (now 4)"
    )
    between = dict(equal, frac_reward_zero_std=0.9)
    assert told([record(i, **between) for i in range(9)]) == []


def test_a_run_that_is_done_is_not_ill():
    """Rewards, and responses, become equal where the reward has risen as far as it can."""
    done = dict(reward_mean=1.0, reward_std=0.0, frac_reward_zero_std=1.0, responses=[["a"] * 4, ["b"] * 4])
    assert told([*map(record, range(5)), *(record(i, **done) for i in range(9))]) == []
    fallen = dict(done, reward_mean=0.1)
    ((step, words),) = told([*map(record, range(5)), *(record(i, **fallen) for i in range(9))])
    assert step == 8 and words.startswith("all responses to a prompt were the same text in the last 3 steps")


def test_nothing_is_said_where_no_reward_was_measured():
    unasked = dict(asked=0, reward_mean=None, reward_std=None, frac_reward_zero_std=None, rank_correlation_within=None)
    assert told([record(i, **unasked) for i in range(9)], learns_to_predict=True) == []
    assert told([record(i, asked=8, unanswered=8, reward_mean=None) for i in range(9)]) == []
    assert told([{"responses": None}] * 9) == [], "imitation alone samples nothing"


def test_responses_that_are_cut_are_said_with_their_share():
    ratios = [0.0, 0.2, 0.7, 0.8, 0.9]
    steps = [record(i, **{"completions/clipped_ratio": ratio}) for i, ratio in enumerate(ratios)]
    assert told(steps, max_completion_length=24) == [
        (
            4,  # the mean of 0.2, 0.7 and 0.8
            "57% of the responses of the last 3 steps were cut at max_completion_length=24, so the reward judges "
            "unfinished texts: raise max_completion_length, or ask for shorter answers in the prompts",
        )
    ]
    assert told([record(i, **{"completions/clipped_ratio": 0.49}) for i in range(9)]) == []
    one = [{**record(i, **{"completions/clipped_ratio": 1.0}), "responses": ["a", "b"]} for i in range(12)]
    assert told(one)[0][0] == 8, "16 responses of one prompt, two at a time"


def test_empty_responses_are_said_and_not_called_equal_besides():
    empty = dict(responses=[["", " ", "\n", "a"], ["", "", "", "b"]], reward_std=0.0, frac_reward_zero_std=1.0)
    ((step, words),) = told([record(i, **empty) for i in range(9)], beta=0.01)
    assert step == 3 and words.startswith(
        "75% of the responses of the last 3 steps were empty: check the prompts and apply_chat_template (not set); if "
    )
    assert words.endswith("raise beta (now 0.01), set kl_target, or lower learning_rate (now 0.0002)")
    nothing = dict(empty, responses=[[""] * 4] * 2)
    assert [words[:4] for _, words in told([record(i, **nothing) for i in range(9)])] == ["100%"]


def test_equal_responses_are_said_and_their_equal_rewards_are_not():
    equal = dict(reward_mean=0.5, reward_std=0.5, frac_reward_zero_std=1.0)
    ((step, words),) = told([record(i, **equal, responses=[["a"] * 4, ["b"] * 4]) for i in range(9)])
    assert (step, words) == (
        3,
        "all responses to a prompt were the same text in the last 3 steps, so there is nothing to compare: raise "
        "temperature (now 0.7); if responses became equal in training, raise beta "
        "(now 0.03), set kl_target, or lower learning_rate (now 0.0002)",
    )
    ((_, words),) = told([record(i, responses=[["a"] * 4] * 2) for i in range(9)])
    assert words.startswith("all responses of a step were the same text, whatever the prompt, in the last 3 steps")
    nearly = [["a"] * 4, ["b", "b", "b", "c"]]
    assert told([record(i, responses=nearly) for i in range(9)]) == []


def test_a_kl_that_runs_away_is_said():
    kls = [0, 1, 2, 4, 8, 12, 18, 24, 30, 34, 38]
    ((step, words),) = told([record(i, kl=float(kl)) for i, kl in enumerate(kls)])
    assert step == 9  # (18 + 24 + 30) / 3 / 10 tokens = 2.4 nats a token; before, 1.8
    assert words == (
        "the KL to the reference is 24 nats per response (2.4 per token) and rises: responses drift away from the "
        "reference's texts; raise beta (now 0.03), set kl_target, or lower learning_rate (now 0.0002)"
    )
    assert told([record(i, kl=float(kl), completion_length=100.0) for i, kl in enumerate(kls)]) == []
    assert told([record(i, kl=float(kl)) for i, kl in enumerate(kls)], kl_target=5.0) == [], "kl_target steers it"
    assert told([record(i, kl=None) for i in range(9)], beta=0.0) == []


def test_a_kl_that_costs_more_than_the_reward_has_gained_is_said():
    def steps(gain):
        return [
            record(i, kl=10.0 * (i >= 10), completion_length=50.0, reward_std=0.2,
                   reward_mean=0.5 + 0.01 * (i % 2) + gain * (i >= 10))
            for i in range(25)
        ]  # fmt: skip

    ((step, words),) = told(steps(0.1))
    assert step == 20 and words.startswith(
        "the KL to the reference, 10 nats per response, costs more than the reward has gained: beta·KL rose by 0.3 "
        "since the first 10 steps, the reward by 0.1; raise beta (now 0.03), set kl_target"
    )
    assert told(steps(0.35)) == [], "the reward is worth it"
    assert told(steps(0.1), beta=0.015) == [], "0.15 is less than the rewards of a step differ"


@pytest.mark.parametrize(("correlation", "expected"), [(0.0, 1), (-0.1, 1), (0.2, 0), (0.3, 0)])
def test_a_discriminator_at_chance_is_said_and_a_useful_one_is_not(correlation, expected):
    """What 8 answers a step in groups of 4 show of a correlation: a standard deviation of about 0.4."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        steps = [record(i, rank_correlation_within=rng.normal(correlation, 0.4)) for i in range(120)]
        found.append(told(steps, learns_to_predict=True, query_rate=0.25))
    share = np.mean([bool(notices) for notices in found])
    assert share >= 0.9 if expected else share <= 0.25, share
    if correlation == 0.3:
        assert share == 0


def test_a_discriminator_at_chance_is_said_with_its_figures():
    steps = [record(i, rank_correlation_within=(-1) ** i * 0.2) for i in range(40)]
    ((step, words),) = told(steps, learns_to_predict=True, query_rate=0.25)
    assert step == 18  # 8 steps for 64 labels, then 10 correlations: 0 ± 0.07
    assert words.startswith(
        "the discriminator is no better than chance: rank_correlation_within is 0.00 ± 0.07 over 10 steps, after 144 "
        "labels. Its predictions only add noise: raise query_rate (now 0.25), num_generations (now 4)"
    )
    assert told(steps, learns_to_predict=False) == []
    done = [step | {"frac_reward_zero_std": 0.75} for step in steps]
    assert told(done, learns_to_predict=True) == [], "most rewards are equal: there is little to rank"


@pytest.mark.parametrize(
    ("settings", "signal", "train_gen", "expected"),
    [
        ({}, "corrected", True, False),  # at query rate 1 this is the true reward
        ({"query_rate": 0.5}, "corrected", True, True),
        ({"reward_budget": 9}, "corrected", True, True),
        ({}, "predicted", True, True),
        ({}, "true", True, False),
        ({}, "true", False, True),
        ({"gradient_path": "straight_through"}, "corrected", True, True),
    ],
)
def test_the_discriminator_is_judged_where_its_prediction_counts(settings, signal, train_gen, expected):
    plan = plan_step(Config(**settings), 0, signal, train_gen=train_gen, train_disc=True)
    assert plan.learns_to_predict is expected
    assert not plan_step(Config(**settings), 0, signal, train_gen=True, train_disc=False).learns_to_predict


# --- state ------------------------------------------------------------------------------------------------------------


def ill_steps():
    """Steps that set off most rules, one after the other."""
    rng = random.Random(0)
    steps = [record(i, kl=2.0 * i, rank_correlation_within=rng.gauss(0, 0.2)) for i in range(30)]
    steps += [record(i, reward_mean=0.1, reward_std=0.0, frac_reward_zero_std=1.0) for i in range(5)]
    return steps + [record(i, **{"completions/clipped_ratio": 1.0}, responses=[["a"] * 4] * 2) for i in range(5)]


@pytest.mark.parametrize("cut", [1, 12, 20, 32, 37, 39])
def test_what_was_said_is_not_said_again_after_a_resume(cut):
    """Oracle: the run that never stopped."""
    config, whole = Config(num_generations=4), []
    one, two = Health(config), Health(config)
    for number, step in enumerate(ill_steps()):
        whole += [(number, words) for words in one.watch(step, learns_to_predict=True)]
    assert len(whole) == 5
    found = []
    for number, step in enumerate(ill_steps()):
        if number == cut:
            state = json.loads(json.dumps(two.state_dict(), allow_nan=False))
            two = Health(config)
            two.load_state_dict(state)
        found += [(number, words) for words in two.watch(step, learns_to_predict=True)]
    assert found == whole
    assert one.state_dict() == two.state_dict()


def test_the_state_stays_small():
    watch = Health(Config())
    for number in range(1000):
        watch.watch(record(number), learns_to_predict=True)
    assert len(json.dumps(watch.state_dict())) < 8000


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: state.update(told=["all is well"]), "told"),
        (lambda state: state.update(labels=-1), "labels"),
        (lambda state: state["first"][0].__setitem__(0, None), "first, entry 0, entry 0 is 'None'"),
        (lambda state: state.update(correlation=[1, 0.5]), "correlation"),
        (lambda state: state.update(recent=[[1.0]]), "recent, entry 0 is a list, but must be a list of 11"),
        (lambda state: state["recent"][0].__setitem__(7, float("nan")), "recent, entry 0, entry 7 is 'nan'"),
    ],
)
def test_a_state_that_is_none_is_refused(spoil, said, tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.step(PROMPTS[:2], TARGETS[:2])
    file = gan.save_checkpoint() / "trainer_state.json"
    state = read_json(file)
    spoil(state["health"])
    file.write_text(json.dumps(state))
    sign(file.parent)
    with pytest.raises(ValueError, match=f"health.*{said}"):
        gan.load_checkpoint(1)


def test_a_checkpoint_of_an_earlier_version_has_none(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.step(PROMPTS[:2], TARGETS[:2])
    file = gan.save_checkpoint() / "trainer_state.json"
    state = read_json(file)
    del state["health"]
    file.write_text(json.dumps(state))
    sign(file.parent)
    gan.load_checkpoint(1)
    assert gan.health.state_dict() == health.EMPTY


def test_of_a_state_that_keeps_other_things_the_common_part_is_taken(tmp_path):
    """Earlier versions had "streaks" and "series" in place of the last steps."""
    gan = small_gan(output_dir=str(tmp_path))
    gan.step(PROMPTS[:2], TARGETS[:2])
    file = gan.save_checkpoint() / "trainer_state.json"
    state = read_json(file)
    common = {"told": ["kl"], "labels": 7, "earlier": [1, 0.5], "correlation": [1, 0.5, 0.25]}
    state["health"] = common | {"streaks": {}, "series": {"first": [[0.5, 1.0]]}}
    file.write_text(json.dumps(state))
    sign(file.parent)
    gan.load_checkpoint(1)
    assert gan.health.state_dict() == health.EMPTY | common


# --- runs -------------------------------------------------------------------------------------------------------------


def fit(gan, steps, rows=ROWS):
    """What is warned of, without what the tests' base brings about: its responses have no end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gan.fit(rows, steps=steps, progress=False)
    return [str(one.message) for one in caught]


CONSTANT = "the true reward was 0.5 for all 24 responses of the last 3 steps"


def test_a_run_warns_and_writes_the_same_line_once_over_a_resume(tmp_path):
    options = {"reward": lambda response, target: 0.5, "output_dir": str(tmp_path)}
    said = fit(small_gan(**options), 4)
    assert [words for words in said if "true reward" in words][0].startswith(f"step 3: {CONSTANT}")
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    (words,) = [words for words in lines[2]["notices"] if words.startswith(CONSTANT)]
    assert f"step 3: {words}" in said
    assert all("notices" not in line for line in (lines[0], lines[1], lines[3]))
    again = small_gan(**options)
    again.load_checkpoint(4)
    assert not [words for words in fit(again, 4) if "true reward" in words]
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines if "notices" in line] == [3]


def test_a_notice_has_a_line_of_its_own_where_the_step_has_none(tmp_path):
    gan = small_gan(reward=lambda response, target: 0.5, output_dir=str(tmp_path), logging_steps=5)
    fit(gan, 6)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [3, 5]
    assert set(lines[0]) == {"step", "notices"} and lines[0]["notices"][-1].startswith(CONSTANT)
    assert lines[1]["reward"] == 0.5


def test_alarms_of_the_monitor_stand_in_the_same_place(tmp_path, monkeypatch):
    gan = small_gan(output_dir=str(tmp_path))
    monkeypatch.setattr(gan.monitor, "watch", lambda *_: ["the reward is being exploited"])
    assert "step 1: the reward is being exploited" in fit(gan, 1)
    assert next(iter(read_lines(tmp_path / "metrics.jsonl")))["notices"] == ["the reward is being exploited"]


def test_callbacks_and_trackers_get_numbers_alone(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Sees(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(logs)

    gan = small_gan(reward=lambda response, target: 0.5, output_dir=str(tmp_path), callbacks=[Sees()])
    fit(gan, 3)
    assert len(seen) == 3 and all(isinstance(value, int | float) for logs in seen for value in logs.values())


def test_steps_by_hand_are_warned_of_once():
    gan = small_gan(reward=lambda response, target: 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = [gan.step(PROMPTS[:2], TARGETS[:2]) for _ in range(6)]
    assert len([one for one in caught if CONSTANT in str(one.message)]) == 1
    assert [any(CONSTANT in words for words in record["notices"]) for record in records] == [0, 0, 1, 0, 0, 0]


def test_a_reward_may_log_a_metric_of_this_name():
    def logs(prompts, completions, log_metric, **_):
        log_metric("notices", 7.0)
        return [reward(completion) for completion in completions]

    record = small_gan(reward_funcs=[logs]).step(PROMPTS[:2])
    assert record["logs/notices"] == 7.0 and isinstance(record["notices"], list)


def test_the_clipped_share_is_shown(tmp_path, capsys):
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=1)
    ratio = next(iter(read_lines(tmp_path / "metrics.jsonl")))["completions/clipped_ratio"]
    assert f", clipped {ratio:.3f}, calls 8, done" in capsys.readouterr().err


def overlap(response, target):
    """Share of the target's words in the response: a reward that `tiny` learns from."""
    words = target.split()
    return sum(word in response.split() for word in words) / len(words)


def healthy(steps, folder):
    from lora_gan.cli.demo import BY_OPPONENT, RECIPE

    gan = LoraGAN("tiny", reward=overlap, output_dir=str(folder), save_steps=None, **RECIPE | BY_OPPONENT["learning"])
    return fit(gan, steps, tiny.pairs("train", 512, seed=0)), gan


def test_a_short_run_of_tiny_is_told_nothing(tmp_path):
    said, gan = healthy(8, tmp_path)
    assert said == [] and gan.health.told == []
    assert not any("notices" in line for line in read_lines(tmp_path / "metrics.jsonl"))


@pytest.mark.slow
def test_a_whole_run_of_tiny_is_told_nothing(tmp_path):
    """It comes to its end: then most rewards are equal in their groups."""
    said, _ = healthy(160, tmp_path)
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2, "else there is nothing to see here"
    assert said == []


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_is_told_of(tmp_path):
    from lora_gan.cli.demo import RECIPE

    options = RECIPE | {"learning_rate": 0.02, "query_rate": 1.0, "output_dir": str(tmp_path)}
    said = fit(LoraGAN("tiny", reward=overlap, **options), 14, tiny.pairs("train", 512, seed=0))
    assert any("the KL to the reference" in words and "lower learning_rate (now 0.02)" in words for words in said)
