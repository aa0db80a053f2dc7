"""What a checkpoint's files may hold, whoever wrote them: everything is read and checked before memory changes.

Tensors come by `weights_only` or safetensors, so nothing is executed; and then names, shapes, types and values must be
those of the players that are to take them. Every refusal is a ValueError that names the file and what is wrong with it.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from annotated_types import Ge, Gt, Lt
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ..settings import fits
from .durable import Damaged, Folder

#: Kinds of plain numbers, for `require`.
WHOLE, POSITIVE = Annotated[int, Ge(0), Lt(2**63)], Annotated[float, Gt(0)]
#: Bytes that a file of tensors may have beside the tensors: names, headers, padding.
SLACK = 2**20


def room_for(tensors: Mapping[str, Tensor] | Sequence[Tensor], times: int = 1) -> int:
    """The largest file, in bytes, that can hold these tensors `times` over, in whatever precision."""
    entries = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
    return times * sum(8 * tensor.numel() + 1024 for tensor in entries) + SLACK


# --- files of tensors


def read_tensors(folder: Folder, name: str, *, limit: int) -> Any:
    """Tensors and plain values out of a file of torch.save; what would execute code on loading is refused."""
    file, data = folder.path / name, folder.read(name, limit=limit)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise Damaged(f"{file} could not be read as tensors: it is no file of torch.save's zip format") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Damaged(f"{file} holds compressed parts, which torch.save never writes: they may be of any size")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken pickle makes torch's reader raise
        reason = str(error).split("\n")[0]
        raise Damaged(f"{file} could not be read as tensors and plain numbers: {reason}") from error
    _require_plain(value, file)
    return value


def read_safetensors(folder: Folder, name: str, *, limit: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name."""
    data = folder.read(name, limit=limit)
    try:
        return load_safetensors(data)
    except Exception as error:  # safetensors' own, and torch's for types that it lacks
        raise Damaged(f"{folder.path / name} could not be read: {error}") from error


def read_weights(
    folder: Folder,
    expected: Mapping[str, Tensor],
    *,
    called: Callable[[str], str] = str,
    optional: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The adapter's weights, refused where a name, a shape, a type or a value cannot be this adapter's.

    Args:
        called: what a tensor is called here, from its name in the file.
        optional: tensors that may be in the file too, in these shapes.
    """
    optional = optional or {}
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if folder.has(name)]
    if not names:
        raise ValueError(
            f"{folder.path} has no adapter_model.bin and no adapter_model.safetensors: it is not an adapter"
        )
    file, limit = folder.path / names[0], room_for({**expected, **optional})
    if names[0].endswith("safetensors"):
        weights: Any = read_safetensors(folder, names[0], limit=limit)
    else:
        weights = read_tensors(folder, names[0], limit=limit)
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not named or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise Damaged(f"{file} holds something else than tensors by their names, in {kind_of(weights)}")
    if len({called(name) for name in weights}) < len(weights):
        raise Damaged(f"{file} holds a tensor twice, under two names")
    weights = {called(name): tensor for name, tensor in weights.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    ours |= {name: tuple(tensor.shape) for name, tensor in optional.items() if name in weights}
    if differing := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        name = differing[0]
        raise ValueError(
            f"{folder.path} does not fit: {name[:120]} is {theirs.get(name, 'absent')} there and "
            f"{ours.get(name, 'absent')} here ({len(differing)} tensors differ); the base and the LoRA settings (rank, "
            "target_modules) must be those it was saved with"
        )
    for name, tensor in weights.items():
        require_numbers(tensor, f"{file}: {name}")
    return weights


def require_numbers(tensor: Any, where: str, like: Tensor | None = None) -> None:
    """A tensor of finite floating-point numbers, of the shape of `like`."""
    if not isinstance(tensor, Tensor):
        raise Damaged(f"{where} is no tensor, but {kind_of(tensor)}")
    if like is not None and tensor.shape != like.shape:
        raise Damaged(f"{where} is {tuple(tensor.shape)} there and {tuple(like.shape)} here")
    if not tensor.dtype.is_floating_point:
        raise Damaged(f"{where} is of {tensor.dtype}, where floating-point numbers belong")
    if not torch.isfinite(tensor.float()).all():
        raise Damaged(f"{where} holds NaN or infinite numbers")


def _require_plain(value: Any, file: Path) -> None:
    """Only what this library writes: dicts, lists, numbers, texts, and dense tensors that own what they show."""
    left, seen = [value], 0
    while left:
        entry, seen = left.pop(), seen + 1
        if seen > 10**6:
            raise Damaged(f"{file} holds more than a million values")
        if isinstance(entry, Tensor):
            if type(entry) not in (Tensor, nn.Parameter) or entry.layout != torch.strided or entry.is_quantized:
                raise Damaged(f"{file} holds a tensor of another kind than dense: {type(entry).__name__}")
            if entry.device.type != "cpu":
                raise Damaged(f"{file} holds a tensor without numbers, on the device {entry.device.type!r}")
            if entry.numel() * entry.element_size() > entry.untyped_storage().nbytes():
                raise Damaged(f"{file} holds a tensor that is larger than what is stored of it: {tuple(entry.shape)}")
        elif isinstance(entry, dict):
            left += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list | tuple):
            left += entry
        elif not isinstance(entry, bool | int | float | str | None):
            raise Damaged(f"{file} holds {kind_of(entry)}, which no checkpoint does")


# --- plain values


def require_keys(value: Any, expected: Any, where: str) -> None:
    """A dict with exactly these keys."""
    if not isinstance(value, dict):
        raise Damaged(f"{where} is {kind_of(value)}, where a mapping belongs")
    missing = [name for name in expected if name not in value]
    surplus = [name for name in value if name not in expected]
    if missing or surplus:
        what = f"lacks {missing[0]!r}" if missing else f"has a surplus {str(surplus[0])[:80]!r}"
        raise Damaged(f"{where} {what}")


def kind_of(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# --- what the discriminator and the monitor carry


def require_replay(state: Any, vocabulary: int, heads: int, where: str) -> None:
    """A Replay.state_dict(): lengths that add up, tokens that the base has, rewards that are numbers."""
    flat = {
        "prompt_tokens": torch.int64, "prompt_lengths": torch.int64, "group_sizes": torch.int64,
        "response_tokens": torch.int64, "response_lengths": torch.int64, "rewards": torch.float64, "heads": torch.bool,
    }  # fmt: skip
    require_keys(state, [*flat, "seen"], where)
    for name, dtype in flat.items():
        tensor = state[name]
        # Of no groups at all, torch.tensor([]) has one dimension where the flags have two.
        dimensions = (1, 2) if name == "heads" else (1,)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.dim() not in dimensions:
            raise Damaged(f"{where}: {name} is no list of {dtype}")
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
        raise Damaged(f"{where} does not add up: its groups, responses, tokens and rewards are not of one number")
    for name in ("prompt_tokens", "response_tokens"):
        if ((state[name] < 0) | (state[name] >= vocabulary)).any():
            raise Damaged(f"{where}: {name} has tokens that the base does not know")
    if not torch.isfinite(state["rewards"]).all():
        raise Damaged(f"{where}: rewards hold NaN or infinite numbers")
    require(state["seen"], Annotated[int, Ge(len(sizes)), Lt(2**63)], f"{where}: seen")


def require_list(value: Any, where: str, check: Callable[[Any, str], object], length: int | None = None) -> None:
    """A list, of `length` entries, each of which passes."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        wanted = "a list" if length is None else f"a list of {length}"
        raise Damaged(f"{where} is {kind_of(value)}, where {wanted} belongs")
    for i, entry in enumerate(value):
        check(entry, f"{where}, entry {i}")


def require(value: Any, shape: Any, where: str) -> None:
    """A plain value of the shape that it must have.

    Args:
        shape: {key: shape} for a mapping with exactly these keys, [shape] for a list of any length, a tuple of shapes
            or a NamedTuple for a list of as many entries, or a type as `settings.fits` takes it.
    """
    if isinstance(shape, type) and issubclass(shape, tuple):
        shape = tuple(get_type_hints(shape).values())
    if isinstance(shape, dict):
        require_keys(value, shape, where)
        for name, part in shape.items():
            require(value[name], part, f"{where}: {name}")
    elif isinstance(shape, list | tuple):
        require_list(value, where, lambda *_: None, len(shape) if isinstance(shape, tuple) else None)
        for i, (entry, part) in enumerate(zip(value, cycle(shape), strict=False)):
            require(entry, part, f"{where}, entry {i}")
    elif not fits(shape, value):
        raise Damaged(f"{where} is {str(value)[:60]!r}, which a checkpoint never holds there")


def require_tensors_like(value: Any, like: Sequence[Tensor], where: str) -> None:
    require_list(value, where, lambda *_: None, len(like))
    for i, (tensor, ours) in enumerate(zip(value, like, strict=True)):
        require_numbers(tensor, f"{where}, entry {i}", like=ours)
