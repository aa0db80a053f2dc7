"""optimizer.pt of a checkpoint, read as a stranger's file. Used by `snapshot`."""

from __future__ import annotations

from typing import Any

import torch

from ..storage import untrusted
from ..storage.durable import Damaged, Folder
from ..training.optimizer import PlayerOptimizer


def read(folder: Folder, optimizer: PlayerOptimizer) -> Any:
    """The optimizer's saved state, None where there is none or another trainer's."""
    if not folder.has("optimizer.pt"):
        return None
    file = folder.path / "optimizer.pt"
    state = untrusted.read_tensors(folder, "optimizer.pt", limit=untrusted.room_for(optimizer.parameters, times=3))
    if folder.files is None and isinstance(state, dict) and "param_groups" in state:
        return None  # another trainer's: its moments belong to its own parameters
    require(state, optimizer, str(file))
    return state


def require(state: Any, optimizer: PlayerOptimizer, where: str) -> None:
    """A state_dict() of such an optimizer: everything but learning rates, moments and counts must be as here. It may
    have followed another schedule, of which it holds no more than that."""
    ours = optimizer.state_dict()
    untrusted.require_keys(state, ours, where)
    adamw, schedule = state["optimizer"], state["schedule"]
    untrusted.require_keys(adamw, ours["optimizer"], f"{where}: optimizer")
    groups, our_groups = adamw["param_groups"], ours["optimizer"]["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(our_groups):
        raise Damaged(
            f"{where} does not fit: it is of {untrusted.kind_of(groups)} in place of {len(our_groups)} parameter groups"
        )
    for theirs, here in zip(groups, our_groups, strict=True):
        untrusted.require_keys(theirs, here, f"{where}: param_groups")
        for name, value in here.items():
            if name in ("lr", "initial_lr"):
                untrusted.require_number(theirs[name], f"{where}: {name}", least=0.0)
            elif name == "params" and theirs[name] != value:
                raise Damaged(f"{where} does not fit: it was saved for other parameters than these")
            elif theirs[name] != value or type(theirs[name]) is not type(value):
                raise Damaged(f"{where} has {name}={str(theirs[name])[:60]}, this optimizer {value!r}")
    if not isinstance(adamw["state"], dict):
        raise Damaged(f"{where}: state is {untrusted.kind_of(adamw['state'])}")
    for i, moments in adamw["state"].items():
        if type(i) is not int or not 0 <= i < len(optimizer.parameters):
            raise Damaged(f"{where} does not fit: it has moments of a parameter {str(i)[:60]!r}")
        untrusted.require_keys(moments, ("step", "exp_avg", "exp_avg_sq"), f"{where}: state {i}")
        untrusted.require_numbers(moments["step"], f"{where}: step {i}", like=torch.zeros(()))
        for name in ("exp_avg", "exp_avg_sq"):
            untrusted.require_numbers(moments[name], f"{where}: {name} {i}", like=optimizer.parameters[i])
        if moments["step"] < 0 or (moments["exp_avg_sq"] < 0).any():
            raise Damaged(f"{where}: state {i} is negative where only squares and counts stand")
    untrusted.require_whole(state["skipped"], f"{where}: skipped")
    if untrusted.require_float(state["scale"], f"{where}: scale") <= 0:
        raise Damaged(f"{where}: scale must be above 0")
    if state["micro_batch_size"] is not None:
        untrusted.require_whole(state["micro_batch_size"], f"{where}: micro_batch_size", least=1)
    untrusted.require_keys(schedule, ours["schedule"], f"{where}: schedule")
    for name, value in ours["schedule"].items():
        theirs = schedule[name]
        if isinstance(value, list):
            if not isinstance(theirs, list) or len(theirs) != len(value):
                raise Damaged(f"{where}: schedule: {name} is {untrusted.kind_of(theirs)}")
            for rate, here in zip(theirs, value, strict=True):
                if isinstance(here, int | float):
                    untrusted.require_number(rate, f"{where}: schedule: {name}", least=0.0)
                elif rate not in (None, {}):  # of a schedule's functions, another one's too, there is nothing to save
                    raise Damaged(f"{where}: schedule: {name} is {str(theirs)[:60]}, here {value}")
        elif isinstance(value, bool) or isinstance(theirs, bool):
            if theirs is not value:
                raise Damaged(f"{where}: schedule: {name} is {theirs!r}, here {value!r}")
        else:
            untrusted.require_number(theirs, f"{where}: schedule: {name}", least=0, whole=isinstance(value, int))
    if not all(rate > 0 for rate in schedule["base_lrs"]):
        raise Damaged(f"{where}: schedule: base_lrs must be above 0")
