"""`lora-gan train --resume` of a moved folder, and with other data or settings.

Oracles: the undisturbed run's weights; the files and the settings that a test changes, each named in its line.
"""

import json
import shutil

import pytest
import yaml
from helpers import base_folder

from lora_gan import data
from lora_gan.cli import main as cli
from lora_gan.run import resuming

OPTIONS = {
    "data": "pairs.csv", "reward": "mine.py:length", "num_generations": 4, "max_completion_length": 6, "lora_r": 4,
    "disc_lora_r": 4, "prompts_per_step": 2, "output_dir": "run",
}  # fmt: skip


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,target\n" + "".join(f"the cat {i},le chat {i}\n" for i in range(6)))
    (tmp_path / "mine.py").write_text("def length(response):\n    return float(len(response))\n")
    return tmp_path


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(*more, **changed):
    return cli.main(["train", "--model", str(base_folder()), *words(OPTIONS | changed), *more])


def said(capsys):
    """Lines on stderr about changes since the checkpoint."""
    return [line for line in capsys.readouterr().err.splitlines() if "has changed" in line or "was moved" in line]


@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
def test_a_moved_run_goes_on_where_it_is(there, capsys):
    (there / "run").mkdir()
    shutil.copy("pairs.csv", "run/pairs.csv")  # data and reward that moved with the run
    shutil.copy("mine.py", "run/mine.py")
    inside = {"data": "run/pairs.csv", "reward": "run/mine.py:length"}
    assert train(max_steps=4, save_steps=2, **inside) == 0
    whole = (there / "run" / "step-4" / "generator" / "adapter_model.bin").read_bytes()
    shutil.rmtree(there / "run" / "step-4")
    (there / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved")
    capsys.readouterr()
    assert cli.main(["train", "--config", "elsewhere/moved/train.yaml", "--resume"]) == 0
    moved = there / "elsewhere" / "moved"
    assert not (there / "run").exists()
    assert (moved / "step-4" / "generator" / "adapter_model.bin").read_bytes() == whole
    assert said(capsys) == [
        f"The run was moved: it continues in {moved}, not in {there / 'run'}, which train.yaml names."
    ]
    kept = yaml.safe_load((moved / "train.yaml").read_text())
    assert (kept["output_dir"], kept["data"], kept["reward"]) == (
        str(moved), str(moved / "pairs.csv"), f"{moved / 'mine.py'}:length",
    )  # fmt: skip
    assert cli.main(["train", "--config", "elsewhere/moved/train.yaml", "--resume", "--max_steps", "5"]) == 0
    assert said(capsys) == [], "not moved again"


def test_a_copy_goes_on_as_a_copy_unless_a_folder_is_given(there, capsys):
    assert train(max_steps=1) == 0
    shutil.copytree("run", "copy")
    assert cli.main(["train", "--config", "copy/train.yaml", "--resume", "--max_steps", "2"]) == 0
    assert (there / "copy" / "step-2").is_dir() and not (there / "run" / "step-2").exists()
    line = ["train", "--config", "copy/train.yaml", "--resume", "--max_steps", "3", "--output_dir", "run"]
    assert cli.main(line) == 0
    assert (there / "run" / "step-3").is_dir() and not (there / "copy" / "step-3").exists()


def test_a_settings_file_without_checkpoints_beside_it_names_its_folder(there, capsys):
    assert train(max_steps=1) == 0
    (there / "settings").mkdir()
    shutil.copy("run/train.yaml", "settings/train.yaml")
    assert cli.main(["train", "--config", "settings/train.yaml", "--resume", "--max_steps", "2"]) == 0
    assert (there / "run" / "step-2").is_dir() and said(capsys) == []


def test_what_changed_is_said_a_line_each(there, capsys):
    assert train(max_steps=1) == 0
    assert train("--resume", max_steps=2, save_steps=7, logging_steps=2) == 0
    assert said(capsys) == [], "neither the length of a run nor its files change what is learned"
    changed = {"seed": 1, "learning_rate": 0.001, "beta": 0.01, "temperature": 0.5, "num_generations": 2}
    assert train("--resume", max_steps=3, **changed) == 0
    before = {"seed": 0, "learning_rate": 0.0002, "beta": 0.03, "temperature": 1.0, "num_generations": 4}
    assert sorted(said(capsys)) == sorted(
        f"{name} has changed: {before[name]} up to step 2, {value} from now on." for name, value in changed.items()
    )


def test_other_data_asks_for_a_flag(there, capsys):
    assert train(max_steps=1) == 0
    (there / "others.csv").write_text("prompt,target\nthe dog,le chien\n")
    assert train("--resume", max_steps=2, data="others.csv") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    line = f"data has changed: {there / 'pairs.csv'} (6 rows) up to here, {there / 'others.csv'} (1 row)"
    assert error.startswith(f"lora-gan: {line} from now on. Add --allow_other_data")
    assert not (there / "run" / "step-2").exists()
    assert train("--resume", "--allow_other_data", max_steps=2, data="others.csv") == 0
    assert said(capsys) == [f"{line} from now on."]
    assert "allow_other_data" not in (there / "run" / "train.yaml").read_text(), "asked for again each time"
    assert train("--resume", max_steps=3, data="others.csv") == 0 and said(capsys) == []


def test_changed_rows_in_the_same_file_are_other_data(there, capsys):
    assert train(max_steps=1) == 0
    (there / "pairs.csv").write_text((there / "pairs.csv").read_text().replace("le chat 3", "le chien 3"))
    assert train("--resume", max_steps=2) == 2
    assert "--allow_other_data" in capsys.readouterr().err


def test_the_same_rows_elsewhere_are_the_same_data(there, capsys):
    assert train(max_steps=1) == 0
    rows = [{"prompt": f"the cat {i}", "target": f"le chat {i}"} for i in range(6)]
    (there / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("--resume", max_steps=2, data="same.jsonl") == 0 and said(capsys) == []


def test_other_held_out_rows_are_said(there, capsys):
    (there / "held.csv").write_text("prompt\nthe dog\n")
    assert train(max_steps=1) == 0
    assert train("--resume", max_steps=2, eval_data="held.csv") == 0
    line = f"eval_data has changed: none up to here, {there / 'held.csv'} (1 row) from now on."
    assert said(capsys) == [line]


def test_runs_of_earlier_versions_go_on_without_a_digest(there, capsys):
    assert train(max_steps=1) == 0
    (there / "run" / "data.json").unlink()
    assert train("--resume", max_steps=2) == 0 and said(capsys) == []
    (there / "run" / "data.json").write_text("[")
    assert train("--resume", max_steps=3) == 0 and said(capsys) == []


def test_streamed_rows_are_known_by_their_file(there):
    stream = data.read_rows("pairs.csv", streaming=True)
    known = resuming.identity("pairs.csv", stream)
    assert known == {"source": str(there / "pairs.csv"), "bytes": (there / "pairs.csv").stat().st_size}
    assert resuming.changed_data({"data": known}, {"data": known}, allowed=False) == []
    with pytest.raises(ValueError, match="--allow_other_data"):
        resuming.changed_data({"data": known}, {"data": known | {"bytes": 1}}, allowed=False)
