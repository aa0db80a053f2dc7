"""Where the return values of a user's reward become numbers. Pure functions without state.

Two forms are understood everywhere (`signatures` tells them apart): f(response, target) -> float, and TRL's
f(prompts=, completions=, **columns) -> list. In both, a score is any one real number (Python, NumPy or PyTorch; a bool
counts as 0 or 1), or None: "not answered" in the first form, "does not apply to this row" in the second. Two departures
from TRL: NaN is refused, not read as None, since it is more often a bug in a reward than a decision; and a function
without **kwargs gets the arguments that it names, where TRL passes all of them and the function raises.
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
Parts = dict[str, list[float | None]]  # {name of the reward: its score of each row, unweighted}

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
    """Score response i by a function of the pair form; `name` is what errors call it, its own if None.

    Prompt, response and target are matched by the names of the parameters, see `signatures`; a function with none of
    these names gets (response, target). A function that has a method `batch(responses, targets) -> list` is asked once
    for all rows, as CosineReward is; it may name `prompts`, too. `caller` says how: how often, how long, how many at
    once; None = once, one after the other.

    Returns:
        for each row a finite float, or None where the reward did not answer.

    Raises:
        RewardError: the function raised, or a value is not a score.
        ValueError: lists of different lengths, a signature that does not say how to call the function, or a function
            that takes the prompt and no `prompts`.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
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
    completion_ids: Sequence[Sequence[int]] | None = None,
    trainer_state: Any = None,
    notes: Notes | None = None,
) -> Parts:
    """What each reward says of each row, unweighted.

    Args:
        funcs: rewards of either form. TRL's is called with prompts, completions, completion_ids, trainer_state,
            log_metric, log_extra and the columns, all by keyword; a function without **kwargs gets those that it names.
            The pair form gets the response, and the prompt and the column `target` (None where there is none) as its
            parameters say.
        prompts: one for each row, text or chat messages, handed on as they are.
        completions: the responses, text or chat messages. Where the prompt is chat messages, a function of TRL's form
            gets a text as [{"role": "assistant", "content": text}], as from TRL; the pair form always gets text.
        columns: the dataset's other columns, each with one entry for each row.
        caller: how often, how long and how many at once they are asked; None = once, one after the other.
        completion_ids: the token ids of each completion, the end token included; None = functions get none.
        trainer_state: a transformers.TrainerState; None = functions get none.
        notes: takes what functions log by log_metric and log_extra; None = it is dropped.

    Returns:
        {name of the function: its scores}, in the order of `funcs`.

    Raises:
        RewardError: a function raised, or returned what is not one score a row.
        ValueError: no functions, completions or a column of the wrong length, a column named as an argument is, or a
            function that names a column that is not there.
        RewardUnavailable, ImportError: passed on as they are; the reward cannot run here, and no row is at fault.
    """
    given = {} if completion_ids is None else {"completion_ids": completion_ids}
    state = {} if trainer_state is None else {"trainer_state": trainer_state}
    _require_columns(funcs, len(prompts), columns, {"completions": completions, **given}, state)

    def values() -> dict[str, Any]:
        ids = {column: list(map(list, entries)) for column, entries in given.items()}
        return {**state, **ids, **_lists(prompts, completions, columns)}

    # What an answer is known by. A column without a value for these rows counts as none, so that it does not matter
    # what other rows have. The ids follow from the completions, the state from the step.
    known = {column: entries for column, entries in columns.items() if any(entry is not None for entry in entries)}
    question = _lists(prompts, completions, known)
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
    """There are functions, every column has one entry for each row, and each function finds the columns it names."""
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
    """Columns, prompts and completions in lists of their own: a function that sorts in place must not misalign the next
    call. Where the prompt is chat messages, so is the completion."""
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
    """Scores of all rows; `notes` takes what the function logged once they are scores."""
    call, rows = trl_call(func), len(question["prompts"])

    def ask() -> Any:
        recorder = Recorder()
        logs = {"log_metric": recorder.log_metric, "log_extra": recorder.log_extra}
        return _with(recorder, func(**call.arguments({**logs, **values()})))

    def read(answer: tuple[Any, Recorder]) -> list[float | None]:
        scores = _scores(name, row, rows, answer[0])
        notes.take(name, answer[1], rows)
        return scores

    return _asked_once(caller, name, question, ask, read, row, rows)


def _with(recorder: Recorder, values: Any) -> Any:
    """(what the function returned, its recorder); awaitable where the function's value is."""
    if not inspect.isawaitable(values):
        return values, recorder

    async def wait() -> Any:
        return await values, recorder

    return wait()


def _row(columns: Mapping[str, Sequence[Any]], i: int) -> str:
    """What errors call a row, with its values of these columns."""
    return f"row {i} ({', '.join(f'{name} {shown(values[i], 80)}' for name, values in columns.items())})"


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


def reward_names(funcs: Sequence[Callable[..., Any]]) -> list[str]:
    """Names by which logs tell the functions apart: the second "f" is "f_2", or the next number that is free."""
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
    where = f"{rows} rows, the first of them {row(0)}" if rows else "no rows"
    (scores,) = caller.all(name, [(question, range(rows), ask, read)], where=lambda _: where)
    return [None] * rows if scores is None else scores


def _scores(name: str, row: Callable[[int], str], rows: int, values: Any) -> list[float | None]:
    with suppress(Exception):  # of another kind than they seem
        values = values.tolist() if hasattr(values, "tolist") else values  # arrays and tensors
    if not isinstance(values, list | tuple):
        raise RewardError(
            f"the reward {name!r} returned {shown(values, 80)} ({type(values).__name__}) for {rows} rows; "
            f"it must return a list with one score for each row{_is_factory(values)}"
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
            f"the reward {name!r} returned {shown(value, 80)} ({type(value).__name__}) for {where}; "
            f"a score is {ACCEPTED}{_is_factory(value)}"
        )
    return result


def _is_factory(value: Any) -> str:
    return ". A function that makes a reward is called first: give what it returns" if callable(value) else ""
