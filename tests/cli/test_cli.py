"""The command line: options, YAML, overrides, resume, Ctrl-C; each command on a tiny random base."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import base_folder, sign

from lora_gan import Config, LoraGAN, data
from lora_gan.cli import main as cli
from lora_gan.run import options as options_module

SMALL = [
    "--num_generations", "4", "--max_completion_length", "6", "--lora_r", "4", "--disc_lora_r", "4",
    "--prompts_per_step", "2",
]  # fmt: skip
REWARD = """
def length(response, target):
    return float(len(response))
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A working folder with data and a reward of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text(
        "prompt,target\n" + "".join(f"the cat number {i},le chat {i}\n" for i in range(6))
    )
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path


def train(*options: str) -> int:
    base = ["--model", str(base_folder()), "--data", "pairs.csv", "--reward", "mine.py:length", "--output_dir", "run"]
    return cli.main(["train", *base, *SMALL, *options])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_setting_is_an_option_of_train_with_its_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Config):
        option = re.search(rf"^  --{field.name}( \S+)?( {{.*?}})?\s+(\S.*)$", text, flags=re.MULTILINE)
        assert option, field.name
        help_text = option[3].partition("(type:")[0].strip()
        assert len(help_text) > 10 and help_text.endswith("."), f"{field.name}: {help_text!r}"
        assert field.name in text


def test_train_writes_what_it_says(there, capsys):
    assert train("--max_steps", "2") == 0
    assert (there / "run" / "step-2" / "generator" / "adapter_config.json").is_file()
    assert [line["step"] for line in lines(there / "run" / "metrics.jsonl")] == [1, 2]
    out = capsys.readouterr().out
    assert "lora-gan generate --checkpoint run" in out
    gan = LoraGAN.from_checkpoint(there / "run", base_folder())
    assert (gan.config.lora_r, gan.config.num_generations, gan.global_step) == (4, 4, 2)


def test_a_yaml_file_says_the_same_and_the_line_wins(there):
    (there / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(base_folder()),
                "data": "pairs.csv",
                "reward": [{"name": "mine.py:length", "weight": 2.0}],
                "max_steps": 3,
                "num_generations": 4,
                "max_completion_length": 6,
                "peft_config": {"r": 2, "target_modules": ["c_attn", "c_fc"]},
                "prompts_per_step": 2,
                "output_dir": "from-file",
            }  # fmt: skip
        )
        + "learning_rate: 1e-3\n"  # what PyYAML alone reads as a text
    )
    assert cli.main(["train", "--config", "run.yaml", "--max_steps", "1", "--output-dir", "from-line"]) == 0
    gan = LoraGAN.from_checkpoint(there / "from-line", base_folder())
    assert gan.global_step == 1 and gan.config.max_steps == 1
    lora = gan.players.peft.peft_config["generator"]
    assert (gan.config.learning_rate, lora.r, lora.target_modules) == (1e-3, 2, {"c_attn", "c_fc"})
    assert not (there / "from-file").exists()


def test_resume_takes_the_newest_and_equals_the_undisturbed_run(there):
    assert train("--max_steps", "4", "--save_steps", "2") == 0
    whole = (there / "run").rename(there / "whole")
    assert train("--max_steps", "2") == 0
    assert cli.main(["train", "--config", "run/train.yaml", "--max_steps", "4", "--resume"]) == 0
    for player in ("generator", "discriminator"):
        weights = [(run / "step-4" / player / "adapter_model.bin").read_bytes() for run in (whole, there / "run")]
        assert weights[0] == weights[1]
    names = ("step", "reward", "reward_calls")
    runs = [[[line[n] for n in names] for line in lines(run / "metrics.jsonl")] for run in (whole, there / "run")]
    assert runs[0] == runs[1] and len(runs[0]) == 4


def test_a_new_run_does_not_mix_with_an_older_one(there, capsys):
    assert train("--max_steps", "1") == 0
    assert train("--max_steps", "1") == 2
    assert "step-1" in (said := capsys.readouterr().err) and "--resume" in said


def test_dry_run_trains_nothing_and_tries_the_reward(there, capsys):
    assert train("--max_steps", "5", "--query_rate", "0.5", "--dry-run") == 0
    assert not (there / "run").exists()
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(  # 5 steps × 8 × 0.5; 2 prompts × 4 responses, and 2 targets to each of the 2 prompts
        r"true reward length: asked for 50% of the responses: 20 calls in training, "
        r"0 in evaluations \(no eval_data\), "
        r"up to 12 in this dry run disk",
        out,
    )
    assert "steps 5, each of 2 prompts × 4 responses" in out
    assert re.search(r"memory about [\d.]+ (MB|GB): Python and its libraries [\d.]+ (MB|GB), base", out)
    assert re.search(r"own target 9\.\d+, another row's 9\.\d+", out)  # "le chat 0": nine characters
    assert "does not prefer a row's own target" in out  # the length does not know the target
    assert re.search(r"about [\d.]+ m?s for 5 steps, [\d.]+ m?s of that for the 20 calls of the true reward", out)


def test_dry_run_says_when_there_is_nothing_to_learn_from(there, capsys):
    (there / "mine.py").write_text("def length(response, target):\n    return 1.0\n")
    assert train("--max_steps", "1", "--dry-run") == 0
    assert "all responses to each prompt have the same reward" in capsys.readouterr().out


def test_generate_score_and_eval(there, capsys):
    assert train("--max_steps", "2") == 0
    gan = LoraGAN.from_checkpoint(there / "run", base_folder())
    capsys.readouterr()

    assert cli.main(["generate", "--checkpoint", "run", "--prompt", "the cat", "--best_of", "3"]) == 0
    assert capsys.readouterr().out == gan.generate("the cat", best_of=3)[0] + "\n"

    assert cli.main(["generate", "--checkpoint", "run", "--data", "pairs.csv", "--output", "answers.jsonl"]) == 0
    answers = lines(there / "answers.jsonl")
    prompts = [f"the cat number {i}" for i in range(6)]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["completion"] for answer in answers] == gan.generate(prompts)

    capsys.readouterr()
    assert cli.main(["score", "--checkpoint", "run", "--prompt", "the cat", "--response", "sat"]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(gan.score("the cat", "sat")[0], abs=1e-6)
    assert cli.main(["score", "--checkpoint", "run/step-2", "--data", "answers.jsonl"]) == 0
    scores = [json.loads(line)["pred_reward"] for line in capsys.readouterr().out.splitlines()]
    assert scores == pytest.approx(gan.score(prompts, [a["completion"] for a in answers]), abs=1e-6)

    options = ["--checkpoint", "run", "--data", "pairs.csv", "--output", "judged.json"]
    assert cli.main(["eval", *options, "--reference"]) == 0
    judged = json.loads((there / "judged.json").read_text())
    for player in ("generator", "reference"):  # the run's own reward: the length
        lengths = [len(sample["response"]) for sample in judged[player]["samples"]]
        assert judged[player]["metrics"]["true_reward"]["mean"] == pytest.approx(sum(lengths) / 6)
    assert "generator" in (out := capsys.readouterr().out) and "reference" in out and "true_reward" in out


def test_the_run_is_found_from_another_folder(there, monkeypatch, capsys):
    assert train("--max_steps", "1") == 0
    (there / "elsewhere").mkdir()
    monkeypatch.chdir(there / "elsewhere")
    assert cli.main(["eval", "--checkpoint", "../run", "--data", "../pairs.csv"]) == 0
    assert (
        cli.main(["train", "--config", "../run/train.yaml", "--output_dir", "../run", "--max_steps", "2", "--resume"])
        == 0
    )
    assert (there / "run" / "step-2").is_dir()


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
def test_ctrl_c_saves_and_says_how_to_go_on(there):
    (there / "mine.py").write_text(
        "import time\ndef length(response, target):\n    time.sleep(0.02)\n    return 1.0 * len(response)\n"
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "lora_gan", "train", "--model", str(base_folder()), "--data", "pairs.csv",
        "--reward", "mine.py:length", "--output_dir", "run", "--max_steps", "100000", *SMALL,
    ]  # fmt: skip
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (there / "run" / "metrics.jsonl").is_file() or len(lines(there / "run" / "metrics.jsonl")) < 2:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in said
    (saved,) = (there / "run").glob("step-*")
    done = int(saved.name.removeprefix("step-"))
    assert lines(there / "run" / "metrics.jsonl")[-1]["step"] == done
    assert "--config run/train.yaml --resume" in said and saved.name in said
    assert cli.main(["train", "--config", "run/train.yaml", "--max_steps", str(done + 1), "--resume"]) == 0
    assert (there / "run" / f"step-{done + 1}").is_dir()


# --- mistakes, and what is said of them


def said_of(capsys, *arguments: str) -> str:
    """The one line on standard error of a command that is refused."""
    capsys.readouterr()
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip()
    assert code == 2 and said.startswith("lora-gan: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("--max_steps", "many", "--max_steps many is not accepted: it must be a whole number, or null"),
        ("--learning_rate", "fast", "it must be a number"),
        ("--log_completions", "maybe", "it must be true or false"),
        ("--on_exploit", "go", "--on_exploit go is not accepted: it must be one of warn, stop, rollback"),
        ("--peft_config", "5", "it must be a mapping, or null"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_plain_words(capsys, option, value, accepted):
    said = said_of(capsys, "train", "--model", "tiny", "--data", "x.csv", option, value)
    assert accepted in said and "typing" not in said and "NoneType" not in said


def test_a_value_that_looks_like_an_option_stays_as_it_is(monkeypatch):
    seen = []

    def score(two_words: str | None = None) -> None:
        """Nothing.

        Args:
            two_words: Any.
        """
        seen.append(two_words)

    monkeypatch.setitem(cli.COMMANDS, "score", score)
    assert cli.main(["score", "--two-words", "--- a well-known one"]) == 0
    assert cli.main(["score", "--two-words", "--a-well-known one"]) == 0
    assert cli.main(["score", "--two-words=well-known"]) == 0
    assert seen == ["--- a well-known one", "--a-well-known one", "well-known"]


def test_options_of_a_run_that_cannot_be_read_are_said(there, capsys):
    assert train("--max_steps", "1") == 0
    for text, words in (("a: [1\n", "not YAML"), ("[1]\n", "NAME: VALUE")):
        (there / "run" / "train.yaml").write_text(text)
        assert words in said_of(capsys, "eval", "--checkpoint", "run", "--data", "pairs.csv")
        assert words in said_of(capsys, "export", "--checkpoint", "run", "--output_dir", "exported")


def test_eval_does_not_guess_the_reward(there, capsys):
    assert train("--max_steps", "1") == 0
    (there / "run" / "train.yaml").unlink()
    assert "give --reward" in said_of(capsys, "eval", "--checkpoint", "run", "--data", "pairs.csv")
    assert cli.main(["eval", "--checkpoint", "run", "--data", "pairs.csv", "--reward", "exact_match"]) == 0


def test_evaluations_need_rows(there, capsys):
    options = ["--model", str(base_folder()), "--data", "pairs.csv", "--eval_steps", "1"]
    assert "--eval_data" in said_of(capsys, "train", *options)


def test_where_an_answer_goes_is_looked_at_first(there, capsys, monkeypatch):
    assert train("--max_steps", "1") == 0
    monkeypatch.setattr(LoraGAN, "from_checkpoint", lambda *_, **__: pytest.fail("opened before"))
    (there / "folder").mkdir()
    for command in ("generate", "score", "eval"):
        said = said_of(capsys, command, "--checkpoint", "run", "--data", "pairs.csv", "--output", "folder")
        assert "folder is a folder" in said


def test_score_reads_what_generate_wrote_whatever_the_run_called_its_columns(there, capsys):
    (there / "pairs.csv").write_text("question,answer\nthe cat,le chat\nthe dog,le chien\n")
    assert train("--max_steps", "1", "--prompt_column", "question", "--target_column", "answer") == 0
    answers = "new/answers.jsonl"  # the folder is made
    assert cli.main(["generate", "--checkpoint", "run", "--data", "pairs.csv", "--output", answers]) == 0
    capsys.readouterr()
    assert cli.main(["score", "--checkpoint", "run", "--data", answers]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = lines(there / answers)
    assert [s["pred_reward"] for s in scores] == pytest.approx([a["pred_reward"] for a in written], abs=1e-5)


def test_a_run_of_another_device_opens_on_this_one(there, capsys):
    assert train("--max_steps", "1") == 0
    state = there / "run" / "step-1" / "trainer_state.json"
    state.write_text(state.read_text().replace('"device": "auto"', '"device": "cuda:77"'))
    sign(state.parent)
    assert "cuda:77" in said_of(capsys, "score", "--checkpoint", "run", "--prompt", "a", "--response", "b")
    assert cli.main(["score", "--checkpoint", "run", "--prompt", "a", "--response", "b", "--device", "cpu"]) == 0


def test_the_base_that_ships_stays_it_beside_a_folder_of_that_name(there):
    (there / "tiny").mkdir()
    options = {"model": "tiny", "data": "pairs.csv", "eval_data": None, "reward": "cosine"}
    kept = yaml.safe_load(options_module.keep_options(there / "run", options).read_text())
    assert kept == options | {"data": str(there / "pairs.csv"), "output_dir": str(there / "run")}


def test_chat_messages_in_parts_are_tried_and_shown(there, capsys):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(base_folder(), there / "chat")
    tokenizer = AutoTokenizer.from_pretrained(there / "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
    tokenizer.save_pretrained(there / "chat")
    message = {"role": "user", "content": [{"type": "text", "text": "the cat"}]}
    (there / "chat.jsonl").write_text(json.dumps({"prompt": [message]}) + "\n")
    options = ["--model", "chat", "--data", "chat.jsonl", "--reward", "mine.py:length", "--max_steps", "1"]
    assert cli.main(["train", *options, *SMALL, "--dry-run"]) == 0
    assert "the cat" in capsys.readouterr().out


def test_ctrl_c_before_anything_is_saved_does_not_say_go_on(there, capsys):
    (there / "mine.py").write_text("def length(response, target):\n    raise KeyboardInterrupt\n")
    assert train("--max_steps", "1") == 130
    said = capsys.readouterr().err
    assert "nothing new to save" in said and "--resume" not in said


@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
def test_a_reward_that_fails_later_leaves_a_run_that_goes_on(there, capsys):
    (there / "mine.py").write_text(
        "calls = []\ndef length(response, target):\n    calls.append(1)\n"
        "    if len(calls) == 20:\n        raise ConnectionError('no service')\n    return float(len(response))\n"
    )
    capsys.readouterr()
    assert train("--max_steps", "4", "--save_steps", "1") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no service" in said and said.endswith("continue with: lora-gan train --config run/train.yaml --resume")
    assert cli.main(["train", "--config", "run/train.yaml", "--resume"]) == 0
    assert (there / "run" / "step-4").is_dir()


def test_score_reads_the_samples_of_a_run_beside_their_targets(there, capsys):
    assert train("--max_steps", "1") == 0
    capsys.readouterr()
    assert cli.main(["score", "--checkpoint", "run", "--data", "run/completions.jsonl"]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    samples = lines(there / "run" / "completions.jsonl")
    assert all("target" in sample for sample in samples)
    assert [score["completion"] for score in scores] == [sample["completion"] for sample in samples]


def test_changing_the_reward_at_resume_is_said(there, capsys):
    assert train("--max_steps", "1") == 0
    assert train("--max_steps", "2", "--resume") == 0
    assert "reward is another one" not in capsys.readouterr().err
    assert train("--max_steps", "3", "--resume", "--reward", "repetition") == 0
    assert "repetition from now on" in capsys.readouterr().err


def test_a_run_leaves_its_curves(there, capsys):
    pytest.importorskip("matplotlib", reason="curves are drawn by matplotlib, which is not installed")
    assert train("--max_steps", "2") == 0
    assert (there / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "metrics.jsonl, completions.jsonl, training.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    "stops",
    [
        "signal.raise_signal(signal.SIGINT)",
        "signal.raise_signal(signal.SIGTERM)",
        "raise KeyboardInterrupt('stopped at response 4 of 8 to rate')",  # q of the human reward
        "raise ConnectionError('no service')",
    ],
)
def test_a_run_that_was_stopped_leaves_its_curves(there, stops, monkeypatch):
    pytest.importorskip("matplotlib", reason="curves are drawn by matplotlib, which is not installed")
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    (there / "mine.py").write_text(
        "import signal\ncalls = []\ndef length(response, target):\n    calls.append(1)\n"
        f"    if len(calls) == 20:\n        {stops}\n    return float(len(response))\n"
    )
    assert train("--max_steps", "4") != 0
    assert (there / "run" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert figures[0].get_suptitle() == "run"
    (calls,) = next(axes for axes in figures[0].axes if "calls" in axes.get_title()).lines
    assert list(calls.get_ydata()) == [8, 16], "the steps that were whole"


@pytest.mark.filterwarnings("always:training.png could not be drawn")
def test_a_picture_that_cannot_be_drawn_hides_nothing(there, capsys, monkeypatch):
    monkeypatch.setattr("lora_gan.run.plots.plot_run", lambda *_, **__: 1 / 0)
    assert train("--max_steps", "1") == 0
    said = capsys.readouterr()
    assert "warning: training.png could not be drawn: division by zero" in said.err and "Done at step 1" in said.out


def test_what_a_reader_does_not_take_is_no_error(there):
    assert train("--max_steps", "1") == 0
    command = (
        f"{sys.executable} -m lora_gan score --checkpoint run --data many.csv --response_column target | head -n 1"
    )
    (there / "many.csv").write_text("prompt,target\n" + "the cat,le chat\n" * 3000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert run.stdout.count("\n") == 1 and "Broken" not in run.stderr and "Traceback" not in run.stderr


# --- what an option says reaches what it is about


def test_eval_does_as_its_options_say(there):
    """Oracle: gan.evaluate() called with the same in Python."""
    assert train("--max_steps", "2", "--learning_rate", "0.05") == 0
    (there / "others.csv").write_text("question,answer\nthe dog,le chien\nthe tree,arbre\nthe red house,non\n")
    gan = LoraGAN.from_checkpoint(there / "run", base_folder(), reward=lambda response, target: 2.0 * len(response))
    rows = [
        {"prompt": p, "target": t}
        for p, t in (("the dog", "le chien"), ("the tree", "arbre"), ("the red house", "non"))
    ]
    options = ["eval", "--checkpoint", "run/step-2", "--data", "others.csv", "--output", "judged.json"]
    columns = ["--prompt_column", "question", "--target_column", "answer"]
    sampling = ["--best_of", "3", "--temperature", "0.7", "--seed", "7", "--reference"]
    twice = ["--reward", '[{"name": "mine.py:length", "weight": 2.0}]']
    assert cli.main([*options, *columns, *sampling, *twice]) == 0
    judged = json.loads((there / "judged.json").read_text())
    for player, more in (("generator", {"best_of": 3}), ("reference", {"player": "reference"})):
        expected = gan.evaluate(rows, temperature=0.7, seed=7, **more)
        assert judged[player]["samples"] == json.loads(json.dumps(expected["samples"])), player
    assert judged["generator"]["samples"] != judged["reference"]["samples"]

    assert cli.main([*options, *columns]) == 0  # a step's folder: the reward stands in the run's train.yaml, above it
    judged = json.loads((there / "judged.json").read_text())
    assert [s["true_reward"] for s in judged["generator"]["samples"]] == [
        float(len(s["response"])) for s in judged["generator"]["samples"]
    ]


def test_reuse_answers_reaches_the_run(there, monkeypatch):
    """As an option, and as a line of a train.yaml, where earlier versions wrote it as a setting."""
    seen = []
    monkeypatch.setattr(LoraGAN, "fit", lambda gan, *_, **__: seen.append(gan.reuse_answers))
    monkeypatch.setattr("lora_gan.cli.training._print_result", lambda *_: None)
    (there / "old.yaml").write_text("reuse_answers: true\n")
    for options in ([], ["--reuse_answers"], ["--config", "old.yaml"]):
        assert train("--max_steps", "1", *options) == 0
    assert seen == [False, True, True]


def test_generate_does_as_its_options_say(there, capsys):
    assert train("--max_steps", "1") == 0
    gan = LoraGAN.from_checkpoint(there / "run", base_folder())
    usual = gan.generate("the cat")[0]
    for option, value in (("seed", 7), ("temperature", 0.0), ("top_p", 0.05), ("max_completion_length", 2)):
        capsys.readouterr()
        assert cli.main(["generate", "--checkpoint", "run", "--prompt", "the cat", f"--{option}", str(value)]) == 0
        (expected,) = gan.generate("the cat", **{option: value})
        assert capsys.readouterr().out == expected + "\n" != usual + "\n", option


def test_train_gives_every_part_what_is_meant_for_it(there):
    (there / "held_out.csv").write_text("question,answer\nthe dog,le chien\n")
    (there / "pairs.csv").write_text("question,answer\nthe cat,le chat\nthe old tree,arbre\n")
    options = ["--model", str(base_folder()), "--data", "pairs.csv", "--output_dir", "run", "--max_steps", "1"]
    columns = ["--prompt_column", "question", "--target_column", "answer", "--eval_data", "held_out.csv"]
    adapters = ["--peft_config", '{"r": 2}', "--disc_peft_config", '{"r": 3}', "--max_completion_length", "6"]
    rewards = ["--reward", '[{"name": "mine.py:length", "weight": 2.0}]']
    assert cli.main(["train", *options, *columns, *adapters, *rewards]) == 0
    ranks = [
        json.loads((there / "run" / "step-1" / player / "adapter_config.json").read_text())["r"]
        for player in ("generator", "discriminator")
    ]
    assert ranks == [2, 3]
    gan = LoraGAN.from_checkpoint(there / "run", base_folder(), reward=lambda response, target: 2.0 * len(response))
    expected = gan.evaluate([{"question": "the dog", "answer": "le chien"}])["metrics"]["true_reward"]["mean"]
    evaluated = [line for line in lines(there / "run" / "metrics.jsonl") if "eval_true_reward" in line]
    assert [line["step"] for line in evaluated] == [0, 1] and evaluated[-1]["eval_true_reward"] == expected


def test_export_writes_the_parts_it_is_told_to(there, capsys):
    assert train("--max_steps", "1") == 0
    assert cli.main(["export", "--checkpoint", "run", "--output_dir", "new", "--parts", "generator"]) == 0
    assert [path.name for path in (there / "new").iterdir() if path.is_dir()] == ["generator"]


def test_a_run_at_its_end_says_so(there, capsys):
    assert train("--max_steps", "1") == 0
    options = ["--config", "run/train.yaml", "--resume"]
    assert "at its end, step 1: set a larger --max_steps" in said_of(capsys, "train", *options)


def test_a_dry_run_beside_an_older_run_is_allowed(there, capsys):
    assert train("--max_steps", "1") == 0
    assert train("--max_steps", "2", "--dry-run") == 0
    assert [path.name for path in (there / "run").glob("step-*")] == ["step-1"]


def test_a_dry_run_compares_targets(there, capsys):
    assert train("--max_steps", "3", "--dry-run", "--reward", "exact_match") == 0
    out = capsys.readouterr().out
    assert "a row's own target 1.000, another row's 0.000" in out and "does not prefer" not in out


def test_a_dry_run_reckons_the_time_of_the_whole_run(there, capsys):
    (there / "mine.py").write_text(
        "import time\ndef length(response, target):\n    time.sleep(0.05)\n    return float(len(response))\n"
    )
    assert train("--max_steps", "1000", "--dry-run") == 0
    out = capsys.readouterr().out
    each = float(re.search(r"([\d.]+) ms per call", out)[1])
    said = re.search(r"about (\d+) min for 1,000 steps, (\d+) min of that for the 8,000 calls", out)
    assert each >= 50 and float(said[2]) == pytest.approx(each * 8000 / 60_000, abs=1)
    assert float(said[1]) >= float(said[2])


def test_files_in_the_kept_options_stand_under_their_full_path(there):
    (there / "base").mkdir()
    reward = ["chrf", {"name": "mine.py:length", "weight": 2.0}, {"name": "human", "log": "said.jsonl"}]
    options = {"model": "base", "data": "pairs.csv", "eval_data": "pairs.csv", "reward": reward, "resume": True}
    kept = yaml.safe_load(options_module.keep_options(there / "run", options).read_text())
    pairs = str(there / "pairs.csv")
    assert kept == {
        "model": str(there / "base"), "data": pairs, "eval_data": pairs, "output_dir": str(there / "run"),
        "reward": [
            "chrf", {"name": f"{there}/mine.py:length", "weight": 2.0},
            {"name": "human", "log": str(there / "said.jsonl")},
        ],
    }  # fmt: skip


def test_split_and_streaming_reach_the_data(there, monkeypatch):
    asked, read = [], data.read_rows
    monkeypatch.setattr(data, "read_rows", lambda source, **how: asked.append(how) or read(source, **how))
    assert train("--max_steps", "1", "--streaming", "--split", "train[:4]", "--dry-run") in (0, 2)
    assert (asked[0]["streaming"], asked[0]["split"]) == (True, "train[:4]")


def test_remote_code_runs_only_where_the_line_says_so(there, capsys, monkeypatch):
    (there / "run").mkdir()
    allowed = []

    def opened(path, model, **arguments):
        allowed.append(arguments["trust_remote_code"])
        raise ValueError("far enough")

    monkeypatch.setattr(LoraGAN, "from_checkpoint", opened)
    for options in (
        ["generate", "--prompt", "a"], ["score", "--prompt", "a", "--response", "b"], ["export", "--output_dir", "new"],
        ["eval", "--data", "pairs.csv", "--reward", "chrf"],
    ):  # fmt: skip
        for more in ([], ["--trust_remote_code"]):
            assert "far enough" in said_of(capsys, options[0], "--checkpoint", "run", *options[1:], *more)
    assert allowed == [False, True] * 4


def test_a_run_that_could_not_save_does_not_say_go_on(there, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt("pressed again")

    monkeypatch.setattr("lora_gan.run.snapshot.take", stopped)
    assert train("--max_steps", "1") == 130
    said = capsys.readouterr().err
    assert "pressed again" in said and "--resume" not in said
