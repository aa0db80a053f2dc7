"""A language model as the judge: its score of each response is the reward.

    pip install "lora-gan[judge]"
    OPENAI_API_KEY=... python examples/judge.py
    python examples/judge.py --judge qwen3-8b --base_url http://127.0.0.1:8000/v1     # vLLM, llama.cpp, Ollama

The judge is asked about a quarter of the responses (query_rate), and about each question once: scores and reasons are
in judge.jsonl, so a second start of this program asks only about new responses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_gan import LoraGAN
from lora_gan.rewards.judge import Judge

PROMPTS = ["Translate English to French: Hello world", "Translate English to French: the cat sleeps"]
RUBRIC = """Is the response a correct French translation of the English text in the prompt?

The prompt:
{prompt}

The response:
{response}

Give the lowest score to a response that is not French, and the best score to a correct translation."""


def main(arguments: list[str] | None = None) -> Judge:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base: a hub id, a folder, or the one that ships")
    parser.add_argument("--judge", default="gpt-4o-mini", help="the judge's name at the endpoint")
    parser.add_argument("--base_url", help="an OpenAI-compatible endpoint; without it OPENAI_BASE_URL, or OpenAI")
    parser.add_argument(
        "--price", type=float, nargs=2, help="of a million prompt tokens and of a million answer tokens"
    )
    parser.add_argument("--steps", type=int, default=10, help="a step asks about at most 8 responses")
    parser.add_argument("--output_dir", default="runs/judge")
    given = parser.parse_args(arguments)
    Path(given.output_dir).mkdir(parents=True, exist_ok=True)
    judge = Judge(
        given.judge,
        base_url=given.base_url,
        rubric=RUBRIC,
        cache=Path(given.output_dir) / "judge.jsonl",
        price_per_million=given.price and tuple(given.price),
    )
    gan = LoraGAN(
        given.model,
        reward_funcs=[judge],
        query_rate=0.25,
        prompts_per_step=4,
        num_generations=8,
        max_completion_length=16,
        learning_rate=1e-3,
        output_dir=given.output_dir,
    )
    gan.fit([{"prompt": prompt} for prompt in PROMPTS], steps=given.steps)
    for prompt, response in zip(PROMPTS, gan.generate(PROMPTS, best_of=8), strict=True):
        print(f"{prompt!r} -> {response!r}")
    usage = judge.usage
    cost = "" if usage["cost"] is None else f", cost {usage['cost']:.4f}"
    print(f"{usage['requests']} requests, {usage['cached']} answers from judge.jsonl{cost}")
    return judge


if __name__ == "__main__":
    main()
