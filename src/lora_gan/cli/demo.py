"""The demo: `tiny` learns to translate by reward alone, in a few minutes on two cores.

    lora-gan demo                              the discriminator learns, and the generator gets the corrected reward
    lora-gan demo --discriminator off          plain RLOO on the true reward of every response
    lora-gan demo --discriminator constant     a constant replaces the predictions: the baseline to beat
    lora-gan demo --discriminator only         the prediction is the generator's only reward

`tiny` was trained on English, French and translations, but answers "Translate English to French: …" with a translation
in about one of six samples. Training never shows a target to the model: only the reward uses targets.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import tiny
from ..gan import LoraGAN
from ..model.sampling import Rollout
from ..run import tables
from ..run.plots import plot_run
from ..storage.json_lines import write_json
from ..training.discriminator import Discriminator
from ..training.experience import Experience, RetainedFeatures

Opponent = Literal["learning", "off", "constant", "only"]

RECIPE: dict[str, Any] = dict(
    prompts_per_step=4,
    num_generations=8,
    max_completion_length=24,
    learning_rate=1e-3,
    disc_learning_rate=1e-3,
    disc_updates=1,
    beta=0.09,  # spreads per nat; rewards of one prompt differ by about 0.3
    query_rate=0.5,
    query_design="uniform",
)
BY_OPPONENT: dict[Opponent, dict[str, Any]] = {
    "learning": dict(reward_signal="corrected"),
    "constant": dict(reward_signal="corrected"),
    "off": dict(adversarial=False, query_rate=1.0),
    "only": dict(adversarial=True),
}
HELLO = "Translate English to French: Hello world"  # a held-out prompt like the others


class ConstantDiscriminator(Discriminator):
    """A baseline: predicts the mean of the true rewards so far for every response."""

    uses_probe = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.total, self.count = 0.0, 0

    def predict(self, rollout: Rollout) -> np.ndarray:
        return np.full((1, len(rollout)), self.total / self.count if self.count else 0.0)

    def predict_to_learn(self, rollout: Rollout) -> tuple[np.ndarray, RetainedFeatures]:
        return self.predict(rollout), RetainedFeatures()

    def update(self, experience: Experience) -> dict[str, float | None]:
        answered_B = experience.true_B[~np.isnan(experience.true_B)]
        self.total, self.count = self.total + float(answered_B.sum()), self.count + len(answered_B)
        return {}


@dataclass
class Judged:
    """The evaluations of one model on the held-out prompts."""

    name: str
    sampled: dict[str, Any]  # at temperature 1, or at the temperature in the name
    greedy: dict[str, Any] | None


def run(*, opponent: Opponent, steps: int, heldout: int, output_dir: str | None, seed: int = 0) -> dict[str, Any]:
    """Evaluate, tune, evaluate again, and print the table. Returns the content of result.json in the output folder."""
    folder = Path(output_dir or f"runs/demo-{opponent}")
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)  # fails now, and not after minutes of training
    train = tiny.pairs("train", 4096, seed=seed)
    test = tiny.pairs("heldout", heldout, seed=0)
    settings = RECIPE | BY_OPPONENT[opponent]
    gan = LoraGAN("tiny", seed=seed, max_steps=steps, save_steps=steps, output_dir=str(folder), **settings)
    if opponent == "constant":
        gan.discriminator = ConstantDiscriminator(gan.players, gan.config)
    print(
        f"tiny ({gan.players.base.model.num_parameters():,} parameters with both adapters) learns to translate "
        "by reward alone.\nReward: cosine to the target by all-MiniLM-L6-v2; the model never sees a target.\n"
        f"Discriminator: {opponent}. Seed {seed}, {steps} steps of {gan.config.prompts_per_step} prompts × "
        f"{gan.config.num_generations} responses; true reward of {gan.config.asked_share:.0%} of the responses.\n"
        f"Held-out: {len(test)} prompts with combinations of words that the base was not trained on.\n",
        flush=True,
    )
    print("evaluating the base …", flush=True)
    models = [
        Judged("before", gan.evaluate(test, temperature=1.0), gan.evaluate(test, temperature=0)),
        Judged("base, temperature 0.5", gan.evaluate(test, temperature=0.5), None),
    ]
    training = time.monotonic()
    gan.fit(train, steps=steps, train_disc=opponent != "off")
    training = time.monotonic() - training
    print("evaluating the trained generator …", flush=True)
    models.append(Judged("after", gan.evaluate(test, temperature=1.0), gan.evaluate(test, temperature=0)))
    hello = gan.generate(HELLO, temperature=0)[0]

    print("\n" + table(models))
    print(f"\n“{HELLO}” → “{hello}”\n")
    print(side_by_side(models[0], models[-1]))
    result: dict[str, Any] = {
        "discriminator": opponent, "seed": seed, "steps": steps, "reward_calls": gan.reward_calls, "hello": hello,
        "seconds": {"training": round(training, 1), "all": round(time.monotonic() - began, 1)},
        "models": [
            {"name": m.name, "sampled": m.sampled["metrics"], "greedy": m.greedy and m.greedy["metrics"]}
            for m in models
        ],
    }  # fmt: skip
    write_json(folder / "result.json", result)
    picture = plot_run(folder / "metrics.jsonl", folder / "training.png")
    print(
        f"\n{gan.reward_calls:,} true-reward calls; {result['seconds']['all']:.0f} s in all.\n"
        f"checkpoint: {folder / f'step-{gan.global_step}'}\nmetrics:    {folder / 'metrics.jsonl'}\n"
        f"figures:    {folder / 'result.json'}\n"
        f"plot:       {picture or 'none: pip install matplotlib for one'}\n"
        f'next:       make demo ARGS="--discriminator off"    (the same without the discriminator)'
    )
    return result


def table(models: list[Judged]) -> str:
    """One column per model: mean and 95 % interval over the held-out prompts."""

    def row(label: str, name: str, scale: float = 1, digits: int = 1, *, greedy: bool = False) -> list[str]:
        runs = [model.greedy if greedy else model.sampled for model in models]
        return [label, *(tables.cell(run and run["metrics"].get(name), scale, digits) for run in runs)]

    rows = [
        row("exact, sampled %", "exact_match", 100),
        row("exact, greedy %", "exact_match", 100, greedy=True),
        row("cosine, sampled", "true_reward", digits=3),
        row("chrF, sampled", "chrf"),
        ["distinct-2", *(f"{model.sampled['distinct_2']:.2f}" for model in models)],
    ]
    return tables.table([model.name for model in models], rows)


def side_by_side(before: Judged, after: Judged, count: int = 10) -> str:
    lines = ["Ten held-out prompts, sampled at temperature 1:"]
    for was, now in zip(before.sampled["samples"][:count], after.sampled["samples"][:count], strict=True):
        mark = "✓" if now["response"].strip() == now["target"].strip() else "✗"
        lines += [
            f"  {was['prompt'].removeprefix('Translate English to French: ')}",
            f"    before: {was['response']}",
            f"    after:  {now['response']}  {mark}" + ("" if mark == "✓" else f"  (target: {now['target']})"),
        ]
    return "\n".join(lines)
