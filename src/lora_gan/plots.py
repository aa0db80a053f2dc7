"""A run as one picture, from its metrics.jsonl. matplotlib (the extra `plots`) is imported only here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np


def plot_run(metrics: Path, picture: Path, *, window: int = 8) -> Path | None:
    """Draw rewards, the discriminator's rank correlation within groups, and KL against steps.

    Args:
        metrics: a metrics.jsonl as fit() writes it.
        picture: the file to write; its ending says the format.
        window: steps of the running mean; the single steps stand behind it, pale.

    Returns:
        The picture's path, or None where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n") if line]
    panels = (
        ("reward", (("true reward", "reward_mean"), ("predicted, fresh", "pred_reward_mean"))),
        ("rank correlation in the group, fresh", (("", "rank_correlation_within"),)),
        ("KL to the base, nats a response", (("", "kl"),)),
    )
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, name in series:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if not points:
                continue
            step, value = np.array(points).T
            (pale,) = axes.plot(step, value, alpha=0.25, linewidth=1)
            width = min(window, len(value))
            smooth = np.convolve(value, np.ones(width) / width, mode="valid")
            axes.plot(step[width - 1 :], smooth, color=pale.get_color(), linewidth=2, label=label or None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if any(label for label, _ in series):
            axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)
    return picture
