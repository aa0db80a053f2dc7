"""The machine of a measurement: its name, its versions, and how fast it multiplies and reads memory.

Matrix products are measured on the base's own weights, over all layers in turn. One layer alone would stay in a CPU
cache, and a whole model does not fit in it. The measured time is one pass through the linear layers and nothing else.
"""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

READ = {"cpu": 2**28, "cuda": 2**31}  # bytes read to measure bandwidth: more than any cache holds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return named.group(1) if named else platform.processor() or platform.machine()


def code_version() -> str:
    """The last commit of the package, with a plus if files changed since. Outside git: the package's version."""
    here = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h", "--", "src") + ("+" if git("status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return version("lora-gan")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, code and versions: the fields of every line of a results file."""
    versions = {}
    for package in ("torch", "transformers", "peft", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "code": code_version(), **versions,
    }  # fmt: skip


def least_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of some runs, after one warm-up run: the machine's limit, without other load."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


# --- the base's linear layers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer of the base, with its adapters."""

    weight: Tensor
    transposed: bool  # GPT-2's Conv1D has weights of shape [in, out]
    adapters: tuple[tuple[str, int], ...]  # player, number of weights of its adapter on this layer

    @property
    def inputs(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    def times(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.transposed else nn.functional.linear(x, self.weight)


def linear_layers(lm: nn.Module) -> tuple[list[Linear], Linear]:
    """The linear layers of the body in order, and the vocabulary head."""
    head = lm.get_output_embeddings()
    body = []
    for name, module in lm.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head or ".lora_" in name:
            continue
        tuner = lm.get_submodule(name.removesuffix(".base_layer"))
        players = getattr(tuner, "lora_A", {})
        adapters = [
            (player, tuner.lora_A[player].weight.numel() + tuner.lora_B[player].weight.numel()) for player in players
        ]
        body.append(Linear(module.weight, isinstance(module, Conv1D), tuple(adapters)))
    return body, Linear(head.weight, False, ())


# --- its speed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How fast this machine multiplies this base's matrices and reads memory.

    `body` and `head` map the rows of a product to FLOP per second.
    """

    body: dict[int, float]
    head: dict[int, float]
    read: float  # bytes per second, summing a tensor
    copy: float  # bytes per second, counting reads and writes

    @property
    def bandwidth(self) -> float:
        return max(self.read, self.copy)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def best(cls, those: list[Rates]) -> Rates:
        """The highest of several measurements: other load can only make a measurement slower."""
        body, head = (
            {rows: max(getattr(its, name)[rows] for its in those) for rows in getattr(those[0], name)}
            for name in ("body", "head")
        )
        return cls(body, head, max(its.read for its in those), max(its.copy for its in those))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rates:
        numbered = {name: {int(rows): rate for rows, rate in values[name].items()} for name in ("body", "head")}
        return cls(**numbered, read=values["read"], copy=values["copy"])


@torch.no_grad()
def measure(lm: nn.Module, body_rows: set[int], head_rows: set[int], device: torch.device) -> Rates:
    """Measure products of the body and the head at these numbers of rows, and the memory's bandwidth."""
    body, head = linear_layers(lm)

    def rate(layers: list[Linear], rows: int) -> float:
        inputs = {
            layer.inputs: torch.randn(rows, layer.inputs, device=device, dtype=layer.weight.dtype) for layer in layers
        }

        def work() -> None:
            for layer in layers:
                layer.times(inputs[layer.inputs])

        return 2 * rows * sum(layer.weight.numel() for layer in layers) / least_seconds(work, device)

    values = torch.ones(READ[device.type] // 4, device=device)
    other = torch.empty_like(values)
    size = values.numel() * values.element_size()
    return Rates(
        {rows: rate(body, rows) for rows in sorted(body_rows)},
        {rows: rate([head], rows) for rows in sorted(head_rows)},
        size / least_seconds(values.sum, device),
        2 * size / least_seconds(lambda: other.copy_(values), device),
    )
