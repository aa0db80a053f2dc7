"""What a dry run says before anything is trained. Oracles: the run itself, arrays made up, and counting by hand."""

import json
import re
import time

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, copies, differences, player_state, small_gan

from lora_gan import Config, LoraGAN, data
from lora_gan.cli import footprint, plan, preview, trial
from lora_gan.cli import main as cli
from lora_gan.cli.footprint import Lengths
from lora_gan.cli.preview import Preview
from lora_gan.data import Row
from lora_gan.rewards import calling

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(8)]


def said(gan, rows=None, **run) -> str:
    """All that a dry run prints of a step on these rows."""
    rows = [Row(row["prompt"], row["target"]) for row in ROWS[:2]] if rows is None else rows
    return "\n".join(Preview(gan, rows, **{"steps": 10, **run}).dry_run())


# --- what a step samples


@pytest.mark.parametrize("settings", [{}, {"query_rate": 0.5}, {"num_generations": 8, "query_rate": 0.25}], ids=str)
def test_the_reward_is_tried_on_responses_that_step_1_samples(settings):
    asked, seen = [], []

    def reward(prompt, response):
        asked.append((prompt, response))
        return float(len(response))

    gan = small_gan(reward=reward, prompts_per_step=3, **settings)
    rows = data.take([Row(row["prompt"]) for row in ROWS], 3, seed=0, position=0)
    said(gan, rows)
    tried = set(asked)
    asked.clear()
    gan.fit(ROWS, steps=1, progress=False, on_step=lambda record: seen.append(record))
    sampled = {(row.prompt, text) for row, texts in zip(rows, seen[0]["responses"], strict=True) for text in texts}
    assert tried and tried <= sampled
    # What step 1 asks for comes first, so as many of its questions are answered already as were tried.
    room = min(4, gan.config.num_generations)
    by_prompt = [sum(pair[0] == row.prompt for pair in set(asked)) for row in rows]
    assert len(tried & set(asked)) == sum(min(room, count) for count in by_prompt)


def test_a_trial_leaves_no_trace():
    gan, twin = (small_gan(num_iterations=2) for _ in range(2))
    for one in (gan, twin):
        one.fit(ROWS, steps=2, progress=False)
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    weights = copies(gan.players.peft.parameters())
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), gan.global_step, gan.reward_calls
    out = said(gan)
    assert "per step" in out
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []
    assert differences(weights, copies(gan.players.peft.parameters())) == []
    assert all(parameter.grad is None for parameter in gan.players.peft.parameters())
    assert torch.equal(states[0], torch.random.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert states[2:] == (gan.global_step, gan.reward_calls)
    records = [one.fit(ROWS, steps=2, progress=False) for one in (gan, twin)]
    keys = ("response", "true_reward", "disc_loss", "pred_reward", "gen_loss")
    assert [[line[key] for key in keys] for line in records[0]] == [[line[key] for key in keys] for line in records[1]]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_path": "straight_through", "adversarial": True},
        {"disc_objective": "real_vs_generated", "adversarial": True},
        {"micro_batch_size": 3, "gradient_checkpointing": True},
        {"imitation_weight": 0.1, "query_rate": 0.5},
        {"lr_scheduler_type": "linear"},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_every_kind_of_step_is_timed(settings):
    gan = small_gan(**settings)
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    seconds = trial.Trial(gan, [Row(row["prompt"], row["target"]) for row in ROWS[:2]]).seconds()
    assert min(seconds.sampling, seconds.generator, seconds.predicting, seconds.discriminator) > 0
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []


def test_a_trial_that_raises_leaves_no_trace(monkeypatch):
    gan = small_gan()
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    monkeypatch.setattr(trial.Generator, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        said(gan)
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []


# --- seconds


@pytest.mark.slow
def test_seconds_per_step_are_those_of_a_step():
    """Side by side on `tiny`, the best of three tries each, so that another process matters little."""
    gan = LoraGAN("tiny", reward=lambda response: float(len(response)), max_completion_length=16)
    rows = [Row(f"Translate English to French: number {i}") for i in range(4)]
    estimates, steps = [], []
    for _ in range(3):
        estimates.append(trial.Trial(gan, rows).seconds().total)
        for _ in range(3):
            began = time.perf_counter()
            gan.step([row.prompt for row in rows])
            steps.append(time.perf_counter() - began)
    assert 0.6 < min(estimates) / min(steps[2:]) < 1.6


def test_a_long_step_is_timed_on_one_group(monkeypatch):
    monkeypatch.setattr(trial, "MAX_SECONDS", 0.0)
    gan = small_gan()
    sizes, predict = [], trial.Discriminator.predict_to_learn
    monkeypatch.setattr(
        trial.Discriminator, "predict_to_learn", lambda self, some: sizes.append(len(some)) or predict(self, some)
    )
    seconds = trial.Trial(gan, [Row(prompt) for prompt in PROMPTS]).seconds()
    assert sizes == [4] and not seconds.whole


def step_of(**seconds):
    numbers = {"sampling": 1.0, "generator": 2.0, "predicting": 0.5, "discriminator": 1.5}
    return trial.Seconds(**{**numbers, "lengths": Lengths.at_most(10, 6), "whole": True, **seconds})


def time_of(gan, planned):
    """What is said of the time of 10 steps with these calls, a tenth of a second each."""
    run = Preview(gan, [Row(PROMPTS[0])], steps=10)
    run.plan = planned
    return run.time(step_of(), preview.Tried("", 12, 0.1))


def test_the_whole_run_is_the_sum_of_its_parts():
    """10 steps × (1 + 2 + 0.5 + 1.5) s + 80 calls × 0.1 s + 2 evaluations × 16 rows × (1.5 / 8 + 0.1) s."""
    first, second, _ = time_of(small_gan(), plan.Plan(80, 16, 2))
    assert first == "about 5.8 s per step: sampling 1 s, updates 4 s, true reward 0.8 s"
    assert second.startswith("about 67 s for 10 steps and 2 evaluations, 11 s of that for the 112 calls of")


def test_after_the_budget_neither_the_reward_nor_the_discriminator_take_time():
    """10 steps × (1 + 2 + 0.5) s + 2 steps with calls × (1.5 + 0.8) s."""
    _, second, _ = time_of(small_gan(reward_budget=16, query_rate=1.0), plan.Plan(16))
    assert second.startswith("about 40 s for 10 steps, 1.6 s of that")


def test_calls_at_once_take_the_time_of_one():
    assert preview.Tried("", 8, 0.5, parallel=4).seconds_for(9) == 1.5
    assert preview.Tried("", 8, 0.5).seconds_for(9) == 4.5


@pytest.mark.filterwarnings("ignore:a call of the reward 'slow' failed and is repeated")
def test_the_dry_run_asks_as_training_does(capsys, monkeypatch):
    """reward_workers, reward_retries: 16 calls of 50 ms, 8 at once, each of which fails once."""
    failed, lock = set(), time.perf_counter

    def slow(response):
        time.sleep(0.05)
        if (key := response) not in failed:
            failed.add(key)
            raise OSError("503")
        return float(len(response))

    monkeypatch.setattr(calling, "BACKOFF", 0.001)
    gan = small_gan(reward=slow, reward_workers=8, reward_retries=1, prompts_per_step=4)
    began = lock()
    rows = [Row(prompt) for prompt in PROMPTS]
    tried = Preview(gan, rows, steps=1).try_reward(trial.Trial(gan, rows))
    assert tried.parallel == 8 and lock() - began < 1.2, "one after the other it takes 1.6 s"
    assert "8 calls in parallel (reward_workers)" in tried.text and "16 of 16 answered" in tried.text
    assert f"True-reward calls: 16 in this dry run, {len(failed)} retries" in tried.text


# --- calls


@pytest.mark.parametrize(
    ("settings", "first", "steps", "expected"),
    [
        ({}, 0, 10, 1),
        ({"eval_steps": 5}, 0, 10, 2),
        ({"eval_steps": 4}, 0, 10, 3),
        ({"eval_steps": 4}, 7, 3, 2),
        ({"eval_steps": 4}, 8, 2, 1),
        ({"eval_steps": 4}, 0, 0, 0),
    ],
    ids=str,
)
def test_evaluations_are_those_that_fit_makes(settings, first, steps, expected, tmp_path, monkeypatch):
    settings |= {"eval_on_start": False}
    assert plan.evaluations(Config(**settings), first, steps) == expected
    gan, judged = small_gan(output_dir=str(tmp_path), **settings), []
    whole = {"metrics": {}, "samples": [], "distinct_2": 0.0, "logged": {}}
    monkeypatch.setattr("lora_gan.run.evaluation.evaluate", lambda *_, **__: judged.append(1) or whole)
    monkeypatch.setattr("lora_gan.run.callbacks.FitObserver.evaluated", lambda *_: None)
    gan.global_step = first
    gan.fit(ROWS, steps=steps, eval_dataset=ROWS[:1], progress=False)
    assert len(judged) == expected


def test_an_evaluation_before_the_first_step_is_planned_where_there_is_one():
    class Early:
        eval_on_start, eval_steps = True, 5

    assert plan.evaluations(Early, 0, 10) == 3
    assert plan.evaluations(Early, 5, 5) == 1


def test_calls_are_at_most_the_budget_and_none_where_no_reward_is_asked():
    settings = {"prompts_per_step": 2, "num_generations": 4, "query_rate": 0.5}
    assert plan.calls(Config(**settings), 10) == 40
    assert plan.calls(Config(**settings, reward_budget=25), 10) == 25
    assert plan.calls(Config(**settings, reward_budget=25), 10, left=5) == 5
    unasked = Config(**settings, adversarial=True, disc_objective="real_vs_generated")
    assert plan.calls(unasked, 10) == 0


def test_calls_in_words():
    assert plan.Plan(320, 30, 3).in_words() == "320 calls in training, 90 in 3 evaluations of 30 rows"
    assert plan.Plan(8, 1, 1).in_words() == "8 calls in training, 1 in 1 evaluation of 1 row"
    assert plan.Plan(8).in_words() == "8 calls in training, 0 in evaluations (no eval_data)"


def described(*arguments, dry_run=False, **run):
    """The description on one line, however it is wrapped."""
    return " ".join(Preview(*arguments, **run).describe(dry_run=dry_run).split())


def test_a_description_fits_a_terminal():
    gan = small_gan(reward_budget=30, query_rate=1.0, reward_retries=2)
    run = Preview(gan, [Row(prompt) for prompt in PROMPTS], total=4, steps=10, held_out=5)
    lines = run.describe().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) > 9
    assert all(line[:15].strip() == "" or line[14] == " " for line in lines), "two columns"


def test_the_plan_names_the_budget_that_limits_it():
    rows = [Row(prompt) for prompt in PROMPTS[:2]]
    lines = described(
        small_gan(reward_budget=30, query_rate=1.0, on_exploit="warn"),
        rows,
        total=2,
        steps=10,
        held_out=5,
        dry_run=True,
    )
    wanted = (
        "30 calls in training (the rest of the budget, enough for about 3.75 of 10 steps), 10 in 2 evaluations of "
        "5 rows, up to 8 in this dry run"
    )
    assert wanted in lines and "memory" not in lines
    lines = described(small_gan(reward_retries=2), rows, total=2, steps=10)
    wanted = "80 calls in training, 0 in evaluations (no eval_data); a failed call is retried up to 2 times"
    assert wanted in lines and "in this dry run" not in lines and "--dry-run measures both" in lines


def test_the_plan_counts_the_calls_of_audits():
    """8 labels per step: 108 of 113 calls in 14 steps. Then 14 steps at most, and an audit of 2 calls every 8 steps."""
    settings = dict(reward_budget=113, query_rate=1.0, prompts_per_step=2, num_generations=4)
    for steps, expected in ((14, 108), (22, 108), (23, 110), (28, 110), (29, 112), (500, 112)):
        plan = Preview(small_gan(**settings), [Row(prompt) for prompt in PROMPTS[:2]], steps=steps).plan
        assert plan.training == expected


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 10, 12, 13, 20, 24, 25, None])
@pytest.mark.parametrize("prompts", [1, 2, 4, 6])
def test_a_dry_run_asks_no_more_than_it_says_and_the_budget_allows(budget, prompts):
    asked = []
    gan = small_gan(
        reward=lambda response, target: asked.append(response) or float(len(asked)),
        reward_budget=budget, prompts_per_step=prompts,
    )  # fmt: skip
    rows = [Row(row["prompt"], row["target"]) for row in ROWS[:prompts]]
    run = Preview(gan, rows, steps=10)
    most = run.tried_calls()
    run.try_reward(trial.Trial(gan, rows, run.allowed))
    assert 0 < len(asked) == most <= (24 if budget is None else budget)


def test_the_total_budget_limits_the_dry_run_too():
    asked = []
    gan = small_gan(reward=lambda response: asked.append(response) or float(len(asked)), reward_budget_total=5)
    said(gan)
    assert len(asked) == gan.budget.counts["dry_run"] == 4, "two responses to each of two prompts"


def test_a_budget_that_is_spent_is_not_overspent():
    asked = []
    gan = small_gan(reward=lambda response: asked.append(response) or 1.0, reward_budget=4)
    gan.budget.counts["training"] = 4
    out = said(gan)
    assert asked == [] and "reward_budget or reward_budget_total is spent" in out and "per step" in out


# --- what a judge costs


class Counting:
    """A judge without a server: 40 prompt tokens and 10 completion tokens per new question."""

    __name__, model, price_per_million = "judge", "m", (2.0, 8.0)

    def __init__(self):
        self.usage = {"calls": 0, "cached": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
        self.known = set()

    def __call__(self, prompts, completions, **_):
        for pair in zip(map(str, prompts), map(str, completions), strict=True):
            self.usage = dict(self.usage)
            if pair in self.known:
                self.usage["cached"] += 1
                continue
            self.known.add(pair)
            for count, more in (("calls", 1), ("prompt_tokens", 40), ("completion_tokens", 10)):
                self.usage[count] += more
        return [float(len(str(completion))) for completion in completions]


def holding(judge, how):
    if how == "itself":
        return judge
    if how == "in a sum of its own":
        return lambda prompts, completions, **columns: judge(prompts, completions, **columns)
    half = Half()
    half.judge = judge
    return half


class Half:
    def __call__(self, prompts, completions):
        return self.judge(prompts, completions)


@pytest.mark.parametrize("how", ["itself", "in a sum of its own", "in an object"])
def test_a_judges_cost_is_measured_and_projected(how):
    """10 steps × 8 responses × (40 × 2 + 10 × 8) / 1e6 per call."""
    judge = Counting()
    gan = small_gan(reward_funcs=[lambda response: 1.0, holding(judge, how)], reward_weights=[1.0, 0.5])
    out = said(gan, steps=10)
    line = next(line for line in out.splitlines() if "completion tokens per call" in line)
    assert "judge (m): 40 prompt and 10 completion tokens per call: about 0.013 for the 80 calls of this run" in line
    assert f"({len(judge.known) * 160 / 1e6:.2g} in this dry run)" in line and "$" not in out


def test_a_judge_without_a_price_says_tokens():
    judge = Counting()
    judge.price_per_million = None
    assert "about 3,200 and 800 for the 80 calls" in said(small_gan(reward_funcs=[judge]), steps=10)


def test_answers_from_a_cache_are_no_measure_of_cost():
    judge, gan = Counting(), None
    for _ in range(2):
        gan = small_gan(reward_funcs=[judge])
        out = said(gan)
    assert "the cost of the run is not known, its cache answered all of these calls" in out


# --- a person


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    return tmp_path


def test_ratings_of_the_dry_run_are_used_by_training(there, monkeypatch, capsys):
    questions = []
    monkeypatch.setattr("lora_gan.rewards.human.Human._require_terminal", lambda self: None)
    monkeypatch.setattr(
        "lora_gan.rewards.human.Human._read", lambda self: questions.append(1) or str(len(questions) % 9)
    )
    small = ["--prompts_per_step", "2", "--num_generations", "4", "--max_completion_length", "6", "--max_steps", "1"]
    run = ["train", "--model", str(base_folder()), "--data", "rows.jsonl", "--reward", "human", "--output_dir", "run"]
    assert cli.main([*run, *small, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Your answers are in run/ratings.jsonl. Training does not ask for them again." in out
    assert [path.name for path in (there / "run").iterdir()] == ["ratings.jsonl"]
    asked = len((there / "run" / "ratings.jsonl").read_text().splitlines())
    assert asked == len(questions) > 8, "8 responses, and targets"
    assert cli.main([*run, *small]) == 0
    assert len(questions) == asked, "step 1 samples what was rated"
    assert (there / "run" / "step-1").is_dir()


# --- memory


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_graph_of_any_size_is_known_from_four_small_ones(architecture, packs, player):
    gan = small_gan(base_folder(architecture))
    gan.players.packs = packs
    graph = footprint.graph_of(gan.players, player)
    prompts, responses = [[1] * 9, [2] * 9], [[3] * 17] * 6
    batch = gan.players.batch(prompts, responses, np.repeat([0, 1], 3))
    with footprint._counting(gan.players) as kept, gan.players.use_adapter(player):
        hidden = gan.players.hidden(batch, batch.predicting_R)
        hidden.sum().backward()
    expected = graph.bytes(2, 6, Lengths.at_most(9, 17), packs=packs)
    assert expected == pytest.approx(sum(kept.values()), rel=0.02)


def test_measuring_a_graph_leaves_no_trace():
    gan = small_gan(gradient_checkpointing=True)
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    forwards, active = [module.forward for module in gan.players.lm.modules()], gan.players.active
    memory = footprint.host(gan.players, gan.config, Lengths.at_most(10, 6))
    assert [module.forward for module in gan.players.lm.modules()] == forwards
    assert gan.players.active == active and memory.total > 0
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []


def test_measuring_a_graph_frees_it():
    gan = LoraGAN("tiny", reward=lambda response: 1.0)
    footprint.graph_of.__wrapped__(gan.players, "generator")
    with footprint.Growth() as growth:
        for _ in range(30):  # of 3 MB each
            footprint.graph_of.__wrapped__(gan.players, "generator")
    assert growth.bytes < 25e6


def test_upper_layers_keep_less():
    gan = small_gan(disc_layers=1)
    whole, upper = (footprint.graph_of(gan.players, player).per_token for player in ("generator", "discriminator"))
    assert 0.4 < upper / whole < 0.6, "one of two layers"


def test_what_takes_turns_is_not_added_up():
    memory = footprint.Memory({"base": 2e6, "adapters": 1e6}, {"sampling": 5e6, "an update": 4e6})
    assert preview._in_words(memory) == "about 8.0 MB: base 2.0 MB, adapters 1.0 MB, sampling 5.0 MB"
    assert footprint.Memory({"base": 2e6}, {"sampling": 5e6}, least=9e6).total == 9e6


def test_libraries_are_what_the_process_held_beside_weights():
    gan = small_gan()
    weights = footprint._base_bytes(gan.players) + footprint._trained_bytes(gan.players)
    found = footprint.host(gan.players, gan.config, Lengths.at_most(10, 6), opened=4e8, reward_model=1e8)
    assert found.always["Python and its libraries"] == pytest.approx(4e8 - weights)
    assert found.always["the reward"] == 1e8
    assert found.always["adapters, their gradients and AdamW's moments"] == 4 * footprint._trained_bytes(gan.players)


def test_what_the_allocator_keeps_is_measured_and_scaled():
    """An update of two groups that took 1.5 times what it uses, beside the copies of the weights."""
    gan = small_gan(prompts_per_step=4)
    lengths = Lengths.at_most(10, 6)
    small = footprint.device_memory(gan.players, small_gan().config, lengths)
    in_use = max(small.in_turn["the generator's update"], small.in_turn["the discriminator's update"])
    grew = 1.5 * in_use + 2.5 * footprint._trained_bytes(gan.players)
    share = footprint.spare_share(gan.players, gan.config, lengths, groups=2, responses=8, grew=grew)
    assert share == pytest.approx(0.5)
    found = footprint.host(gan.players, gan.config, lengths, spare=share)
    largest = max(footprint.device_memory(gan.players, gan.config, lengths).in_turn.values())
    assert found.always["freed memory that the C library keeps"] == pytest.approx(0.5 * largest)
    assert footprint.spare_share(gan.players, gan.config, lengths, groups=2, responses=8, grew=0.0) == 0


def test_growth_is_the_peak_within_the_block():
    filler = np.ones(30_000_000 // 8)
    with footprint.Growth() as growth:
        for _ in range(2):
            block = np.ones(80_000_000 // 8)
            time.sleep(0.05)
            del block
    assert 75e6 < growth.bytes < 100e6 and filler.any()


def test_memory_of_another_device_holds_no_libraries():
    gan = small_gan()
    found = footprint.device_memory(gan.players, gan.config, Lengths.at_most(10, 6))
    assert list(found.always) == ["base", "adapters, their gradients and AdamW's moments"]


def test_a_reward_that_loads_something_is_counted():
    held = []

    def loads(response):
        if not held:
            held.append(np.ones(50_000_000 // 8))
        return float(len(response))

    out = said(small_gan(reward=loads))
    assert 45 <= float(re.search(r"the reward ([\d.]+) MB", out)[1]) <= 65


# --- whether the reward can teach


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([[1.0, np.nan], [np.nan, np.nan]], "no prompt has two answers"),
        ([[1.0, 1.0], [2.0, 2.0]], "all responses to each prompt have the same reward"),
        ([[1.0, 3.0], [2.0, 2.0]], r"responses differ by 0\.500 \(standard deviation\); none for 1 of 2 prompts"),
        ([[1.0, 3.0], [2.0, np.nan]], r"responses differ by 1\.000 \(standard deviation\)$"),
    ],
)
def test_the_spread_is_that_of_responses_to_one_prompt(rewards, said):
    line = preview._verdict_on_spread(np.array(rewards))
    assert re.search(said, line), line
