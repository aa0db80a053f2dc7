"""How much memory does training take, compared with peers? The peak of each arm, in its own process.

    python benchmarks/memory.py --shapes gpt2 --micro-batch 4 --out docs/results/memory.jsonl
    python benchmarks/memory.py --out docs/results/memory.jsonl --report      # only the tables of --out

Arms and shapes are those of arms.py. Each measurement is a new process:

1. It imports everything, builds the arm on a base of two narrow layers and runs one step, because libraries load parts
   late. It drops this arm. The memory that the process holds now is the baseline.
2. It builds the arm on the real base and runs `--steps` steps.

The peak is VmHWM of Linux (resident memory) on the CPU, and torch.cuda.max_memory_allocated on CUDA, minus the
baseline. These figures are measured:

- the peak overall, and the peak of the steps alone, because loading a base may take more memory than using it;
- the bytes of the bases' tensors, of the trained tensors (adapters and heads), and of the optimizers' moments.

The rest of the steps' peak is activations, logits, gradients, the cache of sampling, and memory that the allocator
keeps. Weights that no step read are not in memory, so they are not subtracted: most of a reward model's embeddings, for
example. The size of one float32 copy of the logits of the largest forward pass is computed, not measured.

Micro-batches are equal. They are this library's `micro_batch_size`, and TRL's `per_device_train_batch_size` with enough
accumulation steps for the same batch. two_models has one response by its definition; --micro-batch 1 gives the other
arms the same. Only the arms named "checkpointed" use gradient checkpointing.

On the CPU the weights of a base are mapped from its file, not copied. The two bases of two_models and trl come from two
files, as a model and a reward model do. If both came from one file, Linux would hold its pages once, but would count
them twice in each figure here. The last column gives the memory of such a pair. It is computed: the peak minus the part
of the second base that is in memory. On a GPU nothing is shared.

Every process has the same settings of glibc's allocator: MALLOC_ARENA_MAX=1, and freed blocks from 128 KiB return to
the system immediately. Without these settings the process keeps freed memory, and the figure varies more.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, OURS, SHAPES, Arm, Shape, Workload, built, prepare, quiet
from machine import describe
from speed import add_shape_options, in_order, plain, shape_of, spread, table

from lora_gan.storage.json_lines import append_line, open_lines

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
MINI = Shape("mini", "mini", prompts=1, group=2, tokens=4, prompt_tokens=4)
MIB = 2**20
Line = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny"], choices=list(SHAPES), help="default: tiny")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--micro-batch", type=int, default=4, help="responses in one forward and backward (default 4)")
    parser.add_argument("--steps", type=int, default=2, help="training steps that the peak covers (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per arm (default 3)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/memory.jsonl"), help="JSON Lines, one per process"
    )
    add_shape_options(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)  # the task of a measuring process, as JSON
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(measure(json.loads(given.child))))
        return
    if given.report and not given.out.is_file():
        raise SystemExit(f"{given.out} does not exist: run the benchmark first, or name another --out")
    if not given.report:
        quiet()
        if given.threads:
            torch.set_num_threads(given.threads)
        for name in given.shapes:
            run(shape_of(name, given), given.arms, given.micro_batch, given.steps, given.repeats, given.out)
    print(report(open_lines(given.out)))


def run(shape: Shape, names: Iterable[str], micro_batch: int, steps: int, repeats: int, out: Path) -> None:
    """Make the measurements of this shape that the results file lacks, one process after the other."""
    if shape.responses % micro_batch:
        raise SystemExit(f"--micro-batch {micro_batch} does not divide the {shape.responses} responses of {shape.name}")
    with tempfile.TemporaryDirectory(prefix="lora-gan-benchmark-") as folder:
        try:
            workload = prepare(shape, Path(folder), micro_batch=micro_batch)
        except FileNotFoundError as missing:
            print(f"{shape.name} is left out: {missing}", file=sys.stderr)
            return
        where = describe(workload.device) | {
            "shape": plain(shape), "dtype": str(workload.dtype).rpartition(".")[2], "micro_batch": micro_batch,
            "steps": steps,
        }  # fmt: skip
        done = {_key(line) for line in open_lines(out)}
        for repeat in range(repeats):
            for name in names:
                line: Line = where | {"arm": name, "repeat": repeat}
                if _key(line) in done:
                    continue
                told = {
                    "arm": name, "shape": dataclasses.asdict(shape), "folder": str(workload.folder),
                    "second": str(workload.second), "prompts": workload.prompts, "micro_batch": micro_batch,
                    "steps": steps, "threads": torch.get_num_threads(),
                }  # fmt: skip
                command = [sys.executable, __file__, "--child", json.dumps(told)]
                done_process = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True)
                if done_process.returncode:
                    print(f"{shape.name} {name} ended with {done_process.returncode}", file=sys.stderr)
                    continue
                append_line(out, line | json.loads(done_process.stdout.splitlines()[-1]))
                print(f"{shape.name} {repeat + 1}/{repeats} {name}: {done_process.stdout.splitlines()[-1]}", flush=True)


# --- in the measuring process -----------------------------------------------------------------------------------------


def measure(told: dict[str, Any]) -> Line:
    """Build and run one arm. Returns its peaks and the sizes of its tensors, in bytes."""
    quiet()
    torch.set_num_threads(told["threads"])
    with tempfile.TemporaryDirectory() as folder, built([told["arm"]], prepare(MINI, Path(folder))) as arms:
        arms[told["arm"]].step()
    folders = Path(told["folder"]), Path(told["second"])
    workload = Workload(Shape(**told["shape"]), *folders, tuple(told["prompts"]), told["micro_batch"])
    baseline, files = held(workload.device), mapped_files()
    start_peak(workload.device)
    with built([told["arm"]], workload) as arms:
        arm = arms[told["arm"]]
        building, after_building = peak(workload.device), held(workload.device)
        start_peak(workload.device)
        for _ in range(told["steps"]):
            wrote = arm.step()
        training = peak(workload.device)
        return {
            "baseline": baseline, "peak": max(building, training) - baseline, "training_peak": training - baseline,
            "built": after_building - baseline, "of_files": mapped_files() - files, **tensors(arm),
            "logits": logits_bytes(arm), "wrote": dataclasses.asdict(wrote),
        }  # fmt: skip


def tensors(arm: Arm) -> dict[str, int]:
    """Bytes of the bases, of the trained tensors, and of the optimizers' moments."""

    def size(those: Iterable[torch.Tensor]) -> int:
        alone = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in those}
        return sum(alone.values())

    trained = [parameter for adamw in arm.optimizers() for group in adamw.param_groups for parameter in group["params"]]
    known = {id(parameter) for parameter in trained}
    frozen = [[parameter for parameter in model.parameters() if id(parameter) not in known] for model in arm.models()]
    kept = [
        value
        for adamw in arm.optimizers()
        for state in adamw.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    bases = [size(its) for its in frozen]
    return {
        "base": sum(bases), "second_base": sum(bases[1:]), "adapters": size(trained), "optimizers": size(kept),
    }  # fmt: skip


def logits_bytes(arm: Arm) -> int:
    """Bytes of one float32 copy of the logits of the largest forward pass: computed."""
    shape = arm.workload.shape
    rows = 1 if arm.name == "two_models" else arm.workload.micro_batch or shape.responses
    vocabulary = arm.models()[0].get_base_model().config.get_text_config().vocab_size
    return rows * (shape.tokens + 1) * vocabulary * 4


def held(device: torch.device) -> int:
    """Bytes that the process holds now, after it returned all unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        return _status("VmRSS")
    return peak(device)


def start_peak(device: torch.device) -> None:
    """Reset the peak, if the system allows this. Otherwise the peak includes all memory use before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mapped_files() -> int:
    """Bytes of resident memory that are mapped files, such as mapped weights. 0 where this is unknown."""
    return _status("RssFile") if sys.platform == "linux" else 0


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status of this kernel has no {name}")
    return int(found.group(1)) * 1024


# --- reporting --------------------------------------------------------------------------------------------------------


def _key(line: Line) -> tuple[Any, ...]:
    setting = (line["code"], line["device"], line["torch"], tuple(line["shape"].items()), line["micro_batch"])
    return (*setting, line["steps"], line["arm"], line["repeat"])


def report(lines: list[Line]) -> str:
    """All tables, as Markdown: one section per shape, machine, micro-batch and version of the code."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(_key(line)[:6], []).append(line)
    return "\n\n".join(map(section, groups.values()))


def section(lines: list[Line]) -> str:
    first, shape = lines[0], lines[0]["shape"]
    arms: dict[str, dict[int, Line]] = {}
    for line in lines:
        arms.setdefault(line["arm"], {})[line["repeat"]] = line
    heads = [
        "arm", "peak, MiB: median (minimum–maximum)", "while training", "base", "adapters", "optimizers",
        "activations, logits, gradients, cache", "one copy of the logits (computed)",
        "peak if both bases came from one file (computed)",
    ]  # fmt: skip
    rows = [_row(name, list(rounds.values())) for name, rounds in in_order(arms)]
    text = [
        f"## {shape['name']}: {shape['prompts']} prompts × {shape['group']} responses × {shape['tokens']} tokens, "
        f"micro-batches of {first['micro_batch']}",
        f"{first['device']}, {first['dtype']}; code {first['code']}, Python {first['python']}, torch {first['torch']}, "
        f"transformers {first['transformers']}, peft {first['peft']}, trl {first['trl']}. Figures are MiB above "
        "the memory that the process held before the arm was built.",
        table(heads, rows),
    ]
    peers = [name for name, _ in in_order(arms) if name not in OURS]
    ratios = [[name, *(_ratio(arms[peer], arms[name]) for peer in peers)] for name, _ in in_order(arms) if name in OURS]
    if ratios and peers:
        text += [
            "How many times as much memory the peer takes: its peak over ours, median (minimum–maximum) over repeats.",
            table(["arm", *peers], ratios),
        ]
    return "\n\n".join(text)


def _row(name: str, rounds: list[Line]) -> list[str]:
    def median(key: str) -> float:
        return statistics.median(line[key] for line in rounds) / MIB

    counted = [median(key) for key in ("base", "adapters", "optimizers")]
    never_read = max(0.0, median("base") - median("of_files")) if median("of_files") > median("base") / 2 else 0.0
    left = median("training_peak") - sum(counted) + never_read
    sizes = [f"{value:.1f}" for value in (median("training_peak"), *counted, left, median("logits"))]
    on_cpu = statistics.median(line["of_files"] for line in rounds) > 0
    one_file = median("peak")
    if any(line["second_base"] for line in rounds):  # subtract the pages of the second base that are in memory
        one_file -= max(0.0, median("of_files") - (median("base") - median("second_base")))
    return [name, spread([line["peak"] / MIB for line in rounds], 1), *sizes, f"{one_file:.1f}" if on_cpu else ""]


def _ratio(peer: dict[int, Line], ours: dict[int, Line]) -> str:
    shared = [repeat for repeat in ours if repeat in peer]
    return spread([peer[repeat]["peak"] / ours[repeat]["peak"] for repeat in shared]) if shared else "–"


if __name__ == "__main__":
    main()
