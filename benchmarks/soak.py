"""Does a long run grow? Measures memory, open files and step time over many steps of fit() on the base that ships.

    python benchmarks/soak.py --steps 2000 --out docs/results/soak.jsonl
    python benchmarks/soak.py --report --out docs/results/soak.jsonl

One fit() runs as a user's run does: it saves every 100 steps, logs every step and samples every 25 steps. The script
writes a line every 20 steps. The report compares medians of the first and the last quarter of the steps after --warm.

- `rss`: resident memory
- `held`: resident memory after glibc returned the pages of freed blocks to the system. These pages vary with the
  lengths of responses, and no object uses them.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

EVERY = 20  # steps between lines


def rss() -> int:
    """Resident memory of this process, bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Return freed memory to the system (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def soak(steps: int, out: Path, records: int | None) -> None:
    import torch

    from lora_gan import LoraGAN, gan, rewards, tiny
    from lora_gan.run import callbacks

    if records is not None:
        gan.RECORDS = callbacks.LOG_HISTORY = records

    torch.set_num_threads(1)
    rows = tiny.pairs("train", 4096, seed=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, out.open("w", encoding="utf-8") as file:
        run = LoraGAN(
            "tiny", reward=rewards.chrf, output_dir=folder, query_rate=0.5, max_completion_length=16,
            learning_rate=1e-3, disc_learning_rate=1e-3, save_steps=100, save_total_limit=2,
        )  # fmt: skip
        began = [time.process_time()]

        def note(record: dict) -> None:
            if record["step"] % EVERY == 0:
                now = time.process_time()
                line = {
                    "step": record["step"],
                    "rss": rss(),
                    "held": (trim(), rss())[1],
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                    "cpu_s_per_step": (now - began[0]) / EVERY,
                    "completion_length": record["completion_length"],
                }
                file.write(json.dumps(line) + "\n")
                file.flush()
                began[0] = time.process_time()

        run.fit(rows, steps=steps, progress=False, on_step=note)


def report(out: Path, warm: int) -> None:
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    after = [line for line in lines if line["step"] > warm]
    if len(after) < 4:
        raise SystemExit(f"too few lines after step {warm}: there is one per {EVERY} steps, and four are needed")
    quarter = len(after) // 4
    for name in ("rss", "held", "files", "threads", "cpu_s_per_step", "completion_length"):
        first, last = (statistics.median(line[name] for line in part) for part in (after[:quarter], after[-quarter:]))
        values = [line[name] for line in after]
        print(
            f"{name}: median {first:.6g} in the first quarter after step {warm}, {last:.6g} in the last "
            f"({(last / first - 1):+.2%}); from {min(values):.6g} to {max(values):.6g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm", type=int, default=100, help="warm-up steps; after them nothing may grow")
    parser.add_argument("--records", type=int, help="records that fit() keeps; default: the library's number")
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the report of an existing --out; run nothing")
    given = parser.parse_args()
    if given.records is not None and given.records < 1:
        parser.error("--records must be 1 or more")
    if not given.report:
        soak(given.steps, given.out, given.records)
    report(given.out, given.warm)


if __name__ == "__main__":
    main()
