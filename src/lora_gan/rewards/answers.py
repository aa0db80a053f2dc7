"""answers.jsonl: the answers of the true reward, on the disk before they are used: after a crash nobody pays twice.

    {"run": {"seed": 0, "base": "…", "rewards": ["judge"], "sources": {"judge": "digest of its source"}}}
    {"step": 12, "reward": "judge", "asked": "digest of the question", "occurrence": 0, "answer": 0.5}

A run that goes on from its newest checkpoint takes the answers that were logged after it and does not ask for them
again. A run that was taken back to an older checkpoint asks again, since there may have been a reason. Answers of a
reward whose source has changed since are not taken, unless the run is told to. They stay in the file with their
`source`, so that the next start can still take them. Answers from before the last checkpoint but one are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from ..storage.json_lines import as_line, open_lines, rewritten

FILE = "answers.jsonl"
SYNC_EVERY = 0.1  # seconds: a step's first answers are on the disk while the later ones are asked for

KEY = ("step", "reward", "asked", "occurrence")
Key = tuple[int, str, str, int]  # step, reward, digest of the question, which of the step's equal questions


class Answers(AbstractContextManager["Answers"]):
    """One run's log of answers.

    Args:
        folder: where answers.jsonl stands.
        run: what tells this run from another; the answers of another one are not taken. `rewards` holds the rewards'
            names and `sources` {name: digest of the source}; they are compared for each reward on its own.
        step: the step that the run begins at.
        newest: the step of the newest complete checkpoint in the folder, 0 = none.
        reuse: whether answers are taken although the reward's source has changed.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, step: int, newest: int, reuse: bool = False) -> None:
        self.path, self.run = folder / FILE, dict(run)
        self.step, self._reuse = step, reuse
        self._lines: list[dict[str, Any]] = []  # what the file is to hold
        self._known: dict[Key, Any] = {}
        self._asked: Counter[tuple[str, str]] = Counter()  # this step's questions so far
        self._file: TextIO | None = None
        self._saved, self._synced = step, 0.0
        self._mutex = threading.Lock()  # answers come from several threads
        if self.path.is_file() and step == newest:
            self._take_over()

    def _take_over(self) -> None:
        header, *lines = open_lines(self.path) or [{}]
        before = header.get("run")
        if not isinstance(before, dict) or _identity(before) != _identity(self.run):
            return
        sources, then = self.run.get("sources", {}), before.get("sources")
        then = then if isinstance(then, dict) else {}
        changed: dict[Key, Any] = {}  # answers of rewards with another source
        for line in lines:
            step, reward, asked, nth = map(line.get, KEY)
            if not ("answer" in line and type(step) is int and step >= self.step):
                continue
            if not (isinstance(reward, str) and isinstance(asked, str) and type(nth) is int):
                continue
            key = (step, reward, asked, nth)
            source = line.pop("source", then.get(reward))
            if source is not None and source == sources.get(reward):
                self._known[key] = line["answer"]
            else:
                changed[key] = line["answer"]
                line["source"] = source
            self._lines.append(line)
        self._say_what_is_taken(changed)

    def _say_what_is_taken(self, changed: Mapping[Key, Any]) -> None:
        names = ", ".join(sorted({repr(key[1]) for key in changed}))
        kept = len(self._known)
        if self._reuse:
            self._known = {**changed, **self._known}
        if self._known:
            added = len(self._known) - kept
            other = f" ({added} of them from another source of {names}: reuse_answers)" if added else ""
            warnings.warn(
                f"the run broke off after its newest checkpoint: {len(self._known)} answers of the true reward are "
                f"taken from {self.path} and not asked for again; delete it to ask again{other}",
                stacklevel=6,
            )
        if changed and not self._reuse:
            warnings.warn(
                f"{len(changed)} answers of the true reward in {self.path} are not taken, and the reward is asked "
                f"again: the source of {names} has changed since they were logged, or was not logged with them. Set "
                "reuse_answers=True to take them all the same: they stay in the file until two further checkpoints "
                "are written",
                stacklevel=6,
            )

    def begin_step(self, step: int) -> None:
        self.step = step
        self._asked.clear()

    def key(self, reward: str, question: Any) -> Key:
        """What a question is known by. To be called in the order of the rows, whatever order they are answered in."""
        text = json.dumps(question, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._asked[reward, digest] += 1
        return self.step, reward, digest, self._asked[reward, digest] - 1

    def known(self, key: Key) -> tuple[bool, Any]:
        """Whether the answer is known from before the crash, and the answer."""
        return key in self._known, self._known.get(key)

    def keep(self, key: Key, answer: Any) -> None:
        """Log an answer; it outlives this process when this returns, and the machine when `settle` has."""
        line = dict(zip(KEY, key, strict=True)) | {"answer": answer}
        with self._mutex:
            self._lines.append(line)
            if self._file is None:
                self._rewrite()
            else:
                self._file.write(as_line(line))
                self._file.flush()
                if time.monotonic() - self._synced > SYNC_EVERY:
                    self._sync()

    def settle(self) -> None:
        """What was logged is on the disk when this returns."""
        with self._mutex:
            if self._file is not None:
                self._sync()

    def saved(self, step: int) -> None:
        """A checkpoint stands: what came before the one before it is not needed any more."""
        with self._mutex:
            self._lines = [line for line in self._lines if line["step"] >= self._saved]
            self._saved = step
            if self._file is not None:
                self._rewrite()

    def _rewrite(self) -> None:
        """The whole file."""
        if self._file is not None:
            self._file.close()
        self._file = rewritten(self.path, [{"run": self.run}, *self._lines])
        self._synced = time.monotonic()

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _identity(run: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from another, without its rewards, as JSON gives it back."""
    return json.loads(json.dumps({name: value for name, value in run.items() if name not in ("rewards", "sources")}))
