"""One player's optimizer: AdamW, its schedule, and clipping, saved and loaded as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from . import distributed
from .config import Config


class PlayerOptimizer:
    def __init__(
        self, parameters: list[nn.Parameter], learning_rate: float, config: Config, updates_per_step: int = 1
    ) -> None:
        self.parameters = parameters
        self.config, self.first_learning_rate, self.updates_per_step = config, learning_rate, updates_per_step
        self.restart(None)

    def restart(self, state: dict[str, dict[str, Any]] | None) -> None:
        """Begin anew, or from a saved state."""
        self.adamw = torch.optim.AdamW(self.parameters, lr=self.first_learning_rate, weight_decay=0.0)
        self.schedule = get_scheduler(
            self.config.lr_scheduler_type,
            self.adamw,
            num_warmup_steps=self.config.warmup_steps * self.updates_per_step,
            num_training_steps=self.config.max_steps and self.config.max_steps * self.updates_per_step,
        )
        if state is not None:
            self.adamw.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self._rescale_learning_rate(self.first_learning_rate / self.schedule.base_lrs[0])

    def _rescale_learning_rate(self, ratio: float) -> None:
        """A checkpoint brings its own learning rate along; one that was set anew since then wins."""
        if ratio != 1:
            for group in self.adamw.param_groups:
                group["lr"], group["initial_lr"] = group["lr"] * ratio, group["initial_lr"] * ratio
            self.schedule.base_lrs = [rate * ratio for rate in self.schedule.base_lrs]

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> float:
        """One update from the gradients that stand; returns their norm before clipping."""
        distributed.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            self.zero_grad()
            raise FloatingPointError("a gradient is not finite: nothing was updated; try a smaller learning rate")
        self.adamw.step()
        self.schedule.step()
        self.zero_grad()
        return float(norm)

    @property
    def learning_rate(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        schedule = {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))}
        return {"optimizer": self.adamw.state_dict(), "schedule": schedule}
