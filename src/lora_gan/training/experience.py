"""One step's responses, and all that is known of them before anything is learned from them.

# B = responses, M = heads, H = hidden size

`LoraGAN` makes one `Experience` per step. Both trainers, the monitor and the step's record read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..data import Row
from ..model.sampling import Rollout
from ..rewards.notes import Notes


class RetainedFeatures:
    """The features that predictions were made from, [B, H], with their autograd graph. They serve once.

    Args:
        features_BH: None where no graph was retained.
    """

    def __init__(self, features_BH: Tensor | None = None) -> None:
        self._features_BH = features_BH

    def take(self) -> Tensor | None:
        """Return the features and clear them: the caller's reference is then the only one."""
        features_BH, self._features_BH = self._features_BH, None
        return features_BH


@dataclass(frozen=True, kw_only=True)
class Experience:
    step: int
    rows: list[Row]  # the P prompts
    prompts: list[list[int]]  # their token ids
    rollout: Rollout  # K responses each
    predicted_MB: np.ndarray  # fresh predictions of every head, float64; NaN = not predicted
    asked_B: np.ndarray  # bool: which responses the true reward was asked for, drawn before scoring
    true_B: np.ndarray  # true rewards; NaN = not asked, or not answered
    inclusion_B: np.ndarray  # probability with which each response was asked for and answered; 0 = none was asked for
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # the true reward's parts by name, if it has several
    gate: float = 1.0  # how far predictions are trusted, from earlier steps alone
    failed_B: np.ndarray | None = None  # bool: asked responses on which a reward failed to the last try; None = none
    features: RetainedFeatures = field(default_factory=RetainedFeatures)  # the discriminator's first update takes them
    notes: Notes = field(default_factory=Notes)  # what rewards logged about the asked responses

    @property
    def predicted_B(self) -> np.ndarray:
        return self.predicted_MB.mean(0)

    @property
    def dropped_B(self) -> np.ndarray:
        """Failed responses with inclusion probability 1, bool. They are excluded, because nothing would correct their
        prediction."""
        return (self.failed_B if self.failed_B is not None else False) & (self.inclusion_B >= 1)

    @property
    def group_B(self) -> np.ndarray:
        return self.rollout.group_B
