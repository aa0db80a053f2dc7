"""A digest of a reward's source. Logged answers are reused only if the digest of their reward is unchanged.

The digest covers the following, as far as it can be read without running code:

- the source text of a function or of an object's class; bytecode and constants if there is no text, as in an
  interactive session;
- functions and upper-case constants of the same module that this code names, and wrapped functions;
- numbers, texts and tuples of these in closures and default values;
- the arguments of functools.partial, and the options of `from_spec`;
- the settings of the rewards of this library and of TRL, and of frozen dataclasses.

Lists and dicts in closures and the attributes of other objects are left out, because a reward may change these values.
The digest does not depend on memory addresses, the hash seed, the process or the folder of a file.
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

#: Settings of this library's rewards that do not change the answers, except for rounding.
WITHOUT_EFFECT = {
    "batch_size", "cache", "cache_size", "device", "log", "max_concurrency", "max_failures", "price_per_million",
    "usage",
}  # fmt: skip
OPTIONS = "_lora_gan_options"  # the attribute in which `from_spec` stores the options of an object
SECRETS = ("key", "token", "secret", "password")  # options with these names, or names ending in _key, ..., are left out


def source_digest(func: Callable[..., Any]) -> str:
    """32 hex digits that change when the source of a reward changes."""
    digest = hashlib.blake2b(digest_size=16)
    for line in _description(func, set()):
        digest.update(line.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _description(obj: Any, visited: set[int]) -> Iterator[str]:
    """Lines that describe a callable. `visited` holds the ids of objects that are already described."""
    if id(obj) in visited:
        return
    visited.add(id(obj))
    is_ours = type(obj).__module__.partition(".")[0] == __name__.partition(".")[0]  # described by its settings
    options = {} if is_ours else getattr(obj, "__dict__", {}).get(OPTIONS) or {}
    yield from _values("option", dict(sorted(options.items())), visited)
    if isinstance(obj, functools.partial):
        yield from _values("partial", dict(enumerate(obj.args)) | dict(sorted(obj.keywords.items())), visited)
        yield from _description(obj.func, visited)
    elif isinstance(obj, types.MethodType):
        if isinstance(obj.__func__, types.FunctionType):
            yield from _function(obj.__func__, type(obj.__self__), visited)
        else:  # any callable can be bound, such as a partial
            yield from _description(obj.__func__, visited)
    elif isinstance(obj, types.FunctionType):
        yield from _function(obj, None, visited)
    elif isinstance(obj, type):
        yield from _class(obj, visited)
    elif isinstance(obj, types.BuiltinFunctionType):
        yield f"builtin {obj.__module__}.{obj.__qualname__}"
    else:
        yield from _class(type(obj), visited)
        if isinstance(qualname := getattr(obj, "__qualname__", None), str):  # str.upper and other C functions
            yield f"called {qualname}"
        yield from _settings(obj)
        if hasattr(type(obj), "__wrapped__") or "__wrapped__" in getattr(obj, "__dict__", {}):  # functools.lru_cache
            yield from _description(obj.__wrapped__, visited)


def _function(func: types.FunctionType, owner: type | None, visited: set[int]) -> Iterator[str]:
    code = func.__code__
    text = _text(code)
    yield f"source {text}"
    if text is None or func.__name__ == "<lambda>":  # a line of source may contain several lambdas
        yield from _bytecode(code)
    defaults = dict(enumerate(func.__defaults__ or ())) | (func.__kwdefaults__ or {})
    for kind, values in (("default", defaults), ("closure", dict(cells(func)))):
        fixed = {name: value for name, value in values.items() if not isinstance(value, list | set | dict)}
        yield from _values(kind, fixed, visited)
    yield from _named(func, owner, visited)
    if hasattr(func, "__wrapped__"):
        yield from _description(func.__wrapped__, visited)


def cells(func: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of each variable in a function's closure."""
    for name, cell in zip(func.__code__.co_freevars, func.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def _is_secret(name: object) -> bool:
    return isinstance(name, str) and (name in SECRETS or name.endswith(tuple(f"_{secret}" for secret in SECRETS)))


def _values(kind: str, values: Mapping[Any, Any], visited: set[int]) -> Iterator[str]:
    """Plain data as text, and functions by their description. Secrets and other values are left out."""
    for name, value in values.items():
        if _is_secret(name):
            continue
        if (text := _plain_text(value)) is not None:
            yield f"{kind} {name}={text}"
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            yield f"{kind} {name}"
            yield from _description(value, visited)


def _named(func: types.FunctionType, owner: type | None, visited: set[int]) -> Iterator[str]:
    """The functions, classes and upper-case constants of the same module, and methods of `owner`, that `func` names."""
    for name in sorted(set(_names(func.__code__))):
        for namespace in (func.__globals__, vars(owner) if owner else {}):
            value = namespace.get(name)
            if isinstance(value, types.FunctionType | type) and value.__module__ == func.__module__:
                yield f"names {name}"
                yield from _description(value, visited)
            elif name.isupper() and (text := _plain_text(value)) is not None:
                yield f"constant {name}={text}"


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _class(cls: type, visited: set[int]) -> Iterator[str]:
    """A class by its source and that of its bases in the same package. A class of this library is described by its
    name: a release may change its source without changing its answers."""
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
                    yield from _function(method, cls, visited)
                else:
                    yield from _named(method, None, visited)


def _settings(obj: Any) -> Iterator[str]:
    """The attributes of an object, for kinds of objects in which all attributes are settings."""
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
    """The source text of a code object or a class; None if it cannot be read."""
    try:
        return textwrap.dedent(inspect.getsource(obj)).strip()
    except Exception:  # OSError and TypeError without a file, other errors if the file has changed
        return None


def _bytecode(code: types.CodeType) -> Iterator[str]:
    yield f"bytecode {code.co_code.hex()} {code.co_varnames} {code.co_freevars} {code.co_names}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _bytecode(constant)
        else:
            yield f"constant {_plain_text(constant)}"


def _plain_text(value: Any) -> str | None:
    """Plain data as a text that is equal in every process; None for every other value."""
    try:
        return json.dumps(value, default=_tagged)
    except Exception:  # a list that contains itself, an int with thousands of digits, or a value that is not plain data
        return None


def _tagged(value: Any) -> Any:
    """Plain data that JSON does not support. The order of a set does not depend on the process."""
    if isinstance(value, set | frozenset):
        return {"set": sorted(json.dumps(entry, default=_tagged) for entry in value)}
    if isinstance(value, bytes | complex | PurePath):
        return repr(value)
    raise TypeError
