"""A run as one picture, from its metrics.jsonl. matplotlib (the extra `plots`) is imported only here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .json_lines import read_lines


def plot_run(metrics: Path, picture: Path, *, window: int = 8) -> Path | None:
    """Draw rewards and their parts, the discriminator's rank correlation within groups, KL and length against steps.

    Args:
        metrics: a metrics.jsonl as fit() writes it (docs/metrics.md).
        picture: the file to write; its ending says the format.
        window: lines of the running mean; the single ones stand behind it, pale.

    Returns:
        The picture's path, or None where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    lines = list(read_lines(metrics))
    panels = _panels(lines)
    columns = 2 if len(panels) == 4 else 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, series) in zip(grid, panels, strict=False):
        for label, name in series:
            _draw(axes, [(line["step"], line[name]) for line in lines if name in line], label, window)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.savefig(picture, dpi=120)
    return picture


def _panels(lines: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titles, and what is drawn under each: (label, name in metrics.jsonl)."""
    parts = list(dict.fromkeys(name for line in lines for name in line if _is_part(name)))
    panels = [
        ("reward", [("true", "reward"), ("predicted, fresh", "pred_reward"), ("true, held out", "eval_true_reward")]),
        ("rank correlation in the group, fresh", [("", "rank_correlation_within")]),
        ("KL to the base, nats a response", [("", "kl_per_response")]),
        ("length, tokens", [("", "completions/mean_length")]),
    ]
    if len(parts) > 1:  # of one alone it is the reward
        named = [(name.removeprefix("rewards/").removesuffix("/mean"), name) for name in parts]
        panels.insert(1, ("parts of the true reward", named))
    return panels


def _is_part(name: str) -> bool:
    return name.startswith("rewards/") and name.endswith("/mean")


def _draw(axes: Any, points: list[tuple[int, float]], label: str, window: int) -> None:
    if not points:
        return
    step, value = np.array(points).T
    if len(value) < 2 * window:  # too few for a running mean to show more: evaluations, mostly
        axes.plot(step, value, linewidth=2, marker="o", markersize=4, label=label or None)
        return
    (pale,) = axes.plot(step, value, alpha=0.25, linewidth=1)
    smooth = np.convolve(value, np.ones(window) / window, mode="valid")
    axes.plot(step[window - 1 :], smooth, color=pale.get_color(), linewidth=2, label=label or None)
