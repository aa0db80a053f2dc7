"""answers.jsonl: what the true reward said, on the disk before it is used, so that a crash makes nobody pay twice.

    {"run": {"seed": 0, "base": "…", "rewards": ["judge"]}}
    {"step": 12, "reward": "judge", "asked": "digest of the question", "occurrence": 0, "answer": 0.5}

A run that goes on from its newest checkpoint takes the answers that were logged after it in place of asking; one that
was taken back to an older checkpoint asks anew, since there may have been a reason. What two checkpoints have gone
past is dropped.
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
from pathlib import Path
from typing import Any, TextIO

from . import durable
from .json_lines import open_lines

FILE = "answers.jsonl"
SYNC_EVERY = 0.1  # seconds: a step's first answers are on the disk while the later ones are asked for

Key = tuple[int, str, str, int]  # step, reward, digest of the question, which of the step's equal questions


class Answers:
    """One run's log of answers.

    Args:
        folder: where answers.jsonl stands.
        run: what tells this run from another; the answers of another one are not taken.
        step: the step that the run begins at.
        newest: the step of the newest complete checkpoint in the folder, 0 = none.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, step: int, newest: int) -> None:
        self.path, self.run = folder / FILE, dict(run)
        self.step = step
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
        if header.get("run") != json.loads(json.dumps(self.run)):
            return
        for line in lines:
            key = (line.get("step"), line.get("reward"), line.get("asked"), line.get("occurrence"))
            if "answer" in line and type(key[0]) is int and key[0] >= self.step:
                self._known[key] = line["answer"]
                self._lines.append(line)
        if self._known:
            warnings.warn(
                f"the run broke off after its newest checkpoint: {len(self._known)} answers of the true reward are "
                f"taken from {self.path} and not asked for again; delete it to ask anew",
                stacklevel=5,
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
        line = dict(zip(("step", "reward", "asked", "occurrence"), key, strict=True)) | {"answer": answer}
        with self._mutex:
            self._lines.append(line)
            if self._file is None:
                self._rewrite()
            else:
                self._file.write(json.dumps(line) + "\n")
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
        """The whole file, written beside and renamed, open for more."""
        if self._file is not None:
            self._file.close()
        data = "".join(json.dumps(line) + "\n" for line in [{"run": self.run}, *self._lines])
        durable.replace_file(self.path, data.encode())
        self._file = self.path.open("a", encoding="utf-8", newline="\n")
        self._synced = time.monotonic()

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
