"""What rewards that open a model have in common: where it is, and that opening it leaves no trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .calling import RewardUnavailable


def local_folder(model: str | Path, kind: str) -> Path | None:
    """The folder `model` names, None where only the hub can have it; RewardUnavailable where a path leads nowhere."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if isinstance(model, Path) or path.is_absolute() or model.startswith("."):
        raise RewardUnavailable(f"there is no folder {path}; give the folder of a {kind} model, or a hub id")
    return None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Loading leaves no trace: no progress bars or notices, and every global random state as it was.

    Importing sentence-transformers draws from Python's `random`, so without this the first score would shift a
    user's own stream.
    """
    import numpy as np
    import torch
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # weights are made on the CPU, whatever device they move to
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
