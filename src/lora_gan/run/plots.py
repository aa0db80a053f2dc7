"""Plots a run as one picture from its metrics.jsonl. Only this file imports matplotlib (the extra `plots`)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.json_lines import read_lines
from .tracking import reward_of


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: the quantity, with its unit.
        series: pairs (label, name in metrics.jsonl); the label of a single series is empty.
        is_total: whether the values count over the whole run; such a series has no running mean.
        limits: limits of the y axis; None: from the values.
    """

    title: str
    series: tuple[tuple[str, str], ...]
    is_total: bool = False
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("reward", (("true", "reward"), ("predicted, fresh", "pred_reward"), ("true, held out", "eval_true_reward"))),
    Panel("true-reward calls so far", (("", "reward_calls"),), is_total=True),
    Panel("rank correlation in the group, fresh", (("", "rank_correlation_within"),), limits=(-1.05, 1.05)),
    Panel("KL to the reference, nats per response", (("", "kl_per_response"),)),
    Panel("length, tokens", (("", "completions/mean_length"),)),
    Panel("share of responses cut at the limit", (("", "completions/clipped_ratio"),), limits=(-0.03, 1.03)),
    Panel("generator loss, in units of the reward", (("", "loss"),)),
    Panel("discriminator loss", (("", "disc_loss"),)),
)


def plot_run(metrics: Path, picture: Path, *, window: int = 8) -> Path | None:
    """Draw `PANELS` against steps, and a further panel if the reward has several parts.

    Args:
        metrics: a metrics.jsonl of fit() (docs/reference/metrics.md).
        picture: the file to write; its suffix sets the format.
        window: logged lines in the running mean; the single values are drawn pale behind the mean.

    Returns:
        The picture's path; None if matplotlib is not installed or nothing was logged yet.
    """
    if find_spec("matplotlib") is None or not metrics.is_file():
        return None
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    lines = list(read_lines(metrics))
    panels = _panels(lines)
    columns = 3 if len(panels) == 9 else 4
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows + 0.5), layout="constrained")
    figure.suptitle(metrics.resolve().parent.name, fontsize="x-large")
    for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).ravel(), panels, strict=True):
        _draw_panel(axes, panel, lines, window)
    figure.savefig(picture, dpi=110)
    return picture


def _panels(lines: list[dict[str, Any]]) -> list[Panel]:
    rewards = {name: reward for line in lines for name in line if (reward := reward_of(name))}
    panels = list(PANELS)
    if len(rewards) > 1:  # a single reward equals the total
        panels.insert(1, Panel("parts of the true reward", tuple((label, name) for name, label in rewards.items())))
    return panels


def _draw_panel(axes: Any, panel: Panel, lines: list[dict[str, Any]], window: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for label, name in panel.series:
        points = [(line["step"], line[name]) for line in lines if name in line]
        _draw(axes, points, label, 0 if panel.is_total else window)
    axes.set_title(panel.title, fontsize="medium")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)
    steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
    if len(set(steps)) > 1:
        margin = 0.03 * (max(steps) - min(steps))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    elif panel.is_total:
        axes.set_ylim(bottom=0)
    if not axes.lines:
        axes.set(xticks=[], yticks=[], xlabel="")
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="gray")
    elif axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=True, framealpha=0.7, edgecolor="none", fontsize="small")


def _draw(axes: Any, points: list[tuple[int, float]], label: str, window: int) -> None:
    """Draw a line through the points; from two windows of points on, their running mean over the pale points.

    A window of 0 has no running mean.
    """
    if not points:
        return
    step, value = np.array(points).T
    if not window or len(value) < 2 * window:  # too few points for a running mean, mostly evaluations
        marker = "o" if len(value) < 16 else None
        axes.plot(step, value, linewidth=2, marker=marker, markersize=4, label=label or None)
        return
    (pale,) = axes.plot(step, value, alpha=0.25, linewidth=1)
    smooth = np.convolve(value, np.ones(window) / window, mode="valid")
    axes.plot(step[window - 1 :], smooth, color=pale.get_color(), linewidth=2, label=label or None)
