"""What a person sees of fit(): a live display on a terminal, plain whole lines elsewhere. Both go to stderr.

The display is rich's. What a reward prints, warns or logs while it stands appears above it; a reward that asks at the
terminal says so by an attribute `interactive = True`, and the display steps aside for it (`aside_for`).
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..wording import duration, shortened
from .ending import Ending
from .tracking import part_of

POINTS = 20  # of a trend, at most: on 80 columns it stands beside the longest names and numbers
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
#: Further counts of calls, shown behind those of training.
OTHER_CALLS = {
    "reward_calls/evaluation": "in evaluation",
    "reward_calls/retries": "retries",
    "reward_calls/other": "by hand",
    "reward_calls/cached": "from a cache",
}
_current: Display | None = None  # there is one terminal


@contextmanager
def aside_for(rewards: Sequence[Any]) -> Iterator[None]:
    """Take the live display off the terminal while one of these rewards asks a person there."""
    if _current is not None and any(getattr(reward, "interactive", False) for reward in rewards):
        with _current.paused():
            yield
    else:
        yield


class Series:
    """One number over the steps, in constant memory: its first and last values, and fewer than POINTS between."""

    def __init__(self) -> None:
        self.count = 0
        self.step = 0  # at which it was measured last
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
        """From the mean of the first ten values (or the earlier half of fewer) until now."""
        return self.now - sum(self.first[: self._window]) / self._window if self.count > 1 else None


class Display:
    """Steps done and left, the watched numbers, the last samples; a context manager.

    Args:
        first: steps taken before this run.
        last: steps there will be at its end.
        shown: whether anything is shown at all.
        samples: responses shown at a time.
        console: where to; stderr unless a test gives another.
    """

    def __init__(
        self, first: int, last: int, *, shown: bool = True, samples: int = 2, console: Console | None = None
    ) -> None:
        self.first, self.last, self.shown, self.samples = first, last, shown, samples
        self.console = Console(stderr=True) if console is None else console
        tty = console is not None or sys.stderr.isatty()  # rich believes FORCE_COLOR, even of a file
        self.is_live = shown and tty and self.console.is_interactive and not self.console.is_jupyter
        self.step = first
        self.series: dict[str, Series] = {}
        self._calls: dict[str, int] = {}  # of the true reward, beside those of training
        self.latest: list[Mapping[str, Any]] = []  # the last samples
        self.ending: Ending | None = None  # set when the run has taken its last step
        self._live: ExitStack | None = None
        self._began = self._said_at = time.monotonic()
        self._said = first  # the step of the last plain line

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
        if self.shown and not self.is_live and self.step > self._said:
            self._say_step()
        if self.shown and kind is None and self.ending is not None and self.ending.is_early:
            self._say(str(self.ending))

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A step was taken, or (`eval_…`) an evaluation made at it."""
        self.step = step
        for name, value in metrics.items():
            if name in WATCHED or part_of(name):
                self.series.setdefault(name, Series()).add(value, step)
        self._calls |= {name: value for name, value in metrics.items() if name in OTHER_CALLS}
        if not self.shown or self.is_live:
            return
        if "eval_true_reward" in metrics:
            self._say(f"step {step}: {self._in_words(['eval_true_reward'])}")
        elif time.monotonic() - self._said_at > PLAIN_SECONDS or step == self.last:
            self._say_step()

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Some responses of the last step, with the rewards they got."""
        self.latest = list(samples[: self.samples])
        if self.shown and not self.is_live:
            for sample in self.latest:
                rewards = f"true {_number(sample['true_reward'])}, predicted {_number(sample['pred_reward'])}"
                prompt, completion = one_line(sample["prompt"], 80), one_line(sample["completion"], 160)
                self._say(f"step {sample['step']}: “{prompt}” → “{completion}” ({rewards})")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Off the terminal, which then behaves as if there were no display; on again afterwards."""
        running = self._live is not None
        self._stop(erase=True)
        try:
            yield
        finally:
            if running:
                self._start()

    # --- plain lines

    def _say_step(self) -> None:
        self._said, self._said_at = self.step, time.monotonic()
        names = [name for name in WATCHED if name != "eval_true_reward"]
        self._say(f"step {self.step}: {self._in_words(names)}, {self._time_left()}")

    def _in_words(self, names: Sequence[str]) -> str:
        """The latest values. One that was not measured in this step says when it was."""
        said = []
        for name in names:
            if name not in self.series:
                continue
            series = self.series[name]
            if name == "reward_calls":
                said.append(f"{WATCHED[name]} {self._calls_in_words()}")
            elif series.step == self.step:
                said.append(f"{WATCHED[name]} {_number(series.last[-1])}")
            else:
                said.append(f"{WATCHED[name]} not measured (step {series.step}: {_number(series.last[-1])})")
        return ", ".join(said)

    def _calls_in_words(self) -> str:
        others = [f"{value:,} {OTHER_CALLS[name]}" for name, value in self._calls.items() if value]
        return f"{self.series['reward_calls'].last[-1]:,}" + (f" (plus {', '.join(others)})" if others else "")

    def _say(self, line: str) -> None:
        sys.stderr.write(line + "\n")  # in one piece: other threads write, too
        sys.stderr.flush()

    def _time_left(self) -> str:
        if self.ending is not None and self.ending.is_early:
            return "ended early"
        done, left = self.step - self.first, self.last - self.step
        if done <= 0 or not left:  # below 0 where the run went back to before it began
            return "done" if not left else "time left unknown"
        return f"about {duration(round((time.monotonic() - self._began) / done * left))} left"

    # --- the live display

    def _start(self) -> None:
        self._live = ExitStack()
        # stdout goes through the display only where it is the terminal: a file's lines stay in the file.
        live = Live(
            get_renderable=self._frame, console=self.console, transient=True, redirect_stdout=sys.stdout.isatty()
        )
        streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
        self._live.enter_context(live)
        self._live.enter_context(_logging_follows(streams))

    def _stop(self, *, erase: bool = False) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None
            if not erase:
                self.console.print(self._frame())

    def _frame(self) -> Group:
        wide = self.console.width >= 60
        parts: list[Any] = [
            self._progress(wide),
            self._numbers(trends=self.console.width >= 80 and self.console.encoding.startswith("utf")),
        ]
        if "reward_calls" in self.series:
            parts.append(Text(f"{WATCHED['reward_calls']} {self._calls_in_words()}"))
        if self.latest:
            parts.append(self._samples(wide))
        return Group(*parts)

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
        series = dict(self.series)  # the main thread may add to it meanwhile
        parts = [name for name in series if name not in WATCHED]
        table = Table(box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for name in ("now", "change"):
            table.add_column(name, justify="right", no_wrap=True)
        if trends:
            table.add_column("since the start", no_wrap=True)
        for name in sorted(series.keys() - {"reward_calls"} - set(parts if len(parts) == 1 else []), key=_place):
            one = series[name]
            label = WATCHED.get(name) or shortened(part_of(name) or name, 24)
            # One that was not measured in this step says when it was.
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
def _logging_follows(before: Mapping[Any, str]) -> Iterator[None]:
    """Handlers that write to what was stdout or stderr write to what is there now, as print and warnings do."""
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
    """A text, or the last of some chat messages, as part of one line, without what would move a terminal's cursor."""
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


def _place(name: str) -> tuple[float, str]:
    """Where a number stands: the parts of the reward follow the reward."""
    return list(WATCHED).index(name) if name in WATCHED else 0.5, name
