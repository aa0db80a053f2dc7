"""How a reward is asked: again after a failure, within a time limit, several calls at once. The numbers are those of
one call after the other.

A call is one question to a reward of the form f(response, target), or one to a whole batch. An `async def` reward is
awaited on an event loop that lives as long as the process, so that connections which it opened stay open.
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
LONGEST = 60.0  # seconds between two tries, at the most
ASYNC_WORKERS = 16  # calls of an `async def` reward at once, where nothing else is said


class RewardError(ValueError):
    """A reward function raised, or returned what is not a score. The message names the function and the row."""


class RewardUnavailable(RuntimeError):
    """A reward cannot run here at all, whatever it is asked to score: its model or its data is not to be had."""


HOPELESS = (RewardUnavailable, ImportError)  # no further try helps
Call = tuple[Any, Sequence[int], Callable[[], Any], Callable[[Any], Answer]]


@dataclass
class Caller:
    """How rewards are asked, and which rows they failed on."""

    timeout: float | None = None  # seconds a call may take
    retries: int = 0  # further tries after one that raised, or took too long
    backoff: float = 1.0  # seconds before the first of them; twice as many before each next one
    workers: int | None = None  # calls at once; None: 1, and ASYNC_WORKERS of an `async def` reward
    skip: bool = False  # when the last try has failed: go on without an answer
    log: Answers | None = None
    may_retry: Callable[[int], bool] = lambda rows: True  # whether a failed call about so many rows may be made again
    on_retry: Callable[[str, str], None] = lambda reward, cause: None  # told of each failed try that is made again
    failed: dict[int, str] = field(default_factory=dict)  # rows without an answer after the last try: the cause
    asked: dict[str, int] = field(default_factory=dict)  # by reward: rows of calls that were made, each counted once
    kept: dict[str, int] = field(default_factory=dict)  # of these, rows whose answer is in the log
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def all(
        self,
        name: str,
        calls: Sequence[Call[Answer]],
        *,
        where: Callable[[int], str],
        is_async: bool = False,
    ) -> list[Answer | None]:
        """The answers to a reward's calls, in their order.

        Args:
            name: the reward's, by which its answers are logged.
            calls: for each the question, as it is logged; the rows it is about; what asks; and what makes an answer of
                what that returned. The last is not tried again: a value that is no score is a mistake, not bad weather.
            where: names a call in errors, by the first of its rows.
            is_async: whether the calls return awaitables.

        Raises:
            RewardError: the last try of a call failed, and `skip` is False. Of several such calls, the first is named.
            RewardUnavailable, ImportError: passed on as they are.
        """
        log = self.log
        keys = [] if log is None else [log.key(name, question) for question, *_ in calls]

        def answer(i: int) -> Answer | None:
            _, rows, ask, read = calls[i]
            if log is not None:
                known, before = log.known(keys[i])
                if known:
                    return before
            with self._mutex:
                self.asked[name] = self.asked.get(name, 0) + len(rows)
            try:
                value = self._tried(name, ask, len(rows))
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
            return _at_once(answer, len(calls), workers)
        finally:
            if log is not None:
                log.settle()

    def _tried(self, name: str, ask: Callable[[], Any], rows: int) -> Any:
        """What a call about so many rows returns, tried as often as is allowed."""

        def tell(state: RetryCallState) -> None:
            error = None if state.outcome is None else state.outcome.exception()
            assert error is not None  # tenacity calls this after a failed try
            self.on_retry(name, cause_of(error))

        attempts = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, HOPELESS)),
            # The order matters: `may_retry` counts what it allows, and is not asked after the last try.
            stop=lambda state: state.attempt_number > self.retries or not self.may_retry(rows),
            wait=wait_exponential(self.backoff, max=LONGEST),
            before_sleep=tell,
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
    """A call in a thread that the end of the process does not wait for, as it would for an executor's: it may hang."""
    outcome: Future[Answer] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="lora-gan reward", daemon=True).start()
    return outcome


def cause_of(error: BaseException) -> str:
    """An error as part of one line, such as "HTTPError: HTTP Error 503: Service Unavailable"."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()).rstrip(": "), 200)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, a method or an object's __call__ is an `async def`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _at_once(answer: Callable[[int], Answer], count: int, workers: int) -> list[Answer]:
    """answer(0), answer(1), …, several at once; after an error no further one is begun. Raises the first error."""
    free, given_up = threading.Semaphore(workers), threading.Event()

    def work(i: int) -> Answer:
        try:
            return answer(i)
        except BaseException:
            given_up.set()
            raise
        finally:
            free.release()

    outcomes: list[Future[Answer]] = []
    for i in range(count):
        free.acquire()
        if given_up.is_set():
            break
        outcomes.append(_in_thread(partial(work, i)))
    return [outcome.result() for outcome in outcomes]


def _awaited(value: Any, timeout: float | None) -> Any:
    """What an async reward comes to; another's value as it is."""
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
