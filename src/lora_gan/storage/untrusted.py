"""Checks of a checkpoint's files, which may come from another person. Memory changes only after all checks.

Tensors are loaded by `weights_only` or safetensors, so no code is executed. Their names, shapes, types and values must
match the players that receive them. Every refusal is a ValueError that names the file and the problem.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge, Gt, Le, Lt
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ..settings import fits
from .durable import Damaged, Folder

#: Kinds of plain numbers, for `require`.
WHOLE, POSITIVE, NUMBER = Annotated[int, Ge(0), Lt(2**63)], Annotated[float, Gt(0)], Annotated[float, Ge(0)]
#: Bytes that a file of tensors may have in addition to the tensors: names, headers, padding.
SLACK = 2**20


def room_for(tensors: Iterable[Tensor], times: int = 1) -> int:
    """The maximum size, in bytes, of a file that holds these tensors `times` times, in any precision."""
    return times * sum(8 * tensor.numel() + 1024 for tensor in tensors) + SLACK


# --- files of tensors


def read_tensors(folder: Folder, name: str, *, limit: int) -> Any:
    """The tensors and plain values in a file by torch.save, of at most `limit` bytes. Raises Damaged for a file that
    would execute code when loaded."""
    file, data = folder.path / name, folder.read(name, limit=limit)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise Damaged(f"{file} could not be read as tensors: it does not have torch.save's zip format") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Damaged(f"{file} holds compressed entries of unknown size, which torch.save never writes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # for a broken pickle, torch's reader may raise anything
        reason = str(error).split("\n")[0]
        raise Damaged(f"{file} could not be read as tensors and plain numbers: {reason}") from error
    _require_plain(value, file)
    return value


def read_safetensors(folder: Folder, name: str, *, limit: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    data = folder.read(name, limit=limit)
    try:
        return load_safetensors(data)
    except Exception as error:  # errors of safetensors, and of torch for types that it does not have
        raise Damaged(f"{folder.path / name} could not be read: {error}") from error


def read_weights(
    folder: Folder,
    expected: Mapping[str, Tensor],
    *,
    called: Callable[[str], str] = str,
    optional: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights of an adapter, by their names in the model.

    Args:
        expected: tensors with the names and shapes of the adapter.
        called: maps the name of a tensor in the file to its name in the model.
        optional: further tensors that the file may contain, with these shapes.

    Raises:
        ValueError: there is no file of weights, or its names or shapes are not those of the adapter.
        Damaged: the file cannot be read, or holds NaN, infinity or a type that is not floating-point.
    """
    optional = optional or {}
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if folder.has(name)]
    if not names:
        raise ValueError(f"{folder.path} is not an adapter: it has no adapter_model.bin or adapter_model.safetensors")
    file, limit = folder.path / names[0], room_for({**expected, **optional}.values())
    if names[0].endswith("safetensors"):
        weights: Any = read_safetensors(folder, names[0], limit=limit)
    else:
        weights = read_tensors(folder, names[0], limit=limit)
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise Damaged(f"{file} must hold a dict of tensors by name, not {kind_of(weights)} of other values")
    if len({called(name) for name in weights}) < len(weights):
        raise Damaged(f"{file} holds a tensor twice, under two names")
    weights = {called(name): tensor for name, tensor in weights.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wanted |= {name: tuple(tensor.shape) for name, tensor in optional.items() if name in weights}
    if differing := sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name)):
        name = differing[0]
        raise ValueError(
            f"{folder.path} does not fit: {name[:120]} is {saved.get(name, 'absent')} in the file and "
            f"{wanted.get(name, 'absent')} in the model ({len(differing)} tensors differ). Use the base and the LoRA "
            "settings (rank, target_modules) with which the file was saved"
        )
    for name, tensor in weights.items():
        require_numbers(tensor, f"{file}: {name}")
    return weights


def require_numbers(tensor: Any, where: str, like: Tensor | None = None) -> None:
    """Raise Damaged unless this is a tensor of finite floating-point numbers, of the shape of `like` (None: any)."""
    if not isinstance(tensor, Tensor):
        raise Damaged(f"{where} must be a tensor, but is {kind_of(tensor)}")
    if like is not None and tensor.shape != like.shape:
        raise Damaged(f"{where} is {tuple(tensor.shape)} in the file and {tuple(like.shape)} in the model")
    if not tensor.dtype.is_floating_point:
        raise Damaged(f"{where} is of {tensor.dtype}, but must be floating-point")
    if not torch.isfinite(tensor.float()).all():
        raise Damaged(f"{where} holds NaN or infinite numbers")


def _require_plain(value: Any, file: Path) -> None:
    """Raise Damaged for values that this library never writes. It writes dicts, lists, numbers, texts, and dense
    tensors that own their memory."""
    left, count = [value], 0
    while left:
        entry, count = left.pop(), count + 1
        if count > 10**6:
            raise Damaged(f"{file} holds more than a million values")
        if isinstance(entry, Tensor):
            if type(entry) not in (Tensor, nn.Parameter) or entry.layout != torch.strided or entry.is_quantized:
                raise Damaged(f"{file} holds a tensor of another kind than dense: {type(entry).__name__}")
            if entry.device.type != "cpu":
                raise Damaged(f"{file} holds a tensor without numbers, on the device {entry.device.type!r}")
            if entry.numel() * entry.element_size() > entry.untyped_storage().nbytes():
                raise Damaged(f"{file} holds a tensor that is larger than its stored data: {tuple(entry.shape)}")
        elif isinstance(entry, dict):
            left += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list | tuple):
            left += entry
        elif not isinstance(entry, bool | int | float | str | None):
            raise Damaged(f"{file} holds {kind_of(entry)}, which a checkpoint never contains")


# --- plain values


def require_keys(value: Any, expected: Any, where: str) -> None:
    """Raise Damaged unless the value is a dict with exactly these keys."""
    if not isinstance(value, dict):
        raise Damaged(f"{where} is {kind_of(value)}, but must be a mapping")
    missing = [name for name in expected if name not in value]
    surplus = [name for name in value if name not in expected]
    if missing or surplus:
        what = f"lacks {missing[0]!r}" if missing else f"has a surplus {str(surplus[0])[:80]!r}"
        raise Damaged(f"{where} {what}")


def kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# --- the states of the discriminator and the monitor


def require_replay(state: Any, vocabulary: int, heads: int, where: str) -> None:
    """Raise Damaged unless the value is a Replay.state_dict(): lengths that add up, tokens below `vocabulary`, finite
    rewards, and flags for `heads` score heads."""
    flat = {
        "prompt_tokens": torch.int64, "prompt_lengths": torch.int64, "group_sizes": torch.int64,
        "response_tokens": torch.int64, "response_lengths": torch.int64, "rewards": torch.float64, "heads": torch.bool,
    }  # fmt: skip
    require_keys(state, flat, where)
    for name, dtype in flat.items():
        tensor = state[name]
        # The flags have two dimensions; without groups they are torch.tensor([]), which has one.
        dimensions = (1, 2) if name == "heads" else (1,)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() not in dimensions:
            raise Damaged(f"{where}: {name} must be a one-dimensional tensor of {dtype}")
    sizes, prompts, responses = state["group_sizes"], state["prompt_lengths"], state["response_lengths"]
    adds_up = (
        (sizes > 0).all() and (prompts > 0).all() and (responses >= 0).all()
        and len(sizes) == len(prompts) == len(state["heads"])
        and int(sizes.sum()) == len(responses) == len(state["rewards"])
        and int(prompts.sum()) == len(state["prompt_tokens"])
        and int(responses.sum()) == len(state["response_tokens"])
        and (not len(sizes) or state["heads"].shape[1:] == (heads,))
    )  # fmt: skip
    if not adds_up:
        raise Damaged(f"{where} does not add up: the numbers of groups, responses, tokens and rewards disagree")
    for name in ("prompt_tokens", "response_tokens"):
        if ((state[name] < 0) | (state[name] >= vocabulary)).any():
            raise Damaged(f"{where}: {name} has tokens that the base does not know")
    if not torch.isfinite(state["rewards"]).all():
        raise Damaged(f"{where}: rewards hold NaN or infinite numbers")


def require_probe(state: Any, widths: Collection[int], where: str) -> None:
    """Raise Damaged unless the value is a Probe.state_dict() for features with one of these widths."""
    require_keys(state, ("sizes", "features", "rewards", "weights", "explained", "trust", "amplitude"), where)
    for name in ("explained", "trust"):
        require(state[name], Annotated[float, Ge(0), Le(1)], f"{where}: {name}")
    require(state["amplitude"], POSITIVE, f"{where}: amplitude")
    require(state["sizes"], [Annotated[int, Ge(1), Lt(2**31)]], f"{where}: sizes")
    rows, weights = sum(state["sizes"]), state["weights"]
    width = (
        len(weights) if isinstance(weights, Tensor) and weights.dim() == 1 and len(weights) in widths else max(widths)
    )
    shapes = {
        "features": ((rows, width), torch.float32), "rewards": ((rows,), torch.float64),
        "weights": ((width,), torch.float64),
    }  # fmt: skip
    for name, (shape, dtype) in shapes.items():
        tensor = state[name]
        if tensor is None and (not rows or name == "weights"):
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise Damaged(f"{where}: {name} must be a tensor of {dtype} with the shape {shape}")
        if not torch.isfinite(tensor).all():
            raise Damaged(f"{where}: {name} holds NaN or infinite numbers")


def require_list(value: Any, where: str, length: int | None = None) -> None:
    """Raise Damaged unless the value is a list, of `length` entries if given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise Damaged(f"{where} is {kind_of(value)}, but must be {wanted}")


def require(value: Any, shape: Any, where: str) -> None:
    """Raise Damaged unless a plain value has this shape.

    Args:
        shape: {key: shape} for a mapping with exactly these keys. [shape] for a list of any length. A tuple of shapes
            or a NamedTuple for a list of as many entries. Otherwise a type, as in `settings.fits`.
    """
    if isinstance(shape, type) and issubclass(shape, tuple):
        shape = tuple(get_type_hints(shape).values())
    if isinstance(shape, dict):
        require_keys(value, shape, where)
        for name, inner in shape.items():
            require(value[name], inner, f"{where}: {name}")
    elif isinstance(shape, list | tuple):
        require_list(value, where, len(shape) if isinstance(shape, tuple) else None)
        for i, (entry, inner) in enumerate(zip(value, cycle(shape), strict=False)):
            require(entry, inner, f"{where}, entry {i}")
    elif not fits(shape, value):
        raise Damaged(f"{where} is {str(value)[:60]!r}, which a checkpoint never contains there")


def require_tensors_like(value: Any, like: Sequence[Tensor], where: str) -> None:
    """Raise Damaged unless the value is a list of finite floating-point tensors with the shapes of `like`."""
    require_list(value, where, len(like))
    for i, (tensor, expected) in enumerate(zip(value, like, strict=True)):
        require_numbers(tensor, f"{where}, entry {i}", like=expected)
