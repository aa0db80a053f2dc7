"""The guard's monitor: says in words when the generator is exploiting the discriminator, and can take it back.

# B = responses

Signals of exploitation: the predicted reward rises while the true one falls, on responses that were asked about;
without true rewards, repetition, length and KL. The gate is the discriminator's (`Discriminator.gate`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..config import Config
from ..storage.checkpoint import copied
from .experience import Experience
from .generator import Generator

# Standard errors that the true reward must have fallen by. The best of many windows lies well above its own mean by
# chance, and ten steps give a rough error: with 2 nine in ten runs of 200 steps of pure noise set the alarm off, with 4
# a fifth, with 5 one in twenty.
ALARM_STANDARD_ERRORS = 5.0


def repetition(experience: Experience) -> float:
    """Share of a response's token pairs that it has written before, mean over responses."""
    shares = []
    for ids in experience.rollout.responses:
        pairs = list(pairwise(ids))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return float(np.mean(shares))


class Monitor:
    """Windows of the last steps against the first and the best ones; the generator as it was at the best."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # A step: true and predicted reward (on asked responses), repetition, length, KL; None = not measured.
        self.window: list[list[float | None]] = []
        self.first: list[float] | None = None  # the first window's repetition and length
        self.best: list[float] | None = None  # true mean, its standard error, predicted mean
        self.kept: dict[str, Any] | None = None  # the generator at the best window's end
        self.told: list[str] = []  # alarms that still stand: each is told once

    def watch(self, experience: Experience, kl: float | None, generator: Generator) -> list[str]:
        """Take in a step, before which these responses were sampled; the alarms it sets off, in words.

        With on_exploit="rollback" an alarm puts the generator and its optimizer back to the best window's end.
        """
        asked_B = ~np.isnan(experience.true_B)
        true = predicted = None
        if asked_B.any():
            true, predicted = float(experience.true_B[asked_B].mean()), float(experience.predicted_B[asked_B].mean())
            predicted = predicted if np.isfinite(predicted) else None
        length = float(experience.rollout.lengths_B.mean())
        self.window.append([true, predicted, repetition(experience), length, kl])
        if len(self.window) < self.config.monitor_window:
            return []
        steps = np.array(self.window, dtype=np.float64)  # None becomes NaN
        mean = [float(np.nanmean(column)) if not np.isnan(column).all() else np.nan for column in steps.T]
        self.window = self.window[1:]
        if self.first is None:
            self.first = mean[2:4]
        alarms = self._alarms(mean, self._error(steps[:, 0]))
        if not alarms and not np.isnan(mean[0]) and (self.best is None or mean[0] > self.best[0]):
            predicted = mean[0] if np.isnan(mean[1]) else mean[1]  # plain RL predicts nothing
            self.best = [mean[0], self._error(steps[:, 0]), predicted]
            if self.config.on_exploit == "rollback":
                weights = generator.players.parameters("generator")
                self.kept = copied({"weights": weights, "optimizer": generator.optimizer.state_dict()})
        fresh = [words for kind, words in alarms.items() if kind not in self.told]
        self.told = list(alarms)
        if fresh and self.config.on_exploit == "rollback" and self.kept is not None:
            self._restore(generator)
            self.window, self.told = [], []
            fresh = [f"{words}; the generator is back where the true reward was best" for words in fresh]
        return fresh

    @staticmethod
    def _error(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]
        return float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else 0.0

    def _alarms(self, now: list[float], error: float) -> dict[str, str]:
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
                alarms["length"] = f"responses went from {self.first[1]:.1f} to {length:.1f} tokens"
        if self.config.kl_target is not None and kl > 3 * self.config.kl_target:
            alarms["kl"] = f"the KL to the reference is {kl:.3g} nats a response, over three times kl_target"
        return alarms

    def _restore(self, generator: Generator) -> None:
        assert self.kept is not None
        with torch.no_grad():
            for parameter, kept in zip(generator.players.parameters("generator"), self.kept["weights"], strict=True):
                parameter.copy_(kept)
        scale = generator.optimizer.scale
        generator.optimizer.restart(copied(self.kept["optimizer"]))
        generator.optimizer.rescale(scale)  # a run that went back for numbers that were not finite stays slower

    def state_dict(self) -> dict[str, Any]:
        names = ("window", "first", "best", "kept", "told")
        return {name: copied(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
