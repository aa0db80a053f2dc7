"""The demo's table in docs/results.md: the demo with every discriminator, on several seeds.

    python benchmarks/demo_table.py --out runs/demo-table --seeds 0 1 2

Each run is `lora-gan demo --discriminator ARM --seed N --output-dir OUT/ARM-N`. A run with a result.json is not run
again. The table is made from these files only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ARMS = {
    "learning": "learns, corrects half of the rewards",
    "off": "off: plain RLOO",
    "constant": "a constant in its place",
    "only": "the only reward (adversarial)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for arm in arguments.arms:
        for seed in arguments.seeds:
            folder = arguments.out / f"{arm}-{seed}"
            if not (folder / "result.json").exists() and not arguments.table_only:
                command = ["demo", "--discriminator", arm, "--seed", str(seed), "--output-dir", str(folder)]
                subprocess.run([sys.executable, "-m", "lora_gan", *command], check=True)
    print(table(arguments.out))


def table(out: Path) -> str:
    """Markdown: one line per arm and seed, means with 95 % intervals over held-out prompts."""
    lines = [
        "| discriminator | seed | calls | exact, sampled % | exact, greedy % | cosine | chrF | Hello world |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    base: dict[str, Any] | None = None
    for arm, words in ARMS.items():
        for file in sorted(out.glob(f"{arm}-*/result.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            before, _, after = result["models"]
            base = base or before
            lines.append(
                f"| {words} | {result['seed']} | {result['reward_calls']:,} | {figures(after)} | {result['hello']} |"
            )
    if base is not None:
        lines.insert(2, f"| the base, before | 0 | 0 | {figures(base)} | |")
    return "\n".join(lines)


def figures(model: dict[str, Any]) -> str:
    def cell(run: str, name: str, scale: float, digits: int) -> str:
        mean, low, high = (scale * model[run][name][key] for key in ("mean", "low", "high"))
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    columns = (("sampled", "exact_match", 100, 0), ("greedy", "exact_match", 100, 0))
    columns += (("sampled", "true_reward", 1, 3), ("sampled", "chrf", 1, 1))
    return " | ".join(cell(*column) for column in columns)


if __name__ == "__main__":
    main()
