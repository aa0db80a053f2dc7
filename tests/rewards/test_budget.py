"""How calls of the true reward are counted and limited.

Oracle: an HTTP server on the loopback that counts the requests which rewards make.
"""

import asyncio
import json
import signal
import urllib.error
import urllib.request
import warnings

import pytest
from counting_server import CountingServer, chat_completion
from helpers import PROMPTS, TARGETS, reward, small_gan

from lora_gan.rewards import Judge, Length, RewardError, calling
from lora_gan.rewards.budget import Budget
from lora_gan.run import display
from lora_gan.storage.json_lines import read_lines
from lora_gan.training.discriminator import Discriminator

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]  # a step: 2 × 4 responses
HELD_OUT = [{"prompt": f"{PROMPTS[i % 4]} held out {i}", "target": TARGETS[i % 4]} for i in range(3)]


class Server(CountingServer):
    """Answers with a score of the text, or as a judge."""

    def __init__(self):
        super().__init__(self._answer)

    def _answer(self, body):
        if "messages" in body:
            return chat_completion(self.says(body), prompt_tokens=10, completion_tokens=2)
        return {"score": reward(body["text"])}

    def says(self, body):
        """A judge's answer; one in seven questions is first answered without a score."""
        question = body["messages"][0]["content"]
        unsure = len(body["messages"]) == 1 and sum(map(ord, question)) % 7 == 0
        return "Hard to say." if unsure else f'{{"score": {sum(map(ord, question)) % 11}}}'

    def ask(self, text):
        request = urllib.request.Request(self.url, json.dumps({"text": text}).encode(), method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=20) as answer:
                return json.load(answer)["score"]
        except urllib.error.HTTPError as error:
            error.close()
            raise

    # rewards of each form

    def pair(self, response, target=None):
        return self.ask(response)

    async def awaited(self, response, target=None):
        return await asyncio.to_thread(self.ask, response)

    def batch(self, prompts, completions, **columns):
        answers = []
        for text in completions:
            try:
                answers.append(self.ask(text))
            except OSError as error:
                answers.append(error)
        for answer in answers:  # after all were asked
            if isinstance(answer, OSError):
                raise answer
        return answers

    def judge(self, **options):
        options = {"rubric": "Good? {response}", "base_url": f"{self.url}/v1", "api_key": "none", **options}
        return Judge(model="grader", max_retries=3, **options)


@pytest.fixture
def server(monkeypatch):
    from openai import _base_client

    class NoWait:
        sleep = staticmethod(lambda seconds: None)

        def __getattr__(self, name):
            import time

            return getattr(time, name)

    monkeypatch.setattr(_base_client, "time", NoWait())
    monkeypatch.setattr(calling, "BACKOFF", 0.0)
    server = Server()
    yield server
    server.close()


def fitted(tmp_path, steps=4, held_out=HELD_OUT, **settings):
    gan = small_gan(output_dir=str(tmp_path), log_completions=False, save_steps=1, **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gan.fit(ROWS, steps=steps, eval_dataset=held_out, progress=False)
    return gan, [str(warning.message) for warning in told]


def every(n, after=0):
    return lambda number: number > after and number % n == 0


CONFIGURATIONS = {
    "a pair reward": ("pair", {}, None),
    "evaluations in between": ("pair", {"eval_steps": 1}, None),
    "half of the responses": ("pair", {"query_rate": 0.5, "query_design": "uniform"}, None),
    "retries": ("pair", {"reward_retries": 3, "eval_steps": 2}, every(5)),
    "retries in threads": ("pair", {"reward_retries": 3, "reward_workers": 4}, every(5)),
    "skipped failures": ("pair", {"on_reward_error": "skip"}, every(4)),
    "an async reward": ("awaited", {"reward_retries": 2, "eval_steps": 2}, every(6)),
    "TRL's form": ("batch", {"reward_retries": 4}, lambda number: number == 13),
    "a budget": ("pair", {"reward_budget": 20, "query_rate": 1.0}, None),
    "a budget that ends the run": (
        "pair",
        {"reward_budget": 20, "query_rate": 1.0, "after_budget": "stop", "eval_steps": 2},
        None,
    ),
    "a budget of all": ("pair", {"reward_budget_total": 25, "eval_steps": 1, "reward_retries": 1}, every(9)),
    "a judge": ("judge", {"eval_steps": 2}, every(6)),
    "a sum with a reward of its own": ("judge and length", {}, every(6)),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_counts_are_the_servers(name, server, tmp_path):
    kind, settings, fails = CONFIGURATIONS[name]
    server.fails = fails or server.fails
    forms = {"pair": server.pair, "awaited": server.awaited}
    if kind in forms:
        settings = {**settings, "reward": forms[kind]}
    elif kind == "batch":
        settings = {**settings, "reward_funcs": [server.batch]}
    else:
        settings = {**settings, "reward_funcs": [server.judge(), *([Length()] if "length" in kind else [])]}
    gan, _ = fitted(tmp_path, **settings)
    counts = gan.budget.counts
    assert gan.budget.total - gan.budget.cached == server.requests
    assert counts["training"] == gan.reward_calls > 0 and counts["other"] == counts["dry_run"] == 0
    assert counts["evaluation"] % len(HELD_OUT) == 0
    assert bool(counts["retries"]) == (fails is not None and "skipped" not in name) or kind != "pair"
    assert bool(gan.budget.cached) <= kind.startswith("judge")
    (*_, last) = read_lines(tmp_path / "metrics.jsonl")
    assert last["reward_calls/total"] == gan.budget.total
    assert last.get("reward_calls/retries", 0) == counts["retries"]


def test_the_judges_cache_is_counted_apart(server, tmp_path):
    first, _ = fitted(tmp_path / "a", reward_funcs=[server.judge(cache=tmp_path / "cache.jsonl")])
    made = server.requests
    assert made == first.budget.total - first.budget.cached
    second, _ = fitted(tmp_path / "b", reward_funcs=[server.judge(cache=tmp_path / "cache.jsonl")])
    assert server.requests == made, "the same run again"
    assert second.budget.cached == second.budget.total == second.reward_calls + second.budget.counts["evaluation"]


def test_calls_of_a_run_that_breaks_off_and_goes_on(server, tmp_path):
    """The step that failed is taken again: its answers are in the log, and only its failed call was lost."""
    server.fails = lambda number: number == 15  # in the second step
    settings = {"reward": server.pair, "eval_steps": 1}
    with pytest.raises(RewardError, match="HTTP Error 503"):
        fitted(tmp_path, **settings)
    gan = small_gan(output_dir=str(tmp_path), log_completions=False, save_steps=1, **settings)
    gan.load_checkpoint()
    assert gan.global_step == 1 and gan.reward_calls == 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.fit(ROWS, steps=2, eval_dataset=HELD_OUT, progress=False)
    assert gan.reward_calls == 24 and gan.budget.counts["evaluation"] == 12
    assert server.requests == gan.budget.total and gan.budget.counts["retries"] == 1


def test_a_step_by_hand_that_fails_counts_what_it_asked(server):
    server.fails = lambda number: number == 4
    gan = small_gan(reward=server.pair)
    with pytest.raises(RewardError):
        gan.step(PROMPTS[:2])
    assert gan.budget.counts["retries"] == server.requests == 4 and gan.reward_calls == 0
    gan.step(PROMPTS[:2])
    assert gan.budget.total == server.requests == 12


def test_ask_by_hand_and_evaluate(server):
    gan = small_gan(reward=server.pair)
    gan.evaluate(HELD_OUT)
    rows = gan.check_rows(ROWS)
    gan.ask(rows[:2], ["a", "b"])
    assert {name: count for name, count in gan.budget.counts.items() if count} == {"evaluation": 3, "other": 2}
    assert server.requests == 5
    assert gan.budget.in_words() == "3 in evaluation, 2 by hand"


# --- limits -----------------------------------------------------------------------------------------------------------


def test_the_total_is_kept_to_and_leaves_the_evaluation_at_the_end(server, tmp_path):
    gan, told = fitted(tmp_path, steps=6, reward=server.pair, eval_steps=1, reward_budget_total=25, after_budget="stop")
    assert server.requests == gan.budget.total <= 25
    lines = list(read_lines(tmp_path / "metrics.jsonl"))
    judged = [line["step"] for line in lines if "eval_true_reward" in line]
    # 3 + 8 + 3 = 14 leave 8 for training and 3 for the evaluation at the end.
    assert judged == [0, 1, 2] and gan.global_step == 2 and gan.budget.total == 25
    assert gan.ending.reason.startswith("all 25 calls of reward_budget_total are spent")


def test_an_evaluation_that_the_budget_does_not_allow_is_left_out_aloud(server, tmp_path):
    settings = {
        "eval_steps": 1,
        "eval_on_start": False,
        "reward_budget_total": 20,
        "reward_budget": 16,
        "query_rate": 1.0,
    }
    gan, told = fitted(tmp_path, steps=3, reward=server.pair, **settings)
    # 8 + 3, then a whole group of the 6 that are left for training, then its last 2, and 3 at the end.
    assert server.requests == gan.budget.total == 8 + 3 + 4 + 2 + 3
    judged = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "eval_true_reward" in line]
    assert judged == [1, 3]
    left_out = [words for words in told if "left out" in words]
    assert left_out[0] == (
        "step 2: the evaluation is left out: it needs 3 calls of the true reward, and reward_budget_total leaves 5, of "
        "which 3 are for the evaluation at the end"
    )


def test_an_evaluation_by_hand_beyond_the_total_is_refused(server):
    gan = small_gan(reward=server.pair, reward_budget_total=10)
    gan.step(PROMPTS[:2])
    with pytest.raises(ValueError, match=r"3 calls .* reward_budget_total=10 allows 2 more"):
        gan.evaluate(HELD_OUT)
    assert server.requests == 8


def test_retries_stop_at_the_total(server):
    server.fails = lambda number: True
    gan = small_gan(reward=server.pair, reward_budget_total=10, reward_retries=9)
    with pytest.raises(RewardError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.step(PROMPTS[:2])
    assert server.requests == 3, "8 are the step's, 2 are left for retries"
    assert gan.budget.total == 3


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"on_exploit": "warn"}, "step 2: all 16 calls of reward_budget are spent. Training continues with the "),
        (
            {"reward_budget": 20},
            "step 3: 19 of the 20 calls of reward_budget are spent, and the rest is for audits. Training continues "
            "with the ",
        ),
    ],
    ids=str,
)
def test_the_end_of_the_budget_is_said_with_what_happens_next(settings, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Discriminator, "explained", property(lambda self: 1.0))  # otherwise no audit is needed
    gan, told = fitted(tmp_path, steps=4, held_out=None, **{"reward_budget": 16, "query_rate": 1.0} | settings)
    said = [words for words in told if "reward_budget" in words]
    assert len(said) == 1
    correlation, error = gan.discriminator.fresh_correlation
    assert said[0].startswith(
        f"{words}discriminator's predictions alone"
        f"{', and ends after the last audit' if gan.budget.audits else ''}. Its rank correlation with the true "
        "reward, on responses that it had not learned from and "
        f"within a prompt, is {correlation:.2f} (standard error {error:.2f})"
    )
    assert ("better than chance" in said[0]) == (correlation <= 2 * error)


@pytest.mark.parametrize(("correlation", "warns"), [(0.1, True), (0.9, False)])
def test_a_discriminator_that_is_no_better_than_chance_is_warned_of(correlation, warns, monkeypatch):
    gan = small_gan(reward_budget=8, query_rate=1.0)
    monkeypatch.setattr(type(gan.discriminator), "fresh_correlation", property(lambda self: (correlation, 0.1)))
    with pytest.warns(UserWarning, match=rf"prompt, is {correlation:.2f} \(standard error 0.10\)") as told:
        gan.step(PROMPTS[:2])
    (said,) = [str(warning.message) for warning in told if "spent" in str(warning.message)]
    assert ("after_budget='stop'" in said) == warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan.step(PROMPTS[:2])


def test_causes_of_failures_are_said_once(server, tmp_path):
    server.fails = every(4)
    _, told = fitted(tmp_path, reward=server.pair, reward_retries=1)
    again = [words for words in told if "is repeated" in words]
    assert again == [
        "a call of the reward 'pair' failed and is repeated (HTTPError: HTTP Error 503: Service Unavailable); "
        "reward_calls/retries counts these"
    ]
    _, told = fitted(tmp_path / "skip", reward=server.pair, on_reward_error="skip")
    assert any("HTTP Error 503: Service Unavailable): they are left out" in words for words in told)


def test_what_was_not_measured_is_not_shown_as_current(capsys):
    shown = display.Display(0, 4)
    with shown:
        shown.update(1, {"reward": 0.25, "pred_reward": 0.5, "reward_calls": 8, "reward_calls/evaluation": 3})
        shown.update(4, {"pred_reward": 0.75, "reward_calls": 8, "reward_calls/evaluation": 6})
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "step 4: reward not measured (step 1: 0.250), predicted 0.750, calls 8 (plus 6 in evaluation), done"


def test_a_signal_says_that_the_final_evaluation_was_left_out(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), log_completions=False)

    def stop(record):
        if record["step"] == 2:
            gan._interrupts._pending = signal.SIGINT

    with pytest.raises(KeyboardInterrupt, match="after 2 of 4 steps, without the final evaluation: step 2 is saved"):
        gan.fit(ROWS, steps=4, eval_dataset=HELD_OUT, progress=False, on_step=stop)
    assert gan.ending.reason == "stopped by Ctrl-C; the final evaluation was left out"


def test_after_a_budget_the_final_evaluation_runs(tmp_path):
    gan, _ = fitted(tmp_path, steps=6, reward_budget=16, query_rate=1.0, after_budget="stop")
    judged = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "eval_true_reward" in line]
    assert gan.global_step == 2 and judged == [0, 2]


# --- the class --------------------------------------------------------------------------------------------------------


def test_what_is_left():
    budget = Budget(10, 20)
    budget.reserved = 4
    assert budget.left() == 10 and budget.left("evaluation") == 20
    budget.counts["training"] = 8
    budget.counts["evaluation"] = 6
    assert budget.left() == 2 and budget.left("evaluation") == 6
    budget.counts["retries"] = 2
    assert budget.left() == 0 and budget.left("evaluation") == 4
    assert budget.spent_setting == (
        "all 20 calls of reward_budget_total are spent, except for 4 that the evaluation at the end needs"
    )
    assert Budget().left() is None and Budget().spent_setting is None
    with pytest.raises(ValueError, match="reward_budget_total=0 is not accepted"):
        small_gan(reward_budget_total=0)
