"""Fresh rank correlation on `tiny` when the discriminator's adapter is on the upper layers only.

    python benchmarks/upper_layers.py --steps 60 --seeds 0 1 --out docs/results/upper_layers.jsonl

One run per number of upper layers (`disc_layers`; None is all four), with the default settings and chrF as the reward.
Each run is a line of the results file. The table gives means over the last half of the steps: Spearman's correlation
within groups and over all responses. Both are measured before the discriminator learns from the responses.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from speed import table

from lora_gan import LoraGAN, rewards, tiny
from lora_gan.storage.json_lines import append_line, open_lines

NAMES = ("rank_correlation_within", "rank_correlation", "reward_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 2], help="numbers of upper layers; all layers always run"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/upper_layers.jsonl"))
    given = parser.parse_args()
    done = {(line["layers"], line["seed"], line["steps"]) for line in open_lines(given.out)}
    for seed in given.seeds:
        for layers in (None, *given.layers):
            if (layers, seed, given.steps) not in done:
                append_line(
                    given.out, {"layers": layers, "seed": seed, "steps": given.steps} | run(layers, seed, given.steps)
                )
    table_rows = []
    for layers in (None, *given.layers):
        lines = [line for line in open_lines(given.out) if line["layers"] == layers and line["steps"] == given.steps]
        cells = [
            f"{statistics.mean(its):.2f} ({min(its):.2f}–{max(its):.2f})"
            for its in ([x[n] for x in lines] for n in NAMES)
        ]
        table_rows.append(["all" if layers is None else str(layers), str(len(lines)), *cells])
    print(table(["layers", "seeds", "within groups", "over all responses", "reward"], table_rows))


def run(layers: int | None, seed: int, steps: int) -> dict[str, float]:
    gan = LoraGAN(
        "tiny", reward=rewards.chrf, seed=seed, disc_layers=layers, max_completion_length=16, learning_rate=1e-3,
        disc_learning_rate=1e-3,
    )  # fmt: skip
    pairs = tiny.pairs("train", 4 * steps, seed=seed)
    records = []
    for step in range(steps):
        part = pairs[4 * step : 4 * step + 4]
        records.append(gan.step([pair["prompt"] for pair in part], [pair["target"] for pair in part]))
    last = records[steps // 2 :]
    return {name: statistics.mean(r[name] for r in last if r[name] is not None) for name in NAMES}


if __name__ == "__main__":
    main()
