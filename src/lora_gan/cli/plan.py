"""Computes the true-reward calls of a run in training and in evaluations, for `lora-gan train --dry_run`.

A call is one request for the reward of one response, whatever the number of reward functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config
from ..training.monitor import AUDIT_STEPS, audits_needed
from ..wording import counted


@dataclass(frozen=True)
class Plan:
    """True-reward calls by purpose, without retries of failed calls.

    Attributes:
        training: calls of the steps, at most the rest of reward_budget.
        rows: held-out rows per evaluation, one call per row; 0 without evaluation data.
        evaluations: number of evaluations in the run.
    """

    training: int
    rows: int = 0
    evaluations: int = 0

    @property
    def evaluating(self) -> int:
        """Calls of all evaluations."""
        return self.rows * self.evaluations

    @property
    def total(self) -> int:
        """Calls of the run, without those of a dry run."""
        return self.training + self.evaluating

    def in_words(self, note: str = "") -> str:
        """As in "320 calls in training, 90 in 3 evaluations of 30 rows"; `note` follows the calls in training."""
        text = f"{self.training:,} calls in training{note}, "
        if not self.rows:
            return text + "0 in evaluations (no eval_data)"
        return text + f"{self.evaluating:,} in {counted(self.evaluations, 'evaluation')} of {counted(self.rows, 'row')}"


def planned(
    config: Config, *, first: int, steps: int, held_out: int = 0, left: int | None = None, audits: int = 0
) -> Plan:
    """The calls of `steps` further steps.

    Args:
        config: settings of the run.
        first: number of steps before these.
        steps: number of further steps.
        held_out: number of rows of the evaluation data; 0 without.
        left: training calls that the budgets still allow; None: no limit.
        audits: further calls for audits of the steps on predictions alone.
    """
    return Plan(calls(config, steps, left, audits), held_out, evaluations(config, first, steps) if held_out else 0)


def calls(config: Config, steps: int, left: int | None = None, audits: int = 0) -> int:
    """True-reward calls of `steps` steps: labels, at most reward_budget and at most `left`, and then audits.

    An audit may come earlier than here, if the KL rises fast. Less trust in the predictions means fewer audits.
    """
    per_step = calls_per_step(config)
    labels = min(limit for limit in (round(steps * per_step), config.reward_budget, left) if limit is not None)
    if not audits:
        return labels
    labelled = math.ceil(labels / per_step)
    alone = steps - labelled
    count = audits_needed(labelled) if alone > labelled else max(0, alone - 1) // AUDIT_STEPS
    return labels + min(audits, count * config.prompts_per_step)


def calls_per_step(config: Config) -> float:
    """Mean true-reward calls of one step, before the end of the budget."""
    if config.disc_objective == "real_vs_generated":
        return 0.0
    return config.prompts_per_step * config.num_generations * config.asked_share


def times(every: int | None, first: int, steps: int) -> int:
    """How often an event comes in `steps` steps after step `first`: every `every` steps (None: never), and at the
    end."""
    last = first + steps
    if every is None:
        return min(1, steps)
    return last // every - first // every + bool(steps and last % every)


def evaluations(config: Config, first: int, steps: int) -> int:
    """Evaluations in `steps` steps after step `first`: before the first step, every eval_steps, and at the end."""
    if not steps:
        return 0
    before = 1 if first == 0 and config.eval_on_start else 0
    return before + times(config.eval_steps, first, steps)
