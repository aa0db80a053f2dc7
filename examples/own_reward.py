"""A reward of your own, in both forms: one response and its target, or all responses of a step, as in TRL.

    python examples/own_reward.py

The rows are yours, too: a prompt, a target if the reward needs one, and any other columns that a reward reads.
"""

from __future__ import annotations

import argparse
from typing import Any

from lora_gan import LoraGAN

ROWS = [
    {"prompt": "Translate English to French: Hello world", "target": "Bonjour le monde", "most_words": 3},
    {"prompt": "Translate English to French: the cat sleeps", "target": "le chat dort", "most_words": 4},
    {"prompt": "Translate English to French: a small house", "target": "une petite maison", "most_words": 4},
]


def shared_words(response: str, target: str) -> float:
    """The pair form: share of the target's words that the response contains."""
    wanted = set(target.lower().split())
    return len(wanted & set(response.lower().split())) / len(wanted)


def short_enough(
    prompts: list[str], completions: list[str], most_words: list[int | None], **columns: Any
) -> list[float | None]:
    """TRL's form, with a column of the rows: 1 if a response has at most as many words as its row allows, else 0.

    None means no answer. The other reward alone then scores a row without a limit.
    """
    return [
        None if most is None else float(len(text.split()) <= most)
        for text, most in zip(completions, most_words, strict=True)
    ]


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base: a hub id, a folder, or the one that ships")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/own-reward")
    given = parser.parse_args(arguments)
    gan = LoraGAN(
        given.model,
        reward_funcs=[shared_words, short_enough],
        reward_weights=[1.0, 0.2],
        max_completion_length=16,
        learning_rate=1e-3,
        prompts_per_step=3,
        output_dir=given.output_dir,
    )
    records = gan.fit(ROWS, steps=given.steps)
    prompts = [row["prompt"] for row in ROWS]
    for prompt, response in zip(prompts, gan.generate(prompts, best_of=8), strict=True):
        print(f"{prompt!r} -> {response!r}")
    return records


if __name__ == "__main__":
    main()
