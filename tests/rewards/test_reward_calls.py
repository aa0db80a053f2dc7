"""Rewards in bad weather: tried again, given up on in time, several at once, awaited; with the same numbers."""

import asyncio
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, advantages, differences, play, player_state, reward, small_gan

from lora_gan.data import Row
from lora_gan.rewards import RewardError, RewardUnavailable, calling, score_pairs, score_parts
from lora_gan.rewards.calling import Caller
from lora_gan.training import estimate

RESPONSES, NO_TARGETS = ["a", "bb", "ccc", "dddd"], [None] * 4
EXPECTED = [reward(text) for text in RESPONSES]
PLAYERS = ("generator", "discriminator")


def flaky(fails: int, error=ConnectionError):
    """A reward that raises at the first `fails` calls about each response."""
    seen: dict[str, int] = {}

    def rated(response, target=None):
        seen[response] = seen.get(response, 0) + 1
        if seen[response] <= fails:
            raise error("429 Too Many Requests")
        return reward(response)

    return rated


async def awaited(response, target=None):
    await asyncio.sleep(0.001 * (5 - len(response)))  # the last comes first
    return reward(response)


async def awaited_batch(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [reward(text) for text in completions]


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("rated", [reward, awaited], ids=["plain", "async"])
def test_the_numbers_are_those_of_one_call_after_the_other(rated, workers):
    assert score_pairs(rated, RESPONSES, NO_TARGETS, caller=Caller(workers=workers)) == EXPECTED
    assert score_parts([rated], ["p"] * 4, RESPONSES, {}, caller=Caller(workers=workers, timeout=30)) == {
        rated.__name__: EXPECTED
    }


def test_an_async_reward_of_trls_form():
    assert score_parts([awaited_batch], ["p"] * 4, RESPONSES, {}) == {"awaited_batch": EXPECTED}


def test_several_are_asked_at_once():
    """Each waits for the others: one after the other would never end."""
    together = threading.Barrier(4)

    def waits(response, target=None):
        together.wait(timeout=20)
        return reward(response)

    assert score_pairs(waits, RESPONSES, NO_TARGETS, caller=Caller(workers=4)) == EXPECTED


def test_a_call_that_fails_is_tried_again_after_ever_longer_waits(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(calling, "BACKOFF", 0.5)
    caller = Caller(retries=3)
    assert score_pairs(flaky(3), RESPONSES[:1], [None], caller=caller) == EXPECTED[:1]
    assert waits == [0.5, 1.0, 2.0]
    with pytest.raises(RewardError, match=r"'rated' raised ConnectionError on row 0 .*429"):
        score_pairs(flaky(4), RESPONSES, NO_TARGETS, caller=caller)
    waits.clear()
    monkeypatch.setattr(calling, "BACKOFF", 1.0)
    with pytest.raises(RewardError):
        score_pairs(flaky(99), RESPONSES[:1], [None], caller=Caller(retries=9))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60], "a minute at the most"
    waits.clear()
    assert score_pairs(flaky(1200), RESPONSES[:1], [None], caller=Caller(retries=1200)) == EXPECTED[:1]
    assert len(waits) == 1200 and set(waits[6:]) == {60}, "2**1200 seconds are no float"


@pytest.mark.parametrize("while_waiting", [True, False])
def test_an_interruption_is_no_failure_that_is_tried_again(monkeypatch, while_waiting):
    asked = []

    def interrupt(seconds=None):
        raise KeyboardInterrupt

    def rated(response, target=None):
        asked.append(response)
        if not while_waiting:
            interrupt()
        raise ConnectionError("429")

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        score_pairs(rated, RESPONSES[:1], [None], caller=Caller(retries=3, skip=True))
    assert asked == RESPONSES[:1]


def test_only_a_call_that_is_made_again_asks_for_leave(monkeypatch):
    """`may_retry` counts what it allows in the budget: it is not asked about what is not tried again."""
    monkeypatch.setattr(calling, "BACKOFF", 0.0)
    allowed, told = [], []

    def may_retry(rows):
        allowed.append(rows)
        return len(allowed) < 3

    def caller(retries):
        return Caller(retries=retries, may_retry=may_retry, on_retry=lambda name, cause: told.append(cause))

    with pytest.raises(RewardError):
        score_pairs(flaky(99), RESPONSES[:1], [None], caller=caller(2))
    assert allowed == [1, 1] and told == ["ConnectionError: 429 Too Many Requests"] * 2
    with pytest.raises(RewardError):
        score_pairs(flaky(99), RESPONSES[:1], [None], caller=caller(9))
    assert allowed == [1, 1, 1] and len(told) == 2, "no leave, no further call"


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_call_that_hangs_is_given_up_on(kind):
    hanging = threading.Event()

    def plain(response, target=None):
        if response == "bb":
            hanging.wait(20)
        return reward(response)

    async def waiting(response, target=None):
        if response == "bb":
            await asyncio.sleep(20)
        return reward(response)

    rated = plain if kind == "plain" else waiting
    began = time.monotonic()
    with pytest.raises(RewardError, match="raised TimeoutError on row 1"):
        score_pairs(rated, RESPONSES, NO_TARGETS, caller=Caller(timeout=0.1))
    caller = Caller(timeout=0.1, skip=True)
    assert score_pairs(rated, RESPONSES, NO_TARGETS, caller=caller) == [EXPECTED[0], None, *EXPECTED[2:]]
    assert list(caller.failed) == [1] and caller.failed[1].startswith("TimeoutError")
    hanging.set()
    assert time.monotonic() - began < 15, "it was waited for"


def test_what_no_try_helps_is_not_tried_again():
    calls = []

    def counted(value):
        def rated(response, target=None):
            calls.append(response)
            if isinstance(value, Exception):
                raise value
            return value

        return rated

    caller = Caller(retries=5, skip=True)
    for value, error in (
        (RewardUnavailable("no model"), RewardUnavailable), (ImportError("no package"), ImportError),
        (float("nan"), RewardError), ("good", RewardError),
    ):  # fmt: skip
        calls.clear()
        with pytest.raises(error):
            score_pairs(counted(value), RESPONSES[:1], [None], caller=caller)
        assert calls == ["a"], "a mistake is no bad weather"


def test_the_first_rows_error_is_told_and_the_rest_not_asked():
    asked = []

    def failing(response, target=None):
        asked.append(response)
        raise ValueError(response)

    with pytest.raises(RewardError, match="row 0"):
        score_pairs(failing, ["x"] * 100, [None] * 100, caller=Caller(workers=2))
    assert len(asked) < 100


def test_by_default_a_reward_is_called_in_the_thread_that_trains():
    """It may ask a person, and Ctrl-C reaches that thread alone."""
    threads = []

    def rated(response, target=None):
        threads.append(threading.current_thread())
        return reward(response)

    small_gan(reward=rated).step(PROMPTS[0])
    assert set(threads) == {threading.main_thread()}


def test_a_pool_trains_as_one_call_after_the_other_does():
    gans = [small_gan(query_rate=0.5), small_gan(query_rate=0.5, reward_workers=4, reward_timeout=60, reward=awaited)]
    for gan in gans:
        for _ in range(3):
            gan.step(PROMPTS[:2], TARGETS[:2])
    for player in PLAYERS:
        assert differences(*(player_state(gan, player) for gan in gans)) == []


def fails_on_some(response, target):
    if target == "fails" and len(response) % 3 == 0:
        raise ConnectionError("gone")
    return reward(response, target)


def test_a_failure_costs_only_itself(monkeypatch):
    """With the true reward: the group's other responses teach as they would without the one that failed."""
    gan = small_gan(reward=fails_on_some, reward_signal="true", on_reward_error="skip", seed=3)
    seen = []
    update = gan.generator.update
    monkeypatch.setattr(gan.generator, "update", lambda rows, experience, *rest: (
        seen.append(experience), update(rows, experience, *rest))[1])  # fmt: skip
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        record = gan.step(PROMPTS[:2], ["fails", "stays"])
    responses, rewards = record["responses"][0], record["true_rewards"][0]
    failed = [len(response) % 3 == 0 for response in responses]
    assert 0 < sum(failed) < 3, "two are left to compare"
    assert [value is None for value in rewards] == failed
    assert [value for value in rewards if value is not None] == [
        reward(text, "fails") for text, bad in zip(responses, failed, strict=True) if not bad
    ]
    assert None not in record["true_rewards"][1]
    assert record["reward_calls"] == 8 and record["reward_failures"] == gan.reward_failures == sum(failed)
    said = [str(warning.message) for warning in told if "failed in its last try" in str(warning.message)]
    assert len(said) == 1 and f"on {sum(failed)} of 8 responses (ConnectionError: gone)" in said[0]

    (experience,) = seen
    advantage_B = advantages(gan, experience, "true")
    known = np.array([np.nan if value is None else value for value in rewards])
    for i, value in enumerate(known):  # the mean of the group's others that were answered
        if np.isnan(value):
            assert advantage_B[i] == 0
            continue
        others = [other for j, other in enumerate(known) if j != i and not np.isnan(other)]
        assert advantage_B[i] == pytest.approx(value - np.mean(others))


@pytest.mark.parametrize("path", ["policy_gradient", "straight_through"])
def test_with_the_corrected_reward_a_failed_response_that_was_certain_to_be_asked_is_left_out(path):
    """The bare prediction does not stand in for it: the update is the one of the step without its advantage."""
    gan = small_gan(reward=fails_on_some, on_reward_error="skip", seed=3, gradient_path=path)
    with torch.no_grad():  # predictions that differ
        gan.players.heads_MH.copy_(torch.linspace(-1, 1, gan.players.heads_MH.numel()).view_as(gan.players.heads_MH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experience = play(gan, [Row(PROMPTS[0], "fails"), Row(PROMPTS[1], "stays")])
    failed_B = experience.failed_B
    assert failed_B.any() and (experience.dropped_B == failed_B).all() and (experience.inclusion_B == 1).all()
    rewards_B = gan.generator.rewards(experience, "corrected")
    assert (np.isnan(rewards_B) == failed_B).all()
    if path == "policy_gradient":
        assert (rewards_B[~failed_B] == experience.true_B[~failed_B]).all()
    assert (advantages(gan, experience, "corrected")[failed_B] == 0).all()


def test_the_corrected_reward_is_unbiased_when_calls_fail():
    """Over draws of who is asked and of calls that fail by chance, its mean is the true reward."""
    rng = np.random.default_rng(0)
    true_B, predicted_B = rng.normal(size=400), rng.normal(size=400)
    group_B = np.repeat(np.arange(100), 4)
    total = np.zeros(400)
    for draw in range(400):
        queries = estimate.choose_queries(group_B, 0.5, seed=0, step=draw, design="uniform")
        failed_B = queries.asked_B & (rng.random(400) < 0.3)
        inclusion_B = estimate.answered_inclusion(queries.inclusion_B, queries.asked_B, failed_B)
        known_B = np.where(queries.asked_B & ~failed_B, true_B, np.nan)
        total += estimate.corrected_reward(predicted_B, known_B, inclusion_B)
    error_B = total / 400 - true_B
    assert abs(error_B.mean()) < 4 * error_B.std() / 20
    # Each estimate's own error is its spread over draws; without the correction for failures it is 0.3 of the gap.
    gap_B = predicted_B - true_B
    assert abs((error_B * gap_B).sum() / (gap_B * gap_B).sum()) < 0.02


def test_probabilities_of_one_stay_and_without_failures_nothing_changes():
    inclusion_B, asked_B = np.array([1.0, 0.5, 0.5]), np.array([True, True, False])
    failed_B = np.array([False, True, False])
    assert estimate.answered_inclusion(inclusion_B, asked_B, failed_B).tolist() == [1.0, 0.25, 0.25]
    assert estimate.answered_inclusion(inclusion_B, asked_B, np.zeros(3, dtype=bool)) is inclusion_B


def test_an_async_reward_runs_concurrently_by_default():
    """Each call waits until four are under way: one after the other would never end."""
    arrived, all_here = [], threading.Event()

    async def waits(response, target=None):
        arrived.append(response)
        if len(arrived) == 4:
            all_here.set()
        await asyncio.to_thread(all_here.wait, 20)
        assert all_here.is_set()
        return reward(response)

    assert score_pairs(waits, RESPONSES, NO_TARGETS) == EXPECTED

    class Rated:
        async def __call__(self, response, target=None):
            return await waits(response, target)

    arrived.clear()
    all_here.clear()
    assert score_pairs(Rated(), RESPONSES, NO_TARGETS) == EXPECTED
    most, now = [0], [0]

    async def counts(response, target=None):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return reward(response)

    assert score_pairs(counts, RESPONSES, NO_TARGETS, caller=Caller(workers=1)) == EXPECTED
    assert most == [1], "reward_workers=1 asks one after the other"


def test_settings_that_make_no_sense_are_refused():
    for setting in (
        {"reward_timeout": 0}, {"reward_timeout": float("nan")}, {"reward_retries": -1},
        {"reward_workers": 0}, {"on_reward_error": "ignore"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(setting))):
            small_gan(**setting)


def test_a_slow_reward_overlaps():
    """Eight sleeps of 50 ms, eight at once: no clock decides, but how many slept at the same time."""
    sleeping, most = [0], [0]
    mutex = threading.Lock()

    def slow(response, target=None):
        with mutex:
            sleeping[0] += 1
            most[0] = max(most[0], sleeping[0])
        time.sleep(0.05)
        with mutex:
            sleeping[0] -= 1
        return 1.0

    assert np.allclose(score_pairs(slow, ["x"] * 8, [None] * 8, caller=Caller(workers=8)), 1.0)
    assert most[0] > 1
