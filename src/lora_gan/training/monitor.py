"""The monitor: raises an alarm when the generator exploits the discriminator, and can roll the generator back.

# B = responses

Signs of exploitation: on responses with a true reward, the predicted reward rises while the true reward falls. Without
true rewards: repetition, length and KL. `gan` calls the monitor in each step in which the generator learns from reward.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..config import Config
from ..storage.checkpoint import copied
from .experience import Experience
from .generator import Generator

WINDOW = 10  # steps; a shorter window is noisier, and a longer window raises an alarm later

# Number of standard errors by which the true reward must fall. The best of many windows is above its expected value by
# chance, and ten steps give a rough error. In 200 steps of pure noise, a limit of 2 gave an alarm in 90 % of the runs.
# A limit of 4 gave one in 20 %, and 5 in 5 %.
ALARM_STANDARD_ERRORS = 5.0


def repetition(experience: Experience) -> float:
    """Share of repeated token pairs in a response, 0 to 1, mean over responses."""
    shares = []
    for ids in experience.rollout.responses:
        pairs = list(pairwise(ids))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return float(np.mean(shares))


class Monitor:
    """Compares the window of the last steps with the first and the best window; keeps the best window's generator."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # Per step: true and predicted reward (on answered responses), repetition, length, KL; None = not measured.
        self.window: list[list[float | None]] = []
        self.first: list[float] | None = None  # repetition and length of the first window
        self.best: list[float] | None = None  # best window: mean true reward, its standard error, mean predicted reward
        self.kept: dict[str, Any] | None = None  # weights and optimizer of the generator at the best window's end
        self.told: list[str] = []  # kinds of active alarms; each is reported when it begins

    def watch(self, experience: Experience, kl: float | None, generator: Generator) -> list[str]:
        """Add one step, and return the alarms that begin with this step, as messages.

        With on_exploit="rollback" an alarm returns the generator and its optimizer to the end of the best window.

        Args:
            experience: the step's responses, sampled before its updates.
            kl: KL to the reference in nats per response; None if not measured.
            generator: the generator's trainer.
        """
        asked_B = ~np.isnan(experience.true_B)
        true = predicted = None
        if asked_B.any():
            true = float(experience.true_B[asked_B].mean())
            predicted = float(experience.compared_MB.mean(0)[asked_B].mean())
            predicted = predicted if np.isfinite(predicted) else None
        length = float(experience.rollout.lengths_B.mean())
        self.window = [*self.window, [true, predicted, repetition(experience), length, kl]][-WINDOW:]
        if len(self.window) < WINDOW:
            return []
        steps = np.array(self.window, dtype=np.float64)  # None becomes NaN
        mean = [float(np.nanmean(column)) if not np.isnan(column).all() else np.nan for column in steps.T]
        if self.first is None:
            self.first = mean[2:4]
        alarms = self._alarms(mean, self._error(steps[:, 0]))
        if not alarms and not np.isnan(mean[0]) and (self.best is None or mean[0] > self.best[0]):
            predicted = mean[0] if np.isnan(mean[1]) else mean[1]  # plain RL has no predictions
            self.best = [mean[0], self._error(steps[:, 0]), predicted]
            if self.config.on_exploit == "rollback":
                weights = generator.players.parameters("generator")
                self.kept = copied({"weights": weights, "optimizer": generator.optimizer.state_dict()})
        new = [message for kind, message in alarms.items() if kind not in self.told]
        self.told = list(alarms)
        if new and self.config.on_exploit == "rollback" and self.kept is not None:
            self._restore(generator)
            self.window, self.told = [], []
            new = [f"{message}; the generator is back where the true reward was best" for message in new]
        return new

    @staticmethod
    def _error(values: np.ndarray) -> float:
        """Standard error of the mean of the known values; 0 if fewer than two are known."""
        known = values[~np.isnan(values)]
        return float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else 0.0

    def _alarms(self, now: list[float], error: float) -> dict[str, str]:
        """Messages by kind of alarm, for the window's means in the order of `window` and its true reward's error."""
        alarms = {}
        true, predicted, repeats, length, kl = now
        if self.best is not None and true < self.best[0] - ALARM_STANDARD_ERRORS * float(np.hypot(error, self.best[1])):
            if predicted > self.best[2]:
                alarms["parted"] = (
                    f"the true reward fell from {self.best[0]:.3g} to {true:.3g} while the predicted one rose from "
                    f"{self.best[2]:.3g} to {predicted:.3g}: the generator exploits the discriminator"
                )
        if self.first is not None:
            if repeats > self.first[0] + 0.2:
                alarms["repetition"] = f"responses repeat themselves: {repeats:.0%} of their token pairs"
            if length > 2 * self.first[1] or length < self.first[1] / 3:
                alarms["length"] = f"the mean length of responses went from {self.first[1]:.1f} to {length:.1f} tokens"
        if self.config.kl_target is not None and kl > 3 * self.config.kl_target:
            alarms["kl"] = f"the KL to the reference is {kl:.3g} nats per response, over three times kl_target"
        return alarms

    def _restore(self, generator: Generator) -> None:
        assert self.kept is not None
        with torch.no_grad():
            for parameter, kept in zip(generator.players.parameters("generator"), self.kept["weights"], strict=True):
                parameter.copy_(kept)
        scale = generator.optimizer.scale
        generator.optimizer.restart(copied(self.kept["optimizer"]))
        generator.optimizer.rescale(scale)  # a learning rate that recovery has lowered stays low

    def state_dict(self) -> dict[str, Any]:
        return {name: copied(getattr(self, name)) for name in ("window", "first", "best", "kept", "told")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
