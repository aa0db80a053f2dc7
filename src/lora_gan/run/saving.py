"""fit()'s checkpoints: copied at once, written beside the next steps, tried again where the disk was full.

Training stands still for the copies alone, unless a callback watches on_save: it must find the files of its own step.
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
    """One run's checkpoints; a context manager, at whose end nothing is being written any more.

    Args:
        state: of the run.
        folder: where step-N/ go.
        saved: called, in the thread that trains, with each checkpoint that stands.
        asynchronous: whether they are written by a thread of their own.
    """

    def __init__(self, state: RunState, folder: Path, saved: Callable[[Path], None], *, asynchronous: bool) -> None:
        self.state, self.folder, self.saved, self.asynchronous = state, folder, saved, asynchronous
        self.last: Path | None = None  # the newest that stands
        self._writing: Future[Path] | None = None
        self._retry_at: int | None = None  # the step at which to try again after a failure
        self._wait = 1  # steps between tries, doubled each time

    def save(self, keep: Collection[int] = ()) -> None:
        """Take a checkpoint of now. A failure to write it is told, and `poll` says when to try again."""
        self._begin(keep)
        if not self.asynchronous:
            self.wait()

    def _begin(self, keep: Collection[int]) -> None:
        self.wait()
        content, step = snapshot.take(self.state), self.state.global_step
        limit = self.state.config.save_total_limit
        if self.state.generator.optimizer.skipped or self.state.discriminator.optimizer.skipped:
            limit = None  # an older one may be the last good one, which on_nonfinite="rollback" goes back to

        writing = self._writing = Future()

        def write() -> None:
            try:
                writing.set_result(checkpoint.write(content, self.folder, step, limit=limit, keep=keep))
            except BaseException as error:  # told in the thread that trains
                writing.set_exception(error)

        # No executor: Python waits for an executor's threads when it ends, and a second signal must end it at once.
        threading.Thread(target=write, name="lora-gan checkpoint", daemon=True).start()

    def poll(self) -> bool:
        """Between steps: tell of what was written meanwhile; whether a checkpoint that failed is due again."""
        if self._writing is not None and self._writing.done():
            self.wait()
        return self._retry_at is not None and self.state.global_step >= self._retry_at

    def finish(self, keep: Collection[int] = ()) -> Path:
        """The run ends here: a checkpoint of this step stands when this returns.

        Raises:
            OSError: it could not be written.
        """
        self.wait()
        if self.last is None or self.last.name != f"step-{self.state.global_step}":
            self._begin(keep)
            self.wait(raising=True)
        assert self.last is not None
        return self.last

    def wait(self, *, raising: bool = False) -> None:
        """Wait for what is being written, and tell of it."""
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
                f"a checkpoint could not be written to {self.folder} ({error}): training goes on UNSAVED, and tries "
                f"again at step {self._retry_at}; make room there",
                stacklevel=3,
            )
        else:
            self._retry_at, self._wait = None, 1
            self.saved(self.last)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        in_a_hurry = kind is not None and not issubclass(kind, Exception)  # a second signal: what is half-written stays
        if self._writing is not None and not in_a_hurry:
            self._writing.exception()  # waits
