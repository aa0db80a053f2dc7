"""Fresh quality of the predictions: measured on responses before the discriminator learns from them.

# B = responses, M = heads

The step's record holds these metrics. The discriminator's gate uses the rank correlation within groups.
"""

import numpy as np
from scipy.stats import rankdata

from . import estimate


def fresh_metrics(predicted_MB: np.ndarray, true_B: np.ndarray, group_B: np.ndarray) -> dict[str, float | None]:
    """Compare predictions made before this step's training with the true rewards that were queried afterwards.

    Responses without a true reward or a finite prediction are left out.

    Args:
        predicted_MB: predictions of every head.
        true_B: true rewards; NaN where unknown.
        group_B: the prompt's index of each response.

    Returns:
        Metrics by name. None: too few answers, or no spread. rank_correlation is Spearman's over all answered
        responses. rank_correlation_within takes ranks within each group and subtracts the group's mean rank. Only
        differences within a group reach the generator.
    """
    answered_B = ~np.isnan(true_B) & np.isfinite(predicted_MB).all(0)
    predicted_MB = np.where(answered_B, predicted_MB, 0.0)  # NumPy warns about arithmetic with infinities
    spread_B = predicted_MB.std(0)[answered_B]
    predicted_B, true_B, group_B = predicted_MB.mean(0)[answered_B], true_B[answered_B], group_B[answered_B]
    compared_B = np.array([(group_B == group).sum() > 1 for group in group_B], dtype=bool)
    ranks = [_ranks_within(values_B[compared_B], group_B[compared_B]) for values_B in (predicted_B, true_B)]
    return {
        "rank_correlation": _correlation(rankdata(predicted_B), rankdata(true_B)),
        "rank_correlation_within": _correlation(*ranks),
        "disc_mse": float(np.mean((predicted_B - true_B) ** 2)) if len(true_B) else None,
        "calibration_slope": _slope_within(predicted_B, true_B, group_B),
        "uncertainty_correlation": _correlation(spread_B, np.abs(predicted_B - true_B)),
    }


def _ranks_within(values_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Each value's rank within its group, minus the group's mean rank, [B]."""
    ranks_B = np.zeros(len(values_B))
    for group in np.unique(group_B):
        ranks_B[group_B == group] = rankdata(values_B[group_B == group])
    return estimate.centered_within_groups(ranks_B, group_B)


def _slope_within(predicted_B: np.ndarray, true_B: np.ndarray, group_B: np.ndarray) -> float | None:
    """Least-squares slope of true on predicted reward within groups: 1 is calibrated, below 1 overconfident."""
    centered_B = estimate.centered_within_groups(predicted_B, group_B)
    square = float(centered_B @ centered_B)
    return float(centered_B @ estimate.centered_within_groups(true_B, group_B)) / square if square > 1e-12 else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
