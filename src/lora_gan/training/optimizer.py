"""One player's optimizer: AdamW, learning-rate schedule and gradient clipping. Each trainer has one.

Two differences from plain AdamW: all processes skip an update if the loss or a gradient is not finite in one of the
processes. The learning rate can be scaled down in a run that returned to a checkpoint.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..config import Config
from . import distributed

#: Schedules in which the learning rate falls until the run's last step.
DECAYING_SCHEDULES = ("linear", "cosine", "polynomial")


class PlayerOptimizer:
    """AdamW with schedule and clipping for the parameters of one player.

    Args:
        parameters: the player's trainable parameters.
        learning_rate: the configured rate, before schedule and scale.
        config: the settings of schedule, clipping and micro-batches.
        updates_per_step: optimizer updates per step of the run; the schedule counts updates.
    """

    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, config: Config, updates_per_step: int = 1
    ) -> None:
        self.parameters = parameters
        self.config, self.first_learning_rate, self.updates_per_step = config, learning_rate, updates_per_step
        self.largest_micro_batch: int | None = None  # responses that fit into memory; None: memory never ran out
        self.total_steps = config.max_steps  # steps of the whole run, where the schedule ends; None: not known yet
        self.restart(None)

    def require_end(self) -> None:
        """Check that a decaying schedule has an end.

        Raises:
            ValueError: `max_steps` is None, and no fit() has counted the steps.
        """
        if self.total_steps is None and self.config.lr_scheduler_type in DECAYING_SCHEDULES:
            raise ValueError(
                f"lr_scheduler_type={self.config.lr_scheduler_type!r} needs the number of steps at which it ends, but "
                "max_steps is None: set max_steps, or train with fit(), which counts the steps of num_train_epochs"
            )

    def plan(self, total_steps: int) -> None:
        """Set the number of steps of the whole run, where the schedule ends. The optimizer's state stays."""
        if self.config.lr_scheduler_type in DECAYING_SCHEDULES and total_steps != self.total_steps:
            self.total_steps = total_steps
            self.restart(self.state_dict())

    def restart(self, state: dict[str, Any] | None) -> None:
        """Start from scratch, or continue from the result of `state_dict`."""
        self.adamw = torch.optim.AdamW(self.parameters, lr=self.first_learning_rate, weight_decay=0.0)
        self.schedule = get_scheduler(
            self.config.lr_scheduler_type,
            self.adamw,
            num_warmup_steps=self.config.warmup_steps * self.updates_per_step,
            # 1 is a placeholder for an unknown end. `require_end` prevents updates until the end is known.
            num_training_steps=(self.total_steps or 1) * self.updates_per_step,
        )
        self.skipped = 0  # consecutive skipped updates
        self.scale = 1.0  # factor of the learning rate; recovery halves it when a run returns to a checkpoint
        if state is not None:
            # Load the moments alone: settings and learning rate come from the current config.
            self.adamw.load_state_dict(self.adamw.state_dict() | {"state": state["optimizer"]["state"]})
            self.schedule.last_epoch = state["schedule"]["last_epoch"]
            self.skipped, self.largest_micro_batch = state["skipped"], state["micro_batch_size"]
            self.rescale(state["scale"])

    def rescale(self, scale: float) -> None:
        """Multiply the configured learning rate by `scale` (0 to 1) from now on."""
        base, factor = self.first_learning_rate * scale, self.schedule.lr_lambdas[0]
        self.scale, self.schedule.base_lrs = scale, [base]
        # The scheduler uses the same formula, so a resumed run has a bitwise equal rate.
        self.adamw.param_groups[0] |= {"lr": base * factor(self.schedule.last_epoch), "initial_lr": base}

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def step(self, loss: float) -> float | None:
        """Make one update from the accumulated gradients, and clear them.

        Args:
            loss: this process's loss; NaN or infinity skips the update.

        Returns:
            The gradients' norm before clipping. None if the update was skipped, because the loss or a gradient was not
            finite in at least one process.
        """
        distributed.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        nonfinite = distributed.total(torch.tensor(float(not math.isfinite(loss)), device=norm.device))
        updates = bool(torch.isfinite(norm) & (nonfinite == 0))
        if updates:
            self.adamw.step()
            self.schedule.step()
        self.zero_grad()
        self.skipped = 0 if updates else self.skipped + 1
        return float(norm) if updates else None

    @property
    def learning_rate(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    @property
    def micro_batch_size(self) -> int | None:
        """Responses in one forward and backward pass: the setting, or the size that fits into memory. None: all."""
        sizes = [size for size in (self.config.micro_batch_size, self.largest_micro_batch) if size is not None]
        return min(sizes, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.adamw.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},  # updates made; the settings give everything else
            "skipped": self.skipped,
            "scale": self.scale,
            "micro_batch_size": self.largest_micro_batch,
        }
