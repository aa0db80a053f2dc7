"""Ctrl-C in fit(): the saved state is complete and continues as the undisturbed run; a second one stops immediately."""

import os
import signal
import threading
import time

import pytest
from helpers import PROMPTS, TARGETS, differences, player_state, reward, small_gan
from transformers import TrainerCallback

from lora_gan.run import snapshot
from lora_gan.storage import checkpoint

ROWS = [{"prompt": p, "target": t} for p, t in zip(PROMPTS, TARGETS, strict=True)]
PLAYERS = ("generator", "discriminator")


class PressesCtrlC:
    """A reward during whose n-th call a person presses Ctrl-C."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, response: str, target: str | None) -> float:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return reward(response, target)


def state(gan) -> list:
    return [player_state(gan, player) for player in PLAYERS]


def gone_on(folder, steps: int):
    gan = small_gan(output_dir=str(folder))
    gan.load_checkpoint()
    gan.fit(ROWS, steps=steps - gan.global_step, progress=False)
    return gan


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    gan = small_gan(output_dir=str(tmp_path_factory.mktemp("whole")))
    gan.fit(ROWS, steps=4, progress=False)
    return gan


@pytest.mark.filterwarnings("ignore:.*answers of the true reward in .* are not reused")
def test_while_a_reward_is_asked_it_stops_at_once(tmp_path, undisturbed):
    asked = PressesCtrlC(at=2 * 8 + 3)  # in the third step: 2 prompts × 4 responses a step
    gan = small_gan(output_dir=str(tmp_path), reward=asked)
    with pytest.raises(KeyboardInterrupt, match="step 2 is saved in .*step-2"):
        gan.fit(ROWS, steps=4, progress=False)
    assert asked.calls == asked.at and gan.global_step == 2
    assert differences(state(undisturbed), state(gone_on(tmp_path, 4))) == []


def test_elsewhere_the_step_is_finished_first(tmp_path, undisturbed, capsys):
    gan = small_gan(output_dir=str(tmp_path))
    update = gan.discriminator.update

    def pressed_while_updating(experience):
        if gan.global_step == 1:
            signal.raise_signal(signal.SIGINT)
        return update(experience)

    gan.discriminator.update = pressed_while_updating
    with pytest.raises(KeyboardInterrupt, match="step 2 is saved in .*step-2"):
        gan.fit(ROWS, steps=4, progress=False)
    assert "A second signal stops immediately" in capsys.readouterr().err
    assert differences(state(undisturbed), state(gone_on(tmp_path, 4))) == []


def test_the_second_one_stops_at_once_and_saves_nothing(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))

    def pressed_twice(experience):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    gan.discriminator.update = pressed_twice
    with pytest.raises(KeyboardInterrupt):
        gan.fit(ROWS, steps=4, progress=False)
    assert not list(tmp_path.glob("step-*"))


def test_before_a_step_is_done_there_is_nothing_to_save(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing new to save"):
        small_gan(output_dir=str(tmp_path), reward=PressesCtrlC(at=1)).fit(ROWS, steps=2, progress=False)
    assert not list(tmp_path.glob("step-*"))


def test_what_was_just_saved_is_not_saved_twice(tmp_path, monkeypatch):
    gan = small_gan(output_dir=str(tmp_path), save_steps=1)
    saves = []
    take = snapshot.take
    monkeypatch.setattr(snapshot, "take", lambda state: saves.append(state.global_step) or take(state))
    with pytest.raises(KeyboardInterrupt, match="step 1 is saved"):
        gan.fit(ROWS, steps=3, progress=False, on_step=lambda record: signal.raise_signal(signal.SIGINT))
    assert saves == [1]


def test_the_handler_before_comes_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=1, progress=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_is_caught(tmp_path):
    done = []
    gan = small_gan(output_dir=str(tmp_path))
    thread = threading.Thread(target=lambda: done.append(gan.fit(ROWS, steps=1, progress=False)))
    thread.start()
    thread.join()
    assert len(done[0]) == 1


def test_before_rewards_are_asked_it_stops_and_asks_none(tmp_path, undisturbed):
    asked = PressesCtrlC(at=None)
    gan = small_gan(output_dir=str(tmp_path), reward=asked)
    predict = gan.discriminator.predict_to_learn

    def pressed_while_predicting(sampled):
        if gan.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return predict(sampled)

    gan.discriminator.predict_to_learn = pressed_while_predicting
    with pytest.raises(KeyboardInterrupt, match="step 2 is saved in .*step-2"):
        gan.fit(ROWS, steps=4, progress=False)
    assert asked.calls == 2 * 8
    assert differences(state(undisturbed), state(gone_on(tmp_path, 4))) == []
    del gan.discriminator.predict_to_learn
    gan.step(PROMPTS[0], TARGETS[0])  # what was asked to stop has stopped: this is another run


def test_an_evaluation_may_be_broken_off(tmp_path, undisturbed):
    asked = PressesCtrlC(at=2 * 8 + 2)  # the evaluation after the second step
    gan = small_gan(output_dir=str(tmp_path), reward=asked, eval_steps=2, eval_on_start=False)
    with pytest.raises(KeyboardInterrupt, match="step 2 is saved"):
        gan.fit(ROWS, steps=4, eval_dataset=ROWS, progress=False)
    assert asked.calls == asked.at
    assert differences(state(undisturbed), state(gone_on(tmp_path, 4))) == []


def test_the_evaluation_before_the_first_step_may_be_broken_off(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), reward=PressesCtrlC(at=2))
    with pytest.raises(KeyboardInterrupt, match="after 0 of 4 steps, without the final evaluation: no step was done"):
        gan.fit(ROWS, steps=4, eval_dataset=ROWS, progress=False)
    assert list(tmp_path.glob("step-*")) == []


@pytest.mark.parametrize("moment", ["in a reward", "after a step"])
@pytest.mark.filterwarnings("ignore:.*answers of the true reward in .* are not reused")
def test_sigterm_saves_what_is_whole_and_ends_the_process_with_143(moment, tmp_path, undisturbed):
    before = signal.getsignal(signal.SIGTERM)
    calls = []

    def terminated(response, target):
        calls.append(1)
        if moment == "in a reward" and len(calls) == 10:
            signal.raise_signal(signal.SIGTERM)
        return reward(response, target)

    gan = small_gan(output_dir=str(tmp_path), reward=terminated)
    told = (lambda record: signal.raise_signal(signal.SIGTERM)) if moment == "after a step" else None
    with pytest.raises(SystemExit, match="step 1 is saved in") as ended:
        gan.fit(ROWS, steps=4, progress=False, on_step=told)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert differences(state(undisturbed), state(gone_on(tmp_path, 4))) == []


def test_a_second_sigterm_ends_at_once_and_leaves_the_last_checkpoint(tmp_path):
    # With a callback a checkpoint stands before the next step begins.
    gan = small_gan(output_dir=str(tmp_path), save_steps=1, callbacks=[TrainerCallback()])

    def twice(record):
        if record["step"] == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        gan.fit(ROWS, steps=4, progress=False, on_step=twice)
    assert ended.value.code == 143 and gan.global_step == 2
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-1"]


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        gan = small_gan(output_dir=str(tmp_path))
        gan.fit(ROWS, steps=2, progress=False, on_step=lambda record: signal.raise_signal(signal.SIGTERM))
        assert gan.global_step == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_worker_forked_from_the_run_dies_of_sigterm_as_ever(tmp_path):
    """Else a reward's pool of processes could not be ended."""
    ends = []

    def forking(response, target):
        if not ends:
            ready, told = os.pipe()
            child = os.fork()
            if not child:
                os.write(told, b"x")
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)  # Python forgets the signals that come while it forks
            os.kill(child, signal.SIGTERM)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return reward(response, target)

    small_gan(output_dir=str(tmp_path), reward=forking).fit(ROWS, steps=1, progress=False)
    assert ends == [-signal.SIGTERM]
