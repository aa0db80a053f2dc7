"""A person at the terminal as the reward: reads a prompt and a response, and answers with 0 to 10.

    gan = LoraGAN("gpt2", reward_funcs=[Human(log="ratings.jsonl")], query_rate=0.25)

The rating is blind: the terminal does not show the model, the adapter, the step or the predicted reward. Each pair of
prompt and response is rated once per object and per log file.
"""

import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from ..messages import as_text
from ..storage.json_lines import append_line, open_lines
from .calling import RewardUnavailable

TOP = 10  # ratings are 0 to TOP
QUESTION = "rating 0 to 10, or s, u, q, ? > "
HELP = """0 to 10: a number, decimals are possible; 10 is the best.
s  Skip: this response gets no rating.
u  Undo: return to the previous response, as often as you like. The last rating of a round cannot be undone.
q  Stop the run, as Ctrl-C and Ctrl-D do. If there is a log, the ratings so far are kept.
?  Show this help."""

# Characters that a terminal executes and does not show. A response may contain any byte.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Pair = tuple[str, str, str | None]  # prompt, response, and the target if it is shown


class Human:
    """Ratings by a person: rating / 10, in [0, 1], higher is better; None for a skipped response.

    A reward function of TRL's form, for `reward_funcs`. Responses are shown in the order of sampling.

    Args:
        show_target: also show the target of a row. A rating is then valid for this target only. A rating in the log
            that was given without a target is valid for every target.
        log: a JSON Lines file. Each answer is appended immediately, so a crash loses none. Answers that the file
            already holds are not requested again: name the same file to continue a run.
        stdin, stdout: text streams for answers and questions; None: the terminal.
    """

    interactive = True  # a live display pauses while this reward asks
    __name__ = "human"  # the name in logs

    def __init__(
        self,
        *,
        show_target: bool = True,
        log: str | PathLike[str] | None = None,
        stdin: TextIO | None = None,
        stdout: TextIO | None = None,
    ) -> None:
        self.show_target = show_target
        self.log: Path | None = None
        self._stdin, self._stdout = stdin, stdout
        self._ratings: dict[Pair, float | None] = {}
        self._without_target: dict[tuple[str, str], float | None] = {}  # from log entries without a target
        if log is not None:
            self.keep(log)

    def keep(self, log: str | PathLike[str]) -> None:
        """Append each further answer to this file. Answers that it already holds are not requested again."""
        self.log = Path(log)
        for entry in open_lines(self.log):
            self._recall(entry)
        self._without_target |= {pair[:2]: rating for pair, rating in self._ratings.items() if pair[2] is None}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Ask for a rating of each pair that has none yet.

        Args:
            prompts, completions: one of each per row, texts or chat messages.
            columns: `target`, a text or None per row, is shown if `show_target`; other columns are ignored.

        Returns:
            one float in [0, 1] per row, or None for a skipped row.

        Raises:
            RewardUnavailable: there is no terminal.
            KeyboardInterrupt: the person stopped the run.
        """
        targets = (self.show_target and columns.get("target")) or [None] * len(prompts)
        pairs = [
            (as_text(prompt), as_text(completion), target)
            for prompt, completion, target in zip(prompts, completions, targets, strict=True)
        ]
        for pair in pairs:
            if pair not in self._ratings and pair[:2] in self._without_target:
                self._ratings[pair] = self._without_target[pair[:2]]
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._ratings]
        if missing:
            self._require_terminal()
            with _ctrl_c_raises():
                self._ask_all(missing)
        ratings = [self._ratings[pair] for pair in pairs]
        return [None if rating is None else rating / TOP for rating in ratings]

    def _ask_all(self, pairs: list[Pair]) -> None:
        i = 0
        while i < len(pairs):
            self._show(pairs[i], f"response {i + 1} of {len(pairs)}")
            answer = self._answer()
            if answer == "q":
                raise KeyboardInterrupt(f"stopped at response {i + 1} of {len(pairs)} to rate")
            if answer != "u":
                self._note(pairs[i], None if answer == "s" else float(answer))
                i += 1
            elif i == 0:
                self._print("nothing to undo: this is the first")
            else:
                i -= 1
                self._note(pairs[i], undone=True)

    def _answer(self) -> str:
        """ "s", "u", "q", or a rating as a text that float() reads."""
        while True:
            line = self._read()
            if not line:
                self._print("")
                return "q"
            answer = line.strip().lower().replace(",", ".")
            if answer in ("s", "u", "q"):
                return answer
            if answer == "?":
                self._print(HELP)
            elif re.fullmatch(r"\d+(\.\d+)?", answer, re.ASCII) and float(answer) <= TOP:
                return answer
            else:  # also for an empty line: a mistyped key must not count as a rating
                self._print(f"{line.strip()!r} is not an answer: give a number from 0 to {TOP}, s, u, q, or ? for help")

    # --- memory -----------------------------------------------------------------------------------------------------

    def _note(self, pair: Pair, rating: float | None = None, *, undone: bool = False) -> None:
        """Store an answer, or the fact that an answer was undone; first in the log, then in memory."""
        prompt, response, target = pair
        entry: dict[str, Any] = {"prompt": prompt, "response": response, "rating": rating}
        entry |= {"target": target} if target is not None else {}
        entry |= {"undone": True} if undone else {}
        entry["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.log is not None:
            append_line(self.log, entry)
        self._recall(entry)

    def _recall(self, entry: Mapping[str, Any]) -> None:
        """Store one line of the log in memory. The last line of a pair is valid."""
        prompt, response, target, rating = (entry.get(key) for key in ("prompt", "response", "target", "rating"))
        is_rated = "rating" in entry and (rating is None or (isinstance(rating, int | float) and 0 <= rating <= TOP))
        if not (is_rated and isinstance(prompt, str) and isinstance(response, str) and isinstance(target, str | None)):
            raise ValueError(
                f"{self.log} has a line that is not a rating: {str(entry)[:80]}. A line has the texts prompt and "
                f"response, a rating (0 to {TOP}, or null), and optionally the text target. Name another file as log=, "
                "or correct this one"
            )
        pair = (prompt, response, target)
        if entry.get("undone"):
            self._ratings.pop(pair, None)
        else:
            self._ratings[pair] = rating

    # --- the terminal -----------------------------------------------------------------------------------------------

    def _require_terminal(self) -> None:
        missing = [
            name
            for name, own in (("stdin", self._stdin), ("stdout", self._stdout))
            if own is None and not ((stream := getattr(sys, name)) and stream.isatty())
        ]
        if missing:
            raise RewardUnavailable(
                f"there is no person to ask: {' and '.join(missing)} must be a terminal. Start the run in a terminal, "
                "in the foreground and without redirected input or output, or use another reward"
            )

    def _read(self) -> str:
        """One line of input; empty at the end of the input."""
        self._print(QUESTION, end="")
        return (self._stdin or sys.stdin).readline()

    def _show(self, pair: Pair, title: str) -> None:
        from rich.console import Console
        from rich.panel import Panel
        from rich.text import Text

        prompt, response, target = pair
        for name, text in {"prompt": prompt, "target": target, title: response}.items():
            if text is not None:
                content, style = Text(self._printable(text) or "(empty)"), "bold" if name == title else "dim"
                Console(file=self._out).print(Panel(content, title=name, border_style=style))

    def _print(self, text: str, end: str = "\n") -> None:
        print(self._printable(text), end=end, file=self._out, flush=True)

    @property
    def _out(self) -> TextIO:
        return sys.stdout if self._stdout is None else self._stdout

    def _printable(self, text: str) -> str:
        text = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def _ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt inside the block, also if the process has a handler that only records Ctrl-C:
    with such a handler, input() would continue to wait.

    Python delivers signals to the main thread only. In another thread the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is not None:  # None: a handler from C code, which signal() cannot restore
            signal.signal(signal.SIGINT, before)
