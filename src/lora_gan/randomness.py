"""Keyed randomness: every draw is a function of (seed, step, purpose, index), and of nothing else.

There is no generator whose state must be carried, saved or shared between processes: the numbers for one row at one
step can be made again anywhere, in any order. The key is hashed into the 128-bit key of Philox4x64-10, a
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Index = int | str | bytes


def generator(seed: int, step: int, purpose: str, *index: Index) -> np.random.Generator:
    """A NumPy generator for one purpose: equal arguments give equal streams, on any machine."""
    # Each part is written with its length, so that ("ab", "c") and ("a", "bc") are different keys.
    parts = [str(part).encode() if not isinstance(part, bytes) else part for part in (seed, step, purpose, *index)]
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    key = np.frombuffer(digest.digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def uniforms(size: int, seed: int, step: int, purpose: str, *index: Index) -> np.ndarray:
    """`size` numbers in [0, 1), float64; a longer request begins with the shorter one's numbers."""
    return generator(seed, step, purpose, *index).random(size)


@contextmanager
def seeded_torch(seed: int, purpose: str) -> Iterator[None]:
    """Run library code that draws from torch's global stream (LoRA's initialisation) from a key, and leave no trace."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(generator(seed, 0, purpose).integers(2**63)))
        yield


def fingerprint(ids: list[int]) -> bytes:
    """A stable name for a prompt's tokens. Rows are keyed by it, not by their place in a batch."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
