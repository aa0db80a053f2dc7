"""answers.jsonl: no answer of the true reward is paid for twice, whenever the run breaks off."""

import json
import warnings

import pytest
from helpers import PROMPTS, Gone, dies, differences, player_state, reward, small_gan

from lora_gan import LoraGAN
from lora_gan.rewards.answers import FILE

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}"} for i in range(6)]
SETTINGS = {"save_steps": 2, "query_rate": 0.5, "num_generations": 4}


class Paid:
    """A reward that counts its calls, and is gone in the n-th."""

    def __init__(self, goes_at=None):
        self.asked, self.goes_at = [], goes_at

    def __call__(self, response, target=None):
        if len(self.asked) == self.goes_at:
            raise Gone
        self.asked.append(response)
        return reward(response)


class PaidInBatches(Paid):
    def __call__(self, prompts, completions, **columns):
        if len(self.asked) == self.goes_at:
            raise Gone
        self.asked.append(tuple(completions))
        return [reward(text) for text in completions]


def run(folder, paid, steps=6, **settings):
    gan = small_gan(output_dir=str(folder), reward=paid, **SETTINGS, **settings)
    if list(folder.glob("step-*")):
        gan.load_checkpoint()
    gan.fit(ROWS, steps=steps - gan.global_step, progress=False)
    return gan


def state(gan):
    return [player_state(gan, player) for player in ("generator", "discriminator")] + [gan.reward_calls]


@pytest.mark.parametrize("kind", [Paid, PaidInBatches])
@pytest.mark.parametrize("workers", [1, 3])
def test_wherever_it_breaks_off_nothing_is_paid_twice(kind, workers, tmp_path):
    paid = kind()
    whole = run(tmp_path / "whole", paid, reward_workers=workers)
    for goes_at in range(0, len(paid.asked), 5 if kind is Paid else 1):
        folder = tmp_path / str(goes_at)
        folder.mkdir()
        before = kind(goes_at)
        with dies():
            run(folder, before, reward_workers=workers)
        after = kind()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gan = run(folder, after, reward_workers=workers)
        assert sorted(before.asked + after.asked) == sorted(paid.asked)
        assert differences(state(whole), state(gan)) == []


def test_what_is_taken_over_is_said(tmp_path):
    with dies():
        run(tmp_path, Paid(6))
    with pytest.warns(UserWarning, match=r"6 answers .*answers.jsonl; delete this file"):
        run(tmp_path, Paid(), steps=3)


def test_a_torn_line_is_asked_again_and_closed(tmp_path):
    with dies():
        run(tmp_path, Paid(6))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-9])
    paid = Paid()
    with pytest.warns(UserWarning, match="5 answers"):
        run(tmp_path, paid, steps=2)
    assert len(paid.asked) == 3, "of eight answers of two steps five were there"


@pytest.mark.parametrize("damage", [{"asked": None}, {"asked": ["a list"]}, {"occurrence": "0"}])
def test_a_line_without_a_proper_key_is_not_taken(damage, tmp_path):
    with dies():
        run(tmp_path, Paid(6))
    *lines, last = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text("\n".join([*lines, json.dumps(json.loads(last) | damage)]) + "\n")
    with pytest.warns(UserWarning, match="5 answers"):
        run(tmp_path, Paid(), steps=2)


def test_going_back_on_purpose_asks_anew(tmp_path):
    """Whoever takes up an older checkpoint may have changed the reward."""
    run(tmp_path, Paid(), steps=5)
    gan = LoraGAN.from_checkpoint(tmp_path / "step-2", reward=(paid := Paid()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", ".*were cut at max_completion_length")
        gan.fit(ROWS, steps=2, progress=False)
    assert len(paid.asked) == 8


def test_another_runs_answers_are_not_taken(tmp_path):
    with dies():
        run(tmp_path, Paid(6))
    paid = Paid()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path, paid, steps=1, seed=1)
    assert len(paid.asked) == 4


def test_the_file_does_not_grow_with_the_run(tmp_path):
    run(tmp_path, Paid(), steps=12)
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert lines[0]["run"]["seed"] == 0
    assert {line["step"] for line in lines[1:]} <= {8, 9, 10, 11}


def test_an_evaluation_and_a_bare_step_log_nothing(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), reward=Paid())
    gan.step(PROMPTS[0])
    gan.evaluate(ROWS)
    assert not (tmp_path / FILE).exists()
