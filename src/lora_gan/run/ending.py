"""Why a run ended. fit() notes the reason; the display and `lora-gan train` print it in their last line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

ALL_STEPS = "all steps are done"


@dataclass(frozen=True)
class Ending:
    """How a call of fit() ended.

    Attributes:
        step: the step at which the run ended.
        last: the planned last step.
        reason: a short sentence without a full stop.
    """

    step: int
    last: int
    reason: str

    @property
    def is_early(self) -> bool:
        """Whether planned steps are left."""
        return self.step < self.last

    def __str__(self) -> str:
        return f"{'Ended' if self.is_early else 'Done'} at step {self.step} of {self.last}: {self.reason}"


class StopWatchingHandler(CallbackHandler):
    """transformers' handler, which also notes the callback that requested the end of training."""

    stopped_by: TrainerCallback | None = None

    def call_event(
        self, event: str, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        callbacks = self.callbacks
        try:
            for callback in callbacks:  # one at a time, to find the one that changes `control`
                before = control.should_training_stop
                self.callbacks = [callback]
                control = super().call_event(event, args, state, control, **kwargs)
                if control.should_training_stop and not before:
                    self.stopped_by = callback
        finally:
            self.callbacks = callbacks
        return control


def reason_of(callback: TrainerCallback | None, state: TrainerState, metric: str) -> str:
    """Why a callback ended the run.

    Args:
        callback: the one that set `should_training_stop`.
        state: transformers' state of the run, with its best evaluation.
        metric: the metric of early stopping.
    """
    if isinstance(callback, DefaultFlowCallback):
        return ALL_STEPS
    if isinstance(callback, EarlyStoppingCallback):
        best = "" if state.best_metric is None else f"; the best was {state.best_metric:.4g} at step "
        return (
            f"early stopping: {metric} did not improve in {callback.early_stopping_patience} evaluations"
            f"{best}{state.best_global_step if best else ''}"
        )
    return f"the callback {type(callback).__name__} asked for it"
