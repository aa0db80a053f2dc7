"""A digest of a reward's source: an answer log is taken up only where the reward is still the one that answered.

The digest covers, as far as each can be known without running anything:

- the source text of a function or of an object's class; the bytecode and constants where there is no text, as in an
  interactive session;
- functions and upper-case constants of the same module that this code names, and wrapped functions;
- numbers, texts and tuples of these in closures and default values;
- the arguments of functools.partial, and the options of `from_spec`;
- the settings of the rewards of this library and of TRL, and of frozen dataclasses.

Lists and dicts in closures and the attributes of other objects are left out: a reward may count or collect in them.
Nothing depends on an address in memory, on the hash seed, on the process or on the folder of a file.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

#: Settings of this library's rewards that leave the answers as they are, but for rounding.
WITHOUT_EFFECT = {
    "batch_size", "cache", "cache_size", "device", "log", "max_concurrency", "max_failures", "price_per_million",
    "usage",
}  # fmt: skip
OPTIONS = "_lora_gan_options"  # the attribute where `from_spec` notes the options that it made an object with
SECRETS = ("key", "token", "secret", "password")  # an option that is called so, or ends in _key, ..., changes no answer


def source_digest(func: Callable[..., Any]) -> str:
    """32 hex digits that change when the source of a reward changes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(func, set()):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _parts(obj: Any, seen: set[int]) -> Iterator[str]:
    """What there is to say about a callable; `seen` holds the ids of what was described already."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    is_ours = type(obj).__module__.partition(".")[0] == __name__.partition(".")[0]  # its settings say it all
    options = {} if is_ours else getattr(obj, "__dict__", {}).get(OPTIONS) or {}
    yield from _values("option", dict(sorted(options.items())), seen)
    if isinstance(obj, functools.partial):
        yield from _values("partial", dict(enumerate(obj.args)) | dict(sorted(obj.keywords.items())), seen)
        yield from _parts(obj.func, seen)
    elif isinstance(obj, types.MethodType):
        if isinstance(obj.__func__, types.FunctionType):
            yield from _function(obj.__func__, type(obj.__self__), seen)
        else:  # any callable can be bound, such as a partial
            yield from _parts(obj.__func__, seen)
    elif isinstance(obj, types.FunctionType):
        yield from _function(obj, None, seen)
    elif isinstance(obj, type):
        yield from _class(obj, seen)
    elif isinstance(obj, types.BuiltinFunctionType):
        yield f"builtin {obj.__module__}.{obj.__qualname__}"
    else:
        yield from _class(type(obj), seen)
        if isinstance(qualname := getattr(obj, "__qualname__", None), str):  # str.upper, and what is written in C
            yield f"called {qualname}"
        yield from _settings(obj)
        if hasattr(type(obj), "__wrapped__") or "__wrapped__" in getattr(obj, "__dict__", {}):  # functools.lru_cache
            yield from _parts(obj.__wrapped__, seen)


def _function(func: types.FunctionType, owner: type | None, seen: set[int]) -> Iterator[str]:
    code = func.__code__
    text = _text(code)
    yield f"source {text}"
    if text is None or func.__name__ == "<lambda>":  # a line may hold several
        yield from _bytecode(code)
    defaults = dict(enumerate(func.__defaults__ or ())) | (func.__kwdefaults__ or {})
    for kind, values in (("default", defaults), ("closure", dict(cells(func)))):
        fixed = {name: value for name, value in values.items() if not isinstance(value, list | set | dict)}
        yield from _values(kind, fixed, seen)
    yield from _named(func, owner, seen)
    if hasattr(func, "__wrapped__"):
        yield from _parts(func.__wrapped__, seen)


def cells(func: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of a function's closure, with their values."""
    for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _is_secret(name: object) -> bool:
    return isinstance(name, str) and (name in SECRETS or name.endswith(tuple(f"_{secret}" for secret in SECRETS)))


def _values(kind: str, values: Mapping[Any, Any], seen: set[int]) -> Iterator[str]:
    """Plain data as text, functions by their source; secrets and everything else are left out."""
    for name, value in values.items():
        if _is_secret(name):
            continue
        if (text := _plain_text(value)) is not None:
            yield f"{kind} {name}={text}"
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            yield f"{kind} {name}"
            yield from _parts(value, seen)


def _named(func: types.FunctionType, owner: type | None, seen: set[int]) -> Iterator[str]:
    """Functions, classes and upper-case constants of the same module, and methods of the same object, that it names."""
    for name in sorted(set(_names(func.__code__))):
        for place in (func.__globals__, vars(owner) if owner else {}):
            value = place.get(name)
            if isinstance(value, types.FunctionType | type) and value.__module__ == func.__module__:
                yield f"names {name}"
                yield from _parts(value, seen)
            elif name.isupper() and (text := _plain_text(value)) is not None:
                yield f"constant {name}={text}"


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _class(cls: type, seen: set[int]) -> Iterator[str]:
    """A class by its source, with its bases of the same package; a class of this library by its name: its source
    changes with every release, and what it answers does not."""
    package = cls.__module__.partition(".")[0]
    if package in (__name__.partition(".")[0], "builtins"):
        yield f"class {cls.__module__}.{cls.__qualname__}"
        return
    for kind in cls.__mro__:
        if kind.__module__.partition(".")[0] != package:
            continue
        text = _text(kind)
        yield f"source {text}" if text else f"class {kind.__qualname__}"
        for _, method in sorted(vars(kind).items()):
            method = getattr(method, "__func__", method)  # of a staticmethod or classmethod
            if isinstance(method, types.FunctionType) and method.__module__ == kind.__module__:
                if text is None:
                    yield from _function(method, cls, seen)
                else:
                    yield from _named(method, None, seen)


def _settings(obj: Any) -> Iterator[str]:
    """The settings of an object whose attributes are known to be settings."""
    values = getattr(obj, "__dict__", {})
    package = type(obj).__module__.partition(".")[0]
    if (parameters := getattr(obj, "__dataclass_params__", None)) and parameters.frozen:
        values = {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    elif package == __name__.partition(".")[0]:
        values = {name: value for name, value in values.items() if not name.startswith("_") or name == "_request"}
        values = {name: value for name, value in values.items() if name not in WITHOUT_EFFECT}
    elif package != "trl":
        return
    for name, value in sorted(values.items()):
        if name not in ("__name__", OPTIONS) and (text := _plain_text(value)) is not None:
            yield f"setting {name}={text}"


def _text(obj: Any) -> str | None:
    """The source text of a code object or a class; None where there is none to read."""
    try:
        return textwrap.dedent(inspect.getsource(obj)).strip()
    except Exception:  # OSError and TypeError without a file, others where the file has changed since
        return None


def _bytecode(code: types.CodeType) -> Iterator[str]:
    yield f"bytecode {code.co_code.hex()} {code.co_varnames} {code.co_freevars} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _bytecode(constant)
        else:
            yield f"constant {_plain_text(constant)}"


def _plain_text(value: Any) -> str | None:
    """Plain data as a text that is the same in every process; None for everything else."""
    try:
        return json.dumps(value, default=_tagged)
    except Exception:  # a list that holds itself, a whole number of thousands of digits, another kind of value
        return None


def _tagged(value: Any) -> Any:
    """The plain data that JSON lacks; a set in an order that does not depend on the process."""
    if isinstance(value, set | frozenset):
        return {"set": sorted(json.dumps(entry, default=_tagged) for entry in value)}
    if isinstance(value, bytes | complex | PurePath):
        return repr(value)
    raise TypeError
