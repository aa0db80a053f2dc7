"""The responses of one step, with their predicted and true rewards, before any player learns from them.

# B = responses, M = heads, H = hidden size

`LoraGAN` makes one `Experience` per step. Both trainers, the monitor and the step's record read it.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..data import Row
from ..model.sampling import Rollout
from ..rewards.notes import Notes


class RetainedFeatures:
    """The discriminator's pooled features behind the predictions, [B, H], with their autograd graph. Usable once.

    Args:
        features_BH: None if no graph was retained.
    """

    def __init__(self, features_BH: Tensor | None = None) -> None:
        self._features_BH = features_BH

    def take(self) -> Tensor | None:
        """Return the features and clear them, so that the caller holds the only reference to the graph."""
        features_BH, self._features_BH = self._features_BH, None
        return features_BH


@dataclass(frozen=True)
class Probed:
    """What the probe adds to the adapter's predictions of a step's responses.

    Attributes:
        features_BH: the probe's features, float32.
        probe_B: differences predicted by the probe, up to a constant per group; None: it has learned nothing yet.
        combined_MB: the adapter's predictions of every head, with differences within groups by adapter and probe.
    """

    features_BH: np.ndarray
    probe_B: np.ndarray | None
    combined_MB: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Experience:
    """One step's responses and rewards."""

    step: int
    rows: list[Row]  # the P prompts
    prompts: list[list[int]]  # token ids of the prompts
    rollout: Rollout  # K responses per prompt
    predicted_MB: np.ndarray  # fresh predictions of every head of the adapter, float64; NaN = not predicted
    asked_B: np.ndarray  # bool: whether the true reward was queried, drawn before scoring
    true_B: np.ndarray  # true rewards; NaN = not queried, or not answered
    inclusion_B: np.ndarray  # probability that a response was queried and answered; 0 = no response was queried
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # components of the true reward by name, if several
    probed: Probed | None = None  # None = the probe is not used
    # The probe's differences after it has learned from the step's answers, in reward units, and the trust in them. For
    # the mixed reward. None = the probe knows nothing yet.
    updated_B: np.ndarray | None = None
    updated_trust: float = 0.0
    trust: float = 1.0  # factor of the predictions' differences, from earlier steps alone; see `Calibration`
    failed_B: np.ndarray | None = None  # bool: queried, but without an answer after the last try; None = no failures
    is_audit: bool = False  # the true rewards audit the generator, which does not learn from them
    features: RetainedFeatures = field(default_factory=RetainedFeatures)  # for the discriminator's first update
    notes: Notes = field(default_factory=Notes)  # what reward functions logged about the queried responses

    @property
    def predicted_B(self) -> np.ndarray:
        return self.predicted_MB.mean(0)

    @property
    def compared_MB(self) -> np.ndarray:
        """The fresh predictions by which responses to one prompt are compared: the generator learns from these."""
        return self.predicted_MB if self.probed is None else self.probed.combined_MB

    @property
    def dropped_B(self) -> np.ndarray:
        """Failed responses with inclusion probability 1, bool [B]. They are excluded: no true reward corrects their
        prediction."""
        return (self.failed_B if self.failed_B is not None else False) & (self.inclusion_B >= 1)

    @property
    def group_B(self) -> np.ndarray:
        return self.rollout.group_B
