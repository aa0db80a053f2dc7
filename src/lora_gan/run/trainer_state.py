"""trainer_state.json of a checkpoint: written from a run's state, and read as a stranger's file. Used by `snapshot`."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge

from ..model.adapter_files import read_lora_config
from ..model.players import Players
from ..rewards import budget
from ..state import RunState
from ..storage import checkpoint, untrusted
from ..storage.checkpoint import REFERENCE, STATE
from ..storage.durable import Damaged, Folder
from ..storage.untrusted import WHOLE
from ..training import health

NUMBER = Annotated[float, Ge(0)]
#: What the file holds, in the form that `untrusted.require` takes.
SHAPE: dict[str, Any] = {
    "format": int,
    "global_step": WHOLE,
    "position": WHOLE,
    "reward_calls": WHOLE,
    "other_calls": dict.fromkeys(budget.KEPT, WHOLE),
    "prompt_kinds": [Literal["messages", "texts"]],
    "beta_scale": NUMBER,
    "baseline": {"total": float, "weight": float},
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
#: One of reward_scales.
SCALE = {"answers": WHOLE, "mean": float, "squares": NUMBER, "freedom": WHOLE}
#: What checkpoints of earlier versions do not say.
EARLIER: dict[str, Any] = {
    "prompt_kinds": [],
    "saved_by": "fit",
    "other_calls": dict.fromkeys(budget.KEPT, 0),
    "health": health.EMPTY,
    "init_adapter": None,
}


def content(state: RunState) -> dict[str, Any]:
    """The state's plain values, as JSON holds them."""
    base, baseline = state.players.base, state.generator.baseline
    return {
        "format": 1,
        "global_step": state.global_step,
        "position": state.position,
        "reward_calls": state.true_reward.budget.counts["training"],
        "other_calls": state.true_reward.budget.state_dict(),
        "prompt_kinds": sorted(state.prompt_kinds),
        "beta_scale": state.generator.beta_scale,
        "baseline": {"total": baseline.total, "weight": baseline.weight},
        "reward_scales": state.true_reward.scales.state_dict(),
        "health": state.health.state_dict(),
        "config": state.config.to_file(),
        "by_peft_config": list(state.players.by_peft_config),  # whose adapters the settings do not describe
        "base": {
            "name": base.name,
            "path": base.path,
            "architecture": type(base.model).__name__,
            "fingerprint": base.fingerprint,
        },
        "versions": dict(versions()),
        "machine": machine(state.players),
    } | ({} if state.init_adapter is None else {"init_adapter": state.init_adapter})


@functools.cache  # reading them takes longer than copying small adapters
def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def machine(players: Players) -> dict[str, Any]:
    """Device and threads, which decide how sums are rounded: with others a resumed run is not bitwise equal."""
    device = players.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads()}


def read(folder: Folder) -> dict[str, Any]:
    """A checkpoint's trainer_state.json, with every value of the kind that it must be."""
    state, where = folder.read_json(STATE), str(folder.path / STATE)
    if isinstance(state, dict) and state.get("format", 1) != 1:
        raise Damaged(f"{where} is of format {str(state['format'])[:20]}; this version reads format 1")
    if isinstance(state, dict):
        state = EARLIER | state
        if isinstance(state["health"], dict):  # earlier versions kept other things of the last steps
            state["health"] = health.EMPTY | {key: part for key, part in state["health"].items() if key in health.EMPTY}
    untrusted.require(state, SHAPE, where)
    for name, part in state["reward_scales"].items():
        untrusted.require(part, SCALE, f"{where}: reward_scales: {name[:80]}")
    return state


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a complete checkpoint was made with; empty where there is no such folder."""
    return read(Folder(path, manifest=True))["config"] if path.is_dir() else {}


def init_adapter_of(step_folder: Path) -> str | None:
    """The folder of the adapter that the run of a complete checkpoint started from; None where there was none."""
    return read(Folder(step_folder, manifest=True))["init_adapter"]


def generator_arguments(step_folder: Path, kl_reference: str | None) -> dict[str, Any]:
    """The arguments with which LoraGAN makes adapters of the shapes of a checkpoint's generator and reference.

    Args:
        step_folder: a complete checkpoint.
        kl_reference: the setting from now on.

    Returns:
        init_adapter, peft_config, or nothing: the settings describe the generator's adapter.
    """
    folder = Folder(step_folder, manifest=True)
    if checkpoint.has_reference(folder) and kl_reference != "base":
        return {"init_adapter": step_folder / REFERENCE}
    if "generator" in read(folder)["by_peft_config"]:
        return {"peft_config": read_lora_config(folder.part("generator"))}
    return {}
