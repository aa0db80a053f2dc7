"""Callbacks, logs and samples of fit(), and the schedule of logging, evaluation and saving.

Callbacks are transformers' TrainerCallbacks. transformers' CallbackHandler calls them, and its DefaultFlowCallback
schedules logging, evaluation and saving: every logging_steps, eval_steps, save_steps, and at the end. A callback's
`control` has the same effect as in Trainer.

Differences from Trainer:

- `args` is a view of this library's Config under Trainer's names.
- A step has no sub-steps, so fit() never fires on_substep_end, on_pre_optimizer_step, on_optimizer_step,
  on_prediction_step, on_predict and on_push_begin.
- on_init_end is fired when fit() begins.
- on_epoch_end is fired before the log, evaluation and checkpoint of the epoch's last step, not after.
- An epoch cannot be cut short: should_epoch_stop raises.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import IntervalStrategy

from .. import data
from ..config import Config
from ..data import Row
from ..rewards.answers import Answers
from ..state import RunState
from ..storage import checkpoint, durable
from ..storage.json_lines import JsonLines
from . import tracking
from .display import Display
from .ending import ALL_STEPS, Ending, StopWatchingHandler, reason_of

#: `state.log_history` holds this many of the newest lines, so memory stays constant. metrics.jsonl holds every line.
LOG_HISTORY = 500

#: Steps between samples on the display and in trackers. Samples of every step would hide the numbers on a terminal, and
#: fill a tracker with tables. completions.jsonl has the responses of every step.
SAMPLES_EVERY = 25
#: Responses per displayed step, so that samples and numbers fit on a terminal together.
SAMPLES_SHOWN = 2

Callback = TrainerCallback | type[TrainerCallback]


def check_callbacks(callbacks: Sequence[Callback] | None) -> list[Callback]:
    """The callbacks as a list.

    Raises:
        ValueError: an entry is neither a TrainerCallback nor a subclass of it.
    """
    for callback in callbacks or ():
        if not issubclass(callback if isinstance(callback, type) else type(callback), TrainerCallback):
            raise ValueError(f"callbacks must be transformers.TrainerCallback objects or classes, not {callback!r:.80}")
    return list(callbacks or ())


class Arguments:
    """The `args` of callbacks: every setting of Config, and further names of TrainingArguments."""

    logging_strategy = save_strategy = IntervalStrategy.STEPS
    logging_first_step = False
    eval_delay = 0
    disable_tqdm = True
    process_index = local_process_index = 0
    world_size = 1

    def __init__(self, config: Config, *, max_steps: int, evaluates: bool) -> None:
        self._config = config
        self.max_steps = max_steps
        self.save_steps = config.save_steps or max(1, max_steps)
        self.eval_steps = config.eval_steps or max(1, max_steps)
        self.eval_strategy = IntervalStrategy.STEPS if evaluates else IntervalStrategy.NO
        self.run_name = Path(config.output_dir).resolve().name
        self.metric_for_best_model = config.metric_for_best_model.removeprefix("-")
        self.greater_is_better = not config.metric_for_best_model.startswith("-")
        self.load_best_model_at_end = False

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.__dict__["_config"], name)
        except (KeyError, AttributeError):
            raise AttributeError(f"a callback read args.{name}, but fit() has no such setting") from None

    def to_dict(self) -> dict[str, Any]:
        return self._config.to_dict()

    to_sanitized_dict = to_dict

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class FitObserver:
    """Logs one call of fit() and fires its callbacks; a context manager.

    fit() reports events (begin_step, end_step, evaluated, saved). `control` then holds the next actions:
    should_evaluate, should_save, should_training_stop.

    Args:
        run_state: the state of the run.
        callbacks: the user's callbacks.
        rows: the training data. Data without a length has no epochs.
        steps: number of further steps.
        reuse_answers: as in `LoraGAN`.
        evaluates: whether fit() has evaluation data.
        progress: whether to show progress.

    Raises:
        ValueError: an EarlyStoppingCallback without evaluation data.
    """

    def __init__(
        self,
        run_state: RunState,
        callbacks: Sequence[Callback],
        rows: Any,
        steps: int,
        *,
        reuse_answers: bool = False,
        evaluates: bool = False,
        progress: bool = True,
    ) -> None:
        config, last = run_state.config, run_state.global_step + steps
        self.run_state, self.first, self._rows = run_state, run_state.global_step, rows
        self._reuse_answers = reuse_answers
        self.ending: Ending | None = None
        self._epoch_length = len(rows) if hasattr(rows, "__len__") else None
        self._epoch_is_open = False
        self.args = Arguments(config, max_steps=last, evaluates=evaluates)
        self.control = TrainerControl()
        self.state = TrainerState(
            global_step=self.first,
            max_steps=last,
            epoch=self._epoch,
            logging_steps=config.logging_steps,
            eval_steps=self.args.eval_steps,
            save_steps=self.args.save_steps,
        )
        own = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        own = [callback for callback in own if not isinstance(callback, DefaultFlowCallback)]
        self._stops_early = any(isinstance(callback, EarlyStoppingCallback) for callback in own)
        if self._stops_early and not evaluates:
            raise ValueError("EarlyStoppingCallback needs evaluations: give fit() an eval_dataset")
        peft, tokenizer = run_state.players.peft, run_state.players.base.tokenizer
        optimizer = run_state.generator.optimizer
        self.handler = StopWatchingHandler(
            [DefaultFlowCallback, *own], peft, tokenizer, optimizer.adamw, optimizer.schedule
        )
        shown = progress and not any(isinstance(callback, ProgressCallback) for callback in own)  # has its own display
        self.display = Display(self.first, last, shown=shown, samples=SAMPLES_SHOWN)
        self._unlogged: list[Mapping[str, Any]] = []  # numbers of the steps since the last line of metrics
        self.num_tokens = 0
        self._evaluated_at: int | None = None
        self._undisplayed: Sequence[Mapping[str, Any]] = ()  # the last step's responses, if they were not displayed
        self.saved_steps: set[int] = set()  # steps of the checkpoints that this run has written
        self._stack = ExitStack()
        self._began = time.perf_counter()

    def __enter__(self) -> FitObserver:
        config, folder = self.run_state.config, Path(self.run_state.config.output_dir)
        tracking.trackers_of(config.report_to)  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        durable.tidy(folder)
        with ExitStack() as stack:
            self.answers = stack.enter_context(self._answers(folder))
            true_reward = self.run_state.true_reward
            true_reward.answers, true_reward.trainer_state = self.answers, self.state
            true_reward.data_columns = data.column_names(self._rows)
            stack.callback(self._detach_answers)
            # Calls made after the checkpoint that the run continues from count, too: they were paid for.
            lines = JsonLines(folder / "metrics.jsonl", after=self.first, see=true_reward.budget.catch_up)
            self.metrics = stack.enter_context(lines)
            if config.log_completions:
                lines = JsonLines(folder / "completions.jsonl", after=self.first)
                self.completions = stack.enter_context(lines)
            settings = {"model": self.run_state.players.base.name, **config.to_file()}
            self.trackers = stack.enter_context(tracking.Trackers(config, settings, after=self.first))
            self._restore_totals()
            self._logged_calls = _other_calls(true_reward.budget.metrics())
            stack.enter_context(self.display)
            self._fire("on_init_end")
            self._fire("on_train_begin")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            self._show_last_samples()
            self._log_late_calls()
            if kind is None:
                self._end_epoch()
                self._fire("on_train_end")

    def _log_late_calls(self) -> None:
        """Log counts that changed since the last line, for example in a step that failed. A resumed run reads them."""
        counts = _other_calls(self.run_state.true_reward.budget.metrics())
        has_begun = self.metrics.file is not None or self.metrics.kept  # a first step that fails leaves nothing
        if counts != self._logged_calls and has_begun:
            self.metrics.write({"step": self.run_state.global_step, **counts})

    def _detach_answers(self) -> None:
        """The run is over: later reward calls are not logged in its folder."""
        true_reward = self.run_state.true_reward
        true_reward.answers, true_reward.trainer_state, true_reward.data_columns = None, None, ()

    def _answers(self, folder: Path) -> Answers:
        newest = max(map(checkpoint.step_of, checkpoint.complete(folder)), default=0)
        run = {
            "seed": self.run_state.config.seed,
            "base": self.run_state.players.base.fingerprint,
            "rewards": self.run_state.true_reward.names,
            "sources": self.run_state.true_reward.sources,
        }
        return Answers(folder, run, step=self.first, newest=newest, reuse=self._reuse_answers)

    def _restore_totals(self) -> None:
        """Read totals and the best evaluation so far from the lines of metrics that a resumed run has."""
        self.state.log_history = self.metrics.kept[-LOG_HISTORY:]
        for line in self.metrics.kept:
            self.num_tokens = line.get("num_tokens", self.num_tokens)
            if self._update_best(line, line["step"]):
                path = Path(self.run_state.config.output_dir, f"step-{line['step']}")
                self.state.best_model_checkpoint = str(path) if path.is_dir() else None

    # --- events that fit() reports

    def begin_step(self) -> None:
        if not self._epoch_is_open and self._epoch_length:
            self._epoch_is_open = True
            self._fire("on_epoch_begin")
        self._fire("on_step_begin")
        self._began = time.perf_counter()

    def end_step(self, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Record a step on these rows, and log its numbers when a log is due."""
        seconds = time.perf_counter() - self._began
        epoch = self._epoch
        values = tracking.summary(record) | {"step_time": seconds, **self.run_state.true_reward.budget.metrics()}
        self.num_tokens += values.pop("step_tokens", 0)
        values |= {"num_tokens": self.num_tokens} | ({"epoch": epoch} if self._epoch_length else {})
        ended = int(epoch) > int(self.state.epoch)
        self.state.global_step, self.state.epoch = record["step"], epoch
        self.state.num_input_tokens_seen = self.num_tokens
        self._unlogged.append(values)
        self.display.update(record["step"], values)
        if self.run_state.config.log_completions:
            self._log_samples(record["step"], tracking.samples_of(record, rows))
        self._fire("on_step_end")
        if ended or self.control.should_training_stop:
            self._end_epoch()  # before logging, so that requests of on_epoch_end take effect
        notices = [*record["alarms"], *record["notices"]]
        if self.control.should_log:
            self._log_steps(notices)
        elif notices:  # logged immediately on a line of their own: the run may end before the next line of numbers
            self._write({"step": record["step"], "notices": notices})
        self._schedule_end()

    def evaluated(self, result: Mapping[str, Any]) -> None:
        """Log the result of `gan.evaluate` as eval_<name>: its means, and values that rewards gave to log_metric.

        Raises:
            ValueError: the evaluation lacks metric_for_best_model, which save_best or early stopping needs.
        """
        means = {name: metric["mean"] for name, metric in result["metrics"].items()}
        means |= {"distinct_2": result["distinct_2"], **result.get("logged", {})}
        metrics = tracking.measured({f"eval_{name}": value for name, value in means.items()})
        self._evaluated_at = self.state.global_step
        if self._best_name not in metrics and (self._stops_early or self.args.save_best):
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} was not measured: the evaluation has "
                f"{', '.join(name.removeprefix('eval_') for name in metrics)}"
            )
        self.display.update(self.state.global_step, metrics)
        epoch = {"epoch": self._epoch} if self._epoch_length else {}
        self._log({"step": self.state.global_step, **epoch, **metrics, **self.run_state.true_reward.budget.metrics()})
        self._fire("on_evaluate", metrics=dict(metrics))
        if self._update_best(metrics, self.state.global_step) and self.args.save_best:
            self.control.should_save = True
        self._schedule_end()

    def rolled_back(self) -> None:
        """The run returned to an earlier step and will repeat the later steps: remove their lines.

        Trackers cannot delete values, so they keep the values of the repeated steps.
        """
        step, optimizer = self.run_state.global_step, self.run_state.generator.optimizer
        self.metrics.go_back(step)
        if self.run_state.config.log_completions:
            self.completions.go_back(step)
        self.handler.optimizer, self.handler.lr_scheduler = optimizer.adamw, optimizer.schedule
        self._unlogged, self.num_tokens, self._evaluated_at = [], 0, None
        self._undisplayed = ()
        self.state.global_step, self.state.epoch = step, self._epoch
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self._restore_totals()

    def evaluation_skipped(self, reason: str) -> None:
        """Log and warn that an evaluation that was due is skipped."""
        self.control.should_evaluate = False
        self._write({"step": self.state.global_step, "notices": [reason]})
        warnings.warn(f"step {self.state.global_step}: {reason}", stacklevel=4)

    @property
    def is_evaluated(self) -> bool:
        """Whether the generator was evaluated after the current step."""
        return self._evaluated_at == self.state.global_step

    def stop(self, reason: str | None) -> None:
        """End the run after this step, with an evaluation and a checkpoint. A run that is already ending keeps its
        first reason. None changes nothing."""
        if reason is not None and not self.control.should_training_stop:
            self.control.should_training_stop = True
            self.end(reason)
            if self._unlogged:
                self._log_steps()
            self._schedule_end()

    def saved(self, path: Path) -> None:
        self.saved_steps.add(checkpoint.step_of(path))
        self.answers.saved(checkpoint.step_of(path))
        if path.name == f"step-{self.state.best_global_step}":
            self.state.best_model_checkpoint = str(path)
        self._fire("on_save")

    def end(self, reason: str | None = None) -> None:
        """Note how the run ended. None: a callback ended the run, or all steps are done."""
        stopped = self.control.should_training_stop
        if reason is None:
            reason = reason_of(self.handler.stopped_by, self.state, self._best_name) if stopped else ALL_STEPS
        self.ending = self.display.ending = Ending(self.run_state.global_step, self.args.max_steps, reason)

    # --- reactions to events

    def _fire(self, event: str, **values: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **values)
        if self.control.should_epoch_stop:
            raise ValueError(
                "a callback set should_epoch_stop, but fit() cannot cut an epoch short: set should_training_stop to "
                "end the run"
            )

    def _log_steps(self, notices: Sequence[str] = ()) -> None:
        values, self._unlogged = tracking.averaged(self._unlogged), []
        self._log(values, notices)

    def _log(self, values: dict[str, Any], notices: Sequence[str] = ()) -> None:
        """Log these numbers; callbacks and trackers get no notices."""
        line = {"step": self.state.global_step, **values}
        self._write(line | ({"notices": list(notices)} if notices else {}))
        self.trackers.log(values, self.state.global_step)
        self._fire("on_log", logs={name: value for name, value in values.items() if name != "step"})

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and to the state's history."""
        if self.run_state.config.log_completions:
            self.completions.begin()  # drops completions of another run, and of steps that are repeated
        self.metrics.write(line)
        self._logged_calls = _other_calls(line) or self._logged_calls
        self.state.log_history.append(line)
        del self.state.log_history[:-LOG_HISTORY]

    def _log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's responses. Show and track samples at their interval; show the first and last step, too."""
        self._undisplayed = samples
        if not samples:
            return
        self.completions.write(*samples)
        if step % SAMPLES_EVERY == 0 or step in (self.first + 1, self.args.max_steps):
            self._show_last_samples()
        if step % SAMPLES_EVERY == 0:
            self.trackers.log_samples(samples, step)

    def _show_last_samples(self) -> None:
        """Show the last step's responses, unless they were shown; also called however the run ends."""
        if self._undisplayed:
            self.display.show(self._undisplayed)
        self._undisplayed = ()

    def _schedule_end(self) -> None:
        """Request an evaluation and a checkpoint when the run ends, for any reason."""
        evaluates = self.args.eval_strategy == IntervalStrategy.STEPS
        if self.control.should_training_stop:
            self.control.should_save = True
            self.control.should_evaluate = evaluates and self._evaluated_at != self.state.global_step
        if self.control.should_evaluate and not evaluates:
            raise ValueError("a callback set should_evaluate, but fit() has no evaluation data: give an eval_dataset")

    def _end_epoch(self) -> None:
        if self._epoch_is_open:
            self._epoch_is_open = False
            self._fire("on_epoch_end")

    def _update_best(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Note and report whether this evaluation is the best so far.

        The evaluation before the first step never counts, because no checkpoint belongs to it.
        """
        if not step:
            return False
        value, best = metrics.get(self._best_name), self.state.best_metric
        if value is None or not (best is None or (value > best if self.args.greater_is_better else value < best)):
            return False
        self.state.best_metric, self.state.best_global_step = value, step
        return True

    @property
    def best_steps(self) -> list[int]:
        """The step of the checkpoint that save_best keeps, in a list; empty without one."""
        best = self.state.best_global_step
        return [best] if self.args.save_best and best is not None else []

    @property
    def _best_name(self) -> str:
        return f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"

    @property
    def _epoch(self) -> float:
        """Passes over the data so far."""
        return self.run_state.position / self._epoch_length if self._epoch_length else 0.0


def _other_calls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of reward calls in a line of metrics, except the counts of training and the total."""
    return {name: n for name, n in values.items() if name.startswith("reward_calls/") and name != "reward_calls/total"}
