"""Rewards by specification, for the command line and YAML files: ready-made rewards, and functions in files or modules.

    from_spec("chrf")
    from_spec("my_reward.py:score")                 # a function or a class in a file
    from_spec({"name": "rouge", "kind": "rouge2"})  # with options for the function or class

    # options for a factory: a function that makes a reward
    from_spec({"name": "trl.rewards:get_repetition_penalty_reward", "ngram_size": 2})

    from_specs(["chrf", {"name": "length", "target_words": 30, "weight": 0.2}])

A function is a factory in two cases:

- Its return annotation is Callable.
- No parameter can take a response: no parameter has a name that rewards use, and the options and default values fill
  all parameters.

A factory is called with the options. Every other function is itself a reward.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..wording import did_you_mean
from .signatures import (
    GIVEN,
    PAIR_NAMES,
    VARIADIC,
    check_reward,
    parameters_of,
    returns_function,
    reward_name,
    takes_completions,
)
from .source import OPTIONS

READY = {  # {name: (module in this package, name in the module)}
    "exact_match": ("text", "exact_match"),
    "chrf": ("text", "chrf"),
    "bleu": ("text", "bleu"),
    "rouge": ("text", "rouge"),
    "meteor": ("text", "meteor"),
    "cosine": ("cosine", "CosineReward"),
    "length": ("shaping", "Length"),
    "repetition": ("shaping", "repetition"),
    "perplexity": ("perplexity", "Perplexity"),
    "classifier": ("model", "Classifier"),
    "entailment": ("model", "Entailment"),
    "human": ("human", "Human"),
    "judge": ("judge", "Judge"),
}

Spec = str | Mapping[str, Any] | Callable[..., Any]


def from_spec(spec: Spec) -> Callable[..., Any]:
    """The reward that a specification names.

    Args:
        spec: the name of a ready-made reward (`READY`), "path/to/file.py:function" or "package.module:function". A
            class or a factory is called, and its return value is the reward. Or a mapping with such a `name`, options
            for the function or class, and optionally `as`, the name in logs. A callable is returned unchanged.

    Raises:
        ValueError: the reward, file, module or function does not exist, or cannot be imported or called; or an option
            is unknown. Also if it is not clear whether a function is a reward or a factory, or how to call the reward.
        ImportError: the reward needs a library that is not installed.
    """
    return _read(spec)[0]


def from_specs(specs: Spec | Sequence[Spec]) -> tuple[list[Callable[..., Any]], list[float]]:
    """The rewards that one or several specifications name, and their weights: `weight` in a mapping, else 1.

    Raises:
        ValueError, ImportError: see `from_spec`. ValueError also for a weight that is not a finite number.
    """
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        specs = [specs]
    if not specs:
        raise ValueError("the reward is an empty list: name at least one")
    read = [_read(spec) for spec in specs]
    return [reward for reward, _ in read], [weight for _, weight in read]


def _read(spec: Any) -> tuple[Callable[..., Any], float]:
    if isinstance(spec, str):
        return _build(spec, {}, None), 1.0
    if not isinstance(spec, Mapping):
        if callable(spec):
            check_reward(spec)
            return spec, 1.0
        raise ValueError(f"{spec!r} is not a reward: give a name, file.py:function, or a mapping with 'name'")
    options = dict(spec)
    name, weight, shown = options.pop("name", None), options.pop("weight", 1.0), options.pop("as", None)
    if not isinstance(name, str):
        raise ValueError(f"the reward {dict(spec)!r:.80} has no name: give 'name', and optionally weight and options")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"weight={weight!r} of the reward {name!r} is not accepted: it must be a finite number")
    if not (shown is None or isinstance(shown, str) and shown):
        raise ValueError(f"as={shown!r} of the reward {name!r} is not accepted: it must be a non-empty text")
    return _build(name, options, shown), float(weight)


def _build(name: str, options: dict[str, Any], shown: str | None) -> Callable[..., Any]:
    """The return value of a class or factory for these options, or a function with its options bound."""
    found = _find(name)
    if not callable(found):
        raise ValueError(
            f"{name!r} is of type {type(found).__name__}, not a function: name a function or class that can be called "
            "with a response"
        )
    is_maker = isinstance(found, type) or _is_factory(name, found, options)
    _check_options(name, found, options, is_maker)
    if is_maker:
        reward = _made(name, found, options)
    elif options or shown:
        reward = _bound(found, options)
    else:
        reward = found
    try:
        check_reward(reward)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if shown:
        reward.__name__ = shown
    return reward


def _made(name: str, found: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The reward that a class or a factory makes with its options."""
    try:
        reward = found(**options)
    except (TypeError, AttributeError, LookupError) as error:  # usually an option of the wrong type
        raise ValueError(f"the reward {name!r} cannot be made with {options!r:.200}: {error}") from error
    if not callable(reward):
        raise ValueError(
            f"{name!r} takes no response, so it was called to make a reward. It returned {reward!r:.60}, which is not "
            "callable. A class needs __call__(response, target). A function that is a reward needs parameters named "
            f"{', '.join(PAIR_NAMES)}; or, in TRL's form, {', '.join(GIVEN)}"
        )
    if isinstance(reward, types.FunctionType):  # a new object for name and options: the function may have other users
        reward = _bound(reward, {})
    with contextlib.suppress(AttributeError, TypeError):  # an object with __slots__
        setattr(reward, OPTIONS, options)
    return reward


def _bound(func: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    reward = functools.partial(func, **options)
    reward.__name__ = reward_name(func)  # type: ignore[attr-defined]
    reward.needs_target = getattr(func, "needs_target", False)  # type: ignore[attr-defined]
    return reward


def _is_factory(name: str, found: Callable[..., Any], options: dict[str, Any]) -> bool:
    """Whether a function makes a reward, by the rule in the module docstring.

    Raises:
        ValueError: this is not clear. No parameter has a name that rewards use, and a parameter with the default None
            could take a response.
    """
    if not isinstance(found, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return False  # an object is a reward
    if returns_function(found):
        return True
    parameters = parameters_of(found)
    if parameters is None or any(p.kind in VARIADIC or p.name in (*PAIR_NAMES, *GIVEN) for p in parameters):
        return False
    unset = [parameter for parameter in parameters if parameter.name not in options]
    if any(parameter.default is parameter.empty for parameter in unset):
        return False
    if optional := [parameter.name for parameter in unset if parameter.default is None]:
        raise ValueError(
            f"{name!r} could be a reward that gets a response as {optional[0]}, or a function that makes a reward. "
            f"Rename the parameter to response, or annotate the function with -> Callable, or give {optional[0]} as an "
            "option"
        )
    return True


def _check_options(name: str, found: Callable[..., Any], options: dict[str, Any], is_maker: bool) -> None:
    """Raise ValueError for an unknown or missing option. Parameters that a call of the reward fills are no options."""
    listed = parameters_of(found)
    if listed is None:
        return
    parameters = {parameter.name: parameter for parameter in listed}
    if not is_maker:
        called_with = _called_with(found, list(parameters), options)
        parameters = {key: value for key, value in parameters.items() if key not in called_with}
    accepted = [key for key, value in parameters.items() if value.kind not in VARIADIC]
    if not any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values()):
        for option in options:
            if option not in accepted:
                known = [*accepted, "weight", "as"]
                raise ValueError(
                    f"the reward {name!r} has no option {option!r}{did_you_mean(option, known)}; its options are "
                    f"{', '.join(known)}"
                )
    required = [key for key in accepted if parameters[key].default is inspect.Parameter.empty and key not in options]
    if required and (is_maker or not takes_completions(found)):  # in TRL's form these may be columns
        raise ValueError(
            f"the reward {name!r} needs {', '.join(required)}: give it as {{name: {name}, {required[0]}: ...}}. Its "
            f"signature is {inspect.signature(found)!s:.200}; a reward is called with {', '.join(PAIR_NAMES)}"
        )


def _called_with(found: Callable[..., Any], names: list[str], options: dict[str, Any]) -> list[str]:
    """The parameters that a call of the reward fills. The others are options."""
    if takes_completions(found):
        return [name for name in names if name in GIVEN]
    known = [name for name in names if name in PAIR_NAMES]
    return known or [*names[:1], *(name for name in names[1:2] if name not in options)]


def _find(name: str) -> Any:
    if name in READY:
        module_name, attribute = READY[name]
        return getattr(importlib.import_module(f"{__package__}.{module_name}"), attribute)
    source, colon, attribute = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise ValueError(f"{name!r} names a file: add the name of a function, as {name}:function")
        raise ValueError(
            f"there is no reward {name!r}{did_you_mean(name, READY)}. Ready-made rewards: {', '.join(READY)}. Name "
            "your own function as path/to/file.py:function or package.module:function"
        )
    if not source or not attribute:
        raise ValueError(f"{name!r} names no function: give path/to/file.py:function or package.module:function")
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"there is no {attribute!r} in {source}{did_you_mean(attribute, own)}")
    return getattr(module, attribute)


def _import_file(file: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {file} with a reward (full path: {path})")
    return _run(path, path.stat().st_mtime_ns)


@functools.lru_cache
def _run(path: Path, mtime: int) -> ModuleType:
    """The file as a module. The file runs again only after it has changed, so its rewards share the data they load."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for imports of files next to it; last, so that it hides no other module
    module_name = f"lora_gan_reward_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look up the module of a class there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _unusable(str(path), error) from error
    return module


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # an installed command does not search there, `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise ValueError(f"there is no module {name!r} with a reward: {error}") from error
        raise _unusable(name, error) from error
    except (Exception, SystemExit) as error:
        raise _unusable(name, error) from error


def _unusable(source: str, error: BaseException) -> ValueError:
    if isinstance(error, SyntaxError):
        return ValueError(f"{error.filename or source}, line {error.lineno}: {error.msg}")
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]  # not the import machinery
    text = f": {error}" if str(error) else ""
    return ValueError(
        f"{source} raised {type(error).__name__} when imported ({last.filename}, line {last.lineno}){text}"
    )
