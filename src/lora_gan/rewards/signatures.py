"""How a reward is called, from its signature. The check is made when the reward is given, not after hours of training.

There are two forms:

- The pair form scores one response. Its parameters are matched by name (`PAIR_NAMES`), or by position if no name is
  known.
- TRL's form scores all responses in one call. It gets the keyword arguments of TRL (`GIVEN`) and the columns of the
  data.

A signature is refused if it is not clear which value a parameter gets.
"""

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from ..wording import shortened

#: Parameters of the pair form and the value that each parameter gets.
PAIR_NAMES = {
    "prompt": "prompt",
    "response": "response",
    "completion": "response",
    "target": "target",
    "target_text": "target",
}
#: The same for a method `batch`, which gets lists.
BATCH_NAMES = {f"{name}s": value for name, value in PAIR_NAMES.items()}
#: Arguments of TRL's form in addition to the columns of the data.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def reward_name(func: Callable[..., Any]) -> str:
    """The function's __name__, or the name of its class if it has none (functools.partial, an object)."""
    return getattr(func, "__name__", None) or type(func).__name__


def takes_completions(func: Callable[..., Any]) -> bool:
    """Whether a reward has TRL's form.

    The first rule that applies decides:

    1. An object with a method `batch`, or a callable without a readable signature (some builtins): pair form.
    2. A parameter `completions` or `completion_ids`: TRL's form.
    3. A parameter `prompt`, `response` or `completion`: pair form.
    4. Another parameter in `GIVEN`: TRL's form.
    5. **kwargs and fewer than two positional parameters: TRL's form.
    6. Everything else: pair form.
    """
    parameters = None if hasattr(func, "batch") else parameters_of(func)
    if parameters is None:
        return False
    names = {parameter.name for parameter in parameters if parameter.kind not in VARIADIC}
    if names & {"completions", "completion_ids"}:
        return True
    if names & {"prompt", "response", "completion"}:
        return False
    if names & set(GIVEN):
        return True
    kinds = [parameter.kind for parameter in parameters]
    return inspect.Parameter.VAR_KEYWORD in kinds and sum(kind in _BY_POSITION for kind in kinds) < 2


def check_reward(func: Callable[..., Any]) -> None:
    """Check that the signature of a reward says how to call it.

    Raises:
        ValueError: it does not. The message shows the signature, the known names and what to do.
    """
    if returns_function(func):
        raise ValueError(
            f"{_signed(func)} returns a function, so it makes rewards and is not a reward: call it first, and give its "
            "return value"
        )
    if hasattr(func, "batch"):
        pair_call(func.batch, BATCH_NAMES, name=f"{reward_name(func)}.batch")
    elif takes_completions(func):
        trl_call(func)
    else:
        pair_call(func)


def returns_function(func: Callable[..., Any]) -> bool:
    """Whether the return annotation of a callable says that it returns a callable."""
    try:
        annotation = inspect.signature(func).return_annotation
    except (TypeError, ValueError):
        return False
    if isinstance(annotation, str):
        return re.match(r"([\w.]+\.)?Callable\b", annotation) is not None
    return annotation is Callable or get_origin(annotation) is Callable


# --- the pair form ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairCall:
    """The arguments of a function of the pair form. Each value is "prompt", "response" or "target"."""

    by_position: tuple[str, ...]
    by_name: tuple[tuple[str, str], ...] = ()  # (parameter, value)

    @property
    def takes_prompt(self) -> bool:
        return "prompt" in self.by_position or "prompt" in dict(self.by_name).values()

    def __call__(self, func: Callable[..., Any], **values: Any) -> Any:
        """Call the function with these values of prompt, response and target."""
        return func(
            *(values[name] for name in self.by_position), **{name: values[value] for name, value in self.by_name}
        )


def pair_call(func: Callable[..., Any], names: Mapping[str, str] = PAIR_NAMES, *, name: str | None = None) -> PairCall:
    """How a function of the pair form is called.

    Args:
        func: the function.
        names: the known parameters and the value that each parameter gets.
        name: the name of the function in errors; None: its own name.

    Raises:
        ValueError: there is a known name and an unknown one without a default, no parameter takes the response, or a
            parameter could be the target or an option.
    """
    parameters = parameters_of(func)
    if parameters is None:
        return PairCall(("response", "target"))
    if isinstance(func, functools.partial):  # arguments that it binds by name stay bound, also for a known name
        parameters = [parameter for parameter in parameters if parameter.name not in func.keywords]

    def refused(why: str) -> ValueError:
        known = ", ".join(names)
        values = "prompt, response and target" if names is PAIR_NAMES else "lists of prompts, responses and targets"
        return ValueError(
            f"{_signed(func, name)} cannot be called: {why}. The known names are {known}; they get {values}. Rename "
            "the parameters to known names. Give every other parameter a default, or bind it with functools.partial. A "
            "function with none of these names gets (response, target) by position"
            + (". It is a class: give an object of the class" if isinstance(func, type) else "")
        )

    for parameter in parameters:
        if parameter.name in GIVEN and parameter.name not in names:
            raise refused(f"only rewards of TRL's form, f(prompts, completions, **columns), get {parameter.name}")
    known = [p.name for p in parameters if p.name in names and p.kind not in VARIADIC]
    others = [name for name in _required(parameters) if name not in known]
    if known and others:
        raise refused(f"no value is known for {', '.join(others)}, only for {', '.join(known)}")
    if known and "response" not in [names[name] for name in known]:
        raise refused("no parameter takes the response")
    return _by_name(parameters, names) if known else _by_position(parameters, refused)


def _by_name(parameters: Sequence[inspect.Parameter], names: Mapping[str, str]) -> PairCall:
    """By position as far as possible, because the parameters of a wrapper may differ from the signature it shows."""

    def is_known(parameter: inspect.Parameter) -> bool:
        return parameter.name in names and parameter.kind not in VARIADIC

    positional = list(itertools.takewhile(lambda p: is_known(p) and p.kind in _BY_POSITION, parameters))
    first = [names[p.name] for p in positional]
    rest = [(p.name, names[p.name]) for p in parameters[len(positional) :] if is_known(p)]
    if _has_kind(parameters, inspect.Parameter.VAR_POSITIONAL) and first == ["response"] and not rest:
        first.append("target")  # f(response, *rest)
    return PairCall(tuple(first), tuple(rest))


def _by_position(parameters: Sequence[inspect.Parameter], refused: Callable[[str], ValueError]) -> PairCall:
    """(response, target), or the response alone if there is only one parameter."""
    positional = [parameter for parameter in parameters if parameter.kind in _BY_POSITION]
    has_args = _has_kind(parameters, inspect.Parameter.VAR_POSITIONAL)
    if not positional and not has_args:
        raise refused("no parameter takes the response")
    for parameter in positional[:2]:
        is_option = not (parameter.default is parameter.empty or parameter.default is None)
        if is_option and (parameter is positional[0] or isinstance(parameter.default, str)):
            which = "response" if parameter is positional[0] else "target"
            raise refused(f"{parameter.name}={parameter.default!r:.40} could be the {which} or an option")
    filled = [p for p in positional[:2] if p.default is p.empty or p.default is None]
    if unfilled := [name for name in _required(parameters) if name not in [p.name for p in filled]]:
        raise refused(f"no value is known for {', '.join(unfilled)}")
    count = 2 if has_args and len(positional) < 2 else len(filled)
    return PairCall(("response", "target")[:count])


# --- TRL's form -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrlCall:
    """The keyword arguments that a function of TRL's form takes."""

    named: frozenset[str]
    required: tuple[str, ...]
    takes_all: bool  # by **kwargs

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the function takes. A parameter `target_text` gets the target if there is no such column."""
        chosen = {name: value for name, value in values.items() if self.takes_all or name in self.named}
        if "target_text" in self.named and "target_text" not in values and "target" in values:
            chosen["target_text"] = values["target"]
        return chosen

    def missing(self, values: Collection[str]) -> list[str]:
        """Parameters without a default and without a value, given the names of the values."""
        available = {*values, "target_text"} if "target" in values else set(values)
        return [name for name in self.required if name not in available]


def trl_call(func: Callable[..., Any]) -> TrlCall:
    """How a function of TRL's form is called.

    Raises:
        ValueError: a parameter without a default is positional-only. All arguments are passed by keyword.
    """
    parameters = parameters_of(func) or []
    required = _required(parameters)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.name in required:
            raise ValueError(
                f"{_signed(func)} cannot be called: rewards of TRL's form get keyword arguments, and "
                f"{parameter.name} is positional-only. Remove the /"
            )
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = frozenset(parameter.name for parameter in parameters if parameter.kind in by_keyword)
    return TrlCall(named, tuple(required), _has_kind(parameters, inspect.Parameter.VAR_KEYWORD))


def require_columns(
    funcs: Sequence[Callable[..., Any]],
    columns: Collection[str],
    *,
    given: Collection[str] = (*GIVEN, "target"),
    rows: str = "no row of the data",
) -> None:
    """Check that the data has every column that a reward of TRL's form names.

    Args:
        funcs: rewards of either form.
        columns: names of the existing columns.
        given: arguments that rewards get in addition to the columns.
        rows: describes the checked rows in the message.

    Raises:
        ValueError: a column is missing. The message names the function, the missing column and the existing columns.
    """
    for func in funcs:
        if not takes_completions(func):
            continue
        if missing := trl_call(func).missing({*columns, *given}):
            existing = ", ".join(map(repr, sorted({*columns, "target"})))
            raise ValueError(
                f"{_signed(func)} needs {', '.join(map(repr, missing))}, and {rows} has such a column. Rewards get the "
                f"columns {existing} and {', '.join(GIVEN)}. Rename a column or the parameter, or give the parameter a "
                "default"
            )


def needs_columns(funcs: Sequence[Callable[..., Any]]) -> bool:
    """Whether a reward of TRL's form requires a column of the data."""
    return any(takes_completions(func) and trl_call(func).missing((*GIVEN, "target")) for func in funcs)


# --- signatures -------------------------------------------------------------------------------------------------------


def parameters_of(func: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The parameters; None if the signature cannot be read."""
    try:
        return list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        return None


def _required(parameters: Sequence[inspect.Parameter]) -> list[str]:
    """Names of the parameters that a call must fill."""
    return [p.name for p in parameters if p.kind not in VARIADIC and p.default is p.empty]


def _has_kind(parameters: Sequence[inspect.Parameter], kind: object) -> bool:
    return any(parameter.kind is kind for parameter in parameters)


def _signed(func: Callable[..., Any], name: str | None = None) -> str:
    """The reward and its signature, for messages."""
    try:
        signature = " ".join(str(inspect.signature(func)).split())
    except Exception:  # the repr of a foreign default may raise
        signature = "(...)"
    return f"the reward {name or reward_name(func)}{shortened(signature, 200)}"
