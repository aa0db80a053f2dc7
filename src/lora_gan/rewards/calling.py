"""How a reward function is called: retries, a time limit, and several calls in parallel. Parallel calls return the same
numbers as calls one after the other.

A call asks one question: one response for a reward of the form f(response, target), or a whole batch. An `async def`
reward is awaited on an event loop that runs as long as the process, so that its connections stay open.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from ..wording import shortened
from .answers import Answers

Answer = TypeVar("Answer")
#: Seconds before the first retry; doubled before each further retry. A rate limit often ends within seconds.
BACKOFF = 1.0
LONGEST = 60.0  # seconds; the longest pause between two tries
ASYNC_WORKERS = 16  # parallel calls of an `async def` reward if `workers` is None


class RewardError(ValueError):
    """A reward function raised, or its return value is not a score. The message names the function and the row."""


class RewardUnavailable(RuntimeError):
    """A reward cannot run on this machine for any response, because its model or its data is not available."""


HOPELESS = (RewardUnavailable, ImportError)  # no further try helps
Call = tuple[Any, Sequence[int], Callable[[], Any], Callable[[Any], Answer]]  # question, rows, ask, read


@dataclass
class Caller:
    """Settings for calls of rewards, and the rows on which rewards failed."""

    timeout: float | None = None  # seconds per call
    retries: int = 0  # further tries after a try that raised or took too long
    workers: int | None = None  # parallel calls; None: 1, or ASYNC_WORKERS for an `async def` reward
    skip: bool = False  # whether to continue without an answer after the last try has failed
    log: Answers | None = None
    may_retry: Callable[[int], bool] = lambda rows: True  # whether a failed call with this many rows may be repeated
    on_retry: Callable[[str, str], None] = lambda reward, cause: None  # called before each retry
    failed: dict[int, str] = field(default_factory=dict)  # {row without an answer after the last try: cause}
    asked: dict[str, int] = field(default_factory=dict)  # {reward: rows of its calls, without repetitions by retries}
    kept: dict[str, int] = field(default_factory=dict)  # {reward: rows of `asked` with an answer in the log}
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def all(
        self,
        name: str,
        calls: Sequence[Call[Answer]],
        *,
        where: Callable[[int], str],
        is_async: bool = False,
    ) -> list[Answer | None]:
        """The answers to several calls of a reward, in the order of the calls.

        Args:
            name: the name of the reward in the log.
            calls: for each call (question, rows, ask, read). The question is logged. `ask()` calls the reward and is
                retried. `read(value)` converts its return value and is not retried: a value that is not a score is a
                bug in the reward.
            where: describes a call in errors, from the index of its first row.
            is_async: whether `ask()` returns an awaitable.

        Raises:
            RewardError: the last try of a call failed, and `skip` is False. The message names the first such call.
            RewardUnavailable, ImportError: raised by the reward, and not converted.
        """
        log = self.log
        keys = [] if log is None else [log.key(name, question) for question, *_ in calls]

        def answer(i: int) -> Answer | None:
            _, rows, ask, read = calls[i]
            if log is not None:
                is_known, logged = log.known(keys[i])
                if is_known:
                    return logged
            with self._mutex:
                self.asked[name] = self.asked.get(name, 0) + len(rows)
            try:
                value = self._with_retries(name, ask, len(rows))
            except HOPELESS:
                raise
            except Exception as error:
                if not self.skip:
                    raise RewardError(
                        f"the reward {name!r} raised {type(error).__name__} on {where(rows[0])}: {error}"
                    ) from error
                with self._mutex:
                    self.failed.update(dict.fromkeys(rows, cause_of(error)))
                return None
            result = read(value)
            if log is not None:
                log.keep(keys[i], result)
                with self._mutex:
                    self.kept[name] = self.kept.get(name, 0) + len(rows)
            return result

        try:
            workers = self.workers or (ASYNC_WORKERS if is_async else 1)
            if workers == 1 or len(calls) < 2:
                return [answer(i) for i in range(len(calls))]
            return _in_parallel(answer, len(calls), workers)
        finally:
            if log is not None:
                log.settle()

    def _with_retries(self, name: str, ask: Callable[[], Any], rows: int) -> Any:
        """The return value of a call with this many rows, after as many tries as allowed."""

        def report(state: RetryCallState) -> None:
            error = None if state.outcome is None else state.outcome.exception()
            assert error is not None  # tenacity calls this after a failed try
            self.on_retry(name, cause_of(error))

        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, HOPELESS)),
            # The order matters: `may_retry` counts the calls that it allows, and must not run after the last try.
            stop=lambda state: state.attempt_number > self.retries or not self.may_retry(rows),
            wait=wait_exponential(BACKOFF, max=LONGEST),
            before_sleep=report,
            reraise=True,
        )
        return attempts(self._within_time, ask)

    def _within_time(self, ask: Callable[[], Any]) -> Any:
        if self.timeout is None:
            return _awaited(ask(), None)
        try:
            return _in_thread(lambda: _awaited(ask(), self.timeout)).result(self.timeout)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self.timeout:g} s (reward_timeout)") from None


def _in_thread(call: Callable[[], Answer]) -> Future[Answer]:
    """Start a call in a daemon thread. At exit, Python waits for the threads of an executor, and the call may hang."""
    outcome: Future[Answer] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="lora-gan reward", daemon=True).start()
    return outcome


def cause_of(error: BaseException) -> str:
    """An error in one line, such as "HTTPError: HTTP Error 503: Service Unavailable"."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()).rstrip(": "), 200)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, a method or the __call__ of an object is an `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _in_parallel(answer: Callable[[int], Answer], count: int, workers: int) -> list[Answer]:
    """[answer(0), answer(1), …] by parallel calls. After an error no further call starts. Raises the first error."""
    free, has_failed = threading.Semaphore(workers), threading.Event()

    def work(i: int) -> Answer:
        try:
            return answer(i)
        except BaseException:
            has_failed.set()
            raise
        finally:
            free.release()

    outcomes: list[Future[Answer]] = []
    for i in range(count):
        free.acquire()
        if has_failed.is_set():
            break
        outcomes.append(_in_thread(partial(work, i)))
    return [outcome.result() for outcome in outcomes]


def _awaited(value: Any, timeout: float | None) -> Any:
    """The awaited value of an async reward; every other value unchanged. `timeout` is in seconds."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await asyncio.wait_for(value, timeout)

    future = asyncio.run_coroutine_threadsafe(wait(), _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lora-gan async rewards", daemon=True).start()
    return loop
