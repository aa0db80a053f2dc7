"""What a step returns, and where it goes: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere.

# P = prompts, K = responses a prompt, B = P·K
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm.auto import tqdm

from .config import Config
from .data import Row
from .discriminator import fresh_metrics
from .experience import Experience


def step_record(
    rows: list[Row],
    experience: Experience | None,
    gen: dict[str, Any],
    disc: dict[str, Any],
    *,
    step: int,
    reward_calls: int,
    single: bool,
) -> dict[str, Any]:
    """The dict that step() returns: six keys in their order, all K responses, then metrics, as plain Python values.

    `step` and `reward_calls` count this step in.
    """
    responses, true, predicted = _by_group(experience, len(rows))

    def shaped(values: list[Any]) -> Any:
        return values[0] if single else values

    def first(groups: list[Any]) -> Any:
        return shaped([None if group is None else group[0] for group in groups])

    record: dict[str, Any] = {
        "prompt": shaped([row.prompt for row in rows]),
        "response": first(responses),
        "true_reward": first(true),
        "disc_loss": disc.get("disc_loss"),
        "pred_reward": first(predicted),
        "gen_loss": gen.get("gen_loss"),
        "responses": shaped(responses),
        "true_rewards": shaped(true),
        "pred_rewards": shaped(predicted),
        "reward_mean": None,
        "pred_reward_mean": None,
        "step": step,
        "reward_calls": reward_calls,
    }
    if experience is not None:
        answered_B = experience.true_B[~np.isnan(experience.true_B)]
        record |= {
            "reward_mean": float(answered_B.mean()) if len(answered_B) else None,
            "pred_reward_mean": float(experience.predicted_B.mean()),
            "asked": int(experience.asked_B.sum()),
            "unanswered": int(experience.asked_B.sum()) - len(answered_B),
            "completion_length": float(experience.rollout.lengths_B.mean()),
            **fresh_metrics(experience.predicted_MB, experience.true_B, experience.group_B),
            **{
                f"rewards/{name}": float(np.nanmean(part)) if not np.isnan(part).all() else None
                for name, part in experience.parts.items()
            },
        }
    return record | {k: v for k, v in (gen | disc).items() if k not in record}


def _by_group(experience: Experience | None, prompts: int) -> tuple[list[Any], ...]:
    """Responses, true and predicted rewards, each P lists of K; None for what there is not."""
    if experience is None:
        return tuple([None] * prompts for _ in range(3))
    per_prompt = len(experience.rollout) // prompts
    columns = (
        experience.rollout.texts,
        [None if math.isnan(value) else value for value in experience.true_B.tolist()],
        experience.predicted_B.tolist(),
    )
    return tuple([column[j * per_prompt : (j + 1) * per_prompt] for j in range(prompts)] for column in columns)


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """A step's numbers without its texts: what metrics.jsonl holds."""
    texts = {"prompt", "response", "true_reward", "pred_reward", "responses", "true_rewards", "pred_rewards"}
    return {name: value for name, value in record.items() if name not in texts}


class Tracker:
    """Follows fit(): metrics.jsonl in the output folder, and progress on stderr."""

    def __init__(self, config: Config, steps: int, *, first: int, progress: bool) -> None:
        self.config, self.steps, self.first, self.progress = config, steps, first, progress
        self.file: TextIO | None = None
        self.bar: tqdm | None = None
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Tracker:
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "metrics.jsonl").open("a" if self.first else "w", encoding="utf-8")
        if self.progress and sys.stderr.isatty():
            self.bar = tqdm(total=self.first + self.steps, initial=self.first, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        self.file.close()

    def log(self, record: dict[str, Any]) -> None:
        done = record["step"] - self.first
        if record["step"] % self.config.logging_steps == 0:
            line = summary(record) | {"seconds": round(time.monotonic() - self.began, 3)}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.bar is not None:
            self.bar.set_postfix_str(headline(record))
            self.bar.update()
        elif self.progress and (time.monotonic() - self.said > 10 or done == self.steps):
            self.said = time.monotonic()
            left = (self.said - self.began) / done * (self.steps - done)
            print(f"step {record['step']}: {headline(record)}, about {left:.0f} s left", file=sys.stderr, flush=True)


def headline(record: dict[str, Any]) -> str:
    """The numbers one would watch."""
    shown = (
        ("reward", "reward_mean"), ("predicted", "pred_reward_mean"),
        ("rank corr. in group", "rank_correlation_within"), ("KL", "kl"),
        ("imitation", "imitation_loss"), ("calls", "reward_calls"),
    )  # fmt: skip
    parts = [(name, record.get(key)) for name, key in shown]
    return ", ".join(f"{name} {v:.3f}" if isinstance(v, float) else f"{name} {v}" for name, v in parts if v is not None)
