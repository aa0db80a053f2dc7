"""Shared by rewards that open a model: find its folder, and load it without side effects."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .calling import RewardUnavailable


def local_folder(model: str | Path, kind: str) -> Path | None:
    """The folder that `model` names; None if `model` is a hub id. Raises RewardUnavailable for a missing folder."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if isinstance(model, Path) or path.is_absolute() or model.startswith("."):
        raise RewardUnavailable(f"there is no folder {path}: give the folder of a {kind} model, or a hub id")
    return None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside the block there are no progress bars and notices. After it, all global random states are restored.

    Importing sentence-transformers draws from Python's `random`. Without this block, the first score would change the
    user's own random numbers.
    """
    import numpy as np
    import torch
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # weights are always created on the CPU
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
