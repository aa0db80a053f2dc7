"""One step's responses, and all that is known of them before anything is learned from them.

# B = responses, M = heads
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..data import Row
from ..model.sampling import Rollout
from ..rewards.notes import Notes


@dataclass(frozen=True)
class Experience:
    step: int
    rows: list[Row]  # the P prompts
    prompts: list[list[int]]  # their token ids
    rollout: Rollout  # K responses each
    predicted_MB: np.ndarray  # fresh predictions of every head, float64; NaN = nobody asked for them
    asked_B: np.ndarray  # bool: which responses the true reward was asked for, drawn before scoring
    true_B: np.ndarray  # true rewards; NaN = not asked, or not answered
    inclusion_B: np.ndarray  # probability with which each response was asked for and answered; 0 = none was asked for
    parts: dict[str, np.ndarray]  # the true reward's parts by name, where it has several
    gate: float = 1.0  # how far predictions are trusted, from earlier steps alone
    failed_B: np.ndarray | None = None  # bool: asked responses on which a reward failed to the last try; None = none
    # What the predictions were read off, [B, H], with its graph; nothing where it was not kept. Who takes it out has
    # the only name for it, so that it is gone when it has served.
    features: list[Tensor] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)  # what rewards logged about the asked responses

    @property
    def predicted_B(self) -> np.ndarray:
        return self.predicted_MB.mean(0)

    @property
    def spread_B(self) -> np.ndarray:
        """The heads' standard deviation: how far they disagree."""
        return self.predicted_MB.std(0)

    @property
    def dropped_B(self) -> np.ndarray | None:
        """Failed responses that were certain to be asked, bool; None = no response. They have no part in their group:
        nothing would correct the bare prediction in place of their true reward."""
        if self.failed_B is None or not self.failed_B.any():
            return None
        return self.failed_B & (self.inclusion_B >= 1)

    @property
    def group_B(self) -> np.ndarray:
        return self.rollout.group_B
