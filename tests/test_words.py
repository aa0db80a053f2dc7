"""What the command line says in one line, and a schedule that learns its end from the epochs.

Oracles: the runs that lie in a folder; a run with the same number of steps given as max_steps.
"""

import subprocess
import sys
import warnings

import pytest
from helpers import PROMPTS, TARGETS, base_folder, differences, player_state, small_gan

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.cli import notices
from lora_gan.gan import NO_GROUP
from lora_gan.run import runs

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]  # two a step


def train(*more):
    options = ["--model", str(base_folder()), "--data", "pairs.csv", "--reward", "repetition", "--output_dir", "run"]
    small = ["--max_completion_length", "6", "--prompts_per_step", "2", "--lora_r", "4", "--disc_lora_r", "4"]
    return cli.main(["train", *options, *small, *more])


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt\nthe cat\nthe dog\n")
    return tmp_path


# --- warnings


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.filterwarnings("always:num_generations=1")
def test_one_response_per_prompt_is_explained_in_one_line(there, capsys, more):
    assert train("--num_generations", "1", "--max_steps", "2", *more) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "num_generations" in line]
    assert lines == [f"lora-gan: warning: {NO_GROUP}"]


def test_the_library_warns_of_it_once_as_python_does():
    gan = small_gan(num_generations=1)
    with pytest.warns(UserWarning, match="no group to be compared with"):
        gan.step(PROMPTS[0], TARGETS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gan.step(PROMPTS[0], TARGETS[0])
        small_gan(num_generations=2).step(PROMPTS[0], TARGETS[0])


def test_a_warning_is_one_line_and_other_categories_stay(capsys):
    before = warnings.showwarning
    with pytest.warns(DeprecationWarning, match="for developers"), notices.one_line_each():
        warnings.simplefilter("always")
        warnings.warn("something\n   is so", stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "lora-gan: warning: something is so\n"
    assert warnings.showwarning is before


def test_importing_the_command_line_changes_no_warnings():
    code = (
        "import warnings; shown = warnings.showwarning; import lora_gan.cli.main; assert warnings.showwarning is shown"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- which runs there are


def test_a_folder_of_runs_is_answered_with_the_runs(there, capsys, monkeypatch):
    for run, step in (("a", 2), ("a", 10), ("deep/b", 7)):
        (there / "runs" / run / f"step-{step}").mkdir(parents=True)
        (there / "runs" / run / f"step-{step}" / "manifest.json").write_text("{}")
    monkeypatch.setattr(LoraGAN, "from_checkpoint", lambda *_, **__: pytest.fail("opened before"))
    for line in (
        ["eval", "--data", "pairs.csv"], ["generate", "--prompt", "a"], ["score", "--prompt", "a", "--response", "b"],
        ["export", "--output_dir", "new"],
    ):  # fmt: skip
        assert cli.main([line[0], "--checkpoint", "runs", *line[1:]]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("lora-gan: runs is no run, but holds runs: ")
        assert "runs/a (step 10)" in said and "runs/deep/b (step 7)" in said and "--checkpoint runs/" in said


def test_a_run_and_a_folder_without_runs_pass(there):
    (there / "run" / "step-1").mkdir(parents=True)
    (there / "run" / "step-1" / "manifest.json").write_text("{}")
    for folder in (there / "run", there / "run" / "step-1"):
        runs.require_run(folder)
    (there / "empty").mkdir()
    runs.require_run(there / "empty")


def test_many_runs_are_counted(there):
    for number in range(12):
        (there / "runs" / f"r{number}" / "step-1").mkdir(parents=True)
        (there / "runs" / f"r{number}" / "step-1" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"and 2 more\. Name one"):
        runs.require_run(there / "runs")


# --- a schedule that ends with the epochs


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_a_schedule_ends_with_the_epochs(tmp_path, name):
    settings = {"lr_scheduler_type": name, "warmup_steps": 1, "disc_updates": 3}
    by_epochs = small_gan(output_dir=str(tmp_path / "a"), num_train_epochs=1.5, **settings)  # 5 steps: 9 rows, 2 a step
    by_steps = small_gan(output_dir=str(tmp_path / "b"), max_steps=5, **settings)
    assert by_epochs.fit(ROWS, progress=False) == by_steps.fit(ROWS, progress=False)
    assert by_epochs.global_step == 5 and by_epochs.generator.optimizer.learning_rate < 1e-6
    for player in ("generator", "discriminator"):
        assert differences(player_state(by_epochs, player), player_state(by_steps, player)) == []


def test_it_resumes_exactly(tmp_path):
    settings = {"lr_scheduler_type": "linear", "num_train_epochs": 2, "save_steps": 2}  # 6 steps
    whole = small_gan(output_dir=str(tmp_path), **settings)
    records = whole.fit(ROWS, progress=False)
    gan = small_gan(output_dir=str(tmp_path), **settings)
    gan.load_checkpoint(4)
    assert gan.fit(ROWS, progress=False) == records[4:]
    for player in ("generator", "discriminator"):
        assert differences(player_state(whole, player), player_state(gan, player)) == []


def test_steps_of_fit_are_its_end_where_max_steps_is_none(tmp_path):
    gan = small_gan(output_dir=str(tmp_path), lr_scheduler_type="linear", learning_rate=0.5)
    rates = [record["gen_learning_rate"] for record in gan.fit(ROWS, steps=4, progress=False)]
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_step_by_hand_needs_max_steps_and_says_so_before_anything_is_sampled():
    asked = []
    gan = small_gan(lr_scheduler_type="cosine", max_steps=None, reward=lambda response, target: asked.append(1) or 0.0)
    with pytest.raises(ValueError, match="lr_scheduler_type='cosine' needs the number of steps.*set max_steps"):
        gan.step(PROMPTS[0], TARGETS[0])
    assert asked == [] and gan.global_step == 0
    gan.step(PROMPTS[0], TARGETS[0], train_gen=False, train_disc=False)  # no update, no schedule
    assert len(asked) > 0
