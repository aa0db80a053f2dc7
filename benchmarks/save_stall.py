"""How long does a checkpoint interrupt training? Compares this time with a whole save and with bare copying.

    python benchmarks/save_stall.py            # on the base that ships
    python benchmarks/save_stall.py --model gpt2 --rank 64

The script prints medians over --repeats. The three measurements take turns:

- `copying`: clones the adapters and their optimizers' moments, and nothing else
- `standing`: the time that fit() waits (`snapshot.take`)
- `whole`: a whole save, until all files are written
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="steps before the measurement, to fill replay")
    parser.add_argument("--repeats", type=int, default=21)
    given = parser.parse_args()

    import torch

    from lora_gan import LoraGAN, rewards, tiny
    from lora_gan.run import snapshot
    from lora_gan.storage import checkpoint

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        gan = LoraGAN(
            given.model, reward=rewards.chrf, output_dir=folder, lora_r=given.rank, disc_lora_r=given.rank,
            max_completion_length=16,
        )  # fmt: skip
        gan.fit(tiny.pairs("train", 512, seed=0), steps=given.steps, progress=False)
        players = (gan.generator, gan.discriminator)
        adapters = [carries.optimizer.parameters for carries in players]

        def copying() -> Any:
            return checkpoint.copied([adapters, [carries.optimizer.state_dict() for carries in players]])

        works = {
            "copying": copying,
            "standing": lambda: snapshot.take(gan.state),
            "whole": lambda: gan.save_checkpoint(ckpt_dir=folder),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(given.repeats):
            for name, work in works.items():
                times[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name}: {1000 * value:.1f} ms, {value / medians['copying']:.2f} times copying")


if __name__ == "__main__":
    main()
