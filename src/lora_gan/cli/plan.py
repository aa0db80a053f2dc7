"""The true-reward calls that a run will make, for `lora-gan train --dry_run`: in training and in evaluations.

A call is one question about one response, whatever the number of reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..wording import counted


@dataclass(frozen=True)
class Plan:
    """True-reward calls by purpose. Calls that fail and are made again come on top.

    Attributes:
        training: calls of the steps, at most what is left of reward_budget.
        rows: held-out rows per evaluation, one call each; 0 without evaluation data.
        evaluations: evaluations of the run.
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
        """As in "320 calls in training, 90 in 3 evaluations of 30 rows", with a note on those in training."""
        said = f"{self.training:,} calls in training{note}, "
        if not self.rows:
            return said + "0 in evaluations (no eval_data)"
        return said + f"{self.evaluating:,} in {counted(self.evaluations, 'evaluation')} of {counted(self.rows, 'row')}"


def planned(config: Config, *, first: int, steps: int, held_out: int = 0, left: int | None = None) -> Plan:
    """The calls of `steps` further steps.

    Args:
        config: settings of the run.
        first: steps taken before.
        steps: further steps.
        held_out: rows of the evaluation data; 0 without.
        left: training calls that the budgets still allow; None: no limit.
    """
    return Plan(calls(config, steps, left), held_out, evaluations(config, first, steps) if held_out else 0)


def calls(config: Config, steps: int, left: int | None = None) -> int:
    """True rewards that so many steps ask for, at most reward_budget, and what is left of it."""
    wanted = round(steps * calls_per_step(config))
    return min(limit for limit in (wanted, config.reward_budget, left) if limit is not None)


def calls_per_step(config: Config) -> float:
    """True rewards that one step asks for on average, while the budget lasts."""
    if config.disc_objective == "real_vs_generated":
        return 0.0
    return config.prompts_per_step * config.num_generations * config.query_rate


def times(every: int | None, first: int, steps: int) -> int:
    """How often something is done in so many steps after step `first`: every so many steps (None: never), and at the
    end."""
    last = first + steps
    if every is None:
        return min(1, steps)
    return last // every - first // every + bool(steps and last % every)


def evaluations(config: Config, first: int, steps: int) -> int:
    """Evaluations of so many steps after step `first`: before the first step, every eval_steps, and at the end."""
    if not steps:
        return 0
    before = 1 if first == 0 and config.eval_on_start else 0
    return before + times(config.eval_steps, first, steps)
