"""The true reward of a run: the weighted sum of one or several functions, asked within a budget. Used by `gan`.

It also holds the budget, the scales of the parts and the failures and, during fit(), the log of answers, the columns of
the data and the state that rewards of TRL's form receive.

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

#: Most distinct causes of failed calls that are warned about.
CAUSES = 5

Funcs = list[Callable[..., Any]]


@dataclass(frozen=True)
class QueryResult:
    """What the true reward said of a step's B responses.

    Attributes:
        true_B: float64; NaN where a response was not asked about, or not answered.
        parts: the parts of the sum by name, each as `true_B`.
        failed_B: bool; asked responses on which a reward failed to the last try.
    """

    true_B: np.ndarray
    parts: dict[str, np.ndarray]
    failed_B: np.ndarray


class TrueReward:
    """Asks the functions whose weighted sum is the true reward.

    Args:
        config: the settings of rewards: budget, retries, timeout, workers, aggregation.
        meant: returns the functions that are asked, and their weights (None: 1 each). It is called at every use,
            because a user may assign another reward at any time.
        tokenized: the token ids of a response to a row, for rewards of TRL's form that ask for them.

    Attributes:
        budget: counts of calls by purpose, and their limits.
        scales: of the parts, where they are normalized.
        failures: responses on which a reward failed to the last try, since this object was made.
        answers: in fit(), the log of answers.
        trainer_state: in fit(), the run's.
        data_columns: in fit(), names of the columns of the data.
    """

    def __init__(
        self,
        config: Config,
        meant: Callable[[], tuple[Funcs, list[float] | None]],
        tokenized: Callable[[str, Row], list[int]],
    ) -> None:
        self.config, self._meant, self._tokenized = config, meant, tokenized
        self.budget = Budget(config.reward_budget, config.reward_budget_total)
        self.scales = Scales()
        self.failures = 0
        self.answers: Answers | None = None
        self.trainer_state: TrainerState | None = None
        self.data_columns: Collection[str] = ()
        self._causes: set[str] = set()  # of failed calls, already told
        self._causes_told: list[str] = []  # of these, those that are not in a step's notices yet
        self._told_of_spent_budget = False

    @property
    def funcs(self) -> Funcs:
        return self._meant()[0]

    @property
    def weights(self) -> list[float] | None:
        """One per function; None: 1 each."""
        return self._meant()[1]

    @property
    def names(self) -> list[str]:
        """What logs call the parts."""
        return reward_names(self.funcs)

    @property
    def sources(self) -> dict[str, str]:
        """{name: digest of the reward's source}; answers are taken up again only where the digest is the same."""
        return dict(zip(self.names, map(source_digest, self.funcs), strict=True))

    # --- before asking

    def require_comparable(self, rows: list[Row]) -> None:
        """Raise where a reward needs a target that a row lacks."""
        comparing = [func for func in self.funcs if getattr(func, "needs_target", False)]
        if comparing:
            remedy = ": give target_text (target_column names its column in data), or another reward"
            data.require_targets(rows, f"the reward {reward_name(comparing[0])!r} compares with a target", remedy)

    def require_answerable(self, rows: list[Row]) -> None:
        """Raise if a reward needs a target or a column that is missing."""
        self.require_comparable(rows)
        require_columns(self.funcs, data.column_names(rows).union(self.data_columns), rows="no row")

    def require_columns(self, rows: list[Row] | data.Stream, called: str, *, position: int) -> None:
        """Raise if a reward needs a column that no row has. Of a stream, only the first step's rows are checked."""
        read = f"no row of the {called}"
        if isinstance(rows, data.Stream) and needs_columns(self.funcs):
            rows.take(self.config.prompts_per_step, position)
            read = "no row read so far from the stream"
        require_columns(self.funcs, data.column_names(rows), rows=read)

    # --- asking

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
        """Ask about some responses of a training step.

        Args:
            rows: the step's P rows; group_B [B] says which of them a response answers.
            responses: all B texts.
            token_ids: returns those of all B responses, the end token included; called where a reward takes them.
            asked_B: bool [B], the responses to ask about.
            notes: takes what rewards log.
            step: steps taken before this one.
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
                f"the reward {' + '.join(parts)} answered for none of the step's {len(total)} responses, which teach "
                "nothing then: does the function return its value?",
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
        """One response per row: its true reward, and the parts by name, counted in the budget.

        Where one part failed, the others have no value either: part of a sum is no reward. `LoraGAN.ask` says the rest.
        """
        left = self.budget.left(purpose)
        if left is not None and left < len(responses):
            raise BudgetSpent(
                f"{len(responses):,} calls of the true reward are needed, and reward_budget_total="
                f"{self.config.reward_budget_total:,} allows {left:,} more: raise it, or give fewer rows"
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
            self._tell_cause(
                f"a reward failed to the last try on {len(caller.failed)} of {len(responses)} responses ({cause}): "
                "they are left out (on_reward_error='skip'), which is unbiased only if failures do not depend on the "
                "response"
            )
        parts = {
            name: [None if i in caller.failed else answer for i, answer in enumerate(part)]
            for name, part in parts.items()
        }
        return self._total(parts), parts

    def _total(self, parts: Parts) -> list[float | None]:
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            return self.scales.total(parts, self.weights)
        return weighted_total(parts, self.weights)

    def _caller(self, log: Answers | None = None) -> Caller:
        """How the functions are asked."""
        config = self.config
        return Caller(
            config.reward_timeout,
            config.reward_retries,
            config.reward_backoff,
            config.reward_workers,
            skip=config.on_reward_error == "skip",
            log=log,
            may_retry=self.budget.may_retry,
            on_retry=lambda name, cause: self._tell_cause(
                f"a call of the reward {name!r} failed and is made again ({cause}); reward_calls/retries counts these"
            ),
        )

    # --- what a run is told

    def _tell_cause(self, words: str) -> None:
        """Warn of a failed call, each cause once, at most CAUSES of them."""
        if words not in self._causes and len(self._causes) < CAUSES:
            self._causes.add(words)
            self._causes_told.append(words)
            warnings.warn(words, stacklevel=2)

    def drain_causes(self) -> list[str]:
        """Warnings of failed calls since this was called last."""
        told, self._causes_told = self._causes_told, []
        return told

    def is_over(self, signal: RewardSignal) -> bool:
        """Whether the budget is spent and nothing can teach the generator without another call."""
        return self.budget.left() == 0 and (self.config.after_budget == "stop" or signal == "true")

    def why_over(self, signal: RewardSignal) -> str:
        """Why a run ends that `is_over`."""
        why = "after_budget is 'stop'" if self.config.after_budget == "stop" else f"reward_signal {signal!r} needs more"
        return f"{self.budget.spent_setting}, and {why}"

    def notice_of_spent_budget(self, signal: RewardSignal, fresh_correlation: tuple[float, float] | None) -> list[str]:
        """One notice, given once: training goes on without calls, and whether the discriminator is fit to teach alone.

        Args:
            fresh_correlation: the discriminator's rank correlation within a prompt and its standard error; None: it was
                never measured.
        """
        spent = self.budget.spent_setting
        if spent is None or self._told_of_spent_budget or self.is_over(signal):
            return []
        self._told_of_spent_budget = True
        correlation, error = fresh_correlation or (math.nan, math.nan)
        notice = (
            f"{spent}. Training goes on by the discriminator's prediction alone. The discriminator's rank correlation "
            "with the true reward, on responses that it had not learned from and within a prompt, "
        )
        notice += f"is {correlation:.2f} (standard error {error:.2f})" if fresh_correlation else "was never measured"
        if not correlation > 2 * error:
            notice += (
                ". This does not show that it orders responses better than chance. To end here instead: Ctrl-C, or "
                "after_budget='stop'. For more true rewards: resume with a larger budget"
            )
        return [notice]
