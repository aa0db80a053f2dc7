"""The table of `lora-gan demo-chat` in docs/results.md, on several seeds.

    python benchmarks/demo_chat_table.py --seeds 0 1 2

Each run is `lora-gan demo-chat --seed N --output-dir OUT/seed-N`. Its result is appended to --results. A seed that the
file already has is not run again. The table is made from this file only. Intervals are 95 % bootstrap intervals over
seeds and held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lora_gan import randomness
from lora_gan.rewards import instructions

METRICS = {"share": (100, 1), "full": (100, 1), "base_logprob": (1, 2), "words": (1, 1)}  # name: scale, digits
DRAWS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-chat"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/demo_chat.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        if arguments.table_only or any(result["seed"] == seed for result in read(arguments.results)):
            continue
        folder = arguments.out / f"seed-{seed}"
        if not (folder / "result.json").exists():
            command = ["demo-chat", "--seed", str(seed), "--output-dir", str(folder)]
            subprocess.run([sys.executable, "-m", "lora_gan", *command], check=True)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        with arguments.results.open("a", encoding="utf-8") as out:
            out.write(json.dumps(result, ensure_ascii=False) + "\n")
    results = sorted(
        (result for result in read(arguments.results) if result["seed"] in arguments.seeds), key=lambda r: r["seed"]
    )
    print(report(results) if results else "no results")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def values(results: list[dict[str, Any]], model: str, metric: str) -> np.ndarray:
    """A metric per seed and held-out prompt, [seeds, prompts]. NaN where it was not measured."""
    chosen = [next(m for m in result["models"] if m["name"] == model) for result in results]
    return np.array([m[metric] for m in chosen], dtype=np.float64)


def bootstrap(values_SP: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the 2.5 and 97.5 percentiles over draws of seeds and prompts with replacement."""
    seeds, prompts = values_SP.shape
    draw = randomness.generator(0, 0, "bootstrap over seeds and prompts")
    means = [
        np.nanmean(values_SP[np.ix_(draw.integers(seeds, size=seeds), draw.integers(prompts, size=prompts))])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.nanmean(values_SP)), float(low), float(high)


def gain(results: list[dict[str, Any]], model: str, metric: str) -> tuple[float, float, float]:
    """The model's value minus the base's on the same seed and prompt: mean, low, high."""
    return bootstrap(values(results, model, metric) - values(results, "base", metric))


def report(results: list[dict[str, Any]]) -> str:
    """Markdown: a line per model, per gain and per seed, two checks, and ten prompts with their answers."""
    names = [model["name"] for model in results[0]["models"]]
    lines = [
        "| model | constraints met % | prompts met in full % | log-prob. under the base | words | distinct-2 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        cells = [_cell(bootstrap(values(results, name, metric)), *METRICS[metric]) for metric in METRICS]
        spread = np.mean([m["distinct_2"] for r in results for m in r["models"] if m["name"] == name])
        lines.append(f"| {name} | {' | '.join(cells)} | {spread:.2f} |")
    for name in names[1:]:
        cells = [_cell(gain(results, name, metric), *METRICS[metric]) for metric in METRICS]
        lines.append(f"| {name} − base | {' | '.join(cells)} | |")
    lines.append("")
    for result in results:
        mean, low, high = gain([result], "trained", "share")
        lines.append(
            f"- seed {result['seed']}: trained − base {mean:+.3f} [{low:.3f}, {high:.3f}] of constraints met; "
            f"{result['reward_calls']} reward calls; {result['seconds']['training']:.0f} s of training, "
            f"{result['seconds']['all']:.0f} s in all"
        )
    mean, low, _ = gain(results, "trained", "share")
    lines += ["", f"- The gain is {'' if mean >= 0.15 else 'not '}at least 0.15. Its interval {_excludes(low)} zero."]
    base, trained = (bootstrap(values(results, name, "base_logprob")) for name in ("base", "trained"))
    state = "below" if trained[0] < base[1] else "not below"
    lines.append(
        f"- The second metric is {state} the base's interval: it is {trained[0]:.2f}, and the interval begins "
        f"at {base[1]:.2f}."
    )
    if "by_kind" in results[0]["models"][0]:
        lines += ["", "| constraint | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
        for kind in results[0]["models"][0]["by_kind"]:
            shares = [
                np.mean([m["by_kind"][kind] for r in results for m in r["models"] if m["name"] == name])
                for name in names
            ]
            lines.append(f"| `{kind}` | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")
    if "answers" in results[0]["models"][0]:
        lines += ["", f"The first ten held-out prompts, seed {results[0]['seed']}:", ""]
        rows = instructions.rows("heldout", results[0]["heldout"])[:10]
        for i, row in enumerate(rows):
            lines.append(f"- `{' / '.join(row['prompt'][-1]['content'].splitlines())}`")
            for model in results[0]["models"][:2]:
                lines.append(f"  - {model['name']}: {' / '.join(model['answers'][i].splitlines())}")
    return "\n".join(lines)


def _cell(figures: tuple[float, float, float], scale: float, digits: int) -> str:
    mean, low, high = (scale * value for value in figures)
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _excludes(low: float) -> str:
    return "excludes" if low > 0 else "includes"


if __name__ == "__main__":
    main()
