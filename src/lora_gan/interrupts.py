"""Ctrl-C during a run: the step under way is finished, so that what is saved is whole; a second one stops at once.

Asking for rewards may take long and changes nothing yet: there the first Ctrl-C stops at once, too, and after one that
came while the step's responses were sampled nothing is asked any more.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, at a point where everything is as the last whole step left it."""


class Interrupts:
    """Within `catching()` the first Ctrl-C is kept for `check()`; the second raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self._requested = False
        self._harmless = False  # whether raising now would leave nothing half-done

    @contextmanager
    def catching(self) -> Iterator[None]:
        """In threads other than the main one, where Python delivers no signals, nothing is caught."""
        self._requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            self._requested = False
            if before is not None:  # None: set by C code, which signal() cannot put back
                signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Between steps: raise Interrupted where Ctrl-C was pressed."""
        if self._requested:
            raise Interrupted

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """What runs inside may be broken off at any point: Ctrl-C, or one that came before, raises Interrupted."""
        self._harmless = True
        try:
            if self._requested:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt as stop:  # a person who is asked for rewards may quit, too
            raise Interrupted(*stop.args) from stop
        finally:
            self._harmless = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._harmless or self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print(
            "\nCtrl-C: stopping where a step is whole, then saving; once more stops at once",
            file=sys.stderr,
            flush=True,
        )
