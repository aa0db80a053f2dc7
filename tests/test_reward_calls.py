"""Rewards in bad weather: tried again, given up on in time, several at once, awaited; with the same numbers."""

import asyncio
import threading
import time
import warnings

import numpy as np
import pytest
import torch
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


def fails_on_some(response, target):
    if target == "fails" and len(response) % 2 == 0:
        raise ConnectionError("gone")
    return reward(response, target)


def answers_none_of(response, target):
    return None if target == "fails" else reward(response, target)


def test_a_group_with_a_failure_is_left_out_whole():
    """With the true reward: as if it had not answered for any of the group's responses."""
    ends = []
    for rated in (fails_on_some, answers_none_of):
        gan = small_gan(reward=rated, reward_signal="true", on_reward_error="skip", seed=3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            record = gan.step(PROMPTS[:2], ["fails", "stays"])
        assert record["true_rewards"][0] == [None] * 4 and None not in record["true_rewards"][1]
        assert record["reward_calls"] == 8
        failed = rated is fails_on_some
        assert (0 < record["reward_failures"] <= 4) == failed and gan.reward_failures == record["reward_failures"]
        assert any("left out" in str(warning.message) for warning in told) == failed
        ends.append([player_state(gan, player) for player in PLAYERS])
    assert differences(*ends) == []


@pytest.mark.parametrize("path", ["policy_gradient", "straight_through"])
def test_in_the_corrected_reward_it_is_left_out_too(path):
    """The bare prediction does not stand in for what was asked and not answered: as a step without that prompt."""
    ends = []
    for rated, targets in ((fails_on_some, ["fails", "stays"]), (reward, ["stays"])):
        gan = small_gan(reward=rated, on_reward_error="skip", seed=3, gradient_path=path, beta=0.0, learning_rate=1e-2)
        with torch.no_grad():  # predictions that differ
            gan.players.heads_MH.copy_(
                torch.linspace(-1, 1, gan.players.heads_MH.numel()).view_as(gan.players.heads_MH)
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gan.step(PROMPTS[2 - len(targets) : 2], targets, train_disc=False)
        ends.append(gan.players.parameters("generator"))
    # AdamW's first update does not depend on the gradient's size, but for rounding next to nought.
    for one, other in zip(*ends, strict=True):
        moved = (one - other).abs() < 1e-4
        assert moved.float().mean() > 0.95


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
