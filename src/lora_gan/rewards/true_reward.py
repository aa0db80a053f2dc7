"""The true reward of a run: the weighted sum of one or several functions, called within a budget. Used by `gan`.

It also holds the budget, the scales and the failures. During fit() it holds the log of answers, the columns of the
data, and the state that rewards of TRL's form receive.

# B = responses of one step
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import TrainerState

from .. import data
from ..config import Config, RewardSignal
from ..data import Row
from .answers import Answers
from .budget import Budget, BudgetSpent, Purpose
from .calling import Caller
from .combine import Parts, reward_names, score_parts, weighted_total
from .notes import Notes
from .scales import Scales
from .signatures import needs_columns, require_columns, reward_name, takes_completions
from .source import source_digest

#: Maximum number of distinct causes of failed calls with a warning.
CAUSES = 5

Funcs = list[Callable[..., Any]]


@dataclass(frozen=True)
class QueryResult:
    """The true reward of a step's B responses.

    Attributes:
        true_B: float64; NaN for a response that was not queried or not answered.
        parts: {name of a reward: its scores, unweighted, in the form of `true_B`}.
        failed_B: bool; queried responses on which a reward failed in its last try.
    """

    true_B: np.ndarray
    parts: dict[str, np.ndarray]
    failed_B: np.ndarray


class TrueReward:
    """Calls the reward functions. Their weighted sum is the true reward.

    Args:
        config: the settings of rewards: budget, retries, timeout, workers, aggregation.
        current_rewards: returns the functions and their weights (None: 1 each). It is called at each use, because a
            user may assign another reward at any time.
        tokenized: the token ids of a response to a row, for rewards of TRL's form that ask for ids.

    Attributes:
        budget: counts of calls by purpose, and their limits.
        scales: the spread of each reward, used if rewards are normalized.
        failures: number of responses on which a reward failed in its last try, since this object was made.
        answers: the log of answers; only in fit().
        trainer_state: the state of the run; only in fit().
        data_columns: names of the columns of the data; only in fit().
    """

    def __init__(
        self,
        config: Config,
        current_rewards: Callable[[], tuple[Funcs, list[float] | None]],
        tokenized: Callable[[str, Row], list[int]],
    ) -> None:
        self.config, self._current_rewards, self._tokenized = config, current_rewards, tokenized
        self.budget = Budget(config.reward_budget, config.reward_budget_total, config.audit_calls)
        self.scales = Scales()
        self.failures = 0
        self.answers: Answers | None = None
        self.trainer_state: TrainerState | None = None
        self.data_columns: Collection[str] = ()
        self._causes: set[str] = set()  # warnings of failed calls so far
        self._new_causes: list[str] = []  # those that are not yet in the notices of a step
        self._warned_of_spent_budget = False

    @property
    def funcs(self) -> Funcs:
        return self._current_rewards()[0]

    @property
    def weights(self) -> list[float] | None:
        """One weight per function; None: 1 each."""
        return self._current_rewards()[1]

    @property
    def names(self) -> list[str]:
        """The names of the rewards in logs."""
        return reward_names(self.funcs)

    @property
    def sources(self) -> dict[str, str]:
        """{name: digest of the reward's source}. Logged answers are reused only if the digest is unchanged."""
        return dict(zip(self.names, map(source_digest, self.funcs), strict=True))

    # --- checks before calls

    def require_comparable(self, rows: list[Row]) -> None:
        """Raise ValueError if a reward needs a target that a row lacks."""
        comparing = [func for func in self.funcs if getattr(func, "needs_target", False)]
        if comparing:
            remedy = ": give target_text (target_column names its column in data), or another reward"
            data.require_targets(rows, f"the reward {reward_name(comparing[0])!r} compares with a target", remedy)

    def require_answerable(self, rows: list[Row]) -> None:
        """Raise ValueError if a reward needs a target or a column that is missing."""
        self.require_comparable(rows)
        require_columns(self.funcs, data.column_names(rows).union(self.data_columns), rows="no row")

    def require_columns(self, rows: list[Row] | data.Stream, called: str, *, position: int) -> None:
        """Raise ValueError if a reward needs a column that no row has. For a stream, the rows of the first step are
        checked. `called` names the data in the message."""
        checked = f"no row of the {called}"
        if isinstance(rows, data.Stream) and needs_columns(self.funcs):
            rows.take(self.config.prompts_per_step, position)
            checked = "no row read so far from the stream"
        require_columns(self.funcs, data.column_names(rows), rows=checked)

    # --- calls

    def query_step(
        self,
        rows: list[Row],
        responses: list[str],
        token_ids: Callable[[], list[list[int]]],
        group_B: np.ndarray,
        asked_B: np.ndarray,
        notes: Notes,
        *,
        step: int,
    ) -> QueryResult:
        """The true reward of some responses of a training step.

        Args:
            rows: the P rows of the step.
            responses: all B texts.
            token_ids: returns the token ids of all B responses, with the end token. Called if a reward takes ids.
            group_B: int [B]; the index of the row that each response answers.
            asked_B: bool [B]; the responses to query.
            notes: receives the values that rewards log.
            step: number of steps before this one.

        Raises:
            BudgetSpent, ValueError, RewardError, RewardUnavailable, ImportError: see `ask` and `combine.score_parts`.
        """
        asked = np.flatnonzero(asked_B)
        groups = group_B[asked].tolist()
        if self.answers is not None:
            self.answers.begin_step(step)
        caller = self._caller(log=self.answers)
        ids = token_ids() if any(map(takes_completions, self.funcs)) else None
        _, parts = self.ask(
            [rows[j] for j in groups],
            [responses[i] for i in asked],
            step=step,
            completion_ids=None if ids is None else [ids[i] for i in asked],
            columns=self.data_columns,
            notes=notes,
            purpose="training",
            caller=caller,
        )
        failed_B = np.zeros(len(responses), dtype=bool)
        failed_B[asked[sorted(caller.failed)]] = True
        self.failures += len(caller.failed)
        self.scales.update(parts, groups)

        def spread(answers: list[float | None]) -> np.ndarray:
            whole_B = np.full(len(responses), np.nan)
            whole_B[asked] = [np.nan if answer is None else answer for answer in answers]
            return whole_B

        total = self._total(parts)
        if total and all(answer is None for answer in total) and not caller.failed:
            warnings.warn(
                f"the reward {' + '.join(parts)} answered for none of the step's {len(total)} responses, so they teach "
                "nothing. Check that the function returns its value",
                stacklevel=2,
            )
        return QueryResult(spread(total), {name: spread(part) for name, part in parts.items()}, failed_B)

    def ask(
        self,
        rows: list[Row],
        responses: list[str],
        *,
        step: int,
        completion_ids: list[list[int]] | None = None,
        columns: Collection[str] = (),
        max_steps: int | None = None,
        notes: Notes | None = None,
        purpose: Purpose = "other",
        caller: Caller | None = None,
    ) -> tuple[list[float | None], Parts]:
        """The true reward of one response per row, and the unweighted scores by reward. The calls count in the budget.

        If one reward fails on a row, the row has no score by the other rewards either, because an incomplete sum is not
        a true reward. See `LoraGAN.ask`.

        Raises:
            BudgetSpent: the budget has too few calls left.
            ValueError, RewardError, RewardUnavailable, ImportError: see `combine.score_parts`.
        """
        left = self.budget.left(purpose, audit=True)  # the step has chosen whether this is an audit
        if left is not None and left < len(responses):
            raise BudgetSpent(
                f"{len(responses):,} calls of the true reward are needed, and reward_budget_total="
                f"{self.config.reward_budget_total:,} allows {left:,} more: raise this limit, or give fewer rows"
            )
        funcs, caller = self.funcs, caller or self._caller()
        if not responses:
            return [], {name: [] for name in reward_names(funcs)}
        table = data.columns_of(rows, columns)
        if "target" not in table or any(row.target is not None for row in rows):
            table["target"] = [row.target for row in rows]
        if completion_ids is None and any(map(takes_completions, funcs)):
            completion_ids = [self._tokenized(text, row) for text, row in zip(responses, rows, strict=True)]
        state = self.trainer_state or TrainerState(global_step=step, max_steps=max_steps or self.config.max_steps or 0)
        with self.budget.asking(purpose, len(responses), caller, dict(zip(reward_names(funcs), funcs, strict=True))):
            parts = score_parts(
                funcs,
                [row.prompt for row in rows],
                responses,
                table,
                caller=caller,
                completion_ids=completion_ids,
                trainer_state=state,
                notes=notes,
            )
        for cause in dict.fromkeys(caller.failed.values()):
            self._warn_of_cause(
                f"a reward failed in its last try on {len(caller.failed)} of {len(responses)} responses ({cause}): "
                "they are left out (on_reward_error='skip'). This is unbiased only if failures do not depend on the "
                "response"
            )
        parts = {
            name: [None if i in caller.failed else answer for i, answer in enumerate(scores)]
            for name, scores in parts.items()
        }
        return self._total(parts), parts

    def _total(self, parts: Parts) -> list[float | None]:
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            return self.scales.total(parts, self.weights)
        return weighted_total(parts, self.weights)

    def _caller(self, log: Answers | None = None) -> Caller:
        """A Caller with the settings of this run."""
        config = self.config
        return Caller(
            config.reward_timeout,
            config.reward_retries,
            config.reward_workers,
            skip=config.on_reward_error == "skip",
            log=log,
            may_retry=self.budget.may_retry,
            on_retry=lambda name, cause: self._warn_of_cause(
                f"a call of the reward {name!r} failed and is repeated ({cause}); reward_calls/retries counts these"
            ),
        )

    # --- warnings and notices

    def _warn_of_cause(self, message: str) -> None:
        """Warn of a failed call: once per cause, and of at most CAUSES causes."""
        if message not in self._causes and len(self._causes) < CAUSES:
            self._causes.add(message)
            self._new_causes.append(message)
            warnings.warn(message, stacklevel=2)

    def drain_causes(self) -> list[str]:
        """The warnings of failed calls since the previous call of this method."""
        causes, self._new_causes = self._new_causes, []
        return causes

    def is_over(self, signal: RewardSignal) -> bool:
        """Whether the budget is spent and the run cannot or must not continue without further calls."""
        return self.budget.left() == 0 and (self.config.after_budget == "stop" or signal == "true")

    def why_over(self, signal: RewardSignal) -> str:
        """The reason for the end of a run that `is_over`."""
        why = "after_budget is 'stop'" if self.config.after_budget == "stop" else f"reward_signal {signal!r} needs more"
        return f"{self.budget.spent_setting}, and {why}"

    def notice_of_spent_budget(self, signal: RewardSignal, fresh_correlation: tuple[float, float] | None) -> list[str]:
        """A notice after the last call, in a list; empty if it is not due or was already given. It reports that
        training continues without calls, and whether the discriminator orders responses better than chance.

        Args:
            fresh_correlation: the discriminator's rank correlation within a prompt and its standard error; None: never
                measured.
        """
        spent = self.budget.spent_setting
        if spent is None or self._warned_of_spent_budget or self.is_over(signal):
            return []
        self._warned_of_spent_budget = True
        correlation, error = fresh_correlation or (math.nan, math.nan)
        notice = (
            f"{spent}. Training continues with the discriminator's predictions alone"
            f"{', and ends after the last audit' if self.budget.audits else ''}. Its rank correlation with the true "
            "reward, on responses that it had not learned from and within a prompt, "
        )
        notice += f"is {correlation:.2f} (standard error {error:.2f})" if fresh_correlation else "was never measured"
        if not correlation > 2 * error:
            notice += (
                ". This does not show that it orders responses better than chance. To end the run: Ctrl-C, or "
                "after_budget='stop'. For more true rewards: resume with a larger budget"
            )
        return [notice]
