"""trainer_state.json of a checkpoint: written from a run's state, and read as an untrusted file. Used by `snapshot`."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import Config
from ..model.adapter_files import read_lora_config
from ..model.peft_config import DISC_SCALE
from ..model.players import Players
from ..rewards import budget
from ..state import RunState
from ..storage import checkpoint, untrusted
from ..storage.checkpoint import REFERENCE, STATE
from ..storage.durable import Damaged, Folder
from ..storage.untrusted import NUMBER, WHOLE
from ..training import health
from ..training.estimate import HELD_FROM

#: The content of the file, in the form that `untrusted.require` takes.
SHAPE: dict[str, Any] = {
    "format": int,
    "global_step": WHOLE,
    "position": WHOLE,
    "reward_calls": WHOLE,
    "other_calls": dict.fromkeys(budget.KEPT, WHOLE),
    "prompt_kinds": [Literal["messages", "texts"]],
    "beta_scale": NUMBER,
    "baseline": {"total": float, "weight": float},
    "reward_spread": {"squares": NUMBER, "differences": NUMBER},
    "reward_scales": dict,
    "health": health.SHAPE,
    "config": dict,
    "by_peft_config": list,
    "base": {"name": str | None, "path": str | None, "architecture": str, "fingerprint": str},
    "versions": dict,
    "machine": dict,
    "saved_by": Literal["fit", "save_checkpoint"],
    "init_adapter": str | None,
}
#: A value of reward_scales.
SCALE = {"answers": WHOLE, "mean": float, "squares": NUMBER, "freedom": WHOLE}
#: Defaults of keys that checkpoints of earlier versions lack.
EARLIER: dict[str, Any] = {
    "prompt_kinds": [],
    "saved_by": "fit",
    "other_calls": dict.fromkeys(budget.KEPT, 0),
    "health": health.EMPTY,
    "init_adapter": None,
    # Earlier versions gave beta in reward units, so such a run continues with a unit of 1.
    "reward_spread": {"squares": float(HELD_FROM), "differences": float(HELD_FROM)},
}


def content(state: RunState) -> dict[str, Any]:
    """The state's plain values, in JSON's types."""
    base, baseline, spread = state.players.base, state.generator.baseline, state.generator.spread
    return {
        "format": 1,
        "global_step": state.global_step,
        "position": state.position,
        "reward_calls": state.true_reward.budget.counts["training"],
        "other_calls": state.true_reward.budget.state_dict(),
        "prompt_kinds": sorted(state.prompt_kinds),
        "beta_scale": state.generator.beta_scale,
        "baseline": {"total": baseline.total, "weight": baseline.weight},
        "reward_spread": {"squares": spread.squares, "differences": spread.differences},
        "reward_scales": state.true_reward.scales.state_dict(),
        "health": state.health.state_dict(),
        "config": state.config.to_file(),
        "by_peft_config": list(state.players.by_peft_config),  # players with a peft_config of their own
        "base": {
            "name": base.name,
            "path": base.path,
            "architecture": type(base.model).__name__,
            "fingerprint": base.fingerprint,
        },
        "versions": dict(versions()),
        "machine": machine(state.players),
    } | ({} if state.init_adapter is None else {"init_adapter": state.init_adapter})


@functools.cache  # reading the versions takes longer than copying small adapters
def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def machine(players: Players) -> dict[str, Any]:
    """Device and number of threads, which change the rounding of sums and so make a resumed run bitwise different."""
    device = players.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads()}


def read(folder: Folder) -> dict[str, Any]:
    """A checkpoint's trainer_state.json, with the type of every value checked.

    Raises:
        Damaged: the file is missing, has another format, or holds a wrong value.
    """
    state, where = folder.read_json(STATE), str(folder.path / STATE)
    if isinstance(state, dict) and state.get("format", 1) != 1:
        raise Damaged(f"{where} is of format {str(state['format'])[:20]}; this version reads format 1")
    if isinstance(state, dict):
        state = EARLIER | state
        if isinstance(state["health"], dict):  # earlier versions had other keys here
            state["health"] = health.EMPTY | {key: kept for key, kept in state["health"].items() if key in health.EMPTY}
    untrusted.require(state, SHAPE, where)
    _describe_adapters(state)
    for name, scale in state["reward_scales"].items():
        untrusted.require(scale, SCALE, f"{where}: reward_scales: {name[:80]}")
    return state


def _describe_adapters(state: dict[str, Any]) -> None:
    """Earlier versions had more settings of adapters. A player with other values than today's is one with a peft_config
    of its own: the adapter_config.json in the checkpoint describes the adapter."""
    settings = state["config"]
    for player, prefix in (("generator", ""), ("discriminator", "disc_")):
        today = {"target_modules": "all-linear"}
        if player == "discriminator":
            today["lora_alpha"] = DISC_SCALE * settings.get("disc_lora_r", Config.disc_lora_r)
        theirs = {name: settings.pop(prefix + name, value) for name, value in today.items()}
        if theirs != today and player not in state["by_peft_config"]:
            state["by_peft_config"].append(player)
            for name in ("lora_r", "lora_alpha", "layers"):
                settings.pop(prefix + name, None)


def settings_of(path: Path) -> dict[str, Any]:
    """The settings of a complete checkpoint; empty if the folder does not exist."""
    return read(Folder(path, manifest=True))["config"] if path.is_dir() else {}


def init_adapter_of(step_folder: Path) -> str | None:
    """The folder of the adapter from which the run of a complete checkpoint started; None without one."""
    return read(Folder(step_folder, manifest=True))["init_adapter"]


def generator_arguments(step_folder: Path, kl_reference: str | None) -> dict[str, Any]:
    """The arguments of LoraGAN that give adapters with the shapes of a checkpoint's generator and reference.

    Args:
        step_folder: a complete checkpoint.
        kl_reference: the setting from now on.

    Returns:
        init_adapter or peft_config; empty if the settings describe the generator's adapter.
    """
    folder = Folder(step_folder, manifest=True)
    if checkpoint.has_reference(folder) and kl_reference != "base":
        return {"init_adapter": step_folder / REFERENCE}
    if "generator" in read(folder)["by_peft_config"]:
        return {"peft_config": read_lora_config(folder.part("generator"))}
    return {}
