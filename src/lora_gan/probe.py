"""The probe: heads in closed form on the frozen base's features, meant for noisy rewards.

# N = responses, C = contrasts (one fewer than the responses, a group), H = hidden size, M = heads

An adapter trained on a few hundred answers whose noise is three times their spread can learn the noise; a ridge
regression on features that do not move, with its penalty chosen by the answers, has less room to. Whether that helps
the generator is not settled (docs/learning/). The probe sees differences within groups alone, which are all that
reaches the generator; so what it predicts ranks the responses to a prompt, and its level is not the reward's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import eigh, helmert, solve

# In units of a contrast's mean squared norm. Below a tenth, generalized cross-validation follows the noise where
# contrasts are fewer than features; above a thousand the head is nought for all purposes.
PENALTIES = 10.0 ** np.arange(-1.0, 3.1, 0.5)
LEAST = 4  # contrasts, below which nothing is fitted


def contrasts(values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Differences within each group of rows, [C, ...]: Helmert's, orthonormal, so that independent noise stays so.

    Taking group means off instead would leave a row a group too many, and the penalty's choice would count it.
    """
    parts, first = [np.zeros((0, *values.shape[1:]))], 0
    for size in sizes:
        if size > 1:
            parts.append(helmert(size) @ values[first : first + size])
        first += size
    return np.concatenate(parts)


def penalty(features_CH: np.ndarray, rewards_C: np.ndarray) -> float:
    """The ridge penalty by generalized cross-validation (Golub, Heath and Wahba 1979)."""
    count, width = features_CH.shape
    unit = float((features_CH**2).sum()) / count or 1.0
    # One eigendecomposition of the smaller side serves every penalty.
    if width <= count:
        values, vectors = eigh(features_CH.T @ features_CH)
        along = (vectors.T @ (features_CH.T @ rewards_C)) ** 2 / np.maximum(values, 1e-12 * unit)
    else:
        values, vectors = eigh(features_CH @ features_CH.T)
        along = (vectors.T @ rewards_C) ** 2
    values = np.maximum(values, 0.0)
    outside = max(float(rewards_C @ rewards_C) - float(along.sum()), 0.0)  # what no penalty could reach

    def score(weight: float) -> float:
        kept = values / (values + weight * unit)
        return (outside + float((along * (1 - kept) ** 2).sum())) / (1 - float(kept.sum()) / count) ** 2

    return unit * min(PENALTIES, key=score)


def fit(
    features_NH: np.ndarray, rewards_N: np.ndarray, sizes: Sequence[int], heads: Sequence[Sequence[bool]]
) -> np.ndarray:
    """Ridge heads on contrasts, float64 [M, H]; nought where there are too few.

    Args:
        features_NH: pooled features of the answered responses, group by group.
        rewards_N: their true rewards.
        sizes: responses of each group.
        heads: for each group, which heads learn from it; the penalty is chosen on all.
    """
    count = len(heads[0]) if len(heads) else 0
    fitted = np.zeros((count, features_NH.shape[1]))
    features_CH, rewards_C = contrasts(features_NH, sizes), contrasts(rewards_N, sizes)
    if len(rewards_C) < LEAST or not (np.abs(rewards_C) > 1e-9).any():
        return fitted
    weight = penalty(features_CH, rewards_C)
    seen_CM = np.repeat(np.array(heads, dtype=bool), [max(0, size - 1) for size in sizes], axis=0)
    for head, seen_C in enumerate(seen_CM.T):
        if seen_C.sum() >= LEAST:
            fitted[head] = ridge(features_CH[seen_C], rewards_C[seen_C], weight)
    return fitted


def ridge(features_CH: np.ndarray, rewards_C: np.ndarray, weight: float) -> np.ndarray:
    """argmin ‖X w − r‖² + weight · ‖w‖², [H], by whichever of the two normal equations is smaller."""
    count, width = features_CH.shape
    if width <= count:
        gram = features_CH.T @ features_CH + weight * np.eye(width)
        return solve(gram, features_CH.T @ rewards_C, assume_a="pos")
    gram = features_CH @ features_CH.T + weight * np.eye(count)
    return features_CH.T @ solve(gram, rewards_C, assume_a="pos")
