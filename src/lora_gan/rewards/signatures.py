"""How a reward is called, read from its signature when the reward is given and not after hours.

There are two forms. The pair form scores one response: its parameters are matched by name (`PAIR_NAMES`), or by
position where no name is known. TRL's form scores all responses at once and gets keyword arguments: what TRL gives
(`GIVEN`) and the columns of the data. A signature that does not say which value belongs where is refused.
"""

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from ..wording import shortened

#: Parameters of the pair form and the value each one gets.
PAIR_NAMES = {
    "prompt": "prompt",
    "response": "response",
    "completion": "response",
    "target": "target",
    "target_text": "target",
}
#: The same for a method `batch`, which gets lists.
BATCH_NAMES = {f"{name}s": value for name, value in PAIR_NAMES.items()}
#: What a reward of TRL's form gets beside the columns of the data.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def reward_name(func: Callable[..., Any]) -> str:
    """The function's __name__, or the name of its class where it has none (functools.partial, an object)."""
    return getattr(func, "__name__", None) or type(func).__name__


def takes_completions(func: Callable[..., Any]) -> bool:
    """Whether a reward is of TRL's form.

    These rules decide, the first that applies:

    1. An object with a method `batch` and a callable without a readable signature (some builtins) are of the pair form.
    2. A parameter `completions` or `completion_ids` makes TRL's form.
    3. A parameter `prompt`, `response` or `completion` makes the pair form.
    4. Another parameter that TRL gives (`GIVEN`) makes TRL's form.
    5. **kwargs with fewer than two parameters by position make TRL's form; everything else is of the pair form.
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
    """Raise a ValueError where the signature of a reward does not say how to call it.

    Raises:
        ValueError: it shows the signature, the known names and what to do.
    """
    if returns_function(func):
        raise ValueError(
            f"{_signed(func)} returns a function, so it makes rewards and is none: call it first, and give what it "
            "returns"
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
    """The values that a function of the pair form gets: "prompt", "response" or "target"."""

    by_position: tuple[str, ...]
    by_name: tuple[tuple[str, str], ...] = ()  # parameter, value

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
        names: the known parameters and the value each one gets.
        name: what errors call the function, its own name if None.

    Raises:
        ValueError: a known name stands beside an unknown one without a default, no parameter takes the response, or a
            parameter could be the target or an option.
    """
    parameters = parameters_of(func)
    if parameters is None:
        return PairCall(("response", "target"))
    if isinstance(func, functools.partial):  # what it binds by name stays bound, also where the name is known
        parameters = [parameter for parameter in parameters if parameter.name not in func.keywords]

    def refused(why: str) -> ValueError:
        known = ", ".join(names)
        values = "prompt, response and target" if names is PAIR_NAMES else "lists of prompts, responses and targets"
        return ValueError(
            f"{_signed(func, name)} cannot be called: {why}. The names that are known are {known}; they get {values}. "
            "Rename the parameters to these, give every other one a default, or bind it with functools.partial. A "
            "function with none of these names gets (response, target) by position"
            + (". It is a class: give an object of it" if isinstance(func, type) else "")
        )

    for parameter in parameters:
        if parameter.name in GIVEN and parameter.name not in names:
            raise refused(f"{parameter.name} is given to rewards of TRL's form, f(prompts, completions, **columns)")
    known = [p.name for p in parameters if p.name in names and p.kind not in VARIADIC]
    others = [name for name in _required(parameters) if name not in known]
    if known and others:
        raise refused(f"it is not known what {', '.join(others)} beside {', '.join(known)} should get")
    if known and "response" not in [names[name] for name in known]:
        raise refused("no parameter takes the response")
    return _by_name(parameters, names) if known else _by_position(parameters, refused)


def _by_name(parameters: Sequence[inspect.Parameter], names: Mapping[str, str]) -> PairCall:
    """By position as far as possible: a wrapper may have other names than the signature it shows."""

    def is_known(parameter: inspect.Parameter) -> bool:
        return parameter.name in names and parameter.kind not in VARIADIC

    places = list(itertools.takewhile(lambda p: is_known(p) and p.kind in _BY_POSITION, parameters))
    first = [names[p.name] for p in places]
    rest = [(p.name, names[p.name]) for p in parameters[len(places) :] if is_known(p)]
    collects = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if collects and first == ["response"] and not rest:
        first.append("target")  # f(response, *rest)
    return PairCall(tuple(first), tuple(rest))


def _by_position(parameters: Sequence[inspect.Parameter], refused: Callable[[str], ValueError]) -> PairCall:
    """(response, target), or the response alone where there is room for one."""
    places = [parameter for parameter in parameters if parameter.kind in _BY_POSITION]
    collects = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if not places and not collects:
        raise refused("no parameter takes the response")
    for parameter in places[:2]:
        is_option = not (parameter.default is parameter.empty or parameter.default is None)
        if is_option and (parameter is places[0] or isinstance(parameter.default, str)):
            which = "response" if parameter is places[0] else "target"
            raise refused(f"{parameter.name}={parameter.default!r:.40} could be the {which} or an option")
    taken = [p for p in places[:2] if p.default is p.empty or p.default is None]
    if unfilled := [name for name in _required(parameters) if name not in [p.name for p in taken]]:
        raise refused(f"it is not known what {', '.join(unfilled)} should get")
    count = 2 if collects and len(places) < 2 else len(taken)
    return PairCall(("response", "target")[:count])


# --- TRL's form -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrlCall:
    """The keyword arguments that a function of TRL's form takes."""

    named: frozenset[str]
    required: tuple[str, ...]
    takes_all: bool  # through **kwargs

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that the function takes. `target_text` gets the target where it is named and no column
        is called so."""
        chosen = {name: value for name, value in values.items() if self.takes_all or name in self.named}
        if "target_text" in self.named and "target_text" not in values and "target" in values:
            chosen["target_text"] = values["target"]
        return chosen

    def missing(self, values: Collection[str]) -> list[str]:
        """Parameters without a default that are not among these."""
        there = {*values, "target_text"} if "target" in values else set(values)
        return [name for name in self.required if name not in there]


def trl_call(func: Callable[..., Any]) -> TrlCall:
    """How a function of TRL's form is called.

    Raises:
        ValueError: a parameter without a default is positional-only: all arguments come by keyword.
    """
    parameters = parameters_of(func) or []
    required = _required(parameters)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.name in required:
            raise ValueError(
                f"{_signed(func)} cannot be called: rewards of TRL's form get keyword arguments, and "
                f"{parameter.name} is positional-only: remove the /"
            )
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = frozenset(parameter.name for parameter in parameters if parameter.kind in by_keyword)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return TrlCall(named, tuple(required), takes_all)


def require_columns(
    funcs: Sequence[Callable[..., Any]],
    columns: Collection[str],
    *,
    given: Collection[str] = (*GIVEN, "target"),
    rows: str = "no row of the data",
) -> None:
    """Raise where a reward of TRL's form names a column that the data does not have.

    Args:
        funcs: rewards of either form.
        columns: names of the columns that there are.
        given: what rewards get besides.
        rows: how the message speaks of the rows that were looked at.

    Raises:
        ValueError: it names the function, the missing column and the columns of the data.
    """
    for func in funcs:
        if not takes_completions(func):
            continue
        if missing := trl_call(func).missing({*columns, *given}):
            there = ", ".join(map(repr, sorted({*columns, "target"}))) or "none"
            raise ValueError(
                f"{_signed(func)} needs {', '.join(map(repr, missing))}, and {rows} has such a column; the columns are "
                f"{there}, beside {', '.join(GIVEN)}. Rename a column or the parameter, or give the parameter a default"
            )


def needs_columns(funcs: Sequence[Callable[..., Any]]) -> bool:
    """Whether a reward of TRL's form names a column, or anything else that only the data can have."""
    return any(takes_completions(func) and trl_call(func).missing((*GIVEN, "target")) for func in funcs)


# --- signatures -------------------------------------------------------------------------------------------------------


def parameters_of(func: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The parameters; None where there is no signature to read."""
    try:
        return list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):
        return None


def _required(parameters: Sequence[inspect.Parameter]) -> list[str]:
    """Names of the parameters that a call must fill."""
    return [p.name for p in parameters if p.kind not in VARIADIC and p.default is p.empty]


def _signed(func: Callable[..., Any], name: str | None = None) -> str:
    """The reward and its signature, for messages."""
    try:
        signature = " ".join(str(inspect.signature(func)).split())
    except Exception:  # a stranger's default may have no repr
        signature = "(...)"
    return f"the reward {name or reward_name(func)}{shortened(signature, 200)}"
