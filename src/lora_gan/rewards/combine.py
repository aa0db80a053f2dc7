"""Where what a user's reward returns becomes numbers. Pure functions without state.

Two forms are understood everywhere, told apart by signature: f(response, target) -> float, and TRL's
f(prompts=, completions=, **columns) -> list. In both, a score is any one real number (Python, NumPy or PyTorch; a bool
counts as 0 or 1), or None: "not answered" in the first form, "does not apply to this row" in the second. Departure
from TRL: NaN is refused, not read as None, since it is more often a bug in a reward than a decision.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..wording import shown
from .calling import Call, Caller, CallFailed
from .messages import completion_text

PairReward = Callable[[str, str | None], Any]
TrlReward = Callable[..., Any]
Reward = PairReward | TrlReward
Parts = dict[str, list[float | None]]  # {name of the reward: its score of each row, unweighted}

ACCEPTED = "a finite number (int, float, bool, or a NumPy or PyTorch scalar), or None"


class RewardError(ValueError):
    """A reward function raised, or returned what is not a score. The message names the function and the row."""


class RewardUnavailable(RuntimeError):
    """A reward cannot run here at all, whatever it is asked to score: its model or its data is not to be had."""


def takes_completions(func: Reward) -> bool:
    """Whether a reward is of TRL's form: it takes the keyword `completions`, by name or through **kwargs.

    f(response, target, **kwargs) takes its first two by position and is of the pair form. What has no signature to
    read (some builtins) is of the pair form, too.
    """
    if hasattr(func, "batch"):
        return False
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):
        return False
    kinds = [parameter.kind for parameter in parameters.values()]
    if "completions" in parameters:
        return True
    by_position = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, _EITHER) for kind in kinds)
    return inspect.Parameter.VAR_KEYWORD in kinds and (by_position < 2 or "prompts" in parameters)


_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


def score_pairs(
    fn: PairReward,
    responses: Sequence[str],
    targets: Sequence[str | None],
    *,
    name: str | None = None,
    caller: Caller | None = None,
) -> list[float | None]:
    """Score response i against target i by f(response, target); `name` is what errors call it, its own if None.

    A function that has a method `batch(responses, targets) -> list` is asked once for all rows, as CosineReward is.
    `caller` says how: how often, how long, how many at once; None = once, one after the other.

    Returns:
        for each row a finite float, or None where the reward did not answer.

    Raises:
        RewardError: the function raised, or a value is not a score.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
    """
    if len(responses) != len(targets):
        raise ValueError(f"{len(responses)} responses but {len(targets)} targets; give one target (or None) for each")
    name, caller = name or reward_name(fn), caller or Caller()

    def row(i: int) -> str:
        return f"row {i} (response {_excerpt(responses[i])}, target {_excerpt(targets[i])})"

    if hasattr(fn, "batch"):
        where = f"{len(responses)} rows, the first of them {row(0)}" if responses else "no rows"
        ask = lambda: fn.batch(list(responses), list(targets))  # noqa: E731
        return _asked_once(caller, name, where, [list(responses), list(targets)], ask, row)
    return _called(
        caller,
        name,
        where=row,
        calls=[
            (
                [responses[i], targets[i]],
                [i],
                lambda i=i: fn(responses[i], targets[i]),
                lambda value, i=i: _score(name, value, row(i)),
            )
            for i in range(len(responses))
        ],
    )


def score_trl(
    funcs: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[float | None], Parts]:
    """Score rows by several rewards: `score_parts`, and their `weighted_total` as TRL's GRPOTrainer makes it.

    Returns:
        totals: for each row a finite float, or None where no reward applies to it.
        parts: {name of the function: its scores, unweighted}, in the order of `funcs`.

    Raises:
        RewardError, ValueError, RewardUnavailable, ImportError: see `score_parts`, `weighted_total`.
    """
    weights = checked_weights(weights, len(funcs))  # before a reward that costs is asked
    parts = score_parts(funcs, prompts, completions, columns)
    return weighted_total(parts, weights), parts


def score_parts(
    funcs: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    caller: Caller | None = None,
) -> Parts:
    """What each reward says of each row, unweighted.

    Args:
        funcs: rewards of either form. TRL's is called as f(prompts=..., completions=..., **columns), so it must accept
            the columns it does not use (**kwargs); the other as f(response, target), its target the column `target`,
            None where there is none.
        prompts: one for each row, text or chat messages, handed on as they are.
        completions: the responses, text or chat messages. Where the prompt is chat messages, a function of TRL's form
            gets a text as [{"role": "assistant", "content": text}], as from TRL; the pair form always gets text.
        columns: the dataset's other columns, each with one entry for each row.
        caller: how often, how long and how many at once they are asked; None = once, one after the other.

    Returns:
        {name of the function: its scores}, in the order of `funcs`.

    Raises:
        RewardError: a function raised, or returned what is not one score a row.
        ValueError: no functions, completions or a column of the wrong length, or a column named as an argument is.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
    """
    rows = len(prompts)
    if not funcs:
        raise ValueError("there are no reward functions: give at least one")
    for column in ("prompts", "completions"):
        if column in columns:
            raise ValueError(f"a column must not be called {column!r}: rewards get the rows' own {column} by that name")
    for column, entries in {"completions": completions, **columns}.items():
        if len(entries) != rows:
            raise ValueError(f"{len(entries)} {column} for {rows} prompts; give one for each prompt")

    def row(i: int) -> str:
        return f"row {i} (prompt {_excerpt(prompts[i])}, completion {_excerpt(completions[i])})"

    where = f"{rows} rows, the first of them {row(0)}" if rows else "no rows"
    parts: Parts = {}
    caller = caller or Caller()
    for name, func in zip(reward_names(funcs), funcs, strict=True):
        if not takes_completions(func):
            texts = [completion_text(completion) for completion in completions]
            parts[name] = score_pairs(func, texts, columns.get("target") or [None] * rows, name=name, caller=caller)
            continue
        # Lists of its own for each function: one that sorts in place must not misalign the next.
        arguments: dict[str, Any] = {column: list(entries) for column, entries in columns.items()}
        arguments["prompts"] = list(prompts)
        arguments["completions"] = [_as_answer(*pair) for pair in zip(prompts, completions, strict=True)]
        ask = lambda f=func, given=arguments: f(**given)  # noqa: E731
        parts[name] = _asked_once(caller, name, where, arguments, ask, row)
    return parts


def weighted_total(parts: Parts, weights: Sequence[float] | None = None) -> list[float | None]:
    """The sum of weight · score over the parts that apply to a row, for each row; the weights are not renormalised.

    A row to which none applies has no total: None, where TRL warns and counts 0. One weight for each part, None = 1.
    """
    weights = checked_weights(weights, len(parts))
    weighted = [
        [weight * score for weight, score in zip(weights, scores, strict=True) if score is not None]
        for scores in zip(*parts.values(), strict=True)
    ]
    return [sum(terms) if terms else None for terms in weighted]


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite weight for each of `count` rewards; None means 1 each."""
    weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(weights) != count:
        raise ValueError(f"{len(weights)} reward weights for {count} reward functions; give one for each, or None")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights {weights}; all must be finite numbers")
    return weights


def _as_answer(prompt: Any, completion: Any) -> Any:
    conversational = isinstance(prompt, list | tuple) and isinstance(completion, str)
    return [{"role": "assistant", "content": completion}] if conversational else completion


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


HOPELESS = (RewardUnavailable, ImportError)  # no further try helps


def _called(caller: Caller, name: str, *, where: Callable[[int], str], calls: Sequence[Call[Any]]) -> list[Any]:
    """The answers to calls; one that failed to the last is a RewardError that says where."""
    try:
        return caller.all(name, calls, hopeless=HOPELESS)
    except CallFailed as failure:
        error = failure.__cause__
        raise RewardError(
            f"the reward {name!r} raised {type(error).__name__} on {where(failure.row)}: {error}"
        ) from error


def _asked_once(
    caller: Caller, name: str, where: str, question: Any, ask: Callable[[], Any], row: Callable[[int], str]
) -> list[float | None]:
    """Scores of all rows by one call."""
    rows = _rows_of(question)
    calls = [(question, range(rows), ask, lambda values: _scores(name, values, rows, row))]
    (scores,) = _called(caller, name, where=lambda _: where, calls=calls)
    return [None] * rows if scores is None else scores


def _rows_of(question: Any) -> int:
    return len(question["prompts"] if isinstance(question, dict) else question[0])


def _scores(name: str, values: Any, rows: int, row: Callable[[int], str]) -> list[float | None]:
    try:
        values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    except Exception as error:  # of another kind than they seem
        raise RewardError(f"the reward {name!r} returned {shown(values)}, which is no list: {error}") from error
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
    except Exception:  # a stranger's __float__ may raise anything
        result = math.nan
    if not math.isfinite(result):
        raise RewardError(
            f"the reward {name!r} returned {_excerpt(value)} ({type(value).__name__}) for {where}; "
            f"a score is {ACCEPTED}"
        )
    return result


def _excerpt(value: Any, length: int = 80) -> str:
    text = shown(value, length + 1)
    return text if len(text) <= length else text[:length] + "..."
