"""Checkpoint folders: their files, and how they are written, found and removed.

    step-100/
      generator/      adapter_config.json  adapter_model.bin  optimizer.pt  monitor.json  monitor.safetensors
      discriminator/  adapter_config.json  adapter_model.bin  optimizer.pt  state.json  state.safetensors
      reference/      adapter_config.json  adapter_model.bin
      trainer_state.json
      manifest.json

- monitor: the state of the monitor. state: the discriminator's heads, probe and replay. `state_files` writes both, and
  reads monitor.pt and state.pt of earlier versions.
- reference/ exists if the KL is measured to the adapter of init_adapter=.
- trainer_state.json holds the step, data position, settings, fingerprint of the base, and versions.
- manifest.json holds the size and SHA-256 of every other file. A folder without it is not a checkpoint.

`run.snapshot` makes and reads the content of the files. `durable` writes a folder completely or not at all.
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
BY_HAND = "save_checkpoint"  # "saved_by" in the trainer_state.json of a checkpoint by save_checkpoint(), not by fit()
FILES = (
    STATE, "generator/adapter_config.json", "generator/optimizer.pt",
    "discriminator/adapter_config.json", "discriminator/optimizer.pt",
)  # fmt: skip
STATES = ("generator/monitor", "discriminator/state")  # two files each, see `state_files`
ADAPTER = "adapter_model.bin"
WEIGHTS = ("adapter_model.safetensors", ADAPTER)  # earlier versions also saved the first, which PEFT prefers

Content = dict[str, Any]  # {name of a file within the checkpoint, or one of STATES: its content}


# --- writing


def write(content: Content, folder: Path, step: int, *, limit: int | None = None, keep: Collection[int] = ()) -> Path:
    """Write a snapshot as folder/step-N. Then remove fit()'s oldest checkpoints beyond `limit`, except for the steps in
    `keep`.

    Returns:
        the folder of the checkpoint.

    Raises:
        OSError: the checkpoint could not be written. An earlier checkpoint of the same step remains.
    """
    final = folder / f"step-{step}"
    durable.write_folder(final, _files(content))
    if limit:
        kept_names = {final.name, *(f"step-{kept}" for kept in keep)}
        automatic = [path for path in complete(folder) if not _is_by_hand(path)]
        for old in automatic[:-limit]:
            if old.name not in kept_names:
                durable.remove_folder(old)
    return final


def _is_by_hand(path: Path) -> bool:
    """Whether `save_checkpoint()` made this complete checkpoint. An unreadable one counts as such, and is kept."""
    try:
        return Folder(path, manifest=True).read_json(STATE).get("saved_by") == BY_HAND
    except Damaged:
        return True


def size_of(content: Content) -> int:
    """Size of a snapshot on the disk, in bytes."""
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


def copied(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples, with the tensors copied to the CPU."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()).contiguous()
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value


def readable(folder: Path) -> None:
    """Give safetensors files the default mode of new files. safetensors makes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


# --- finding


def player_folder(path: Path, player: str) -> Folder:
    """The folder of a player. `path` is this folder, or the checkpoint or export that contains it. In a checkpoint, the
    files are checked against its manifest. Other folders have no manifest."""
    if (path / MANIFEST).exists():
        return Folder(path, manifest=True).part(player)
    if path.name in (*PLAYERS, REFERENCE) and (path.parent / MANIFEST).exists():
        return Folder(path.parent, manifest=True).part(path.name)
    is_inside = (path / player).is_dir() and not (path / "adapter_config.json").exists()
    return Folder(path / player if is_inside else path, manifest=False)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, lowest step first."""
    return [path for _, path in sorted(_steps(folder).items()) if fault(path) is None]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name. Also works for a replaced folder (see `durable`)."""
    match = re.search(r"step-([0-9]+)", path.name)
    assert match is not None, path
    return int(match[1])


def _steps(folder: Path) -> dict[int, Path]:
    """{step: folder with the name of this step}, complete or not."""
    return {
        int(name.removeprefix("step-")): path
        for name, path in durable.find_folders(folder).items()
        if re.fullmatch(r"step-[0-9]{1,18}", name)
    }


def fault(path: Path, *, deep: bool = False) -> str | None:
    """The reason why a folder is not a complete checkpoint; None if it is one. `deep` also compares SHA-256 digests."""
    try:
        folder = Folder(path, manifest=True)
        adapters = (*PLAYERS, REFERENCE) if has_reference(folder) else PLAYERS
        weights = {sum(folder.has(f"{adapter}/{name}") for name in WEIGHTS) for adapter in adapters}
        required = (*FILES, *(f"{adapter}/adapter_config.json" for adapter in adapters))
        missing = [name for name in required if not folder.has(name)]
        missing += [name for name in STATES if not state_files.has(folder, name)]
        if missing or weights != {1}:
            what = missing[0] if missing else "the weights of each player once"
            return f"{path / MANIFEST} does not name {what}"
        folder.verify(deep=deep)
    except Damaged as error:
        return str(error)
    return None


def find(folder: Path, step: int | None) -> Path:
    """The complete checkpoint of a step, or the newest one if `step` is None. Newer, damaged checkpoints are skipped
    with a warning.

    Raises:
        ValueError: there is none. The message lists the complete steps.
    """
    steps = _steps(folder)
    if step is not None and step in steps and fault(steps[step]) is None:
        return steps[step]
    skipped: list[str] = []
    for number in sorted(steps, reverse=True) if step is None else ():
        reason = fault(steps[number], deep=True)
        if reason is None:
            for message in skipped:
                warnings.warn(f"{message}; continuing from step {number}", stacklevel=4)
            return steps[number]
        skipped.append(f"the checkpoint of step {number} is skipped: {reason}")
    existing = ", ".join(str(step_of(path)) for path in complete(folder)) or "none"
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    hint = ". Name the folder of a run, which contains folders step-N"
    if runs := sorted({str(path.parent.parent) for path in folder.glob(f"*/step-*/{MANIFEST}")}):
        hint += f"; there are some in {', '.join(runs[:3])}"
    elif step in steps:
        hint = f" ({fault(steps[step])})"
    elif skipped:
        hint = f" ({'; '.join(skipped[:3])})"
    raise ValueError(f"there is no complete {wanted} in {folder}: complete steps there: {existing}{hint}")


def has_reference(folder: Folder) -> bool:
    """Whether a checkpoint contains files of the adapter to which the KL is measured."""
    return bool(folder.part(REFERENCE).files)
