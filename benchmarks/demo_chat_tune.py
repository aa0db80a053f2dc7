"""Evaluates one setting of `lora-gan demo-chat` on the validation split and appends a line to --out.

    python benchmarks/demo_chat_tune.py --steps 16 --set learning_rate=5e-4 beta=0.001

This script never reads the held-out split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_gan import LoraGAN
from lora_gan.cli import demo_chat
from lora_gan.rewards import instructions
from lora_gan.run.evaluation import interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/demo_chat_tried.jsonl"))
    parser.add_argument("--steps", type=int, default=demo_chat.STEPS)
    parser.add_argument("--seed", type=int, default=100, help="use a seed that the table does not use")
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--best-of", type=int, default=1, help="above 1: also judge the discriminator's pick")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings that replace the demo's")
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    changed = {name: _value(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    validation = instructions.rows("validation", arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        options = {**demo_chat.RECIPE, "max_steps": arguments.steps, "save_steps": None, **changed}
        gan = LoraGAN("smollm2", reward_funcs=[instructions.reward], seed=arguments.seed, output_dir=folder, **options)
        judged = [demo_chat.judge(gan, validation, "base", player="reference")]
        train = instructions.rows("train", max(64, arguments.steps * gan.config.prompts_per_step), seed=arguments.seed)
        began = time.monotonic()
        gan.fit(train, steps=arguments.steps)
        seconds = time.monotonic() - began
        judged.append(demo_chat.judge(gan, validation, "trained"))
        if arguments.best_of > 1:
            judged.append(demo_chat.judge(gan, validation, f"best of {arguments.best_of}", best_of=arguments.best_of))
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    curve = [[round(r.get(name) or 0.0, 3) for name in ("reward", "kl_per_response")] for r in records]
    line = {
        "steps": arguments.steps, "seed": arguments.seed, "set": changed, "note": arguments.note,
        "recipe": {name: value for name, value in options.items() if name not in ("max_steps", "save_steps")},
        "reward_calls": gan.reward_calls, "training_seconds": round(seconds, 1),
        "gain": sum(judged[1].share) / len(validation) - sum(judged[0].share) / len(validation),
        "models": {
            model.name: {
                "share": interval(model.share), "full": interval(model.full),
                "base_logprob": interval(model.base_logprob), "words": interval(model.words),
                "distinct_2": model.distinct_2, "by_kind": model.by_kind, "answers": model.answers[:10],
            }
            for model in judged
        },
        "reward_and_kl_per_step": curve,
    }  # fmt: skip
    with arguments.out.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(demo_chat.table(judged))
    print(demo_chat.kinds_table(judged))
    print(f"{seconds:.0f} s of training, gain {line['gain']:+.3f}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
