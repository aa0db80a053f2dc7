"""One player's optimizer: AdamW, its schedule, and clipping, saved and loaded as one. Each trainer has one.

Departs from a plain AdamW in two points: an update whose loss or gradient is not finite is skipped, in all processes;
and the learning rate can be rescaled in a run that went back to a checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..config import Config
from . import distributed

#: Schedules whose learning rate falls up to the run's last step.
DECAYING_SCHEDULES = ("linear", "cosine", "polynomial")


class PlayerOptimizer:
    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, config: Config, updates_per_step: int = 1
    ) -> None:
        self.parameters = parameters
        self.config, self.first_learning_rate, self.updates_per_step = config, learning_rate, updates_per_step
        self.largest_micro_batch: int | None = None  # responses that fitted into memory; None: it never ran out
        self.total_steps = config.max_steps  # of the run, where the schedule ends; None: not known yet
        self.restart(None)

    def require_end(self) -> None:
        """Raise where the schedule does not know its end.

        Raises:
            ValueError: `max_steps` is None, and no fit() has counted the steps.
        """
        if self.total_steps is None and self.config.lr_scheduler_type in DECAYING_SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={self.config.lr_scheduler_type!r} has to know where it ends, and max_steps is "
                "None: set max_steps, or train with fit(), which counts the steps of num_train_epochs"
            )

    def plan(self, total_steps: int) -> None:
        """Set the steps of the whole run, where the schedule ends; the optimizer's state stays."""
        if self.config.lr_scheduler_type in DECAYING_SCHEDULES and total_steps != self.total_steps:
            self.total_steps = total_steps
            self.restart(self.state_dict())

    def restart(self, state: dict[str, Any] | None) -> None:
        """Begin again, or continue from a saved state."""
        self.adamw = torch.optim.AdamW(self.parameters, lr=self.first_learning_rate, weight_decay=0.0)
        self.schedule = get_scheduler(
            self.config.lr_scheduler_type,
            self.adamw,
            num_warmup_steps=self.config.warmup_steps * self.updates_per_step,
            # 1 stands for an end that is not known yet; no update is made until it is.
            num_training_steps=(self.total_steps or 1) * self.updates_per_step,
        )
        self.skipped = 0  # updates in a row, up to now
        self.scale = 1.0  # of the learning rate; halved where a run went back
        if state is not None:
            # The moments alone: settings and learning rate are those configured now.
            self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state["optimizer"]["state"]})
            self.schedule.last_epoch = state["schedule"]["last_epoch"]
            self.skipped, self.largest_micro_batch = state["skipped"], state["micro_batch_size"]
            self.rescale(state["scale"])

    def rescale(self, scale: float) -> None:
        """Set the share of the configured learning rate that updates are made with from now on."""
        base, share = self.first_learning_rate * scale, self.schedule.lr_lambdas[0]
        self.scale, self.schedule.base_lrs = scale, [base]
        # Computed as the scheduler does, so that a run that goes on has bitwise the same rate.
        self.adamw.param_groups[0] |= {"lr": base * share(self.schedule.last_epoch), "initial_lr": base}

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def step(self, loss: float) -> float | None:
        """One update from the gradients that stand; returns their norm before clipping.

        None: the loss or a gradient was not finite, in one process or another, and the update was skipped by all.
        """
        distributed.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        broken = distributed.total(torch.tensor(float(not math.isfinite(loss)), device=norm.device))
        done = bool(torch.isfinite(norm) & (broken == 0))
        if done:
            self.adamw.step()
            self.schedule.step()
        self.zero_grad()
        self.skipped = 0 if done else self.skipped + 1
        return float(norm) if done else None

    @property
    def learning_rate(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    @property
    def micro_batch_size(self) -> int | None:
        """Responses in one forward and backward: the config's, or what turned out to fit into memory."""
        sizes = [size for size in (self.config.micro_batch_size, self.largest_micro_batch) if size is not None]
        return min(sizes, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.adamw.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},  # updates made; the rest follows from the settings
            "skipped": self.skipped,
            "scale": self.scale,
            "micro_batch_size": self.largest_micro_batch,
        }
