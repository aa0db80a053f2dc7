"""Rewards in bad weather: tried again, given up on in time, several at once, awaited; with the same numbers."""

import asyncio
import threading
import time

import numpy as np
import pytest
from helpers import PROMPTS, TARGETS, differences, player_state, reward, small_gan

from lora_gan.rewards import RewardError, RewardUnavailable, score_pairs, score_parts
from lora_gan.rewards.calling import Caller

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
    caller = Caller(retries=3, backoff=0.5)
    assert score_pairs(flaky(3), RESPONSES[:1], [None], caller=caller) == EXPECTED[:1]
    assert waits == [0.5, 1.0, 2.0]
    with pytest.raises(RewardError, match=r"'rated' raised ConnectionError on row 0 .*429"):
        score_pairs(flaky(4), RESPONSES, NO_TARGETS, caller=caller)
    waits.clear()
    with pytest.raises(RewardError):
        score_pairs(flaky(99), RESPONSES[:1], [None], caller=Caller(retries=9, backoff=1.0))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60], "a minute at the most"


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
    assert caller.failed == {1}
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

    caller = Caller(retries=5, backoff=0.0, skip=True)
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


@pytest.mark.parametrize("signal", ["corrected", "true"])
def test_a_group_with_a_failure_is_left_out_whole(signal):
    """As if the reward had not answered for any of the group's responses."""

    def failing(prompts, completions, **columns):
        return [reward(text) for text in completions]

    def pair(response, target):
        if target == "fails" and broken and len(response) % 2 == 0:
            raise ConnectionError("gone")
        return None if target == "fails" and not broken else reward(response)

    targets, ends = ["fails", "stays"], []
    for broken in (True, False):
        gan = small_gan(reward=pair, reward_signal=signal, on_reward_error="skip", seed=3)
        if broken:
            with pytest.warns(UserWarning, match="left out.*biased"):
                record = gan.step(PROMPTS[:2], targets)
            assert 0 < record["reward_failures"] <= 4 and gan.reward_failures == record["reward_failures"]
            assert record["true_rewards"][0] == [None] * 4, "the whole group"
            assert None not in record["true_rewards"][1]
        else:
            record = gan.step(PROMPTS[:2], targets)
            assert record["reward_failures"] == 0
        assert record["reward_calls"] == 8
        ends.append([player_state(gan, player) for player in PLAYERS])
    assert differences(*ends) == []


def test_settings_that_make_no_sense_are_refused():
    for setting in (
        {"reward_timeout": 0}, {"reward_timeout": float("nan")}, {"reward_retries": -1}, {"reward_backoff": -1.0},
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
