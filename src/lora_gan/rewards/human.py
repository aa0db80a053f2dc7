"""A person at the terminal as the reward: sees a prompt and a response, answers 0 to 10.

    gan = LoraGAN("gpt2", reward_funcs=[Human(log="ratings.jsonl")], query_rate=0.25)

The person is blind: nothing shown tells which model, adapter or step a response comes from, nor what the discriminator
predicts. Equal pairs of prompt and response are asked for once, in the life of the object and of its log.
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
HELP = """0 to 10, decimals too: 10 is the best
s  skip: no answer for this response
u  undo: back to the response before, as often as you like; the last of a round is handed in as it is given
q  stop the run (Ctrl-C and Ctrl-D do, too); what was rated is kept where there is a log
?  this help"""

# What a terminal would obey, not show: a response may hold any byte.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

Pair = tuple[str, str, str | None]  # prompt, response, and the target where it is shown


class Human:
    """Ratings by a person: rating / 10, so in [0, 1], higher is better; None for a response that was skipped.

    A reward function of TRL's form, for `reward_funcs`. Responses are shown in the order they were sampled in.

    Args:
        show_target: show the target too, where a row has one. A rating then holds for that target only. A rating in the
            log that was given without a target holds for any.
        log: a JSON Lines file that each answer is appended to as it is given, so that no crash loses one. Answers it
            holds already are not asked for again: name the same file to go on with a run.
        stdin, stdout: text streams to read answers from and write to; None is the terminal.
    """

    interactive = True  # a live display steps aside while it asks
    __name__ = "human"  # what logs call this part of a sum of rewards

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
        self._without_target: dict[tuple[str, str], float | None] = {}  # of the log, from runs that showed no target
        if log is not None:
            self.keep(log)

    def keep(self, log: str | PathLike[str]) -> None:
        """From now on append each answer to this file; what it holds already is not asked again."""
        self.log = Path(log)
        for entry in open_lines(self.log):
            self._recall(entry)
        self._without_target |= {pair[:2]: rating for pair, rating in self._ratings.items() if pair[2] is None}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Ask for each pair that has no answer yet.

        Args:
            prompts, completions: one of each for each row, texts or chat messages.
            columns: `target`, a text or None for each row, is shown if `show_target`; others are ignored.

        Returns:
            for each row a float in [0, 1], or None where it was skipped.

        Raises:
            RewardUnavailable: there is no terminal to ask at.
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
                self._say("nothing to undo: this is the first")
            else:
                i -= 1
                self._note(pairs[i], undone=True)

    def _answer(self) -> str:
        """ "s", "u", "q", or a rating as a text that float() reads."""
        while True:
            line = self._read()
            if not line:
                self._say("")
                return "q"
            answer = line.strip().lower().replace(",", ".")
            if answer in ("s", "u", "q"):
                return answer
            if answer == "?":
                self._say(HELP)
            elif re.fullmatch(r"\d+(\.\d+)?", answer, re.ASCII) and float(answer) <= TOP:
                return answer
            else:  # a bare Enter too: a slip must not cost a rating
                self._say(f"{line.strip()!r} is not an answer: a number from 0 to {TOP}, s, u, q, or ? for help")

    # --- memory -----------------------------------------------------------------------------------------------------

    def _note(self, pair: Pair, rating: float | None = None, *, undone: bool = False) -> None:
        """Remember an answer, or that one was taken back, in the log first."""
        prompt, response, target = pair
        entry: dict[str, Any] = {"prompt": prompt, "response": response, "rating": rating}
        entry |= {"target": target} if target is not None else {}
        entry |= {"undone": True} if undone else {}
        entry["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        if self.log is not None:
            append_line(self.log, entry)
        self._recall(entry)

    def _recall(self, entry: Mapping[str, Any]) -> None:
        """Take one line of the log in; the last one of a pair holds."""
        prompt, response, target, rating = (entry.get(key) for key in ("prompt", "response", "target", "rating"))
        known = "rating" in entry and (rating is None or (isinstance(rating, int | float) and 0 <= rating <= TOP))
        if not (known and isinstance(prompt, str) and isinstance(response, str) and isinstance(target, str | None)):
            raise ValueError(
                f"{self.log} holds a line that is no rating: {str(entry)[:80]}; a line has prompt, response and rating "
                f"(0 to {TOP}, or null), and may have target; texts all but the rating. Name another file as log=, or "
                "mend this one"
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
                "neither in the background nor with input or output redirected, or use another reward"
            )

    def _read(self) -> str:
        """One line; empty at the end of input."""
        self._say(QUESTION, end="")
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

    def _say(self, text: str, end: str = "\n") -> None:
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
    """Ctrl-C raises KeyboardInterrupt, even where the process only takes note of it: input() would go on waiting.

    Signals reach Python's main thread only; in another one nothing can be changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if before is not None:  # None: set by C code, which signal() cannot put back
            signal.signal(signal.SIGINT, before)
