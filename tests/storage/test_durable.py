"""Faults at every file operation of a save: always the old or the new checkpoint, never neither.

`durable` reaches the disk through the module `os` alone (`shutil.rmtree` and `Path.mkdir` end there, too). Here each of
its operations is counted, and at the k-th one the fault comes, for every k that there is.
"""

import errno
import os
import signal

import pytest
import torch
from helpers import PROMPTS, differences, player_state, reward, small_gan

from lora_gan import LoraGAN
from lora_gan.run import snapshot
from lora_gan.storage import checkpoint, durable
from lora_gan.storage.durable import Damaged, Folder

OPERATIONS = ("open", "write", "fsync", "close", "rename", "mkdir", "rmdir", "unlink")
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


class Crash(BaseException):
    """The process is gone: nothing that the library would do afterwards happens."""


class Faults:
    """Stands in for `os`'s functions; what happens from the k-th operation on is the fault's."""

    def __init__(self, monkeypatch, fault=None, at=-1):
        self.count, self.fault, self.at, self.hit = 0, fault, at, None
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._standing_in(name, getattr(os, name)))

    def _standing_in(self, name, real):
        def operation(*arguments, **options):
            number, self.count = self.count, self.count + 1
            gone = self.hit is not None and self.fault == "crash"
            if number == self.at or gone:
                self.hit = self.hit or name
                if self.fault == "crash":
                    if not gone and name == "write":
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    raise Crash(f"{name}, operation {number}")
                if self.fault == "short" and name == "write":
                    return real(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 2)])
                if self.fault in (errno.ENOSPC, errno.EIO):
                    if name == "write":
                        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    if name == "close":
                        real(*arguments, **options)
                    raise OSError(self.fault, os.strerror(self.fault))
            return real(*arguments, **options)

        return operation


@pytest.fixture(scope="module")
def two():
    """A run's checkpoint contents after one step and after two."""
    gan = small_gan(num_generations=2)
    contents = []
    for prompt in PROMPTS[:2]:
        gan.step(prompt)
        contents.append(snapshot.take(gan.state))
    return contents


def operations(two, folder, **options):
    """How many there are in this save."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        checkpoint.write(two[1], folder, **options)
    return faults.count


def step_of(path):
    return Folder(path, manifest=True).read_json("trainer_state.json")["global_step"]


@pytest.mark.parametrize("fault", ["crash", "short", errno.ENOSPC, errno.EIO], ids=["crash", "short", "full", "io"])
@pytest.mark.parametrize("where", ["same step", "next step"])
def test_a_fault_at_every_operation_leaves_the_old_or_the_new(where, fault, two, tmp_path):
    step, limit = (1, None) if where == "same step" else (2, 1)
    checkpoint.write(two[0], tmp_path / "count", 1)
    count = operations(two, tmp_path / "count", step=step, limit=limit)
    assert count > 40, "the save does not go through what is watched"
    outcomes = set()
    for at in range(count):
        folder = tmp_path / str(at)
        checkpoint.write(two[0], folder, 1)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, fault, at)
            try:
                checkpoint.write(two[1], folder, step, limit=limit)
                raised = None
            except (OSError, Crash) as error:
                raised = error
        assert faults.hit, at
        found = checkpoint.find(folder, None)  # compares every SHA-256
        outcomes.add(left := step_of(found))
        if fault == "short":
            assert raised is None and left == 2, "a short write is written on"
        # Whoever writes next, and alone, finds the same, under its own name, and nothing half-written.
        durable.tidy(folder)
        assert step_of(checkpoint.find(folder, None)) == left
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        checkpoint.write(two[1], folder, 3)
        assert step_of(checkpoint.find(folder, None)) == 2
    assert outcomes == ({2} if fault == "short" else {1, 2})


@pytest.mark.filterwarnings("ignore:a checkpoint could not be written")
def test_a_full_disk_is_told_and_the_run_goes_on_and_saves_when_it_can(tmp_path, monkeypatch):
    undisturbed = small_gan(output_dir=str(tmp_path / "undisturbed"), save_steps=2)
    undisturbed.fit(ROWS, steps=8, progress=False)
    gan = small_gan(output_dir=str(tmp_path / "full"), save_steps=2)
    write, full = durable.write_folder, []

    def filled(final, files):
        if 2 <= gan.global_step <= 4:
            full.append(final.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(final, files)

    monkeypatch.setattr(durable, "write_folder", filled)
    monkeypatch.setattr(gan, "callbacks", [_Idle()])  # then fit() writes before it goes on: the steps are known
    with pytest.warns(UserWarning, match="UNSAVED.*tries again at step 3"):
        gan.fit(ROWS, steps=8, progress=False)
    assert full[:2] == ["step-2", "step-3"], "tried again at the next step"
    there = sorted(path.name for path in (tmp_path / "full").glob("step-*"))
    assert there[-1] == "step-8" and "step-6" in there and not {"step-2", "step-3", "step-4"} & set(there)
    assert differences(player_state(undisturbed, "generator"), player_state(gan, "generator")) == []
    assert differences(player_state(undisturbed, "discriminator"), player_state(gan, "discriminator")) == []


@pytest.mark.parametrize("callbacks", [False, True])
def test_where_the_end_of_a_run_cannot_be_saved_it_says_so(callbacks, tmp_path, monkeypatch):
    def filled(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    gan = small_gan(output_dir=str(tmp_path), callbacks=[_Idle()] if callbacks else None)
    monkeypatch.setattr(durable, "write_folder", filled)
    with pytest.warns(UserWarning, match="UNSAVED"), pytest.raises(OSError, match="No space"):
        gan.fit(ROWS, steps=2, progress=False)
    assert gan.global_step == 2 and not list(tmp_path.glob("step-*"))


def test_saving_beside_the_steps_gives_the_same_checkpoints(tmp_path, monkeypatch):
    """The copies are of their own step, though the weights move on while they are written."""
    import time

    write = durable.write_folder

    def slowly(final, files):
        time.sleep(0.05)
        write(final, files)

    monkeypatch.setattr(durable, "write_folder", slowly)
    beside = small_gan(output_dir=str(tmp_path / "beside"), save_steps=1, save_total_limit=None)
    beside.fit(ROWS, steps=4, progress=False)
    waiting = small_gan(output_dir=str(tmp_path / "waiting"), save_steps=1, save_total_limit=None, callbacks=[_Idle()])
    waiting.fit(ROWS, steps=4, progress=False)
    for step in range(1, 5):
        one, other = (tmp_path / name / f"step-{step}" / durable.MANIFEST for name in ("beside", "waiting"))
        one, other = ({k: v for k, v in Folder(p.parent, manifest=True).files.items() if k != "trainer_state.json"}
                      for p in (one, other))  # fmt: skip
        assert one == other


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    judged = iter([0.95, 0.1, 0.9, 0.3, 0.2, 0.4])  # the first is from before the first step, and does not count

    def scripted(response, target=None):
        return reward(response, target)

    gan = small_gan(
        output_dir=str(tmp_path), save_steps=1, eval_steps=1, save_total_limit=1, save_best=True, reward=scripted
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_gan.run.evaluation.evaluate", lambda *_, **__: _evaluation(next(judged)))
        gan.fit(ROWS, steps=3, eval_dataset=ROWS, progress=False)
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-3"]
        again = LoraGAN.from_checkpoint(tmp_path, reward=scripted)
        again.fit(ROWS, steps=2, eval_dataset=ROWS, progress=False)  # which was the best outlives the process
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-5"]


def test_what_another_version_or_thread_count_may_change_is_said(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.save_checkpoint(step=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"threads {threads} then, {threads + 1} now"):
            gan.load_checkpoint(step=1)
    finally:
        torch.set_num_threads(threads)


def test_a_killed_process_in_the_middle_of_replacing_leaves_the_old_one(two, tmp_path):
    """SIGKILL between the two renames: the old one stands under the name it was set aside by."""
    checkpoint.write(two[0], tmp_path, 1)
    child = os.fork()
    if not child:
        rename, calls = os.rename, []

        def killing(*arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*arguments)

        os.rename = killing
        checkpoint.write(two[1], tmp_path, 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "step-1").exists()
    assert step_of(checkpoint.find(tmp_path, None)) == 1
    assert step_of(checkpoint.find(tmp_path, 1)) == 1
    small_gan(num_generations=2, output_dir=str(tmp_path)).load_checkpoint(step=1)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Damaged, match="no plain file"):
        Folder(tmp_path, manifest=False).read("pipe", limit=10)


def _evaluation(value):
    return {"metrics": {"true_reward": {"mean": value}}, "distinct_2": 0.5, "samples": []}


def _Idle():
    from transformers import TrainerCallback

    return TrainerCallback()
