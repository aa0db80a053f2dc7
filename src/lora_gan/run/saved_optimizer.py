"""Reads optimizer.pt of a checkpoint as an untrusted file. Used by `snapshot`."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

import torch
from annotated_types import Ge

from ..storage import untrusted
from ..storage.durable import Damaged, Folder
from ..storage.untrusted import POSITIVE, WHOLE
from ..training.optimizer import PlayerOptimizer


def read(folder: Folder, optimizer: PlayerOptimizer, *, keeps_last: bool = True) -> Any:
    """The optimizer's saved state; None if the file is missing, or is another trainer's.

    Args:
        keeps_last: whether the last parameter keeps its moments. False: its shape has changed, so they start at zero.

    Raises:
        Damaged: the file is not a state of such an optimizer.
    """
    if not folder.has("optimizer.pt"):
        return None
    file = folder.path / "optimizer.pt"
    state = untrusted.read_tensors(folder, "optimizer.pt", limit=untrusted.room_for(optimizer.parameters, times=3))
    if folder.files is None and isinstance(state, dict) and "param_groups" in state:
        return None  # another trainer's state: the moments belong to other parameters
    if not keeps_last:
        with suppress(AttributeError, KeyError, TypeError):  # `require` names what is wrong with such a state
            state["optimizer"]["state"].pop(len(optimizer.parameters) - 1, None)
    require(state, optimizer, str(file))
    return state


def require(state: Any, optimizer: PlayerOptimizer, where: str) -> None:
    """Check that `state` is a state_dict() of such an optimizer, with moments and counts of the right shapes.

    Settings, learning rate, and values that earlier versions kept of the schedule are not read.

    Raises:
        Damaged: the state does not match; the message starts with `where`.
    """
    ours = optimizer.state_dict()
    untrusted.require_keys(state, ours, where)
    adamw, schedule = state["optimizer"], state["schedule"]
    untrusted.require_keys(adamw, ours["optimizer"], f"{where}: optimizer")

    groups = adamw["param_groups"]
    saved_for = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    untrusted.require(saved_for, ((WHOLE,) * len(optimizer.parameters),), f"{where}: param_groups: params")
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
            raise Damaged(f"{where}: state {i} has negative values, but squares and counts cannot be negative")
    plain = {"skipped": WHOLE, "scale": POSITIVE, "micro_batch_size": Annotated[int | None, Ge(1)]}
    untrusted.require({name: state[name] for name in plain}, plain, where)
    last_epoch = schedule.get("last_epoch") if isinstance(schedule, dict) else None
    untrusted.require(last_epoch, WHOLE, f"{where}: schedule: last_epoch")
