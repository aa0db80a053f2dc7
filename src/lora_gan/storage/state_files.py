"""Nested values with tensors, as two files: tensors as safetensors, all else as JSON. Reading them executes no code.

    NAME.safetensors   the tensors by their path: "replay.rewards", "raw.0"
    NAME.json          everything else; {"$tensor": "raw.0"} refers to a tensor

JSON has no tuples and no keys that are numbers. They are encoded as {"$tuple": [...]} and
{"$items": [[key, value], ...]}. Floats are read bitwise equal. NaN and infinity are encoded as in Python's json module.
Earlier versions wrote NAME.pt by torch.save; `read` also reads this file.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.torch
from torch import Tensor

from . import untrusted
from .durable import Damaged, Folder


def encoded(name: str, value: dict[Any, Any]) -> dict[str, bytes]:
    """{file name: content} for a dict of dicts, lists and tuples with tensors, numbers, texts and None.

    The tensors must be contiguous and must not share memory. `checkpoint.copied` makes such tensors.
    """
    tensors: dict[str, Tensor] = {}
    rest = _split(value, "", tensors)
    return {
        f"{name}.safetensors": safetensors.torch.save(tensors),
        f"{name}.json": (json.dumps(rest, indent=2) + "\n").encode(),
    }


def has(folder: Folder, name: str) -> bool:
    """Whether a folder has the files of a value, in the current or the earlier format."""
    return folder.has(f"{name}.pt") or (folder.has(f"{name}.json") and folder.has(f"{name}.safetensors"))


def read(folder: Folder, name: str, *, limit: int) -> Any:
    """The value in the files. The file of tensors may have `limit` bytes.

    Raises:
        Damaged: a file does not match the manifest, cannot be read, or does not fit the other file.
    """
    if not folder.has(f"{name}.json"):
        return untrusted.read_tensors(folder, f"{name}.pt", limit=limit)
    tensors = untrusted.read_safetensors(folder, f"{name}.safetensors", limit=limit)
    rest = folder.read_json(f"{name}.json")
    try:
        return _join(rest, tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:120]
        raise Damaged(f"{folder.path / name}.json does not fit {name}.safetensors: {reason}") from error


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value in a form that JSON supports. Its tensors are added to `tensors`, by path."""

    def inside(key: Any, entry: Any) -> Any:
        return _split(entry, f"{path}.{key}" if path else str(key), tensors)

    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, dict):
        entries = {key: inside(key, entry) for key, entry in value.items()}
        return entries if all(isinstance(key, str) for key in entries) else {"$items": list(entries.items())}
    if isinstance(value, list | tuple):
        listed = [inside(i, entry) for i, entry in enumerate(value)]
        return {"$tuple": listed} if isinstance(value, tuple) else listed
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(value, list):
        return [_join(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"$tensor"}:
        return tensors[value["$tensor"]]
    if set(value) == {"$tuple"}:
        return tuple(_join(entry, tensors) for entry in value["$tuple"])
    entries = value["$items"] if set(value) == {"$items"} else value.items()
    return {key: _join(entry, tensors) for key, entry in entries}
