"""Does torch.compile pay? Seconds of the first step, and of later steps with and without compilation.

    python benchmarks/compiled.py --shape tiny --steps 10

Each layer of the base is compiled for changing shapes, because shapes change between steps and between tokens. The two
arms take turns, one step each, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from arms import ARMS, SHAPES, Arm, prepare, quiet

from lora_gan.model.layers import layer_list


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=10, help="steps of each arm after everything is compiled")
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch._dynamo.config.cache_size_limit = 64  # three players, with and without gradients
    with tempfile.TemporaryDirectory() as folder:
        workload = prepare(SHAPES[given.shape], Path(folder))
        plain, compiled = (ARMS["lora_gan_fresh"](workload) for _ in range(2))
        named = layer_list(compiled.gan.players.lm)
        assert named is not None
        for layer in named[1]:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        first = [_seconds(compiled) for _ in range(3)]
        print(f"the first steps, compiled: {', '.join(f'{seconds:.1f}' for seconds in first)} s")
        _seconds(plain)
        pairs = [(_seconds(plain), _seconds(compiled)) for _ in range(given.steps)]
    ratio = statistics.median(with_it / without for without, with_it in pairs)
    without, with_it = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(f"one step: {without:.3f} s, compiled {with_it:.3f} s, {ratio:.2f} times as long")
    if with_it < without:
        spent = sum(first) - len(first) * without
        print(f"the time of compiling is recovered after {spent / (without - with_it):,.0f} steps")


def _seconds(arm: Arm) -> float:
    began = time.perf_counter()
    arm.step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
