"""The checkpoints of fit(): copied immediately, written in parallel with the next steps, retried after a failure.

Training waits for the copy only. With callbacks it also waits for the write, because on_save must find the files of
its own step.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path

from ..state import RunState
from ..storage import checkpoint
from . import snapshot


class Saver:
    """Writes the checkpoints of one run; a context manager that waits for the last write on exit.

    Args:
        state: the state of the run.
        folder: the folder for step-N/.
        saved: called in the training thread with the path of each complete checkpoint.
        asynchronous: whether a separate thread writes the checkpoints.
    """

    def __init__(self, state: RunState, folder: Path, saved: Callable[[Path], None], *, asynchronous: bool) -> None:
        self.state, self.folder, self.saved, self.asynchronous = state, folder, saved, asynchronous
        self.last: Path | None = None  # the newest complete checkpoint
        self._writing: Future[Path] | None = None
        self._retry_at: int | None = None  # the step at which to try again after a failure
        self._wait = 1  # steps between tries, doubled each time

    def save(self, keep: Collection[int] = ()) -> None:
        """Save a checkpoint of the current state. A write that fails gives a warning, and `poll` reports when a retry
        is due."""
        self._begin(keep)
        if not self.asynchronous:
            self.wait()

    def _begin(self, keep: Collection[int]) -> None:
        self.wait()
        content, step = snapshot.take(self.state), self.state.global_step
        limit = self.state.config.save_total_limit
        if self.state.generator.optimizer.skipped or self.state.discriminator.optimizer.skipped:
            limit = None  # delete none: on_nonfinite="rollback" may need an older one

        writing = self._writing = Future()

        def write() -> None:
            try:
                writing.set_result(checkpoint.write(content, self.folder, step, limit=limit, keep=keep))
            except BaseException as error:  # raised or reported in the training thread
                writing.set_exception(error)

        # No executor: Python waits for its threads at exit, but a second signal must end the process immediately.
        threading.Thread(target=write, name="lora-gan checkpoint", daemon=True).start()

    def poll(self) -> bool:
        """Between steps: report a finished write. Returns whether a failed checkpoint is due for a retry."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._retry_at is not None and self.state.global_step >= self._retry_at

    def finish(self, keep: Collection[int] = ()) -> Path:
        """At the end of the run: return the path of a complete checkpoint of this step.

        Raises:
            OSError: the checkpoint could not be written.
        """
        self.wait()
        if self.last is None or self.last.name != f"step-{self.state.global_step}":
            self._begin(keep)
            self.wait(raising=True)
        assert self.last is not None
        return self.last

    def wait(self, *, raising: bool = False) -> None:
        """Wait for a running write and report its result.

        Raises:
            OSError: the write failed, and `raising` is True; else the failure gives a warning.
        """
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            self.last = writing.result()
        except OSError as error:
            if raising:
                raise
            self._retry_at, self._wait = self.state.global_step + self._wait, 2 * self._wait
            warnings.warn(
                f"a checkpoint could not be written to {self.folder} ({error}): training continues UNSAVED, and tries "
                f"again at step {self._retry_at}; make room there",
                stacklevel=3,
            )
        else:
            self._retry_at, self._wait = None, 1
            self.saved(self.last)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        is_killed = kind is not None and not issubclass(kind, Exception)  # a second signal: do not wait for the write
        if self._writing is not None and not is_killed:
            self._writing.exception()  # waits
