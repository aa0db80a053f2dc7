"""trainer_state.json of a checkpoint: written from a run's state, and read as a stranger's file. Used by `snapshot`."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..model.adapter_files import read_lora_config
from ..model.players import Players
from ..rewards import budget
from ..state import State
from ..storage import checkpoint, untrusted
from ..storage.checkpoint import BY_HAND, REFERENCE, STATE
from ..storage.durable import Damaged, Folder
from ..training import health


def content(state: State) -> dict[str, Any]:
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
    if isinstance(state, dict):
        state.setdefault("prompt_kinds", [])  # checkpoints of earlier versions do not say
        state.setdefault("saved_by", "fit")
        state.setdefault("other_calls", dict.fromkeys(budget.KEPT, 0))
        state.setdefault("health", health.EMPTY)
        state.setdefault("init_adapter", None)  # where the generator started as a new adapter
    untrusted.require_keys(
        state,
        (
            "format", "global_step", "position", "reward_calls", "prompt_kinds", "beta_scale", "baseline",
            "reward_scales", "health", "config", "by_peft_config", "base", "versions", "machine", "saved_by",
            "other_calls", "init_adapter",
        ),
        where,
    )  # fmt: skip
    if state["format"] != 1:
        raise Damaged(f"{where} is of format {str(state['format'])[:20]}; this version reads format 1")
    for name in ("global_step", "position", "reward_calls"):
        untrusted.require_whole(state[name], f"{where}: {name}")
    untrusted.require_keys(state["other_calls"], budget.KEPT, f"{where}: other_calls")
    for name, value in state["other_calls"].items():
        untrusted.require_whole(value, f"{where}: other_calls: {name}")
    state["beta_scale"] = untrusted.require_float(state["beta_scale"], f"{where}: beta_scale", least=0.0)
    untrusted.require_keys(state["baseline"], ("total", "weight"), f"{where}: baseline")
    for name, value in state["baseline"].items():
        state["baseline"][name] = untrusted.require_float(value, f"{where}: baseline: {name}")
    for name in ("reward_scales", "config", "base", "versions", "machine"):
        if not isinstance(state[name], dict):
            raise Damaged(f"{where}: {name} is no mapping")
    for name, part in state["reward_scales"].items():
        inside = f"{where}: reward_scales: {name[:80]}"
        untrusted.require_keys(part, ("answers", "mean", "squares", "freedom"), inside)
        for key in ("answers", "freedom"):
            untrusted.require_whole(part[key], f"{inside}: {key}")
        untrusted.require_float(part["mean"], f"{inside}: mean")
        untrusted.require_float(part["squares"], f"{inside}: squares", least=0.0)
    _require_health(state["health"], f"{where}: health")
    if not isinstance(state["base"].get("fingerprint"), str):
        raise Damaged(f"{where}: base: fingerprint is no text")
    for name in ("name", "path"):
        if not isinstance(state["base"].get(name), str | None):
            raise Damaged(f"{where}: base: {name} is no text")
    if not isinstance(state["init_adapter"], str | None):
        raise Damaged(f"{where}: init_adapter is no text")
    untrusted.require_list(state["by_peft_config"], f"{where}: by_peft_config", lambda *_: None)
    untrusted.require_list(state["prompt_kinds"], f"{where}: prompt_kinds", _require_kind)
    if state["saved_by"] not in ("fit", BY_HAND):
        raise Damaged(f"{where}: saved_by is {str(state['saved_by'])[:60]!r}: it must be fit or {BY_HAND}")
    return state


def _require_health(state: Any, where: str) -> None:
    """What `Health.state_dict()` gives: plain numbers, in lists that are no longer than it keeps."""

    def numbers(*kinds: str) -> Callable[[Any, str], None]:
        """A list of so many numbers; those called "float_or_none" may be missing."""

        def check(value: Any, inside: str) -> None:
            untrusted.require_list(value, inside, lambda *_: None, len(kinds))
            for kind, number in zip(kinds, value, strict=True):
                if number is not None or kind != "float_or_none":
                    untrusted.require_float(number, inside)

        return check

    untrusted.require_keys(state, health.EMPTY, where)
    untrusted.require_list(state["told"], f"{where}: told", _require_notice)
    untrusted.require_whole(state["labels"], f"{where}: labels")
    numbers("float", "float")(state["earlier"], f"{where}: earlier")
    numbers("float", "float", "float")(state["correlation"], f"{where}: correlation")
    untrusted.require_keys(state["streaks"], health.EMPTY["streaks"], f"{where}: streaks")
    for name, streak in state["streaks"].items():
        untrusted.require_keys(streak, health.STREAK, f"{where}: streaks: {name}")
        for key, number in streak.items():
            untrusted.require_float(number, f"{where}: streaks: {name}: {key}")
    untrusted.require_keys(state["series"], health.SERIES, f"{where}: series")
    for name, (kinds, most) in health.SERIES.items():
        inside = f"{where}: series: {name}"
        untrusted.require_list(state["series"][name], inside, numbers(*kinds))
        if len(state["series"][name]) > most:
            raise Damaged(f"{inside} has more than {most} entries")


def _require_notice(value: Any, where: str) -> None:
    if value not in health.KINDS:
        raise Damaged(f"{where} is {str(value)[:60]!r}: it must be one of {', '.join(health.KINDS)}")


def _require_kind(value: Any, where: str) -> None:
    if value not in ("messages", "texts"):
        raise Damaged(f"{where} is {str(value)[:60]!r}: it must be messages or texts")


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
