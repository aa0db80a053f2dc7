"""How a setting is declared, checked and described. `config.py` declares every setting; the command line describes it.

A declaration is one annotation, `name: Annotated[TYPE, MARKERS...] = DEFAULT`, with the help text under it. The markers
are a `Group`, bounds and a `Unit` of annotated-types, and `Mark`s. Bounds hold for values other than None.
pydantic would check such annotations too, but its import costs more than all of `import lora_gan`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, Unit


class Group(Enum):
    """The part of a run that a setting belongs to; its value is a heading of `lora-gan train --help`."""

    RUN = "the run and its checkpoints"
    LOGS = "evaluation and logs"
    BASE = "the base model"
    DATA = "the data"
    SAMPLING = "sampling"
    GENERATOR = "the generator"
    REWARD = "the reward, and how it reaches the generator"
    DISCRIMINATOR = "the discriminator"
    GUARD = "what to do when a run goes wrong"


class Mark(Enum):
    """A property of a setting that code elsewhere asks for."""

    FIRST = "`lora-gan train --help` shows it before the groups"
    SILENT = "changes neither what is learned nor what is asked for, so a resumed run does not report a change"
    UNLISTED = "a model card leaves it out: it says nothing about the weights, may hold a token, or is in the adapter"


KINDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "True or False", dict: "a mapping",
    tuple: "a list of texts", NoneType: "None",
}  # fmt: skip
#: Of each bound: whether a value is within it, and how messages say it.
RANGE: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (lambda value, bound: value >= bound.ge, "{.ge} or more"),
    Gt: (lambda value, bound: value > bound.gt, "above {.gt}"),
    Le: (lambda value, bound: value <= bound.le, "at most {.le}"),
    Lt: (lambda value, bound: value < bound.lt, "below {.lt}"),
    MinLen: (lambda value, bound: len(value) >= bound.min_length, "not empty"),
}


def marked(config: Any, mark: Mark) -> set[str]:
    """Names of the settings with this mark."""
    return {field.name for field in fields(config) if mark in markers(field)}


def markers(field: Field[Any]) -> tuple[Any, ...]:
    return get_args(field.type)[1:]


def group(field: Field[Any]) -> Group:
    return next(marker for marker in markers(field) if isinstance(marker, Group))


def plain_type(field: Field[Any]) -> Any:
    """The type without its markers, such as `int | None`."""
    return get_args(field.type)[0]


def bounds(field: Field[Any]) -> list[str]:
    """The range in words, such as ["above 0", "at most 1"]; empty where every value of the type is accepted."""
    return [RANGE[type(marker)][1].format(marker) for marker in markers(field) if type(marker) in RANGE]


def units(field: Field[Any]) -> list[str]:
    """The unit in words; "none" for a pure number, and an empty list for a setting that is not a number."""
    if not {int, float} & set(_alternatives(plain_type(field))):
        return []
    return [marker.unit for marker in markers(field) if isinstance(marker, Unit)] or ["none"]


def accepted(field: Field[Any]) -> str:
    """What the setting accepts, such as "a whole number, 1 or more, or None"."""
    kinds = kinds_of(plain_type(field), KINDS)
    none = [kinds.pop()] if kinds[-1] == KINDS[NoneType] else []
    return ", or ".join([", ".join([", or ".join(kinds), *bounds(field)]), *none])


def kinds_of(hint: Any, words: Mapping[type, str]) -> list[str]:
    """The alternatives of a type in words, such as ["a whole number", "None"]."""
    return [
        words.get(get_origin(kind) or kind) or "one of " + ", ".join(map(str, get_args(kind)))
        for kind in _alternatives(hint)
    ]


def fits(declared: Any, value: Any) -> bool:
    """Whether a value is of a declared type and within its bounds."""
    origin = get_origin(declared)
    if origin is Annotated:
        kind, *found = get_args(declared)
        within = (RANGE[type(marker)][0](value, marker) for marker in found if type(marker) in RANGE)
        return fits(kind, value) and (value is None or all(within))
    if origin in (Union, UnionType):
        return any(fits(kind, value) for kind in get_args(declared))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(declared)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if declared is float:  # 1 is accepted as well as 1.0
        return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if declared is int:  # True is an int to Python
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or declared)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
