"""Train on rows of chat data sets: a column `messages`, with a system message.

    lora-gan fetch smollm2
    python examples/chat_rows.py

In a row with the column `messages`, the last message is the target if it is the assistant's. The messages before it are
the prompt. The chat template of the base renders the prompt, with its system message.
"""

from __future__ import annotations

import argparse
from typing import Any

from lora_gan import LoraGAN

SYSTEM = {"role": "system", "content": "You answer questions about geography. Answer in one word."}
CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Norway": "Oslo", "Peru": "Lima"}
ROWS = [
    {
        "messages": [
            SYSTEM,
            {"role": "user", "content": f"What is the capital of {country}?"},
            {"role": "assistant", "content": capital},
        ]
    }
    for country, capital in CAPITALS.items()
]


def right_and_brief(response: str, target: str) -> float:
    """0 without the target in the response; else 1 for one word, and less for each further word, but at least 0.5."""
    if target.lower() not in response.lower():
        return 0.0
    return max(0.5, 1.1 - 0.1 * len(response.split()))


def main(arguments: list[str] | None = None) -> LoraGAN:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a chat model: a hub id, a folder, or smollm2")
    parser.add_argument("--steps", type=int, default=10, help="a step samples 8 responses")
    parser.add_argument("--output_dir", default="runs/chat-rows")
    given = parser.parse_args(arguments)
    gan = LoraGAN(
        given.model,
        reward=right_and_brief,
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=16,
        temperature=0.7,
        beta=0.003,
        output_dir=given.output_dir,
    )
    gan.fit(ROWS, steps=given.steps)
    prompts: list[Any] = [row["messages"][:-1] for row in ROWS]  # messages again: the system message is sent, too
    for prompt, response in zip(prompts, gan.generate(prompts, temperature=0), strict=True):
        print(f"{prompt[-1]['content']} -> {response!r}")
    return gan


if __name__ == "__main__":
    main()
