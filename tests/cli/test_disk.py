"""How many checkpoints a run keeps, and how much the dry run says that it writes.

Oracle: the files that the run leaves.
"""

import re

import pytest
from helpers import PROMPTS, TARGETS, base_folder, small_gan

from lora_gan.cli import disk, plan
from lora_gan.cli import main as cli
from lora_gan.storage import checkpoint

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]


def steps_in(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_fit_keeps_the_newest_three_unless_told_otherwise(tmp_path):
    small_gan(output_dir=str(tmp_path / "few"), save_steps=1).fit(ROWS, steps=5, progress=False)
    assert steps_in(tmp_path / "few") == [3, 4, 5]
    gan = small_gan(output_dir=str(tmp_path / "all"), save_steps=1, save_total_limit=None)
    gan.fit(ROWS, steps=5, progress=False)
    assert steps_in(tmp_path / "all") == [1, 2, 3, 4, 5]


def test_what_was_saved_by_hand_is_deleted_by_nobody(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), save_steps=1, save_total_limit=1)
    gan.fit(ROWS, steps=1, progress=False)
    for step in (10, 11, 12):
        gan.save_checkpoint(step)
    assert steps_in(tmp_path) == [1, 10, 11, 12], "by hand deletes nothing"
    again = small_gan(output_dir=str(tmp_path), save_steps=1, save_total_limit=1)  # another process would know it, too
    again.load_checkpoint(1)
    again.fit(ROWS, steps=3, progress=False)
    assert steps_in(tmp_path) == [4, 10, 11, 12]


def test_while_updates_are_skipped_nothing_is_deleted(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), save_steps=1, save_total_limit=1)
    gan.fit(ROWS, steps=1, progress=False)
    step, broken = gan.generator.optimizer.step, [True, True, False]
    gan.generator.optimizer.step = lambda loss: step(float("nan") if broken.pop(0) else loss)
    gan.fit(ROWS, steps=2, progress=False)
    assert steps_in(tmp_path) == [1, 2, 3], "step 1 is the last good one"
    gan.fit(ROWS, steps=1, progress=False)
    assert steps_in(tmp_path) == [4]


@pytest.mark.parametrize(
    ("save_steps", "first", "steps", "expected"),
    [(None, 0, 9, 1), (None, 3, 0, 0), (2, 0, 6, 3), (2, 0, 5, 3), (2, 3, 4, 3), (100, 0, 6, 1), (4, 4, 4, 1)],
)
def test_saves_are_counted_as_fit_saves(save_steps, first, steps, expected):
    assert plan.times(save_steps, first, steps) == expected
    last = first + steps
    by_hand = {step for step in range(first + 1, last + 1) if (save_steps and step % save_steps == 0) or step == last}
    assert len(by_hand) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_steps": 2},
        {"save_steps": 1},
        {"save_steps": 2, "save_total_limit": None},
        {"log_completions": False},
    ],
    ids=str,
)
def test_the_estimate_is_the_size_of_what_is_written(tmp_path, settings):
    gan = small_gan(output_dir=str(tmp_path), **settings)
    tokens = max(len(ids) for ids in gan._encode([row["prompt"] for row in ROWS]))
    expected = disk.needed(gan, steps=6, prompt_tokens=tokens, calls=6 * 8)
    gan.fit(ROWS, steps=6, progress=False)
    kept = checkpoint.complete(tmp_path)
    assert (expected.saved, expected.kept) == (gan_saves(settings), len(kept))
    sizes = [bytes_in(path) for path in kept]
    assert expected.each == pytest.approx(max(sizes), rel=0.1)
    assert expected.total == pytest.approx(bytes_in(tmp_path), rel=0.1)


def gan_saves(settings):
    return 1 if "save_steps" not in settings else 6 // settings["save_steps"]


def test_the_dry_run_says_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt\nthe cat\nthe dog\n")
    line = ["train", "--model", str(base_folder()), "--data", "pairs.csv", "--reward", "repetition", "--dry-run"]
    small = ["--max_completion_length", "6", "--prompts_per_step", "1", "--max_steps", "9", "--save_steps", "1"]
    assert cli.main([*line, *small]) == 0
    said = re.search(
        r"disk about [\d.]+ (kB|MB), and [\d.]+ (kB|MB) while a checkpoint replaces another: "
        r"the newest 3 of 9 checkpoints of [\d.]+ (kB|MB) \(save_total_limit=3\)",
        " ".join(capsys.readouterr().out.split()),
    )
    assert said
    assert not (tmp_path / "checkpoints").exists()
