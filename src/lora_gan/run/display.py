"""The display of fit() on stderr: a live display by rich on a terminal, plain lines elsewhere.

Output of a reward (print, warnings, logging) appears above the live display. A reward that asks a person at the
terminal has the attribute `interactive = True`; the display is removed while such a reward asks (`aside_for`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..wording import duration, shortened
from .ending import Ending
from .tracking import reward_of

POINTS = 20  # most points of a trend: they fit into 80 columns together with the longest names and numbers
PLAIN_SECONDS = 10.0  # between plain lines
WATCHED = {
    "reward": "reward",
    "eval_true_reward": "held-out reward",
    "pred_reward": "predicted",
    "rank_correlation_within": "rank corr. in group",
    "kl_per_response": "KL",
    "imitation_loss": "imitation",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "clipped",
    "reward_calls": "calls",
}
#: Further counts of calls, shown after those of training.
OTHER_CALLS = {
    "reward_calls/evaluation": "in evaluation",
    "reward_calls/retries": "retries",
    "reward_calls/other": "by hand",
    "reward_calls/cached": "from a cache",
}
_current: Display | None = None  # there is one terminal


def aside_for(rewards: Sequence[Any]) -> AbstractContextManager[None]:
    """Remove the live display from the terminal while one of these rewards asks a person there."""
    asks = any(getattr(reward, "interactive", False) for reward in rewards)
    return nullcontext() if _current is None or not asks else _current.paused()


class Series:
    """One number over the steps in constant memory: its first ten and last ten values, and fewer than POINTS means."""

    def __init__(self) -> None:
        self.count = 0
        self.step = 0  # of the last measurement
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=10)
        self.points: list[float] = []
        self._stride, self._pending = 1, 0.0

    def add(self, value: float, step: int) -> None:
        self.count += 1
        self.step = step
        self.last.append(value)
        if len(self.first) < 10:
            self.first.append(value)
        self._pending += value / self._stride
        if self.count % self._stride == 0:
            self.points.append(self._pending)
            self._pending = 0.0
        if len(self.points) == POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self._stride *= 2

    @property
    def _window(self) -> int:
        return max(1, min(10, self.count // 2))

    @property
    def now(self) -> float:
        """The mean of the last ten values, or of the later half of fewer."""
        return sum(list(self.last)[-self._window :]) / self._window

    @property
    def change(self) -> float | None:
        """`now` minus the mean of the first ten values, or of the earlier half of fewer; None with one value."""
        return self.now - sum(self.first[: self._window]) / self._window if self.count > 1 else None


class Display:
    """Shows progress, the watched numbers and the newest samples; a context manager.

    Args:
        first: steps taken before this run.
        last: the step at which the run will end.
        shown: False shows nothing.
        samples: number of responses to show at a time.
        console: rich's console; None: stderr.
    """

    def __init__(
        self, first: int, last: int, *, shown: bool = True, samples: int = 2, console: Console | None = None
    ) -> None:
        self.first, self.last, self.shown, self.samples = first, last, shown, samples
        self.console = Console(stderr=True) if console is None else console
        tty = console is not None or sys.stderr.isatty()  # with FORCE_COLOR rich takes a file for a terminal
        self.is_live = shown and tty and self.console.is_interactive and not self.console.is_jupyter
        self.step = first
        self.series: dict[str, Series] = {}
        self._calls: dict[str, int] = {}  # counts of OTHER_CALLS
        self.latest: list[Mapping[str, Any]] = []  # the last samples
        self.ending: Ending | None = None  # set when the run has taken its last step
        self._live: ExitStack | None = None
        self._began = self._printed_at = time.monotonic()
        self._printed_step = first  # the step of the last plain line

    def __enter__(self) -> Display:
        global _current
        if self.is_live:
            self._start()
            _current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _current
        self._stop()
        if _current is self:
            _current = None
        if self.shown and not self.is_live and self.step > self._printed_step:
            self._print_step()
        if self.shown and kind is None and self.ending is not None and self.ending.is_early:
            self._print(str(self.ending))

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the numbers of a step, or of an evaluation (`eval_…`) after this step."""
        self.step = step
        for name, value in metrics.items():
            if name in WATCHED or reward_of(name):
                self.series.setdefault(name, Series()).add(value, step)
        self._calls |= {name: value for name, value in metrics.items() if name in OTHER_CALLS}
        if not self.shown or self.is_live:
            return
        if "eval_true_reward" in metrics:
            self._print(f"step {step}: {self._latest_values(['eval_true_reward'])}")
        elif time.monotonic() - self._printed_at > PLAIN_SECONDS or step == self.last:
            self._print_step()

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Show some responses of the last step with their rewards."""
        self.latest = list(samples[: self.samples])
        if self.shown and not self.is_live:
            for sample in self.latest:
                rewards = f"true {_number(sample['true_reward'])}, predicted {_number(sample['pred_reward'])}"
                prompt, completion = one_line(sample["prompt"], 80), one_line(sample["completion"], 160)
                self._print(f"step {sample['step']}: “{prompt}” → “{completion}” ({rewards})")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the live display within the block, and show it again afterwards."""
        running = self._live is not None
        self._stop(erase=True)
        try:
            yield
        finally:
            if running:
                self._start()

    # --- plain lines

    def _print_step(self) -> None:
        self._printed_step, self._printed_at = self.step, time.monotonic()
        names = [name for name in WATCHED if name != "eval_true_reward"]
        self._print(f"step {self.step}: {self._latest_values(names)}, {self._time_left()}")

    def _latest_values(self, names: Sequence[str]) -> str:
        """The latest values; a value that this step did not measure has the step of its measurement."""
        texts = []
        for name in filter(self.series.__contains__, names):
            series, value = self.series[name], _number(self.series[name].last[-1])
            if name == "reward_calls":
                value = self._call_counts()
            elif series.step != self.step:
                value = f"not measured (step {series.step}: {value})"
            texts.append(f"{WATCHED[name]} {value}")
        return ", ".join(texts)

    def _call_counts(self) -> str:
        others = [f"{value:,} {OTHER_CALLS[name]}" for name, value in self._calls.items() if value]
        return f"{self.series['reward_calls'].last[-1]:,}" + (f" (plus {', '.join(others)})" if others else "")

    def _print(self, line: str) -> None:
        sys.stderr.write(line + "\n")  # one write per line, because other threads write, too
        sys.stderr.flush()

    def _time_left(self) -> str:
        if self.ending is not None and self.ending.is_early:
            return "ended early"
        done, left = self.step - self.first, self.last - self.step
        if done <= 0 or not left:  # below 0 after a return to a checkpoint from before this call of fit()
            return "done" if not left else "time left unknown"
        return f"about {duration(round((time.monotonic() - self._began) / done * left))} left"

    # --- the live display

    def _start(self) -> None:
        self._live = ExitStack()
        # The display captures stdout only if stdout is the terminal: lines for a file stay in the file.
        live = Live(
            get_renderable=self._frame, console=self.console, transient=True, redirect_stdout=sys.stdout.isatty()
        )
        streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
        self._live.enter_context(live)
        self._live.enter_context(_logging_redirected(streams))

    def _stop(self, *, erase: bool = False) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None
            if not erase:
                self.console.print(self._frame())

    def _frame(self) -> Group:
        wide = self.console.width >= 60
        trends = self.console.width >= 80 and self.console.encoding.startswith("utf")
        blocks: list[Any] = [self._progress(wide), self._numbers(trends=trends)]
        if "reward_calls" in self.series:
            blocks.append(Text(f"{WATCHED['reward_calls']} {self._call_counts()}"))
        if self.latest:
            blocks.append(self._samples(wide))
        return Group(*blocks)

    def _progress(self, wide: bool) -> Table | Text:
        if not wide:
            return Text(f"step {self.step}/{self.last}, {self._time_left()}")
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(1, self.last), completed=self.step)
        passed = duration(round(time.monotonic() - self._began))
        row.add_row(f"step {self.step}/{self.last}", bar, f"{passed}, {self._time_left()}")
        return row

    def _numbers(self, *, trends: bool) -> Table:
        series = dict(self.series)  # a copy: the main thread may add numbers while this thread draws
        rewards = [name for name in series if name not in WATCHED]
        hidden = {"reward_calls", *(rewards if len(rewards) == 1 else [])}  # a single reward equals the total
        table = Table(box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in ("now", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        if trends:
            table.add_column("since the start", no_wrap=True)
        for name in sorted(series.keys() - hidden, key=_sort_key):
            one = series[name]
            label = WATCHED.get(name) or shortened(reward_of(name) or name, 24)
            # A value that this step did not measure has the step of its measurement.
            now = _number(one.now) if one.step == self.step else f"at step {one.step}: {_number(one.now)}"
            change = "" if one.change is None else f"{one.change:+.3f}"
            table.add_row(*map(Text, (label, now, change)), *([sparkline(one.points)] if trends else []))
        return table

    def _samples(self, wide: bool) -> Table:
        table = Table(box=None, pad_edge=False, expand=True)
        if wide:
            table.add_column(f"prompt (step {self.latest[0]['step']})", ratio=1)
        table.add_column("completion", ratio=1)
        table.add_column("true", justify="right", no_wrap=True)
        table.add_column("pred.", justify="right", no_wrap=True)
        for sample in self.latest:
            texts = [Text(one_line(sample[name], 160)) for name in ("prompt", "completion")]
            rewards = (_number(sample["true_reward"]), _number(sample["pred_reward"]))
            table.add_row(*texts[0 if wide else 1 :], *rewards)
        return table


@contextmanager
def _logging_redirected(before: Mapping[Any, str]) -> Iterator[None]:
    """Redirect logging handlers of the original stdout and stderr to the current streams, as print and warnings are.

    Args:
        before: original stream -> its name in `sys`.
    """
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
        if isinstance(handler, logging.StreamHandler) and (stream := getattr(handler, "stream", None)) in before:
            handler.setStream(getattr(sys, before[stream]))
            moved.append((handler, stream))
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def one_line(text: Any, length: int) -> str:
    """A text, or the last of several chat messages, for one line of output: at most `length` printable characters."""
    if isinstance(text, list) and text and isinstance(text[-1], Mapping):
        text = text[-1].get("content")
    return shortened("".join(filter(str.isprintable, " ".join(str(text).split()))), length)


def sparkline(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[int(7.999 * (value - low) / (high - low)) if high > low else 3] for value in values)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _sort_key(name: str) -> tuple[float, str]:
    """The order of the numbers: single rewards follow the total reward."""
    return list(WATCHED).index(name) if name in WATCHED else 0.5, name
