"""Ctrl-C and SIGTERM during a run: the step under way is finished, so that what is saved is whole; a second one stops
at once.

Asking for rewards may take long and changes nothing yet: there the first one stops at once, too, and after one that
came while the step's responses were sampled nothing is asked any more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}  # as a person calls them


class Interrupted(KeyboardInterrupt):
    """A signal came, and everything is as the last whole step left it."""

    def __init__(self, *args: object, number: int) -> None:
        super().__init__(*args)
        self.number, self.cause = number, NAMES[signal.Signals(number)]

    def ending(self, message: str) -> BaseException:
        """What fit() ends with: KeyboardInterrupt after Ctrl-C, Terminated after SIGTERM."""
        return Terminated(message) if self.number == signal.SIGTERM else KeyboardInterrupt(message)


class Terminated(SystemExit):
    """SIGTERM, as from a scheduler that takes the machine back; the process ends with the status a shell expects."""

    code: int = 128 + signal.SIGTERM


class Interrupts:
    """Within `catching()` the first signal is kept for `check()`; the second raises at once."""

    def __init__(self) -> None:
        self._came: int | None = None  # the signal that came
        self._process = os.getpid()  # whose signals these are
        self._harmless = False  # whether raising now would leave nothing half-done

    @contextmanager
    def catching(self) -> Iterator[None]:
        """In threads other than the main one, where Python delivers no signals, nothing is caught; nor is SIGTERM where
        the process was told to ignore it."""
        self._came, self._process = None, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in NAMES:
            # SIGINT is ignored in whatever a shell starts in the background, where it is asked for all the same.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._came = None
            for number, handler in before.items():
                if handler is not None:  # None: set by C code, which signal() cannot put back
                    signal.signal(number, handler)

    def check(self) -> None:
        """Between steps: raise Interrupted where a signal came."""
        if self._came:
            raise Interrupted(number=self._came)

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """What runs inside may be broken off at any point: a signal, or one that came before, raises Interrupted."""
        self._harmless = True
        try:
            if self._came:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt as stop:  # a person who is asked for rewards may quit, too
            raise Interrupted(*stop.args, number=self._came or signal.SIGINT) from stop
        finally:
            self._harmless = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # forked from the run, as a reward's workers are: as if nothing were caught
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_second, self._came = self._came is not None, number
        if self._harmless:
            raise KeyboardInterrupt
        if is_second:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        print(
            f"\n{NAMES[signal.Signals(number)]}: the run stops after this step and saves it. A second signal stops at "
            "once, and the step is lost",
            file=sys.stderr,
            flush=True,
        )
