"""An evening with a chat model of 100 M parameters, on the command line alone, as a new user would spend it.

Dry run, training with a judge that fails at times, Ctrl-C, resume, a judge that is down, a moved folder, the end of the
budget, evaluation and export. The oracle of all counts is the judge's server. LORA_GAN_EVENING_MODEL names another
base, and LORA_GAN_EVENING_OUTPUT a file for all that is printed, to be read by a person.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from counting_server import CountingServer, chat_completion
from families import family_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_gan.storage.json_lines import read_lines

pytestmark = pytest.mark.slow

TOPICS = (
    "the sea", "a good friend", "the morning", "bread", "snow", "a long walk", "trains", "the moon", "tea", "a garden",
    "old books", "rain", "bicycles", "the library", "music", "a bridge",
)  # fmt: skip
WISHES = ("Say something about {}.", "Describe {} in one sentence.", "What is special about {}?", "Praise {}.")


def judged(body):
    """A grader's answer, by the characters of its question."""
    score = sum(map(ord, body["messages"][0]["content"])) % 11
    return chat_completion(f'{{"score": {score}}}', prompt_tokens=120, completion_tokens=8)


def llama_of_100_million(folder: Path) -> Path:
    """A random model of Llama's shape, with SmolLM2's kind of tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(family_folder("smollm2"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=11,
        num_attention_heads=12, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert 0.9e8 < model.num_parameters() < 1.2e8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Evening:
    """A terminal in a folder; keeps all that it prints."""

    def __init__(self, folder: Path, server: CountingServer) -> None:
        self.folder, self.server, self.printed = folder, server, []

    def run(self, *words: str, interrupt_at: int | None = None, run_folder: str = "runs/evening") -> tuple[int, str]:
        """One command: its exit status and its output. `interrupt_at`: Ctrl-C once this step is logged."""
        environment = {**os.environ, "OPENAI_API_KEY": "none", "COLUMNS": "120", "NO_PROXY": "127.0.0.1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "lora_gan", *words], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if interrupt_at is not None:
            log = self.folder / run_folder / "metrics.jsonl"
            deadline = time.monotonic() + 900
            while process.poll() is None and time.monotonic() < deadline:
                if log.is_file() and any(line.get("step") == interrupt_at for line in read_lines(log)):
                    process.send_signal(signal.SIGINT)
                    break
                time.sleep(0.1)
        output = process.communicate(timeout=1200)[0]
        self.printed.append(f"$ lora-gan {' '.join(map(_quoted, words))}\n{output}[exit status {process.returncode}]\n")
        return process.returncode, output


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"[\s{}]", word) else word


@pytest.fixture
def evening(tmp_path):
    server = CountingServer(judged, Retry_After_Ms="10")
    server.fails = lambda number: number % 7 == 3
    evening = Evening(tmp_path, server)
    yield evening
    server.close()
    if os.environ.get("LORA_GAN_EVENING_OUTPUT"):
        Path(os.environ["LORA_GAN_EVENING_OUTPUT"]).write_text("\n".join(evening.printed), encoding="utf-8")


def requests_of(evening, *words, **options) -> tuple[int, str, int]:
    """A command's exit status and output, and the requests that it made."""
    before = evening.server.requests
    status, output = evening.run(*words, **options)
    return status, output, evening.server.requests - before


def test_an_evening(evening):
    folder, server = evening.folder, evening.server
    rows = [[{"role": "user", "content": wish.format(topic)}] for topic in TOPICS for wish in WISHES]
    for name, prompts in (("chat.jsonl", rows[8:]), ("held_out.jsonl", rows[:8])):
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (folder / name).write_text(lines, encoding="utf-8")
    model = os.environ.get("LORA_GAN_EVENING_MODEL") or str(llama_of_100_million(folder / "llama"))
    judge = (
        f"{{name: judge, model: grader, base_url: {server.url}/v1, max_failures: 4, price_per_million: [0.5, 2.0], "
        "rubric: 'How friendly is this answer?\n{response}'}"
    )
    options = {
        "model": model, "data": "chat.jsonl", "eval_data": "held_out.jsonl", "reward": judge,
        "output_dir": "runs/evening", "max_steps": 9, "prompts_per_step": 2, "num_generations": 4,
        "max_completion_length": 16, "save_steps": 2, "eval_steps": 4, "reward_budget": 52, "disc_layers": 4,
    }  # fmt: skip
    train = ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]

    # 1. The dry run says what is to come, and asks as often as it says.
    status, output, made = requests_of(evening, *train, "--dry-run")
    assert status == 0 and not (folder / "runs").exists()
    ((asked, retries),) = re.findall(r"True-reward calls: (\d+) in this dry run(?:, (\d+) retr)?", output)
    assert int(asked) + int(retries or 0) == made
    for word in ("memory", "disk", "52 calls in training", "6.5 of 9 steps", "32 in 4 evaluations", "s per step"):
        assert word in " ".join(output.split())  # the plan breaks its lines at 80 columns

    # 2. Training, Ctrl-C in the third step.
    total = 0
    status, output, made = requests_of(evening, *train, interrupt_at=2)
    total += made
    assert status == 130
    (step,) = re.findall(r"step (\d+) is saved in", output)
    assert int(step) >= 2 and "without the final evaluation" in output
    resume = ["train", "--config", "runs/evening/train.yaml", "--resume"]
    assert f"lora-gan {' '.join(resume)}" in re.sub(rf"{re.escape(str(folder))}/", "", output)

    # 3. The judge goes down: the run ends saved, and names the cause.
    server.fails = lambda number, first=server.requests: number > first + 9 or number % 7 == 3
    status, output, made = requests_of(evening, *resume)
    total += made
    assert status not in (0, 130) and "503" in output and "--resume" in output

    # 4. It is up again, and the folder has moved meanwhile.
    server.fails = lambda number: number % 7 == 3
    (folder / "runs" / "evening").rename(folder / "runs" / "moved")
    status, output, made = requests_of(evening, "train", "--config", "runs/moved/train.yaml", "--resume")
    total += made
    assert status == 0, output
    assert "The run was moved" in output
    assert "all 52 calls of reward_budget are spent" in output
    assert "Done at step 9 of 9: all steps are done" in output and "(step 9)" in output
    counts = dict(
        (name or "in training", int(n))
        for n, name in re.findall(
            r"(\d+) (in training|in evaluation|retries)", output.split("True-reward calls:")[1].split("Held-out")[0]
        )
    )
    cached = re.search(r"(\d+) of them came from", output)
    assert counts["in training"] == 52
    assert sum(counts.values()) - (int(cached[1]) if cached else 0) == total
    lines = list(read_lines(folder / "runs" / "moved" / "metrics.jsonl"))
    assert [line["step"] for line in lines if "eval_true_reward" in line] == [0, 4, 8, 9]
    for name in ("training.png", "completions.jsonl", "train.yaml"):
        assert (folder / "runs" / "moved" / name).stat().st_size

    # 5. What came of it.
    status, output, made = requests_of(
        evening, "eval", "--checkpoint", "runs/moved", "--data", "held_out.jsonl", "--reference"
    )
    assert status == 0 and "difference per row" in output, output
    status, output = evening.run("generate", "--checkpoint", "runs/moved", "--prompt", "Praise snow.", "--best_of", "4")
    assert status == 0
    status, output = evening.run(
        "export", "--checkpoint", "runs/moved", "--output_dir", "exported", "--license", "apache-2.0"
    )
    assert status == 0, output
    card = (folder / "exported" / "generator" / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "52 in training" in card and "held-out" in card.lower()
