"""Ctrl-C and SIGTERM during a run.

After the first signal the run finishes its current step, so that the saved state is complete. A second signal stops the
run immediately.

Asking for rewards may take long and does not change the state. There the first signal stops the run immediately, too.
After a signal during sampling, no reward is asked.
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

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}  # for messages


class Interrupted(KeyboardInterrupt):
    """A signal arrived, and the state is that after the last complete step."""

    def __init__(self, *args: object, number: int) -> None:
        super().__init__(*args)
        self.number, self.cause = number, NAMES[signal.Signals(number)]

    def exception(self, message: str) -> BaseException:
        """The exception that fit() raises: KeyboardInterrupt after Ctrl-C, Terminated after SIGTERM."""
        return Terminated(message) if self.number == signal.SIGTERM else KeyboardInterrupt(message)


class Terminated(SystemExit):
    """SIGTERM, for example from a scheduler that reclaims the machine, with the exit status that shells expect."""

    code: int = 128 + signal.SIGTERM


class Interrupts:
    """Within `catching()` the first signal is kept for `check()`; the second raises immediately."""

    def __init__(self) -> None:
        self._pending: int | None = None  # the signal that arrived
        self._process = os.getpid()  # the process that handles these signals
        self._harmless = False  # whether an exception now leaves the state complete

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Handle signals within the block.

        Python delivers signals to the main thread alone; in other threads this does nothing. SIGTERM stays ignored
        where the process ignores it.
        """
        self._pending, self._process = None, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {}
        for number in NAMES:
            # Shells make background processes ignore SIGINT; a SIGINT that is sent to such a run must stop it, too.
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            self._pending = None
            for number, handler in before.items():
                if handler is not None:  # None: a handler set by C code, which signal() cannot restore
                    signal.signal(number, handler)

    def check(self) -> None:
        """Between steps: raise Interrupted if a signal arrived."""
        if self._pending:
            raise Interrupted(number=self._pending)

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """Mark a block that can be interrupted at any point: a signal during the block or before it raises
        Interrupted."""
        self._harmless = True
        try:
            if self._pending:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt as stop:  # a person who is asked for rewards may quit, too
            raise Interrupted(*stop.args, number=self._pending or signal.SIGINT) from stop
        finally:
            self._harmless = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process, such as a reward's worker: use the default handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        is_second, self._pending = self._pending is not None, number
        if self._harmless:
            raise KeyboardInterrupt
        if is_second:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        print(
            f"\n{NAMES[signal.Signals(number)]}: the run stops after this step and saves it. A second signal stops "
            "immediately, and this step is lost",
            file=sys.stderr,
            flush=True,
        )
