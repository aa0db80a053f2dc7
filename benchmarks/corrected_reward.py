"""Variance of advantages from the corrected reward, relative to asking for every response.

    python benchmarks/corrected_reward.py --plot docs/results/corrected_reward.png

Simulated groups of 8 responses with standard normal true rewards. Predictions have a given correlation with the true
reward, and are on their calibrated scale (the regression of true on predicted reward has slope 1). Whole groups are
asked for, as by default. The library's own functions draw the queries and compute reward and advantage.
"""

from __future__ import annotations

import argparse

import numpy as np

from lora_gan.training.estimate import advantages, choose_queries, corrected_reward

GROUPS, SIZE = 8, 8


def error_of_advantages(correlation: float, rate: float, *, steps: int) -> float:
    """Mean squared difference to the advantages of the true rewards, plus their own variance, over that variance."""
    rng = np.random.default_rng(0)
    group_B = np.repeat(np.arange(GROUPS), SIZE)
    squared, own = [], []
    for step in range(steps):
        true_B = rng.normal(size=GROUPS * SIZE)
        noise_B = rng.normal(size=GROUPS * SIZE)
        predicted_B = correlation**2 * true_B + correlation * (1 - correlation**2) ** 0.5 * noise_B
        queries = choose_queries(group_B, rate, seed=0, step=step, design="groups")
        answers_B = np.where(queries.asked_B, true_B, np.nan)
        exact_B = advantages(true_B, group_B, 0.0)
        estimate_B = advantages(corrected_reward(predicted_B, answers_B, queries.inclusion_B), group_B, 0.0)
        squared.append(((estimate_B - exact_B) ** 2).mean())
        own.append((exact_B**2).mean())
    return float(1 + np.mean(squared) / np.mean(own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="simulated steps per point")
    parser.add_argument("--plot", help="picture to write")
    given = parser.parse_args()
    correlations = np.linspace(0, 1, 11)
    curves = {
        rate: [error_of_advantages(c, rate, steps=given.steps) for c in correlations] for rate in (1 / 8, 1 / 4, 1 / 2)
    }
    for rate, curve in curves.items():
        print(
            f"query rate {rate:g}: " + ", ".join(f"{c:.1f} {v:.2f}" for c, v in zip(correlations, curve, strict=True))
        )
    if given.plot:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        for rate, curve in curves.items():
            axes.plot(correlations, curve, marker="o", markersize=3, label=f"query rate 1/{round(1 / rate)}")
        axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="every response asked for")
        axes.set(xlabel="correlation of predicted and true reward within groups", ylabel="variance of the advantage")
        axes.set_yscale("log", base=2)
        axes.set_ylim(0.5, 10)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, loc="lower left")
        figure.tight_layout()
        figure.savefig(given.plot, dpi=110)


if __name__ == "__main__":
    main()
