"""Everything around the steps of fit(): callbacks, logs, samples, and when to log, evaluate and save.

Callbacks are transformers' TrainerCallbacks, driven by its own CallbackHandler; its DefaultFlowCallback decides when to
log, evaluate and save: every logging_steps, eval_steps, save_steps, and at the end. So a callback's `control` is
honoured as Trainer does. What departs from it: `args` is a view of this library's Config under Trainer's names; a step
has no sub-steps, so on_substep_end, on_pre_optimizer_step, on_optimizer_step, on_prediction_step, on_predict and
on_push_begin never come; on_init_end comes when fit() begins; on_epoch_end comes before the log, evaluation and
checkpoint of the epoch's last step, not after; an epoch cannot be cut short (should_epoch_stop raises).
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

#: Lines that `state.log_history` holds, the newest ones; a long run's memory does not grow. metrics.jsonl has them all.
LOG_HISTORY = 500

Callback = TrainerCallback | type[TrainerCallback]


def check_callbacks(callbacks: Sequence[Callback] | None) -> list[Callback]:
    """The callbacks, as a list; what is none raises."""
    for callback in callbacks or ():
        if not _is_a(callback, TrainerCallback):
            raise ValueError(f"callbacks must be transformers.TrainerCallback objects or classes, not {callback!r:.80}")
    return list(callbacks or ())


class Arguments:
    """What callbacks get as `args`: every setting of Config, and the names that TrainingArguments has besides."""

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
        self.run_name = config.run_name or Path(config.output_dir).resolve().name
        self.load_best_model_at_end = False

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.__dict__["_config"], name)
        except (KeyError, AttributeError):
            raise AttributeError(f"a callback read args.{name}, which fit() has no setting for") from None

    def to_dict(self) -> dict[str, Any]:
        return self._config.to_dict()

    to_sanitized_dict = to_dict

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class FitObserver:
    """One call of fit(), for those who watch it; a context manager.

    fit() says what happened (begin_step, end_step, evaluated, saved), `control` says what to do next: should_evaluate,
    should_save, should_training_stop.

    Args:
        carried: what the run carries.
        callbacks: the user's.
        rows: the training data; where it has no length, there are no epochs.
        steps: how many further steps.
        evaluates: whether there is an evaluation to ask for.
        progress: whether anything is shown.
    """

    def __init__(
        self,
        carried: RunState,
        callbacks: Sequence[Callback],
        rows: Any,
        steps: int,
        *,
        evaluates: bool = False,
        progress: bool = True,
    ) -> None:
        config, last = carried.config, carried.global_step + steps
        self.carried, self.first, self._rows = carried, carried.global_step, rows
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
        own = [callback for callback in callbacks if not _is_a(callback, DefaultFlowCallback)]
        self._stops_early = any(_is_a(callback, EarlyStoppingCallback) for callback in own)
        if self._stops_early and not evaluates:
            raise ValueError("EarlyStoppingCallback watches an evaluation: give fit() an eval_dataset")
        self.handler = StopWatchingHandler(
            [DefaultFlowCallback, *own],
            carried.players.peft,
            carried.players.base.tokenizer,
            carried.generator.optimizer.adamw,
            carried.generator.optimizer.schedule,
        )
        shown = progress and not any(_is_a(callback, ProgressCallback) for callback in own)  # it shows its own
        self.display = Display(self.first, last, shown=shown, samples=config.num_completions_to_print)
        self._unlogged: list[Mapping[str, Any]] = []  # numbers of the steps since the last line of metrics
        self.num_tokens = 0
        self._evaluated_at: int | None = None
        self._last_samples: dict[str, Sequence[Mapping[str, Any]]] = {}  # of the last step, where they still must go
        self.saved_steps: set[int] = set()  # of the checkpoints that this run has written
        self._stack = ExitStack()
        self._began = time.perf_counter()

    def __enter__(self) -> FitObserver:
        config, folder = self.carried.config, Path(self.carried.config.output_dir)
        tracking.trackers_of(config.report_to)  # before anything is written
        folder.mkdir(parents=True, exist_ok=True)
        durable.tidy(folder)
        with ExitStack() as stack:
            self.answers = stack.enter_context(self._answers(folder))
            true_reward = self.carried.true_reward
            true_reward.answers, true_reward.trainer_state = self.answers, self.state
            true_reward.data_columns = data.column_names(self._rows)
            stack.callback(self._leave)
            # Calls that were made after the checkpoint which the run goes on from count, too: they were paid for.
            lines = JsonLines(folder / "metrics.jsonl", after=self.first, see=self.carried.true_reward.budget.catch_up)
            self.metrics = stack.enter_context(lines)
            if config.log_completions:
                lines = JsonLines(folder / "completions.jsonl", after=self.first)
                self.completions = stack.enter_context(lines)
            settings = {"model": self.carried.players.base.name, **config.to_file()}
            self.trackers = stack.enter_context(tracking.Trackers(config, settings, after=self.first))
            self._go_on()
            self._logged_calls = _counts(self.carried.true_reward.budget.metrics())
            stack.enter_context(self.display)
            self._fire("on_init_end")
            self._fire("on_train_begin")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            self._keep_last()
            self._log_late_calls()
            if kind is None:
                self._end_epoch()
                self._fire("on_train_end")

    def _log_late_calls(self) -> None:
        """Log counts that changed since the last line, as in a step that failed: a resumed run goes on from them."""
        counts = _counts(self.carried.true_reward.budget.metrics())
        has_begun = self.metrics.file is not None or self.metrics.kept  # a first step that fails leaves nothing
        if counts != self._logged_calls and has_begun:
            self.metrics.write({"step": self.carried.global_step, **counts})

    def _leave(self) -> None:
        """The run is over: asking goes on without its log."""
        true_reward = self.carried.true_reward
        true_reward.answers, true_reward.trainer_state, true_reward.data_columns = None, None, ()

    def _answers(self, folder: Path) -> Answers:
        newest = max(map(checkpoint.step_of, checkpoint.complete(folder)), default=0)
        run = {
            "seed": self.carried.config.seed,
            "base": self.carried.players.base.fingerprint,
            "rewards": self.carried.true_reward.names,
            "sources": self.carried.true_reward.sources,
        }
        return Answers(folder, run, step=self.first, newest=newest, reuse=self.carried.config.reuse_answers)

    def _go_on(self) -> None:
        """Totals and the best evaluation so far, from the lines of metrics that a resumed run has."""
        self.state.log_history = self.metrics.kept[-LOG_HISTORY:]
        for line in self.metrics.kept:
            self.num_tokens = line.get("num_tokens", self.num_tokens)
            if self._keep_best(line, line["step"]):
                path = Path(self.carried.config.output_dir, f"step-{line['step']}")
                self.state.best_model_checkpoint = str(path) if path.is_dir() else None

    # --- what fit() says

    def begin_step(self) -> None:
        if not self._epoch_is_open and self._epoch_length:
            self._epoch_is_open = True
            self._fire("on_epoch_begin")
        self._fire("on_step_begin")
        self._began = time.perf_counter()

    def end_step(self, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """A step was taken on these rows: its numbers are kept, and logged where it is time."""
        seconds = time.perf_counter() - self._began
        epoch = self._epoch
        values = tracking.summary(record) | {"step_time": seconds, **self.carried.true_reward.budget.metrics()}
        self.num_tokens += values.pop("step_tokens", 0)
        values |= {"num_tokens": self.num_tokens} | ({"epoch": epoch} if self._epoch_length else {})
        ended = int(epoch) > int(self.state.epoch)
        self.state.global_step, self.state.epoch = record["step"], epoch
        self.state.num_input_tokens_seen = self.num_tokens
        self._unlogged.append(values)
        self.display.update(record["step"], values)
        if self.carried.config.log_completions:
            self._keep_samples(record["step"], tracking.samples_of(record, rows))
        self._fire("on_step_end")
        if ended or self.control.should_training_stop:
            self._end_epoch()  # here, so that what it asks for is done
        notices = [*record["alarms"], *record["notices"]]
        if self.control.should_log:
            self._log_steps(notices)
        elif notices:  # a line of their own, at once: the next line of numbers may never come
            self._write({"step": record["step"], "notices": notices})
        self._end_if_told()

    def evaluated(self, result: Mapping[str, Any]) -> None:
        """What `gan.evaluate` found: its means, and what rewards gave log_metric, are logged as eval_<name>."""
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
        self._log({"step": self.state.global_step, **epoch, **metrics, **self.carried.true_reward.budget.metrics()})
        self._fire("on_evaluate", metrics=dict(metrics))
        if self._keep_best(metrics, self.state.global_step) and self.args.save_best:
            self.control.should_save = True
        self._end_if_told()

    def went_back(self) -> None:
        """The run went back to an earlier step: later steps are repeated, and what was written of them is removed.

        Trackers keep it: theirs cannot be taken back.
        """
        step, carried = self.carried.global_step, self.carried
        self.metrics.go_back(step)
        if carried.config.log_completions:
            self.completions.go_back(step)
        self.handler.optimizer, self.handler.lr_scheduler = (
            carried.generator.optimizer.adamw,
            carried.generator.optimizer.schedule,
        )
        self._unlogged, self.num_tokens, self._evaluated_at = [], 0, None
        self._last_samples = {}
        self.state.global_step, self.state.epoch = step, self._epoch
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        self._go_on()

    def evaluation_left_out(self, why: str) -> None:
        """An evaluation that was due is not made."""
        self.control.should_evaluate = False
        self._write({"step": self.state.global_step, "notices": [why]})
        warnings.warn(f"step {self.state.global_step}: {why}", stacklevel=4)

    @property
    def is_evaluated(self) -> bool:
        """Whether the generator as it stands was evaluated."""
        return self._evaluated_at == self.state.global_step

    def stops(self, reason: str | None) -> None:
        """The run ends after this step for a reason of its own, evaluated and saved. None: it goes on. A run that ends
        already keeps its first reason."""
        if reason is not None and not self.control.should_training_stop:
            self.control.should_training_stop = True
            self.ends(reason)
            if self._unlogged:
                self._log_steps()
            self._end_if_told()

    def saved(self, path: Path) -> None:
        self.saved_steps.add(checkpoint.step_of(path))
        self.answers.saved(checkpoint.step_of(path))
        if path.name == f"step-{self.state.best_global_step}":
            self.state.best_model_checkpoint = str(path)
        self._fire("on_save")

    def ends(self, reason: str | None = None) -> None:
        """The last step was taken. None: a callback said so, or all steps are done."""
        stopped = self.control.should_training_stop
        if reason is None:
            reason = reason_of(self.handler.stopped_by, self.state, self._best_name) if stopped else ALL_STEPS
        self.ending = self.display.ending = Ending(self.carried.global_step, self.args.max_steps, reason)

    # --- what follows from it

    def _fire(self, event: str, **values: Any) -> None:
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **values)
        if self.control.should_epoch_stop:
            raise ValueError(
                "a callback set should_epoch_stop, but fit() cuts no epoch short: should_training_stop ends"
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
        """A line of metrics.jsonl, also in the state's history."""
        if self.carried.config.log_completions:
            self.completions.begin()  # so that none of another run, or of steps that come again, stand beside
        self.metrics.write(line)
        self._logged_calls = _counts(line) or self._logged_calls
        self.state.log_history.append(line)
        del self.state.log_history[:-LOG_HISTORY]

    def _keep_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A step's responses go where it is time; `_keep_last` makes up for the last step of a run that ends early."""
        config, at_an_end = self.carried.config, step in (self.first + 1, self.args.max_steps)
        self._last_samples = {"file": samples, "display": samples} if samples else {}
        if not samples:
            return
        if at_an_end or step % config.log_completions_steps == 0:
            self.completions.write(*self._last_samples.pop("file"))
        if at_an_end or step % config.completions_steps == 0:
            self.display.show(self._last_samples.pop("display"))
        if step % config.completions_steps == 0:
            self.trackers.log_samples(samples, step)

    def _keep_last(self) -> None:
        """The last step's responses are written and shown, however the run ends."""
        left, self._last_samples = self._last_samples, {}
        if "file" in left:
            self.completions.write(*left["file"])
        if "display" in left:
            self.display.show(left["display"])

    def _end_if_told(self) -> None:
        """A run that ends, for whatever reason, is evaluated and saved as it is then."""
        evaluates = self.args.eval_strategy == IntervalStrategy.STEPS
        if self.control.should_training_stop:
            self.control.should_save = True
            self.control.should_evaluate = evaluates and self._evaluated_at != self.state.global_step
        if self.control.should_evaluate and not evaluates:
            raise ValueError("a callback set should_evaluate, but fit() was given no eval_dataset")

    def _end_epoch(self) -> None:
        if self._epoch_is_open:
            self._epoch_is_open = False
            self._fire("on_epoch_end")

    def _keep_best(self, metrics: Mapping[str, Any], step: int) -> bool:
        """Whether this evaluation is the best so far; never the one before the first step, where nothing is saved."""
        if not step:
            return False
        value, best = metrics.get(self._best_name), self.state.best_metric
        if value is None or not (best is None or (value > best if self.args.greater_is_better else value < best)):
            return False
        self.state.best_metric, self.state.best_global_step = value, step
        return True

    @property
    def best_steps(self) -> list[int]:
        """Steps whose checkpoints save_best keeps."""
        best = self.state.best_global_step
        return [best] if self.args.save_best and best is not None else []

    @property
    def _best_name(self) -> str:
        return f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"

    @property
    def _epoch(self) -> float:
        """Passes over the data so far."""
        return self.carried.position / self._epoch_length if self._epoch_length else 0.0


def _is_a(callback: Callback, kind: type[TrainerCallback]) -> bool:
    return isinstance(callback, kind) or (isinstance(callback, type) and issubclass(callback, kind))


def _counts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of metrics, the counts of reward calls beside those of training and the total."""
    return {name: n for name, n in values.items() if name.startswith("reward_calls/") and name != "reward_calls/total"}
