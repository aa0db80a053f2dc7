"""The cost of a paid judge, measured on a few calls and projected to a whole run."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .source import cells


class Meter:
    """Counts the tokens that the judges in some rewards use after this object is made.

    A judge is any object with `usage` and `price_per_million`, such as `rewards.Judge`. It is found as the reward
    itself, in a functools.partial, as the object of a bound method, in a closure, and as an attribute of a reward.
    """

    def __init__(self, funcs: Sequence[Callable[..., Any]]) -> None:
        self.judges = list(_judges(funcs, set(), 3))
        self._before = [judge.usage for judge in self.judges]

    def lines(self, rows: int, plan_calls: int, planned: str) -> list[str]:
        """One line per judge: its tokens per call since the meter was made, and the cost of a run.

        Args:
            rows: number of responses that the reward has scored since the meter was made.
            plan_calls: number of calls of the run.
            planned: describes these calls in the message.
        """
        return [
            _line(judge, before, judge.usage, rows, plan_calls, planned)
            for judge, before in zip(self.judges, self._before, strict=True)
        ]


def _line(judge: Any, before: dict[str, Any], now: dict[str, Any], rows: int, plan_calls: int, planned: str) -> str:
    name = f"{getattr(judge, '__name__', 'judge')} ({getattr(judge, 'model', '')})"
    used = {count: now[count] - before[count] for count in ("cached", "failed", "prompt_tokens", "completion_tokens")}
    asked = rows - used["cached"] - used["failed"]
    if asked <= 0:
        why = "its cache answered all" if used["cached"] else "no call was answered"
        return f"  {name}: the cost of the run is not known, {why} of these calls"
    prompt, completion = used["prompt_tokens"] / asked, used["completion_tokens"] / asked
    if not prompt + completion:
        return f"  {name}: the cost of the run is not known, the server does not count tokens"
    per_call = f"  {name}: {prompt:,.0f} prompt and {completion:,.0f} completion tokens per call"
    if judge.price_per_million is None:
        return (
            f"{per_call}, about {plan_calls * prompt:,.0f} and {plan_calls * completion:,.0f} for the {planned}; "
            "set price_per_million=[PROMPT, COMPLETION] to see the cost"
        )
    price = (prompt * judge.price_per_million[0] + completion * judge.price_per_million[1]) / 1e6
    return (
        f"{per_call}: about {amount(price * plan_calls)} for the {planned}, in the currency of price_per_million "
        f"({amount(price * asked)} in this dry run)"
    )


def amount(cost: float) -> str:
    """A price with two decimals, or with two significant digits if it is below 1."""
    return f"{cost:,.2f}" if cost >= 1 or cost == 0 else f"{cost:.2g}" if cost >= 1e-4 else f"{cost:.1e}"


def _judges(values: Any, visited: set[int], depth: int) -> Iterator[Any]:
    """The judges in some values and in the values that these refer to, up to `depth` levels, each once."""
    for value in values:
        if id(value) in visited or isinstance(value, str | bytes | int | float | type | None):
            continue
        visited.add(id(value))
        if hasattr(value, "price_per_million") and isinstance(getattr(value, "usage", None), dict):
            yield value
        elif depth:
            yield from _judges(_referenced(value), visited, depth - 1)


def _referenced(value: Any) -> Iterator[Any]:
    """The values that a reward may call."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from dict(cells(value)).values()
        yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
    elif isinstance(value, list | tuple):
        yield from value
    elif callable(value):
        yield from vars(value).values() if hasattr(value, "__dict__") else ()
