"""The loop of fit(): steps, evaluations, checkpoints, and the ways in which a run ends. Used by `gan`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import data
from ..data import Row
from ..rewards import RewardUnavailable
from ..state import RunState
from ..storage import lock
from .callbacks import Callback, FitObserver
from .ending import Ending
from .interrupts import Interrupted, Interrupts
from .recovery import Rollback
from .saving import Saver

#: fit() returns at most this many records: records hold every response, and memory must stay constant.
RECORDS = 500

Record = dict[str, Any]


class FitLoop:
    """One call of fit().

    Args:
        state: the state of the run; each step changes it.
        rows: the training data.
        held_out: rows of the evaluations; None: no evaluations.
        steps: number of further steps.
        step: takes one step on a batch of rows and returns its record.
        evaluate: evaluates the generator on held-out rows.
        on_step: called with every step's record.
        callbacks: transformers' callbacks.
        reuse_answers: as in `LoraGAN`.
        interrupts: catches Ctrl-C and SIGTERM.
        progress: whether to show progress.
    """

    def __init__(
        self,
        state: RunState,
        rows: list[Row] | data.Stream,
        held_out: list[Row] | None,
        steps: int,
        *,
        step: Callable[[list[Row]], Record],
        evaluate: Callable[[list[Row]], dict[str, Any]],
        on_step: Callable[[Record], None] | None,
        callbacks: Sequence[Callback],
        reuse_answers: bool,
        interrupts: Interrupts,
        progress: bool,
    ) -> None:
        self.state, self.config, self.budget = state, state.config, state.true_reward.budget
        self._rows, self._held_out, self._last = rows, held_out, state.global_step + steps
        self._step, self._evaluate, self._on_step = step, evaluate, on_step
        self._interrupts = interrupts
        self._signal = self.config.signal(self.config.adversarial)
        self._records: deque[Record] = deque(maxlen=RECORDS)
        self.budget.reserved = 0 if held_out is None or self.config.reward_budget_total is None else len(held_out)
        self._folder = Path(self.config.output_dir)
        evaluates = held_out is not None
        self._run = FitObserver(
            state, callbacks, rows, steps, reuse_answers=reuse_answers, evaluates=evaluates, progress=progress
        )
        self._saver = Saver(state, self._folder, self._run.saved, asynchronous=not callbacks)
        self._rollback = Rollback(state, state.global_step, self._run.saved_steps)

    @property
    def ending(self) -> Ending | None:
        """How the run ended; None while the run has not ended."""
        return self._run.ending

    def run(self) -> list[Record]:
        """Take the steps and return the newest records, at most RECORDS. `LoraGAN.fit` lists the errors."""
        with lock.writing_alone(self._folder, self.state), self._run, self._saver:
            try:
                with self._interrupts.catching():
                    self._take_steps()
            except (Interrupted, ValueError, RewardUnavailable) as stop:
                # After an interrupt, a bad row or a bad reward the last complete step can be saved.
                saved = self._saver.finish(self._run.best_steps) if self._records else None
                if not isinstance(stop, Interrupted):
                    raise
                raise self._interrupted(stop, saved) from None
            if self._records:
                self._saver.finish(self._run.best_steps)
        return list(self._records)

    def _take_steps(self) -> None:
        state, run = self.state, self._run
        if state.global_step < self._last and not state.global_step and self.config.eval_on_start:
            self._run_evaluation()
            self._interrupts.check()
        while state.global_step < self._last:
            run.begin_step()
            batch = data.take(self._rows, self.config.prompts_per_step, seed=self.config.seed, position=state.position)
            record = self._step_or_roll_back(batch)
            if record is None:
                continue
            state.position += len(batch)  # after the step: a step that raised takes its rows again
            self._records.append(record)
            run.end_step(record, batch)
            if self._on_step is not None:
                self._on_step(record)
            run.stop(self._reason_to_stop(record))
            if run.control.should_evaluate:
                self._run_evaluation()
                run.stop(self._reason_to_stop(record))  # the evaluation may have spent the budget
            due = run.control.should_save  # read first: poll() may fire on_save, which clears should_save
            if self._saver.poll() or due:
                self._saver.save(keep=run.best_steps)
            if run.control.should_training_stop:
                break
            self._interrupts.check()
        if run.ending is None:
            run.end()

    def _step_or_roll_back(self, batch: list[Row]) -> Record | None:
        """The step's record; None when its numbers were not finite and the run returned to a checkpoint."""
        next_step = self.state.global_step + 1
        try:
            return self._step(batch)
        except FloatingPointError as failure:
            if self.config.on_nonfinite == "stop":
                raise
            self._saver.wait()
            self._rollback.go_back(failure, next_step)
            self._run.rolled_back()
            while self._records and self._records[-1]["step"] > self.state.global_step:
                self._records.pop()
            self._saver.last = None  # newer checkpoints belong to steps that will be repeated
            return None

    def _run_evaluation(self) -> None:
        """Evaluate the generator in its current state, if there are held-out rows and the budget allows it."""
        if self._held_out is None:
            return
        is_last, needed = self._run.control.should_training_stop, len(self._held_out)
        left = self.budget.left("evaluation")
        if left is not None and left - (0 if is_last else self.budget.reserved) < needed:
            self._run.evaluation_skipped(
                f"the evaluation is left out: it needs {needed:,} calls of the true reward, and reward_budget_total "
                f"leaves {left:,}"
                + ("" if is_last else f", of which {self.budget.reserved:,} are for the evaluation at the end")
            )
            return
        with self._interrupts.harmless():  # an evaluation changes nothing, and may ask a person
            result = self._evaluate(self._held_out)
        self._run.evaluated(result)

    def _reason_to_stop(self, record: Mapping[str, Any]) -> str | None:
        """Why fit() ends after this step although steps are left; None when it continues."""
        if record["alarms"] and self.config.exploit_action == "stop":
            return f"alarm, and on_exploit is 'stop': {'; '.join(record['alarms'])}"
        return self.state.why_over(self._signal)

    def _interrupted(self, stop: Interrupted, saved: Path | None) -> BaseException:
        """The exception of fit() after a signal; its message names the checkpoint and a missing final evaluation."""
        step, reason = self.state.global_step, str(stop) or f"stopped by {stop.cause}"
        left_out = self._held_out is not None and not self._run.is_evaluated
        self._run.end(reason + ("; the final evaluation was left out" if left_out else ""))
        reason += f" after {step} of {self._last} steps"
        reason += ", without the final evaluation" if left_out else ""
        if saved is None:
            return stop.exception(f"{reason}: no step was done, so there is nothing new to save")
        return stop.exception(f"{reason}: step {step} is saved in {saved}")
