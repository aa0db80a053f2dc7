"""The demo on a chat model: SmolLM2-135M-Instruct learns by reward alone to follow instructions that code can check.

    lora-gan fetch smollm2
    lora-gan demo-chat

`instructions` makes the prompts and checks the answers. There are no targets. The table compares the untouched base,
the generator, and the discriminator's pick of 8 on held-out prompts. Their topics and pairs of constraints are absent
from training. The second metric is the mean log-probability of an answer's tokens under the untouched base.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..gan import LoraGAN
from ..model.players import Player
from ..rewards import Perplexity, instructions, text
from ..run import tables
from ..run.evaluation import interval
from ..run.plots import plot_run
from ..storage.json_lines import write_json, write_lines

#: Chosen on the validation split; docs/results/demo_chat_tried.jsonl has every setting that was tried.
RECIPE: dict[str, Any] = dict(
    prompts_per_step=4,
    num_generations=4,
    max_completion_length=24,
    temperature=1.0,
    learning_rate=5e-4,
    disc_learning_rate=1e-3,
    disc_layers=6,
    disc_updates=1,
    beta=0.04,  # spreads per nat; rewards of one prompt differ by about 0.23
    reward_budget=256,
    reward_signal="corrected",  # with query_rate=1 it is the true reward; budget mode was not measured here
    query_rate=1.0,
    on_exploit="warn",  # every response gets its true reward, so nothing is kept for audits
)
STEPS = 16
BEST_OF = 8
BATCH = 48  # prompts per batch


@dataclass
class Judged:
    """The metrics of one model on the same rows; each list has one value per row."""

    name: str
    answers: list[str]
    share: list[float]  # share of the prompt's constraints that the answer meets
    full: list[float]  # 1 if the answer meets all constraints, else 0
    base_logprob: list[float | None]  # nats per token under the untouched base
    words: list[float]
    by_kind: dict[str, float]  # share of constraints met, per kind of constraint
    distinct_2: float  # of all answers


def judge(
    gan: LoraGAN,
    rows: list[dict[str, Any]],
    name: str,
    *,
    player: Player = "generator",
    best_of: int = 1,
    temperature: float | None = None,
) -> Judged:
    """Sample one answer per row, or the discriminator's pick of `best_of`, and compute the metrics."""
    prompts = [row["prompt"] for row in rows]
    batch = max(1, 2 * BATCH // best_of)
    answers = list(gan.generate(prompts, best_of, temperature=temperature, player=player, batch_size=batch))
    fluency = Perplexity()
    fluency.bind(gan)
    share: list[float] = []
    by_kind: dict[str, list[float]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        share.append(instructions.share_met(row["constraints"], answer))
        for constraint in row["constraints"]:
            by_kind[constraint.partition(":")[0]].append(float(instructions.met(constraint, answer)))
    return Judged(
        name,
        answers,
        share,
        [float(value == 1) for value in share],
        fluency(prompts, answers),
        [float(len(answer.split())) for answer in answers],
        {kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())},
        text.distinct_n(answers, 2),
    )


def run(
    *,
    seed: int = 0,
    steps: int = STEPS,
    heldout: int = 96,
    output_dir: str | None = None,
    model: str = "smollm2",
) -> dict[str, Any]:
    """Evaluate the base, tune, evaluate again, and print the tables.

    Args:
        seed: seed of every random draw.
        steps: generator updates; updates after the end of the reward budget use the predicted reward alone.
        heldout: number of held-out prompts in the table.
        output_dir: the output folder; None: runs/demo-chat-SEED.
        model: smollm2, or a hub id or a folder of another chat model.

    Returns:
        The content of result.json in the output folder.

    Raises:
        ValueError: the base is not on this machine; the message names the command that downloads it.
    """
    began = time.monotonic()
    folder = Path(output_dir or f"runs/demo-chat-{seed}")
    options = {**RECIPE, "seed": seed, "max_steps": steps, "save_steps": None, "output_dir": str(folder)}
    gan = LoraGAN(model, reward_funcs=[instructions.reward], **options)
    folder.mkdir(parents=True, exist_ok=True)
    train = instructions.rows("train", max(64, steps * gan.config.prompts_per_step), seed=seed)
    test = instructions.rows("heldout", heldout)
    for file, rows in (("train.jsonl", train), ("held_out.jsonl", test)):
        write_lines(folder / file, rows)
    _print_plan(gan, model, steps, len(test))
    print("evaluating the base …", flush=True)
    judged = [judge(gan, test, "base", player="reference")]
    training = time.monotonic()
    gan.fit(train, steps=steps)
    training = time.monotonic() - training
    print("evaluating the generator …", flush=True)
    judged.append(judge(gan, test, "trained"))
    judged.append(judge(gan, test, f"trained, best of {BEST_OF}", best_of=BEST_OF))

    result: dict[str, Any] = {
        "seed": seed, "steps": steps, "reward_calls": gan.reward_calls, "heldout": len(test),
        "settings": {name: value for name, value in options.items() if name != "output_dir"},
        "seconds": {"training": round(training, 1), "all": round(time.monotonic() - began, 1)},
        "models": list(map(asdict, judged)),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    write_lines(folder / "answers.held_out.jsonl", _lines(test, judged))
    _print_result(gan, folder, test, judged, result["seconds"])
    return result


def _print_plan(gan: LoraGAN, model: str, steps: int, heldout: int) -> None:
    config = gan.config
    print(
        f"{model} learns to follow instructions by reward alone: {len(instructions.KINDS)} kinds of constraints, each "
        "checked by code.\n"
        f"Seed {config.seed}: {steps} steps of {config.prompts_per_step} prompts × {config.num_generations} answers, "
        f"at most {config.reward_budget} reward calls.\n"
        f"Held-out: {heldout} prompts with topics and pairs of constraints that training does not have.\n",
        flush=True,
    )


def _print_result(
    gan: LoraGAN, folder: Path, test: list[dict[str, Any]], judged: list[Judged], seconds: dict[str, float]
) -> None:
    """Plot the run, and print the tables and the next commands."""
    picture = plot_run(folder / "metrics.jsonl", folder / "training.png")
    print("", table(judged), "", kinds_table(judged), "", side_by_side(test, judged[0], judged[1]), sep="\n")
    checkpoint = f"--checkpoint {folder}"
    print(
        f"\n{gan.reward_calls} reward calls; {seconds['training']:.0f} s of training, {seconds['all']:.0f} s in all.\n"
        f"In {folder}: the checkpoint step-{gan.global_step}, metrics.jsonl, result.json, answers.held_out.jsonl"
        f"{', training.png' if picture else ''}\n"
        "Next commands:\n"
        f'  lora-gan generate {checkpoint} --best_of 8 --prompt "Describe the sea. Answer in one sentence."\n'
        f"  lora-gan eval {checkpoint} --data {folder / 'held_out.jsonl'} "
        "--reward lora_gan.rewards.instructions:reward --reference\n"
        f"  lora-gan export {checkpoint} --output_dir exported-chat"
    )


def table(judged: list[Judged]) -> str:
    """One column per model: means with 95 % bootstrap intervals over the held-out prompts."""

    def row(label: str, columns: list[list[Any]], scale: float = 1, digits: int = 2) -> list[str]:
        return [label, *(tables.cell(interval(values), scale, digits) for values in columns)]

    rows = [
        row("constraints met %", [model.share for model in judged], 100, 0),
        row("prompts met in full %", [model.full for model in judged], 100, 0),
        row("log-prob. under the base", [model.base_logprob for model in judged]),
        row("words", [model.words for model in judged], digits=1),
        ["distinct-2", *(f"{model.distinct_2:.2f}" for model in judged)],
    ]
    return tables.table([model.name for model in judged], rows)


def kinds_table(judged: list[Judged]) -> str:
    """One line per kind of constraint: the share met, in percent."""
    rows = [[kind, *(f"{100 * model.by_kind[kind]:.0f} %" for model in judged)] for kind in judged[0].by_kind]
    return tables.table([model.name for model in judged], rows)


def side_by_side(rows: list[dict[str, Any]], before: Judged, after: Judged, count: int = 10) -> str:
    """The first `count` held-out prompts, not a selection, with both answers and a mark per constraint."""

    def shown(row: dict[str, Any], answer: str) -> str:
        marks = "".join("✓" if instructions.met(constraint, answer) else "✗" for constraint in row["constraints"])
        return f"{marks:<2} {' ⏎ '.join(answer.splitlines())}"

    lines = [f"The first {min(count, len(rows))} held-out prompts:"]
    for row, was, now in list(zip(rows, before.answers, after.answers, strict=True))[:count]:
        lines += [
            f"  {row['prompt'][-1]['content']}",
            f"    base:    {shown(row, was)}",
            f"    trained: {shown(row, now)}",
        ]
    return "\n".join(lines)


def _lines(rows: list[dict[str, Any]], judged: list[Judged]) -> list[dict[str, Any]]:
    """One line per model and row, as JSON Lines for other tools."""
    return [
        {"model": model.name, **row, "completion": answer, "share_met": share, "base_logprob": logprob}
        for model in judged
        for row, answer, share, logprob in zip(rows, model.answers, model.share, model.base_logprob, strict=True)
    ]
