"""Ctrl-C during a run: the step under way is finished, so that what is saved is whole; a second one stops at once.

Asking for rewards may take long and changes nothing yet, so there the first Ctrl-C stops at once, too.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Within `catching()`: `requested` turns true at the first Ctrl-C; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._harmless = False  # whether raising now would leave nothing half-done
        self.catches = False

    @contextmanager
    def catching(self) -> Iterator[None]:
        """In threads other than the main one, where Python delivers no signals, nothing is caught."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        self.catches = True
        try:
            yield
        finally:
            self.catches = False
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """What runs inside may be broken off at any point: Ctrl-C raises KeyboardInterrupt at once."""
        self._harmless = True
        try:
            yield
        finally:
            self._harmless = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._harmless or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nCtrl-C: finishing this step, then saving; once more stops at once", file=sys.stderr, flush=True)
