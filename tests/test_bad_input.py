"""Wrong input at the command line: one clear line that names the value and what to do, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest
from helpers import base_folder, byte_tokenizer, small_gan

from lora_gan.cli import main as cli

GOOD = '{"prompt": "the cat", "target": "le chat"}\n{"prompt": "the dog", "target": "le chien"}\n'


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "length.py").write_text("def reward(response, target):\n    return float(len(response))\n")
    return tmp_path


def refused(capsys, arguments: list[str], *words: str) -> str:
    """Run a command that must be refused; its one line on standard error, which must hold all the words."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # what the parser itself refuses
        code = stop.code
    said = capsys.readouterr().err.strip()
    complaint = said.splitlines()[-1] if said else ""
    assert code == 2, f"exit {code}: {said}"
    assert complaint.startswith("lora-gan: ") and "Traceback" not in said, said
    for word in words:
        assert word in complaint, f"{word!r} is not in {complaint!r}"
    return complaint


def train(*options: str, **changes: str) -> list[str]:
    chosen = {
        "model": str(base_folder()), "data": "good.jsonl", "reward": "length.py:reward", "output_dir": "run",
        "max_steps": "1", "num_generations": "4", "max_completion_length": "6", "prompts_per_step": "2",
    } | changes  # fmt: skip
    return ["train", *(word for name, value in chosen.items() for word in (f"--{name}", value)), *options]


def nothing_written(folder: Path) -> bool:
    """No checkpoint, whole or half, and no line of metrics."""
    run = folder / "run"
    written = {path.name for path in run.rglob("*") if path.is_file()} if run.is_dir() else set()
    return written == set()


# --- the base


def test_a_base_that_does_not_exist(there, capsys):
    refused(capsys, train(model="./nowhere"), "./nowhere", "folder")
    assert nothing_written(there)


def test_a_hub_id_without_a_hub(there, capsys):
    refused(capsys, train(model="someone/some-model"), "someone/some-model", "hub")
    assert nothing_written(there)


def test_a_base_that_is_no_causal_language_model(there, capsys):
    from transformers import BertConfig, BertForMaskedLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=300, **small)
    BertForMaskedLM(config).save_pretrained(there / "bert")
    byte_tokenizer("gpt2", "own").save_pretrained(there / "bert")
    refused(capsys, train(model="bert"), "bert", "causal language model")
    assert nothing_written(there)


# --- the data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", "", ["empty.jsonl", "no rows"]),
        ("empty.csv", "", ["empty.csv"]),
        ("header.csv", "prompt,target\n", ["header.csv", "no rows"]),
        ("broken.jsonl", GOOD + '{"prompt": "the\n', ["broken.jsonl", "line 3"]),
        ("list.jsonl", "[1]\n", ["list.jsonl", "line 1"]),
        ("ragged.csv", "prompt,target\na,b\nc,d,e\n", ["ragged.csv", "line 3"]),
        ("columns.csv", "question,answer\na,b\n", ["columns.csv", "'prompt'", "'question', 'answer'", "prompt_column"]),
        ("empty-prompt.csv", "prompt,target\na,b\n,d\n", ["line 3", "prompt"]),
        ("number.jsonl", '{"prompt": 3}\n', ["line 1", "3"]),
        ("rows.xlsx", "x", ["rows.xlsx", ".csv"]),
    ],
)
def test_a_file_that_is_no_data(there, capsys, name, content, words):
    (there / name).write_text(content)
    refused(capsys, train(data=name), *words)
    assert nothing_written(there)


def test_a_file_that_does_not_exist(there, capsys):
    refused(capsys, train(data="nowhere.csv"), "nowhere.csv")


def test_a_column_that_does_not_exist(there, capsys):
    refused(capsys, train(target_column="targt"), "targt", "did you mean 'target'")


def test_a_prompt_longer_than_the_context(there, capsys):
    (there / "long.jsonl").write_text(json.dumps({"prompt": "the cat " * 200, "target": "x"}) + "\n")
    refused(capsys, train(data="long.jsonl"), "96 tokens", "max_completion_length")
    assert nothing_written(there)


def test_a_response_longer_than_the_context(there, capsys):
    refused(capsys, train(max_completion_length="500"), "96 tokens", "500")


def test_targets_missing_where_they_are_needed(there, capsys):
    (there / "good.jsonl").write_text('{"prompt": "the cat"}\n')
    refused(capsys, train(reward="cosine"), "the cat", "target")
    refused(capsys, train(reward="chrf"), "target")
    refused(capsys, train("--imitation_weight", "1"), "the cat", "imitation")
    assert nothing_written(there)


# --- the reward


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('who')", ["'reward'", "KeyError", "response '"]),
        ("return float('nan')", ["'reward'", "nan", "response '"]),
        ("return 'good'", ["'reward'", "'good'", "response '"]),
        ("return [1.0, 2.0]", ["'reward'", "[1.0, 2.0]"]),
    ],
)
def test_a_reward_of_a_pair_that_does_not_answer_as_it_should(there, capsys, body, words):
    (there / "length.py").write_text(f"def reward(response, target):\n    {body}\n")
    refused(capsys, train(), *words)
    assert nothing_written(there)


def test_a_reward_with_a_list_of_the_wrong_length(there, capsys):
    (there / "length.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0] * 3\n")
    refused(capsys, train(), "'reward'", "3 scores for 8 rows", "completion")
    assert nothing_written(there)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("chfr", ["chfr", "chrf"]),
        ("nowhere.py:reward", ["nowhere.py"]),
        ("length.py:rewrd", ["length.py", "rewrd", "reward"]),
        ("no_such_module:reward", ["no_such_module"]),
        ('{"name": "rouge", "knd": "rouge1"}', ["knd", "kind"]),
        ('{"name": "chrf", "weight": "much"}', ["weight", "much"]),
        ("[]", ["reward"]),
    ],
)
def test_a_reward_that_is_not_there(there, capsys, reward, words):
    refused(capsys, train(reward=reward), *words)
    assert nothing_written(there)


# --- settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lerning_rate", "1e-3"], ["lerning_rate", "learning_rate"]),
        (["--query_rate", "2"], ["query_rate=2.0", "at most 1"]),
        (["--lora_r", "0"], ["lora_r=0"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast", "a number"]),
        (["--reward_signal", "ture"], ["--reward_signal", "ture", "true"]),
        (["--adversarial", "true", "--reward_signal", "true"], ["adversarial=True", "reward_signal='true'"]),
        (["--reward_signal", "true", "--query_rate", "0.5"], ["query_rate=0.5", "corrected"]),
        (["--peft_config", '{"target_modules": "no_such_layer"}'], ["no_such_layer"]),
        (["--device", "gpu7"], ["gpu7"]),
        (["--report_to", "tensorbord"], ["tensorbord", "tensorboard"]),
        (["--peft_config", '{"lora_dropout": 0.1}'], ["lora_dropout", "0.1"]),
        (["--peft_config", '{"rang": 4}'], ["rang"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--resume"], ["no complete checkpoint", "run"]),
    ],
)
def test_settings_that_do_not_hold(there, capsys, options, words):
    refused(capsys, train(*options), *words)
    assert nothing_written(there)


@pytest.mark.parametrize(
    ("content", "words"),
    [("lerning_rate: 1\n", ["lerning_rate", "learning_rate"]), ("a: [1\n", ["bad.yaml"]), ("- 1\n", ["bad.yaml"])],
)
def test_a_yaml_file_with_mistakes(there, capsys, content, words):
    (there / "bad.yaml").write_text(content)
    refused(capsys, ["train", "--config", "bad.yaml", "--model", "tiny", "--data", "good.jsonl"], *words)


# --- checkpoints


def test_checkpoints_that_do_not_fit(there, capsys):
    small_gan().save_checkpoint(step=1, ckpt_dir=there / "run")
    other = str(base_folder("llama"))
    refused(capsys, ["generate", "--checkpoint", "nowhere", "--prompt", "a"], "nowhere")
    refused(capsys, ["generate", "--checkpoint", "run/step-9", "--prompt", "a"], "run/step-9")
    refused(capsys, ["generate", "--checkpoint", "run", "--prompt", "a", "--model", other], "weights", other)
    small = ["--lora_alpha", "8", "--disc_lora_r", "4"]
    refused(capsys, train("--resume", "--lora_r", "8", *small), "r=4", "8")
    refused(capsys, train("--resume", "--lora_r", "4", *small, model=other), "base", other)
    (there / "empty").mkdir()
    refused(capsys, ["generate", "--checkpoint", "empty", "--prompt", "a"], "empty", "no complete checkpoint")


# --- the other commands


def test_what_the_other_commands_refuse(there, capsys):
    small_gan().save_checkpoint(step=1, ckpt_dir=there / "run")
    generate = ["generate", "--checkpoint", "run"]
    refused(capsys, generate, "--prompt", "--data")
    refused(capsys, [*generate, "--prompt", ""], "prompt")
    refused(capsys, [*generate, "--prompt", "a\udcff"], "prompt 1", "half a surrogate pair")
    refused(capsys, [*generate, "--prompt", "a", "--data", "good.jsonl"], "one of the two")
    refused(capsys, [*generate, "--prompt", "a", "--temperature", "-1"], "temperature=-1")
    refused(capsys, [*generate, "--prompt", "a", "--best_of", "0"], "--best_of", "0")
    refused(capsys, ["score", "--checkpoint", "run", "--prompt", "a"], "--response")
    refused(capsys, ["score", "--checkpoint", "run", "--prompt", "a", "--response", "\udcff"], "response 1")
    refused(capsys, ["score", "--checkpoint", "run", "--data", "good.jsonl"], "completion", "--response_column")
    refused(capsys, ["eval", "--checkpoint", "run"], "--data")
    refused(capsys, ["trian"], "trian", "train")
    assert cli.main([]) == 2 and "COMMAND" in capsys.readouterr().err  # the help
    export = ["export", "--checkpoint", "run", "--output_dir", "new"]
    refused(capsys, [*export, "--parts", "gen"], "'gen'", "generator-merged")
    refused(capsys, [*export, "--dtype", "int8"], "int8", "bfloat16")
    assert not (there / "new").exists()
    refused(capsys, ["generate", "--checkpoint", "run/step-1/generator", "--prompt", "a"], "run/step-1")
    refused(capsys, ["generate", "--checkpoint", ".", "--prompt", "a"], "run (step 1)", "--checkpoint run")
    refused(capsys, train(output_dir="good.jsonl"), "good.jsonl is a file")
    (there / "full").mkdir()
    (there / "full" / "thesis.txt").write_text("mine")
    refused(capsys, ["export", "--checkpoint", "run", "--output_dir", "full"], "full")
    assert (there / "full" / "thesis.txt").read_text() == "mine"


def test_an_empty_response_is_scored_not_refused(there, capsys):
    """A generator may end at once: the discriminator reads prompt and end, and must have an opinion."""
    small_gan().save_checkpoint(step=1, ckpt_dir=there / "run")
    assert cli.main(["score", "--checkpoint", "run", "--prompt", "a", "--response", ""]) == 0
    float(capsys.readouterr().out)
