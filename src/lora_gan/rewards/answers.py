"""answers.jsonl: the log of the true reward's answers. An answer is on the disk before a step uses it, so a crash never
causes a second paid call for the same question.

    {"run": {"seed": 0, "base": "…", "rewards": ["judge"], "sources": {"judge": "digest of its source"}}}
    {"step": 12, "reward": "judge", "asked": "digest of the question", "occurrence": 0, "answer": 0.5}

- A run that continues from its newest checkpoint reuses the answers that were logged after that checkpoint.
- A run that continues from an older checkpoint asks again, because the user may have gone back for a reason.
- If the source of a reward has changed, its answers are reused only with `reuse_answers`. They stay in the file with
  their `source`, so the next start can still reuse them.
- Answers from before the second newest checkpoint are dropped.
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
SYNC_EVERY = 0.1  # seconds; early answers of a step reach the disk while later calls are still running

KEY = ("step", "reward", "asked", "occurrence")
Key = tuple[int, str, str, int]  # step, reward, digest of the question, index among equal questions of the step


class Answers(AbstractContextManager["Answers"]):
    """The answer log of one run. Thread-safe.

    Args:
        folder: the folder of answers.jsonl.
        run: the identity of this run. The answers of a run with another identity are not reused. `rewards` holds the
            names of the rewards and `sources` holds {name: digest of the source}; both are compared per reward.
        step: the step at which the run starts.
        newest: the step of the newest complete checkpoint in the folder; 0: there is none.
        reuse: whether to reuse the answers of a reward after its source has changed.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], *, step: int, newest: int, reuse: bool = False) -> None:
        self.path, self.run = folder / FILE, dict(run)
        self.step, self._reuse = step, reuse
        self._lines: list[dict[str, Any]] = []  # the content of the file
        self._known: dict[Key, Any] = {}
        self._asked: Counter[tuple[str, str]] = Counter()  # questions of this step so far, by (reward, digest)
        self._file: TextIO | None = None
        self._saved, self._synced = step, 0.0
        self._mutex = threading.Lock()  # answers come from several threads
        if self.path.is_file() and step == newest:
            self._read_earlier_answers()

    def _read_earlier_answers(self) -> None:
        header, *lines = open_lines(self.path) or [{}]
        earlier = header.get("run")
        if not isinstance(earlier, dict) or _identity(earlier) != _identity(self.run):
            return
        sources, logged_sources = self.run.get("sources", {}), earlier.get("sources")
        logged_sources = logged_sources if isinstance(logged_sources, dict) else {}
        changed: dict[Key, Any] = {}  # answers of rewards that had another source
        for line in lines:
            key: Any = tuple(map(line.get, KEY))
            if "answer" not in line or [*map(type, key)] != [int, str, str, int] or key[0] < self.step:
                continue
            reward = line["reward"]
            source = line.pop("source", logged_sources.get(reward))
            if source is not None and source == sources.get(reward):
                self._known[key] = line["answer"]
            else:
                changed[key] = line["answer"]
                line["source"] = source
            self._lines.append(line)
        self._warn_of_reuse(changed)

    def _warn_of_reuse(self, changed: Mapping[Key, Any]) -> None:
        names = ", ".join(sorted({repr(key[1]) for key in changed}))
        unchanged = len(self._known)
        if self._reuse:
            self._known = {**changed, **self._known}
        if self._known:
            added = len(self._known) - unchanged
            other = f" (reuse_answers: {added} answers are from another source of {names})" if added else ""
            warnings.warn(
                f"the run stopped after its newest checkpoint: {len(self._known)} answers of the true reward are "
                f"reused from {self.path}; delete this file to ask again{other}",
                stacklevel=6,
            )
        if changed and not self._reuse:
            warnings.warn(
                f"{len(changed)} answers of the true reward in {self.path} are not reused, and the reward is called "
                f"again: the source of {names} has changed since they were logged, or was not logged. Set "
                "reuse_answers=True to reuse them; they stay in the file until two more checkpoints are written",
                stacklevel=6,
            )

    def begin_step(self, step: int) -> None:
        self.step = step
        self._asked.clear()

    def key(self, reward: str, question: Any) -> Key:
        """The key of a question in the log. Call it in the order of the rows; the answers may arrive in any order."""
        text = json.dumps(question, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        self._asked[reward, digest] += 1
        return self.step, reward, digest, self._asked[reward, digest] - 1

    def known(self, key: Key) -> tuple[bool, Any]:
        """Whether the log has an answer from before the crash, and this answer (None if there is none)."""
        return key in self._known, self._known.get(key)

    def keep(self, key: Key, answer: Any) -> None:
        """Log an answer. After this call it survives a crash of the process; after `settle`, a crash of the machine."""
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
        """Write all logged answers to the disk before returning."""
        with self._mutex:
            if self._file is not None:
                self._sync()

    def saved(self, step: int) -> None:
        """Note that a checkpoint of this step is complete. Answers from before the previous checkpoint are dropped."""
        with self._mutex:
            self._lines = [line for line in self._lines if line["step"] >= self._saved]
            self._saved = step
            if self._file is not None:
                self._rewrite()

    def _rewrite(self) -> None:
        """Write the whole file again, and keep it open for more lines."""
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
    """The identity of a run without its rewards, as it is after a round trip through JSON."""
    return json.loads(json.dumps({name: value for name, value in run.items() if name not in ("rewards", "sources")}))
