"""Keyed randomness: every draw is a function of (seed, step, purpose, index) alone.

No generator state is saved or shared between processes. The numbers for a row at a step can be reproduced anywhere, in
any order. The key is hashed to the 128-bit key of Philox4x64-10, a counter-based generator (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011).
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Index = int | str | bytes


def generator(seed: int, step: int, purpose: str, *index: Index) -> np.random.Generator:
    """A NumPy generator for one purpose. Equal arguments give equal streams on any machine."""
    digest = hashlib.blake2b(digest_size=16)
    for item in (seed, step, purpose, *index):
        encoded = item if isinstance(item, bytes) else str(item).encode()
        # The length separates items, so that ("ab", "c") and ("a", "bc") are different keys.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    key = np.frombuffer(digest.digest(), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def uniforms(size: int, seed: int, step: int, purpose: str, *index: Index) -> np.ndarray:
    """`size` uniform numbers in [0, 1), float64. With equal keys, a longer result starts with the shorter one."""
    return generator(seed, step, purpose, *index).random(size)


@contextmanager
def seeded_torch(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's global generator from a key within the block (for LoRA initialization), then restore its state."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(generator(seed, 0, purpose).integers(2**63)))
        yield


def fingerprint(ids: list[int]) -> bytes:
    """A stable hash of a prompt's tokens. Draws are keyed by this hash instead of the index in a batch."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()
