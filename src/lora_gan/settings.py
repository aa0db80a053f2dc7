"""Declaration, checks and descriptions of settings. `config.py` declares them; the command line shows descriptions.

A declaration is one annotation, `name: Annotated[TYPE, MARKERS...] = DEFAULT`, with the help text below. The markers
are a `Group`, bounds and a `Unit` of annotated-types, and `Mark`s. Bounds apply to values other than None.
pydantic also checks such annotations, but importing it takes longer than all of `import lora_gan`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, Unit


class Group(Enum):
    """The topic of a setting. The value is a heading of `lora-gan train --help`."""

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
    """A property of a setting that other modules use."""

    FIRST = "`lora-gan train --help` shows this setting before the groups"
    SILENT = "no effect on learning or queries, so a resumed run does not report a change"
    UNLISTED = "not in model cards: no effect on the weights, may hold a token, or is part of the adapter's config"


KINDS = {
    int: "a whole number", float: "a number", str: "a text", bool: "True or False", dict: "a mapping",
    tuple: "a list of texts", NoneType: "None",
}  # fmt: skip
#: For each bound: the check of a value, and the text for messages.
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
    """The range in words, such as ["above 0", "at most 1"]; empty if the setting has no bounds."""
    return [RANGE[type(marker)][1].format(marker) for marker in markers(field) if type(marker) in RANGE]


def units(field: Field[Any]) -> list[str]:
    """The unit in words: ["none"] for a number without unit, an empty list for a setting that is not a number."""
    if not {int, float} & set(_alternatives(plain_type(field))):
        return []
    return [marker.unit for marker in markers(field) if isinstance(marker, Unit)] or ["none"]


def accepted(field: Field[Any]) -> str:
    """The accepted values in words, such as "a whole number, 1 or more, or None"."""
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
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool) and declared in (int, float):  # True is an int in Python
        return False
    if declared is float:  # a finite number; 1 is accepted, too, but no whole number beyond the largest float
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, origin or declared)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
