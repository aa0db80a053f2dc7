"""You are the reward: rate responses from 0 to 10 at the terminal, and the discriminator learns your taste.

    python examples/human_reward.py

You are asked for half of the responses (query_rate); the discriminator judges the others. Answers are kept in a file,
so that nothing is asked twice when the run is started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TextIO

from lora_gan import LoraGAN
from lora_gan.rewards.human import Human

PROMPTS = ["Translate English to French: Hello world", "Translate English to French: the cat sleeps"]


def main(arguments: list[str] | None = None, *, stdin: TextIO | None = None, stdout: TextIO | None = None) -> LoraGAN:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base: a hub id, a folder, or the one that ships")
    parser.add_argument("--steps", type=int, default=5, help="a step asks for at most 16 ratings")
    parser.add_argument("--output_dir", default="runs/human-reward")
    given = parser.parse_args(arguments)
    Path(given.output_dir).mkdir(parents=True, exist_ok=True)
    person = Human(log=Path(given.output_dir) / "ratings.jsonl", stdin=stdin, stdout=stdout)
    gan = LoraGAN(
        given.model,
        reward_funcs=[person],
        query_rate=0.5,
        num_generations=8,
        max_completion_length=16,
        learning_rate=1e-3,
        output_dir=given.output_dir,
    )
    try:
        gan.fit([{"prompt": prompt} for prompt in PROMPTS], steps=given.steps, progress=False)
    except KeyboardInterrupt as stop:  # q, Ctrl-C or Ctrl-D: use what was learned so far
        print(stop, file=stdout)
    said: list[dict[str, Any]] = [
        {"prompt": prompt, "response": gan.generate(prompt, best_of=8)[0]} for prompt in PROMPTS
    ]
    for row in said:
        print(f"{row['prompt']!r} -> {row['response']!r}")
    print(f"{gan.reward_calls} ratings asked for; the adapters are in {given.output_dir}", file=stdout)
    return gan


if __name__ == "__main__":
    main()
