"""Checkpoint folders: their files, how they are written whole or not at all, and how they are found.

    step-100/
      generator/      adapter_config.json  adapter_model.bin  optimizer.pt  monitor.json  monitor.safetensors
      discriminator/  adapter_config.json  adapter_model.bin  optimizer.pt  state.json  state.safetensors
      reference/      adapter_config.json  adapter_model.bin  (where the KL is to the adapter of init_adapter=)
      trainer_state.json   (step, data position, settings, the base's fingerprint, versions)
      manifest.json        (size and SHA-256 of every other file; a folder without it is no checkpoint)

monitor: what the monitor remembers. state: the discriminator's raw weights, average and replay. `state_files` writes
both, and reads the monitor.pt and state.pt of earlier versions in their place.

`run.snapshot` says what the files hold, and reads them. `durable` writes a folder so that a reader sees all or nothing.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from . import durable, state_files
from .durable import MANIFEST, Damaged, Folder

STATE = "trainer_state.json"
PLAYERS: tuple[Literal["generator", "discriminator"], ...] = ("generator", "discriminator")
REFERENCE = "reference"
BY_HAND = "save_checkpoint"  # what trainer_state.json says of a checkpoint that was not fit()'s own
FILES = (
    STATE, "generator/adapter_config.json", "generator/optimizer.pt",
    "discriminator/adapter_config.json", "discriminator/optimizer.pt",
)  # fmt: skip
STATES = ("generator/monitor", "discriminator/state")  # two files each, see `state_files`
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT prefers the first; never both are written

Content = dict[str, Any]  # {name of a file within the checkpoint, or one of STATES: what it is to hold}


# --- writing


def write(content: Content, folder: Path, step: int, *, limit: int | None = None, keep: Collection[int] = ()) -> Path:
    """Write a snapshot as folder/step-N, then remove fit()'s oldest beyond `limit`, but none of the steps in `keep`."""
    final = folder / f"step-{step}"
    durable.write_folder(final, _files(content))
    if limit:
        spared = {final.name, *(f"step-{kept}" for kept in keep)}
        there = complete(folder)
        automatic = [path for path in there if not _is_by_hand(path)] if len(there) > limit else []
        for old in automatic[:-limit]:
            if old.name not in spared:
                durable.remove_folder(old)
    return final


def _is_by_hand(path: Path) -> bool:
    """Whether `save_checkpoint()` made a complete checkpoint; one that cannot be read counts so, and stays."""
    try:
        return Folder(path, manifest=True).read_json(STATE).get("saved_by") == BY_HAND
    except Damaged:
        return True


def size_of(content: Content) -> int:
    """Bytes that a snapshot takes on the disk."""
    return sum(map(len, _files(content).values()))


def _files(content: Content) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name, value in content.items():
        files |= state_files.encoded(name, value) if name in STATES else {name: serialized(name, value)}
    return files


def serialized(name: str, value: Any) -> bytes:
    if name.endswith(".json"):
        return (json.dumps(value, indent=2) + "\n").encode()
    if name.endswith(".safetensors"):
        return safetensors.torch.save(value, metadata={"format": "pt"})
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def weights_name(weights_format: str) -> str:
    return f"adapter_model.{weights_format}"


def copied(value: Any) -> Any:
    """A copy on the CPU of tensors, in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        there = value.detach()
        return (there.clone() if there.device.type == "cpu" else there.cpu()).contiguous()
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value


def readable(folder: Path) -> None:
    """safetensors makes files that only their owner can read: give them the mode that every other new file has."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


# --- finding


def player_folder(path: Path, player: str) -> Folder:
    """A player's folder, named itself or by the checkpoint or export that holds it. A checkpoint's manifest holds then;
    other folders have none."""
    if (path / MANIFEST).exists():
        return Folder(path, manifest=True).part(player)
    if path.name in (*PLAYERS, REFERENCE) and (path.parent / MANIFEST).exists():
        return Folder(path.parent, manifest=True).part(path.name)
    is_inside = (path / player).is_dir() and not (path / "adapter_config.json").exists()
    return Folder(path / player if is_inside else path, manifest=False)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints under a run's folder, oldest step first."""
    return [path for _, path in sorted(_steps(folder).items()) if fault(path) is None]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, also where the folder is set aside."""
    match = re.search(r"step-([0-9]+)", path.name)
    assert match is not None, path
    return int(match[1])


def _steps(folder: Path) -> dict[int, Path]:
    """Whatever stands under a step's name, by its number."""
    return {
        int(name.removeprefix("step-")): path
        for name, path in durable.standing(folder).items()
        if re.fullmatch(r"step-[0-9]{1,18}", name)
    }


def fault(path: Path, *, deep: bool = False) -> str | None:
    """Why a folder is no complete checkpoint, None where it is one; `deep` compares every file's SHA-256, too."""
    try:
        folder = Folder(path, manifest=True)
        adapters: list[str] = [*PLAYERS]
        files = [*FILES]
        if has_reference(folder):
            adapters.append(REFERENCE)
            files.append(f"{REFERENCE}/adapter_config.json")
        weights = [sum(folder.has(f"{adapter}/{name}") for name in WEIGHTS) for adapter in adapters]
        missing = [name for name in files if not folder.has(name)]
        missing += [name for name in STATES if not state_files.has(folder, name)]
        if missing or set(weights) != {1}:
            what = missing[0] if missing else "the weights of each player once"
            return f"{path / MANIFEST} does not name {what}"
        folder.verify(deep=deep)
    except Damaged as error:
        return str(error)
    return None


def is_complete(path: Path) -> bool:
    return fault(path) is None


def find(folder: Path, step: int | None) -> Path:
    """One step's folder, or the newest complete one; what is newer and damaged is skipped with a warning."""
    steps = _steps(folder)
    if step is not None and step in steps and is_complete(steps[step]):
        return steps[step]
    skipped: list[str] = []
    for number in sorted(steps, reverse=True) if step is None else ():
        why = fault(steps[number], deep=True)
        if why is None:
            for words in skipped:
                warnings.warn(f"{words}; going on from step {number}", stacklevel=4)
            return steps[number]
        skipped.append(f"the checkpoint of step {number} is skipped: {why}")
    there = ", ".join(str(step_of(path)) for path in complete(folder)) or "none"
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    hint = ". Name the folder of a run, which holds folders step-N"
    if runs := sorted({str(path.parent.parent) for path in folder.glob(f"*/step-*/{MANIFEST}")}):
        hint += f"; there are in {', '.join(runs[:3])}"
    elif step in steps:
        hint = f" ({fault(steps[step])})"
    elif skipped:
        hint = f" ({'; '.join(skipped[:3])})"
    raise ValueError(f"there is no complete {wanted} in {folder}: complete steps there: {there}{hint}")


def has_reference(folder: Folder) -> bool:
    """Whether a checkpoint holds an adapter that the KL is measured to."""
    return any(folder.has(f"{REFERENCE}/{name}") for name in ("adapter_config.json", *WEIGHTS))
