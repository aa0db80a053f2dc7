"""Trains a small story model to describe restaurants, on real input: imitation warm-up, then adversarial training.

    python benchmarks/e2e.py --model FOLDER --data e2e_nlg.jsonl --out runs/e2e --seeds 0 1 2

The data is the development set of the E2E NLG Challenge (CC BY-SA 4.0): meaning representations, each with several
reference texts. It is split by distinct prompt. Three models are compared on held-out prompts: the untouched base, the
warm-up's checkpoint, and the model after the adversarial phase. Paired differences are bootstrapped over prompts.

Each seed writes its result to OUT/seed-N/result.json. A seed with this file is skipped, so an interrupted run
continues. The table at the end is made from these files only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lora_gan import LoraGAN
from lora_gan.data import read_rows
from lora_gan.rewards import chrf
from lora_gan.run.evaluation import interval
from lora_gan.storage.checkpoint import complete


def split(path: Path, test: int, validation: int) -> dict[str, list[dict[str, str]]]:
    """Rows by part. No prompt is in two parts. Held-out parts have one row per prompt, with its first reference."""
    rows = [{"prompt": row.prompt + "\n", "target": row.target} for row in read_rows(path)]
    prompts = sorted({row["prompt"] for row in rows})
    order = np.random.Generator(np.random.Philox(0)).permutation(len(prompts))
    part_of = {
        prompts[int(i)]: "test" if place < test else "validation" if place < test + validation else "train"
        for place, i in enumerate(order)
    }
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for row in rows:
        part = part_of[row["prompt"]]
        if part == "train" or row["prompt"] not in seen:
            parts[part].append(row)
        seen.add(row["prompt"])
    return parts


def judge(gan: LoraGAN, rows: list[dict[str, str]], samples: int, player: str = "generator") -> dict[str, list[float]]:
    """Each metric's mean over `samples` responses per prompt: one number per prompt, so that models can be paired."""
    runs = [gan.evaluate(rows, player=player, seed=1000 + i) for i in range(samples)]
    columns: dict[str, list[float]] = {}
    for name in ("true_reward", "pred_reward"):
        columns[name] = np.mean([[s[name] for s in run["samples"]] for run in runs], axis=0).tolist()
    columns["chrf"] = np.mean(
        [[100 * chrf(s["response"], s["target"]) for s in run["samples"]] for run in runs], axis=0
    ).tolist()
    columns["length"] = np.mean([[len(s["response"].split()) for s in run["samples"]] for run in runs], axis=0).tolist()
    columns["distinct_2"] = [float(np.mean([run["distinct_2"] for run in runs]))]
    columns["texts"] = [s["response"] for s in runs[0]["samples"]]
    return columns


def run_seed(seed: int, arguments: argparse.Namespace, parts: dict[str, list[dict[str, str]]]) -> None:
    folder = arguments.out / f"seed-{seed}"
    result: dict[str, object] = {
        "seed": seed,
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
    }
    if (folder / "result.json").exists():
        return
    shared = dict(seed=seed, max_completion_length=96, num_generations=8, beta=0.0)
    warm = LoraGAN(
        arguments.model, output_dir=str(folder / "warm-up"), prompts_per_step=16,
        imitation_weight=1.0, reward_weight=0.0, learning_rate=arguments.imitation_learning_rate,
        lr_scheduler_type="cosine", warmup_steps=50, max_steps=arguments.imitation_steps,
        save_steps=100, save_total_limit=1, logging_steps=20, **shared,
    )  # fmt: skip
    if complete(folder / "warm-up"):
        warm.load_checkpoint()
    result["base"] = judge(warm, parts["test"], arguments.samples, "reference")
    warm.fit(parts["train"], train_disc=False)
    result["warm-up"] = judge(warm, parts["test"], arguments.samples)

    gan = LoraGAN(
        arguments.model, output_dir=str(folder / "adversarial"), prompts_per_step=4, imitation_weight=arguments.anchor,
        learning_rate=arguments.learning_rate, reward_signal=arguments.signal, query_rate=arguments.query_rate,
        disc_updates=arguments.disc_updates, disc_learning_rate=arguments.disc_learning_rate,
        save_steps=arguments.steps, **shared,
    )  # fmt: skip
    gan.load_generator(folder / "warm-up" / f"step-{arguments.imitation_steps}")
    gan.generator.optimizer.restart(None)  # the warm-up's schedule has ended
    result["adversarial seconds"] = timed(
        lambda: (
            gan.fit(parts["train"], steps=arguments.disc_steps, train_gen=False),
            gan.fit(parts["train"], steps=arguments.steps),
        )
    )
    result["adversarial"] = judge(gan, parts["test"], arguments.samples)
    result["reward_calls"] = gan.reward_calls
    (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def timed(work: Callable[[], object]) -> int:
    began = time.monotonic()
    work()
    return round(time.monotonic() - began)


def table(out: Path, rows: list[dict[str, str]]) -> str:
    """Markdown of all finished seeds: means with 95 % intervals over prompts (seeds averaged per prompt)."""
    results = [json.loads(file.read_text()) for file in sorted(out.glob("seed-*/result.json"))]
    lines = [
        "| model | cosine (trained on) | chrF (second metric) | words | distinct-2 |",
        "| --- | --- | --- | --- | --- |",
    ]
    mean = {
        (model, name): np.mean([result[model][name] for result in results], axis=0)
        for model in ("base", "warm-up", "adversarial")
        for name in ("true_reward", "chrf", "length", "distinct_2")
    }

    def cell(values: np.ndarray, digits: int) -> str:
        at = interval(list(values))
        return f"{at['mean']:.{digits}f} [{at['low']:.{digits}f}, {at['high']:.{digits}f}]"

    for model in ("base", "warm-up", "adversarial"):
        lines.append(
            f"| {model} | {cell(mean[model, 'true_reward'], 3)} | {cell(mean[model, 'chrf'], 1)} | "
            f"{mean[model, 'length'].mean():.1f} | {mean[model, 'distinct_2'].mean():.3f} |"
        )
    for name, first, second in (
        ("warm-up − base", "warm-up", "base"),
        ("adversarial − base", "adversarial", "base"),
        ("adversarial − warm-up", "adversarial", "warm-up"),
    ):
        lines.append(
            f"| {name} | {cell(mean[first, 'true_reward'] - mean[second, 'true_reward'], 3)} | "
            f"{cell(mean[first, 'chrf'] - mean[second, 'chrf'], 1)} | | |"
        )
    lines.append("")
    for result in results:
        gain = cell(np.subtract(result["adversarial"]["true_reward"], result["warm-up"]["true_reward"]), 3)
        lines.append(
            f"- seed {result['seed']}: adversarial − warm-up {gain} cosine, "
            f"{cell(np.subtract(result['adversarial']['chrf'], result['warm-up']['chrf']), 1)} chrF; "
            f"{result['reward_calls']:,} true-reward calls; {result['adversarial seconds']} s"
        )
    lines.append("")
    for i in range(4):
        lines += [f"- prompt: `{rows[i]['prompt'].strip()}`", f"  - reference: {rows[i]['target']}"]
        lines += [
            f"  - {model}: {' '.join(results[0][model]['texts'][i].split())}"
            for model in ("base", "warm-up", "adversarial")
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the base")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines with prompt and target")
    parser.add_argument("--out", type=Path, default=Path("runs/e2e"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test", type=int, default=128, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=2, help="responses per held-out prompt, at temperature 1")
    parser.add_argument("--imitation-steps", type=int, default=1000)
    parser.add_argument("--imitation-learning-rate", type=float, default=5e-3)
    parser.add_argument("--disc-steps", type=int, default=15, help="steps in which only the discriminator learns")
    parser.add_argument("--steps", type=int, default=80, help="steps of the adversarial phase")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--disc-learning-rate", type=float, default=1e-3)
    parser.add_argument("--disc-updates", type=int, default=2)
    parser.add_argument("--anchor", type=float, default=0.1, help="weight of imitation in the adversarial phase")
    parser.add_argument("--signal", choices=("predicted", "corrected", "true"), default="corrected")
    parser.add_argument("--query-rate", type=float, default=0.5)
    arguments = parser.parse_args()
    parts = split(arguments.data, arguments.test, validation=48)
    for seed in arguments.seeds:
        run_seed(seed, arguments, parts)
    print(table(arguments.out, parts["test"]))


if __name__ == "__main__":
    main()
