"""One run, killed again and again by SIGKILL, a third of the times inside a save; each time it goes on by itself.

A parent with everything imported forks the lives of the run, so that imports are paid once. In a save the life kills
itself at a file operation drawn beforehand, elsewhere the parent kills it after a time drawn beforehand. Oracle: a run
that nothing ever disturbed. More kills: pytest -m slow tests/storage/test_crash.py
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from helpers import PROMPTS, TARGETS, differences, player_state, reward, small_gan

from lora_gan import LoraGAN
from lora_gan.storage import checkpoint

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(12)]
SETTINGS = {"num_generations": 2, "save_steps": 2, "save_total_limit": 2, "query_rate": 0.5, "disc_replay_groups": 8}
OPERATIONS = ("open", "write", "fsync", "close", "rename", "mkdir", "rmdir", "unlink")
FAILED = 3  # exit status of a life that could not begin


def live(folder: Path, *, steps: int, dies_at: int | None = None) -> LoraGAN:
    """Begin the run, or go on with it; `dies_at`: SIGKILL at this file operation of the checkpoints that are saved."""

    def paid(response: str, target: str | None) -> float:
        with folder.with_suffix(".paid").open("a") as file:  # one write: whole, whoever is killed
            file.write(json.dumps([gan.global_step, response, target]) + "\n")
        return reward(response, target)

    if checkpoint.complete(folder):
        gan = LoraGAN.from_checkpoint(folder, reward=paid)
    else:
        gan = small_gan(output_dir=str(folder), reward=paid, **SETTINGS)
    if dies_at is not None:
        die_within_saving(dies_at)
    gan.fit(ROWS, steps=steps - gan.global_step, progress=False)
    return gan


def die_within_saving(at: int) -> None:
    count, saving, write = [0], [False], checkpoint.write

    def watched(*arguments, **options):
        saving[0] = True
        try:
            return write(*arguments, **options)
        finally:
            saving[0] = False

    def deadly(real):
        def operation(*arguments, **options):
            if saving[0]:
                count[0] += 1
                if count[0] > at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return operation

    checkpoint.write = watched
    for name in OPERATIONS:
        setattr(os, name, deadly(getattr(os, name)))


def fork(life) -> int:
    """The process that lives `life()`; its exit status is FAILED if that raises."""
    child = os.fork()
    if child:
        return child
    try:
        life()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)


def seconds_of_a_life(folder: Path) -> float:
    """How long a life of four steps and two checkpoints takes on this machine."""
    began = time.perf_counter()
    os.waitpid(fork(lambda: live(folder, steps=4)), 0)
    return time.perf_counter() - began


def newest(folder: Path) -> int:
    """The newest complete checkpoint's step, whatever name it stands under; 0 = none."""
    return max((step for step, path in checkpoint._steps(folder).items() if checkpoint.fault(path) is None), default=0)


def crash(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill a run `kills` times; what was seen of it."""
    draws = random.Random(seed)
    longest = 2 * seconds_of_a_life(folder.with_name("measured"))
    seen = {"in a save": 0, "elsewhere": 0, "gone on": 0, "steps": 0}
    while seen["in a save"] + seen["elsewhere"] < kills:
        before = newest(folder)
        in_save = (seen["in a save"] + seen["elsewhere"]) % 3 == 0
        dies_at = draws.randrange(120) if in_save else None
        child = fork(lambda dies_at=dies_at: live(folder, steps=10**6, dies_at=dies_at))
        if not in_save:
            time.sleep(draws.uniform(0.0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, "a life could not go on from what the one before left"
        seen["in a save" if in_save else "elsewhere"] += 1
        after = newest(folder)
        assert after >= before, f"the checkpoint of step {before} was lost"
        seen["gone on"] += after > before
    (folder / ".metrics.jsonl.writing-1").write_text("left by a kill that this run may have been spared")
    # Saving may lag behind by any number of steps where the disk is slow, so count from the last step that was asked.
    seen["steps"] = max(newest(folder), *(json.loads(line)[0] for line in paid_lines(folder)), 0) + 3
    child = fork(lambda: live(folder, steps=seen["steps"]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return seen


def paid_lines(folder: Path) -> list[str]:
    """What the run in this folder asked its reward, in all its lives."""
    file = folder.with_suffix(".paid")
    return file.read_text().splitlines() if file.exists() else []


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "step_time"} for line in lines]


def require_as_undisturbed(tmp_path: Path, kills: int) -> dict[str, int]:
    torch.set_num_threads(1)
    seen = crash(tmp_path / "killed", kills, seed=kills)
    undisturbed = live(tmp_path / "undisturbed", steps=seen["steps"])
    killed = LoraGAN.from_checkpoint(tmp_path / "killed", reward=reward)
    assert killed.global_step == undisturbed.global_step == seen["steps"]
    assert (killed.position, killed.reward_calls) == (undisturbed.position, undisturbed.reward_calls)
    for player in ("generator", "discriminator"):
        assert differences(player_state(undisturbed, player), player_state(killed, player)) == []
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "undisturbed")
    paid, once = (paid_lines(tmp_path / name) for name in ("killed", "undisturbed"))
    seen["paid twice"] = len(paid) - len(once)
    assert sorted(set(paid)) == sorted(set(once))
    assert 0 <= seen["paid twice"] <= kills, "only a call that is under way when the process dies may come again"
    assert not [path for path in (tmp_path / "killed").iterdir() if "writing" in path.name], "half-written ones remain"
    return seen


@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
@pytest.mark.filterwarnings("ignore:the checkpoint of step .* is skipped")
def test_a_run_killed_15_times_ends_as_one_that_never_was(tmp_path):
    seen = require_as_undisturbed(tmp_path, 15)
    assert seen["in a save"] == 5 and seen["gone on"] >= 1, seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
@pytest.mark.filterwarnings("ignore:the checkpoint of step .* is skipped")
def test_a_run_killed_300_times_ends_as_one_that_never_was(tmp_path):
    seen = require_as_undisturbed(tmp_path, 300)
    print(seen)
    assert seen["in a save"] == 100 and seen["gone on"] > 30, seen
