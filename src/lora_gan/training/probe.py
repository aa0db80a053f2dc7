"""The discriminator's probe: ridge regression on frozen features, which ranks responses after a few dozen labels.

# B = responses, H = hidden size, N = labelled responses, R = min(N, H)

The features of a response are the base's hidden states after two thirds of the layers, averaged over the response's
tokens (`Players.base_features`). A mean over tokens is much easier to learn from than the last token's state, which
stock sequence classification reads: on SmolLM2-135M with 128 labels the rank correlation within prompts is 0.71 against
0.27 (benchmarks/screen.py). The adapter needs more labels than the probe, and can learn more from many labels.

The probe is solved in closed form after each step. It has no learning rate, and it depends only on the labels. Its
strength of regularization is chosen by generalized cross-validation (Golub, Heath and Wahba 1979). How far to trust its
predictions is measured by leaving out one group at a time. Used by `discriminator`.
"""

from typing import Any

import numpy as np
import torch

from . import distributed
from .estimate import centered_within_groups, explained_share, shrinkage

#: Strengths of the ridge, in units of a centred feature vector's mean square. Noisy labels need the larger ones.
RIDGES = np.array([1.0, 3.0, 10.0, 30.0, 100.0])
MOST_ROWS = 1024  # latest labelled responses that are kept; with H of 1,024 or more, solving takes some 0.2 s


class Probe:
    """Predicts differences of the true reward within a group. Holds the labelled responses and the weights."""

    def __init__(self) -> None:
        self.features: list[np.ndarray] = []  # per group, [responses, H], float32
        self.rewards: list[np.ndarray] = []  # per group, [responses], float64
        self.weights_H: np.ndarray | None = None  # None: no group with two answers yet
        # By leaving out one group at a time, both 0 to 1: the share of the labels' variance within groups that the
        # predictions explain, and the evidence that they explain any.
        self.explained = self.trust = 0.0
        self.amplitude = 1.0  # root mean square of the fitted rewards, relative to that of the true rewards

    def predict(self, features_BH: np.ndarray) -> np.ndarray | None:
        """Predicted reward up to a constant per group, float64 [B]. None: nothing is learned yet."""
        return None if self.weights_H is None else features_BH.astype(np.float64) @ self.weights_H

    def learn(self, features_BH: np.ndarray, true_B: np.ndarray, group_B: np.ndarray) -> None:
        """Add the groups with at least two known rewards, of all processes, and solve for the weights again."""
        ours = []
        for group in np.unique(group_B):
            members = np.flatnonzero((group_B == group) & np.isfinite(true_B))
            if len(members) > 1 and np.isfinite(features_BH[members]).all():
                ours.append((features_BH[members].astype(np.float32), true_B[members]))
        new = [group for process in distributed.gathered(ours) for group in process]
        if not new:
            return
        self.features += [features for features, _ in new]
        self.rewards += [rewards for _, rewards in new]
        while len(self.features) > 1 and sum(map(len, self.rewards)) > MOST_ROWS:
            del self.features[0], self.rewards[0]
        self._solve()

    def _solve(self) -> None:
        """Ridge regression of centred rewards on centred features, in the dual form, or in the primal form for N > H.

        Both forms give the singular values and left singular vectors of the features, R = min(N, H).
        """
        group_N = np.repeat(np.arange(len(self.rewards)), [len(rewards) for rewards in self.rewards])
        true_N = centered_within_groups(np.concatenate(self.rewards), group_N)
        features_NH = np.concatenate([f - f.mean(0) for f in self.features]).astype(np.float64)
        scale, freedom = np.square(features_NH).sum() / len(true_N), len(true_N) - len(self.rewards)
        self.weights_H = np.zeros(features_NH.shape[1])
        self.explained, self.trust, self.amplitude = 0.0, 0.0, 1.0
        if not scale or not true_N.any():
            return
        values_R, vectors_NR = _squared_singular(features_NH)
        along_R = vectors_NR.T @ true_N
        outside = max(0.0, float(true_N @ true_N - along_R @ along_R))  # no fit reaches this part
        errors = []
        for ridge in RIDGES * scale:
            left_R = ridge / (values_R + ridge)  # share of each component that the fit leaves
            unused = max(freedom - (1 - left_R).sum(), 1e-9)
            errors.append((float(np.square(left_R * along_R).sum()) + outside) / unused**2)
        ridge = RIDGES[int(np.argmin(errors))] * scale
        self.weights_H = features_NH.T @ (vectors_NR @ (along_R / (values_R + ridge)))
        kept_NR = vectors_NR * np.sqrt(values_R / (values_R + ridge))  # kept kept' maps true rewards to fitted rewards
        fitted_N = kept_NR @ (kept_NR.T @ true_N)
        self.amplitude = float(np.sqrt(np.square(fitted_N).sum() / np.square(true_N).sum())) or 1.0
        self.explained = explained_share(_left_out(kept_NR, true_N, fitted_N, group_N), true_N)
        self.trust = shrinkage(self.explained, 1, freedom)

    def clear(self) -> None:
        self.features, self.rewards, self.weights_H = [], [], None
        self.explained, self.trust, self.amplitude = 0.0, 0.0, 1.0

    # --- the state in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors and plain numbers, which load without executing code."""
        return {
            "sizes": [len(rewards) for rewards in self.rewards],
            "features": torch.from_numpy(np.concatenate(self.features)) if self.features else None,
            "rewards": torch.from_numpy(np.concatenate(self.rewards)) if self.rewards else None,
            "weights": None if self.weights_H is None else torch.from_numpy(self.weights_H),
            "explained": self.explained,
            "trust": self.trust,
            "amplitude": self.amplitude,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        if state["features"] is not None:
            edges = np.cumsum(state["sizes"])[:-1]
            self.features = np.split(state["features"].numpy(), edges)
            self.rewards = np.split(state["rewards"].numpy(), edges)
        self.weights_H = None if state["weights"] is None else state["weights"].numpy()
        self.explained, self.trust, self.amplitude = state["explained"], state["trust"], state["amplitude"]


def _squared_singular(features_NH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The squared singular values, [R], and the left singular vectors, [N, R], from the smaller Gram matrix."""
    count, width = features_NH.shape
    if count <= width:
        values_R, vectors_NR = np.linalg.eigh(features_NH @ features_NH.T)
        return np.maximum(values_R, 0.0), vectors_NR
    values_R, right_HR = np.linalg.eigh(features_NH.T @ features_NH)
    used = values_R > 1e-12 * values_R[-1]  # the others are rounding
    return values_R[used], features_NH @ right_HR[:, used] / np.sqrt(values_R[used])


def _left_out(kept_NR: np.ndarray, true_N: np.ndarray, fitted_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """What the regression without a group predicts for this group, [N], for every group, in closed form.

    Args:
        kept_NR: the factor of the matrix that maps true rewards to fitted rewards.
    """
    predicted_N = np.zeros_like(true_N)
    for group in np.unique(group_N):
        members = np.flatnonzero(group_N == group)
        own = np.eye(len(members)) - kept_NR[members] @ kept_NR[members].T
        residual = np.linalg.lstsq(own, (true_N - fitted_N)[members], rcond=1e-9)[0]
        predicted_N[members] = true_N[members] - residual
    return predicted_N
