"""Calls reward functions and converts their return values to numbers. Pure functions without state.

A reward has one of two forms, which `signatures` detects: f(response, target) -> float, and TRL's
f(prompts=, completions=, **columns) -> list. A score is one real number (Python, NumPy or PyTorch; a bool counts as 0
or 1) or None. None means "not answered" in the first form and "does not apply to this row" in the second.

Departures from TRL:

- NaN is an error, not None: NaN is more often a bug in a reward than a decision.
- A function without **kwargs gets only the arguments that it names. TRL passes every argument, and the function raises.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..messages import completion_text
from ..wording import shown
from .calling import Call, Caller, RewardError, is_async
from .notes import Notes, Recorder
from .signatures import BATCH_NAMES, pair_call, require_columns, reward_name, takes_completions, trl_call

PairReward = Callable[[str, str | None], Any]
TrlReward = Callable[..., Any]
Reward = PairReward | TrlReward
Parts = dict[str, list[float | None]]  # {name of the reward: one unweighted score per row}

ACCEPTED = "a finite number (int, float, bool, or a NumPy or PyTorch scalar), or None"


def score_pairs(
    fn: PairReward,
    responses: Sequence[str],
    targets: Sequence[str | None],
    *,
    prompts: Sequence[Any] | None = None,
    name: str | None = None,
    caller: Caller | None = None,
) -> list[float | None]:
    """Score R responses by a function of the pair form.

    Prompt, response and target are matched by the names of the parameters (see `signatures`). A function with none of
    these names gets (response, target). A function with a method `batch(responses, targets) -> list`, such as
    CosineReward, is called once for all rows; `batch` may also name `prompts`.

    Args:
        fn: the reward.
        responses, targets: R texts each; a target may be None.
        prompts: R prompts, for a function that takes the prompt.
        name: the name of the function in errors; None: its own name.
        caller: retries, time limit and parallel calls; None: one try per call, one call after the other.

    Returns:
        R finite floats, or None for a row that the reward did not answer.

    Raises:
        RewardError: the function raised, or a value is not a score.
        ValueError: lists of different lengths, a signature that does not say how to call the function, or no `prompts`
            for a function that takes the prompt.
        RewardUnavailable, ImportError: raised by the reward, which cannot run on this machine; not converted.
    """
    if len(responses) != len(targets):
        raise ValueError(f"{len(responses)} responses but {len(targets)} targets; give one target (or None) for each")
    name, caller = name or reward_name(fn), caller or Caller()
    batch = getattr(fn, "batch", None)
    call = pair_call(batch, BATCH_NAMES, name=f"{name}.batch") if batch else pair_call(fn, name=name)
    if call.takes_prompt and (prompts is None or len(prompts) != len(responses)):
        given = "none were given" if prompts is None else f"{len(prompts)} were given"
        raise ValueError(f"the reward {name!r} takes the prompt: give {len(responses)} prompts; {given}")
    columns: dict[str, Sequence[Any]] = {"response": responses, "target": targets}
    row, rows = partial(_row, dict(columns)), len(responses)
    if call.takes_prompt:
        columns["prompt"] = prompts or ()
    if batch:
        question = [list(values) for values in columns.values()]

        def ask() -> Any:
            return call(batch, **{column: list(values) for column, values in columns.items()})

        return _asked_once(caller, name, question, ask, partial(_scores, name, row, rows), row, rows)

    def one(i: int) -> Call[float | None]:
        values = {column: entries[i] for column, entries in columns.items()}
        return list(values.values()), [i], lambda: call(fn, **values), lambda value: _score(name, value, row(i))

    return caller.all(name, [one(i) for i in range(rows)], where=row, is_async=is_async(fn))


def score_trl(
    funcs: Sequence[Reward],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[list[float | None], Parts]:
    """Score rows by several rewards: `score_parts`, and the `weighted_total`, as TRL's GRPOTrainer computes it.

    Returns:
        totals: one finite float per row, or None if no reward applies to the row.
        parts: {name of the function: its unweighted scores}, in the order of `funcs`.

    Raises:
        RewardError, ValueError, RewardUnavailable, ImportError: see `score_parts`, `weighted_total`.
    """
    weights = checked_weights(weights, len(funcs))  # before any paid call
    parts = score_parts(funcs, prompts, completions, columns)
    return weighted_total(parts, weights), parts


def score_parts(
    funcs: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    caller: Caller | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    trainer_state: Any = None,
    notes: Notes | None = None,
) -> Parts:
    """The unweighted score of each row by each reward, for R rows.

    Args:
        funcs: rewards of either form. TRL's form gets keyword arguments: prompts, completions, completion_ids,
            trainer_state, log_metric, log_extra and the columns. A function without **kwargs gets only the arguments
            that it names. The pair form gets the response, and, if its parameters ask for them, the prompt and the
            column `target` (None if there is no such column).
        prompts: R prompts, texts or chat messages, passed on unchanged.
        completions: R responses, texts or chat messages. If the prompt is chat messages, a function of TRL's form gets
            a text as [{"role": "assistant", "content": text}], as TRL does it. The pair form always gets text.
        columns: the other columns of the dataset, R entries each.
        caller: retries, time limit and parallel calls; None: one try per call, one call after the other.
        completion_ids: the token ids of each completion, with the end token; None: functions get no ids.
        trainer_state: a transformers.TrainerState; None: functions get no state.
        notes: receives the values that functions log by log_metric and log_extra; None: they are dropped.

    Returns:
        {name of the function: R scores}, in the order of `funcs`.

    Raises:
        RewardError: a function raised, or did not return one score per row.
        ValueError: no functions, completions or a column of the wrong length, a column with the name of an argument, or
            a function that names a column that is missing.
        RewardUnavailable, ImportError: raised by a reward, which cannot run on this machine; not converted.
    """
    given = {} if completion_ids is None else {"completion_ids": completion_ids}
    state = {} if trainer_state is None else {"trainer_state": trainer_state}
    _require_columns(funcs, len(prompts), columns, {"completions": completions, **given}, state)

    def values() -> dict[str, Any]:
        ids = {column: list(map(list, entries)) for column, entries in given.items()}
        return {**state, **ids, **_lists(prompts, completions, columns)}

    # The question is the key of an answer in the log. A column without a value for these rows is left out, so that the
    # key does not depend on other rows. The ids follow from the completions, and the state from the step.
    filled = {column: entries for column, entries in columns.items() if any(entry is not None for entry in entries)}
    question = _lists(prompts, completions, filled)
    row = partial(_row, {"prompt": prompts, "completion": completions})
    parts: Parts = {}
    caller, notes = caller or Caller(), notes or Notes()
    for name, func in zip(reward_names(funcs), funcs, strict=True):
        if takes_completions(func):
            parts[name] = _score_by_trls_form(func, name, question, values, row, caller, notes)
        else:
            texts = [completion_text(completion) for completion in completions]
            targets = columns.get("target") or [None] * len(prompts)
            parts[name] = score_pairs(func, texts, targets, prompts=prompts, name=name, caller=caller)
    return parts


def _require_columns(
    funcs: Sequence[Reward],
    rows: int,
    columns: Mapping[str, Sequence[Any]],
    given: Mapping[str, Sequence[Any]],
    state: Mapping[str, Any],
) -> None:
    """Check that there are functions, that every column has one entry per row, and that no named column is missing."""
    if not funcs:
        raise ValueError("there are no reward functions: give at least one")
    for column in ("prompts", "completions"):
        if column in columns:
            raise ValueError(f"a column must not be called {column!r}: rewards get the rows' own {column} by that name")
    for column, entries in {**given, **columns}.items():
        if len(entries) != rows:
            raise ValueError(f"{len(entries)} {column} for {rows} prompts; give one for each prompt")
    require_columns(funcs, columns, given=("prompts", "log_metric", "log_extra", *given, *state), rows="no row")


def _lists(
    prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[Any]]:
    """New lists of columns, prompts and completions, so that a function that sorts in place cannot misalign the next
    call. If the prompt is chat messages, so is the completion."""
    lists = {column: list(entries) for column, entries in columns.items()}
    answers = [
        [{"role": "assistant", "content": completion}]
        if isinstance(prompt, list | tuple) and isinstance(completion, str)
        else completion
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return {**lists, "prompts": list(prompts), "completions": answers}


def _score_by_trls_form(
    func: TrlReward,
    name: str,
    question: dict[str, list[Any]],
    values: Callable[[], dict[str, Any]],
    row: Callable[[int], str],
    caller: Caller,
    notes: Notes,
) -> list[float | None]:
    """Scores of all rows. `notes` receives what the function logged, after its return value was checked."""
    call, rows = trl_call(func), len(question["prompts"])

    def ask() -> Any:
        recorder = Recorder()
        logs = {"log_metric": recorder.log_metric, "log_extra": recorder.log_extra}
        return _paired(func(**call.arguments({**logs, **values()})), recorder)

    def read(answer: tuple[Any, Recorder]) -> list[float | None]:
        scores = _scores(name, row, rows, answer[0])
        notes.take(name, answer[1], rows)
        return scores

    return _asked_once(caller, name, question, ask, read, row, rows)


def _paired(values: Any, recorder: Recorder) -> Any:
    """(return value of the function, its recorder); an awaitable for this pair if the return value is awaitable."""
    if not inspect.isawaitable(values):
        return values, recorder

    async def wait() -> Any:
        return await values, recorder

    return wait()


def _row(columns: Mapping[str, Sequence[Any]], i: int) -> str:
    """The row as errors show it: its index and its values in these columns."""
    return f"row {i} ({', '.join(f'{name} {shown(values[i], 80)}' for name, values in columns.items())})"


def weighted_total(parts: Parts, weights: Sequence[float] | None = None) -> list[float | None]:
    """The sum of weight · score per row, over the rewards that apply to the row. Weights are not renormalised.

    Args:
        parts: {name of the reward: one score per row, None if the reward does not apply}.
        weights: one weight per reward; None: 1 each.

    Returns:
        one total per row; None if no reward applies (TRL warns and counts 0).

    Raises:
        ValueError: the number of weights is wrong, or a weight is not finite.
    """
    weights = checked_weights(weights, len(parts))
    weighted = [
        [weight * score for weight, score in zip(weights, scores, strict=True) if score is not None]
        for scores in zip(*parts.values(), strict=True)
    ]
    return [sum(terms) if terms else None for terms in weighted]


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """`count` finite weights, one per reward; None means 1 each. Raises ValueError for other weights."""
    weights = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(weights) != count:
        raise ValueError(f"{len(weights)} reward weights for {count} reward functions; give one for each, or None")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward weights {weights} are not accepted: all must be finite numbers")
    return weights


def reward_names(funcs: Sequence[Callable[..., Any]]) -> list[str]:
    """Distinct names of the functions for logs: the second "f" is "f_2", or "f_" with the next free number."""
    names: list[str] = []
    for func in funcs:
        name, number = reward_name(func), 1
        while (unique := name if number == 1 else f"{name}_{number}") in names:
            number += 1
        names.append(unique)
    return names


def _asked_once(
    caller: Caller,
    name: str,
    question: Any,
    ask: Callable[[], Any],
    read: Callable[[Any], list[float | None]],
    row: Callable[[int], str],
    rows: int,
) -> list[float | None]:
    """Scores of all rows by one call."""
    where = f"{rows} rows, the first: {row(0)}" if rows else "no rows"
    (scores,) = caller.all(name, [(question, range(rows), ask, read)], where=lambda _: where)
    return [None] * rows if scores is None else scores


def _scores(name: str, row: Callable[[int], str], rows: int, values: Any) -> list[float | None]:
    with suppress(Exception):  # a foreign tolist() may raise anything
        values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"the reward {name!r} returned {shown(values, 80)} ({type(values).__name__}) for {rows} rows; "
            f"it must return a list with one score per row{_factory_hint(values)}"
        )
    if len(values) != rows:
        first_missing = f"; none for {row(len(values))}" if len(values) < rows else ""
        raise RewardError(
            f"the reward {name!r} returned {len(values)} scores for {rows} rows{first_missing}; it must return one "
            "score per row"
        )
    return [_score(name, value, row(i)) for i, value in enumerate(values)]


def _score(name: str, value: Any, where: str) -> float | None:
    """A score as a finite Python float or None. Raises RewardError for every other value."""
    if value is None:
        return None
    try:
        number = value.item() if hasattr(value, "item") else value  # .item() raises unless there is exactly one element
        # float() would also parse a string. A string has no __float__; every real number has one.
        result = float(number) if hasattr(number, "__float__") else math.nan
    except Exception:  # a foreign __float__ may raise anything
        result = math.nan
    if not math.isfinite(result):
        raise RewardError(
            f"the reward {name!r} returned {shown(value, 80)} ({type(value).__name__}) for {where}; "
            f"a score is {ACCEPTED}{_factory_hint(value)}"
        )
    return result


def _factory_hint(value: Any) -> str:
    return ". If the function makes a reward, call it first and give its return value" if callable(value) else ""
