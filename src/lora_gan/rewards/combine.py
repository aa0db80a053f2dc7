"""Where what a user's reward returns becomes numbers. Pure functions without state.

Two forms are understood: f(response, target) -> float, and TRL's f(prompts=, completions=, **columns) -> list. In both,
a score is any one real number (Python, NumPy or PyTorch; a bool counts as 0 or 1), or None: "not answered" in the first
form, "does not apply to this row" in the second. Departure from TRL: NaN is refused, not read as None, since it is
more often a bug in a reward than a decision.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cosine import RewardUnavailable

PairReward = Callable[[str, str | None], Any]
TrlReward = Callable[..., Any]

ACCEPTED = "a finite number (int, float, bool, or a NumPy or PyTorch scalar), or None"


class RewardError(ValueError):
    """A reward function raised, or returned what is not a score. The message names the function and the row."""


def score_pairs(fn: PairReward, responses: Sequence[str], targets: Sequence[str | None]) -> list[float | None]:
    """Score response i against target i by f(response, target).

    A function that has a method `batch(responses, targets) -> list` is asked once for all rows, as CosineReward is.

    Returns:
        for each row a finite float, or None where the reward did not answer.

    Raises:
        RewardError: the function raised, or a value is not a score.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
    """
    if len(responses) != len(targets):
        raise ValueError(f"{len(responses)} responses but {len(targets)} targets; give one target (or None) for each")
    name = reward_name(fn)

    def row(i: int) -> str:
        return f"row {i} (response {_excerpt(responses[i])}, target {_excerpt(targets[i])})"

    if hasattr(fn, "batch"):
        where = f"{len(responses)} rows, the first of them {row(0)}" if responses else "no rows"
        values = _call(name, where, lambda: fn.batch(list(responses), list(targets)))
        return _scores(name, values, len(responses), row)
    return [
        _score(name, _call(name, row(i), lambda i=i: fn(responses[i], targets[i])), row(i))
        for i in range(len(responses))
    ]


def score_trl(
    funcs: Sequence[TrlReward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Score rows by TRL's reward functions, f(prompts=..., completions=..., **columns) -> list[float | None].

    A row's total is the sum of weight · score over the functions that apply to it, as in TRL's GRPOTrainer; the weights
    are not renormalised. A row to which none applies has no total: None, where TRL warns and counts 0.

    Args:
        funcs: reward functions; they must accept the columns they do not use (**kwargs).
        weights: one for each function; None means 1 each.
        prompts: one for each row, text or chat messages, handed on as they are.
        completions: likewise.
        columns: the dataset's other columns, each with one entry for each row.

    Returns:
        totals: for each row a finite float, or None.
        parts: {name of the function: its scores, unweighted}, in the order of `funcs`.

    Raises:
        RewardError: a function raised, or returned what is not one score a row.
        ValueError: weights, completions or a column of the wrong length.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
    """
    rows = len(prompts)
    weights = [1.0] * len(funcs) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(funcs):
        raise ValueError(f"{len(weights)} reward weights for {len(funcs)} reward functions; give one for each, or None")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights {weights}; all must be finite numbers")
    for column, entries in {"completions": completions, **columns}.items():
        if len(entries) != rows:
            raise ValueError(f"{len(entries)} {column} for {rows} prompts; give one for each prompt")

    def row(i: int) -> str:
        return f"row {i} (prompt {_excerpt(prompts[i])}, completion {_excerpt(completions[i])})"

    where = f"{rows} rows, the first of them {row(0)}" if rows else "no rows"
    parts: dict[str, list[float | None]] = {}
    for name, func in zip(reward_names(funcs), funcs, strict=True):
        # Lists of its own for each function: one that sorts in place must not misalign the next.
        kwargs = {column: list(entries) for column, entries in columns.items()}
        values = _call(
            name, where, lambda f=func, kw=kwargs: f(prompts=list(prompts), completions=list(completions), **kw)
        )
        parts[name] = _scores(name, values, rows, row)
    weighted = [
        [weight * score for weight, part in zip(weights, parts.values(), strict=True) if (score := part[i]) is not None]
        for i in range(rows)
    ]
    return [sum(terms) if terms else None for terms in weighted], parts


def reward_name(func: Callable[..., Any]) -> str:
    """The function's __name__, or its class's where it has none (functools.partial, an object with __call__)."""
    return getattr(func, "__name__", None) or type(func).__name__


def reward_names(funcs: Sequence[Callable[..., Any]]) -> list[str]:
    """Names by which logs tell the functions apart: the second "f" is "f_2", or the next number that is free."""
    names: list[str] = []
    for func in funcs:
        name, number = reward_name(func), 1
        while (unique := name if number == 1 else f"{name}_{number}") in names:
            number += 1
        names.append(unique)
    return names


def _call(name: str, where: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (RewardUnavailable, ImportError):
        raise
    except Exception as error:
        raise RewardError(f"the reward {name!r} raised {type(error).__name__} on {where}: {error}") from error


def _scores(name: str, values: Any, rows: int, row: Callable[[int], str]) -> list[float | None]:
    values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"the reward {name!r} returned {_excerpt(values)} ({type(values).__name__}) for {rows} rows; "
            "it must return a list with one score for each row"
        )
    if len(values) != rows:
        last = f"; nothing for {row(len(values))}" if len(values) < rows else ""
        raise RewardError(
            f"the reward {name!r} returned {len(values)} scores for {rows} rows{last}; it must return one for each row"
        )
    return [_score(name, value, row(i)) for i, value in enumerate(values)]


def _score(name: str, value: Any, where: str) -> float | None:
    """One finite Python float, or None; anything else raises RewardError."""
    if value is None:
        return None
    try:
        number = value.item() if hasattr(value, "item") else value  # .item() raises unless there is exactly one element
        # float() would parse a string; whatever is a real number has __float__.
        result = float(number) if hasattr(number, "__float__") else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        result = math.nan
    if not math.isfinite(result):
        raise RewardError(
            f"the reward {name!r} returned {_excerpt(value)} ({type(value).__name__}) for {where}; "
            f"a score is {ACCEPTED}"
        )
    return result


def _excerpt(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
