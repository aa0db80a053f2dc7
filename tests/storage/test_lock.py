"""Two runs cannot write one folder; a dead run's lock holds nobody up."""

import os
import signal
import time

import pytest
from helpers import PROMPTS, base_folder, reward, small_gan

from lora_gan.storage.lock import writing_alone

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def holding(folder, act=lambda: time.sleep(60)):
    """A process that holds the folder's lock, and then does something."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with writing_alone(folder, "a run"):
            os.write(told, b"x")
            act()
        os._exit(0)
    os.read(ready, 1)
    return child


def test_a_second_run_is_refused_by_name_and_a_dead_one_holds_nobody_up(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    child = holding(tmp_path)
    for attempt in (lambda: gan.fit(ROWS, steps=1, progress=False), gan.save_checkpoint):
        with pytest.raises(ValueError, match=f"process {child} on .*output_dir"):
            attempt()
    assert gan.global_step == 0
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing was written"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    gan.fit(ROWS, steps=1, progress=False)
    assert (tmp_path / "step-1").is_dir()


def test_a_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path):
    """Data workers and a reward's processes are forked from the run and inherit what it has open."""
    child_ready, child_told = os.pipe()

    def fork_and_wait():
        if not os.fork():
            os.write(child_told, f"{os.getpid()}\n".encode())
            time.sleep(60)
            os._exit(0)
        time.sleep(60)

    parent = holding(tmp_path, fork_and_wait)
    grandchild = int(os.read(child_ready, 20))
    try:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        with writing_alone(tmp_path, "another"):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_in_one_process_as_well(tmp_path):
    one, other = small_gan(output_dir=str(tmp_path)), small_gan(output_dir=str(tmp_path))

    def meanwhile(record):
        with pytest.raises(ValueError, match="another run"):
            other.fit(ROWS, steps=1, progress=False)
        one.save_checkpoint()  # its own run may

    one.fit(ROWS, steps=1, progress=False, on_step=meanwhile)
    other.fit(ROWS, steps=1, progress=False)  # it has ended


def test_another_folder_is_free(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "a"))
    with writing_alone(tmp_path / "b", "another"):
        gan.fit(ROWS, steps=1, progress=False)


def test_where_the_file_system_has_no_locks_it_is_said(tmp_path, monkeypatch):
    def missing(self):
        raise OSError("Operation not supported")

    monkeypatch.setattr("lora_gan.storage.lock.FileLock.acquire", missing)
    with pytest.warns(UserWarning, match="cannot be locked"):
        small_gan(output_dir=str(tmp_path)).save_checkpoint(step=1)
    assert (tmp_path / "step-1").is_dir()


def run(folder, base):
    """A run that says when a step is done, for the test below."""
    from lora_gan import LoraGAN

    gan = LoraGAN(base, reward=reward, output_dir=folder, num_generations=2, max_completion_length=4, save_steps=None)
    gan.fit(ROWS, steps=10**6, progress=False, on_step=lambda record: print(record["step"], flush=True))


@pytest.mark.filterwarnings("ignore:the run continues, but not bitwise equal")
def test_sigterm_from_outside_saves_and_ends_with_143(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    code = f"import test_lock; test_lock.run({str(tmp_path)!r}, {str(base_folder())!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().strip() == b"1", process.stderr.read().decode()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said.decode()
    assert b"SIGTERM: the run stops after this step" in said
    assert len(list(tmp_path.glob("step-*"))) == 1, "saved where it stood"
    gan = small_gan(output_dir=str(tmp_path), lora_r=16, lora_alpha=32, disc_lora_r=16)
    gan.load_checkpoint()
    assert gan.global_step >= 1
