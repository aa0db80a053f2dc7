"""Finds the runs below a folder by their files, without importing torch."""

from __future__ import annotations

import re
from pathlib import Path

SHOWN = 10  # runs that a message lists


def require_run(path: Path) -> None:
    """Reject a folder that is no run but contains runs.

    Raises:
        ValueError: the message lists the runs with their newest steps, newest first.
    """
    if _steps(path) or (path / "manifest.json").is_file():
        return
    runs = {
        folder: max(steps) for folder in sorted(path.glob("*")) + sorted(path.glob("*/*")) if (steps := _steps(folder))
    }
    if not runs:
        return
    newest = sorted(runs, key=lambda run: (run / f"step-{runs[run]}").stat().st_mtime, reverse=True)
    listed = ", ".join(f"{run} (step {runs[run]:,})" for run in newest[:SHOWN])
    more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    raise ValueError(f"{path} is no run, but holds runs: {listed}{more}. Name one, such as --checkpoint {newest[0]}")


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints with a manifest in a folder."""
    names = [file.parent.name for file in folder.glob("step-*/manifest.json")]
    return [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-[0-9]{1,18}", name)]
