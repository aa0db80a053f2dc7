"""What every test stands on: no network, one thread, the same seeds.

The environment is set when pytest imports this file, before any test imports transformers, which reads it once.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import sys

import numpy as np
import pytest
import torch

# On the tiny models of these tests one thread is quicker than many, and sums then have one order. Deterministic
# algorithms are not forced: what users rely on must hold in PyTorch's default mode.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward taken from a file leaves its folder on the path: not for the next test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global random state, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
