"""How does the time of one step grow with its sizes, and over a run?

    python benchmarks/growth.py --out docs/results/growth.jsonl --plot docs/results/growth.png
    python benchmarks/growth.py --axes rank replay --repeats 7
    python benchmarks/growth.py --out docs/results/growth.jsonl --report        # only the table of --out

One size changes at a time. All other sizes stay as in PLAIN, and the other settings are the library's defaults. The
values of an axis take turns, one step each, for `--repeats` rounds, so other load on the machine affects all values.
The table gives medians next to the expected time. The expected time grows in proportion to the size (responses, group,
tokens), in proportion to prompt and response together (prompt_tokens), or not at all (replay, rank, steps).

- responses: responses per step, that is prompts × 8
- group: responses per prompt, with 2 prompts
- tokens: tokens per response
- prompt_tokens: tokens per prompt
- replay: groups in replay; replay is filled with the first step's groups before anything is timed
- rank: the rank of both adapters
- steps: the steps before, in one run

The base is a GPT-2 of four layers of width 128 with random weights, made here, or "tiny", which ships. Each timed step
is one line of the results file. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from arms import LoraGanArm, Shape, prepare, quiet
from machine import describe, synchronize
from speed import spread, table

from lora_gan.storage.json_lines import append_line, open_lines

Line = dict[str, Any]
PLAIN = Shape("growth", "small", prompts=2, group=8, tokens=16, prompt_tokens=16)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One size that changes."""

    values: tuple[int, ...]
    unit: str
    shape: Callable[[int], dict[str, int]] = lambda value: {}
    settings: Callable[[int], dict[str, int]] = lambda value: {}
    grows: Callable[[int], float] = lambda value: 1.0  # the expected time is proportional to this


AXES = {
    "responses": Axis((8, 16, 32, 64), "responses per step", lambda v: {"prompts": v // 8}, grows=float),
    "group": Axis((2, 4, 8, 16), "responses per prompt", lambda v: {"group": v}, grows=float),
    "tokens": Axis((8, 16, 32, 64), "tokens per response", lambda v: {"tokens": v}, grows=float),
    "prompt_tokens": Axis(
        (8, 32, 64, 128), "tokens per prompt", lambda v: {"prompt_tokens": v}, grows=lambda v: v + PLAIN.tokens
    ),
    "replay": Axis((2, 16, 64, 256, 1024), "groups in replay", settings=lambda v: {"disc_replay_groups": v}),
    "rank": Axis((4, 8, 16, 32, 64), "rank", settings=lambda v: {"lora_r": v, "disc_lora_r": v}),
    "steps": Axis((5, 25, 50, 100, 200), "steps taken"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES), help="default: all")
    parser.add_argument("--base", default="small", choices=["small", "tiny"], help="default: small")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per value (default 5)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/growth.jsonl"), help="JSON Lines, one per step")
    parser.add_argument("--plot", type=Path, help="draw the lines in --out as one picture, one panel per axis")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1: these bases are small)")
    parser.add_argument("--report", action="store_true", help="print the table of the lines in --out; measure nothing")
    given = parser.parse_args(arguments)
    if given.report and not given.out.is_file():
        raise SystemExit(f"{given.out} does not exist: run the benchmark first, or name another --out")
    if not given.report:
        quiet()
        torch.set_num_threads(given.threads)
        for name in given.axes:
            (over_steps if name == "steps" else over_values)(name, given.base, given.repeats, given.out)
    lines = open_lines(given.out)
    print(report(lines))
    if given.plot:
        draw(lines, given.plot)


# --- measuring --------------------------------------------------------------------------------------------------------


def over_values(name: str, base: str, repeats: int, out: Path) -> None:
    """Time steps at each value of the axis, in turns."""
    axis = AXES[name]
    where = _where(name, base)
    done = {_key(line) for line in open_lines(out)}
    due = [(r, v) for r in range(repeats) for v in axis.values if _key(where | {"value": v, "repeat": r}) not in done]
    if not due:
        return
    with tempfile.TemporaryDirectory(prefix="lora-gan-benchmark-") as folder:
        arms = {}
        for value in dict.fromkeys(value for _, value in due):
            shape = dataclasses.replace(PLAIN, base=base, **axis.shape(value))
            arm = arms[value] = LoraGanArm("lora_gan", prepare(shape, Path(folder, str(value))), **axis.settings(value))
            arm.step()
            replay = arm.gan.discriminator.replay
            if name == "replay":
                replay.extend(list(replay.groups) * (value // len(replay.groups)))
            arm.step()
        for repeat, value in due:
            append_line(out, where | {"value": value, "repeat": repeat, "seconds": seconds(arms[value])})
    print(f"{name} is done", flush=True)


def over_steps(name: str, base: str, repeats: int, out: Path) -> None:
    """Time the last steps before each mark of one run. The run starts again if the file lacks some of these steps."""
    where = _where(name, base)
    marks = AXES[name].values
    done = {_key(line) for line in open_lines(out)}
    if all(_key(where | {"value": mark, "repeat": r}) in done for mark in marks for r in range(repeats)):
        return
    with tempfile.TemporaryDirectory(prefix="lora-gan-benchmark-") as folder:
        arm = LoraGanArm("lora_gan", prepare(dataclasses.replace(PLAIN, base=base), Path(folder)))
        times: list[float] = []
        for mark in marks:
            while len(times) < mark:
                times.append(seconds(arm))
            for repeat, its in enumerate(times[-repeats:]):
                line = where | {"value": mark, "repeat": repeat, "seconds": its}
                if _key(line) not in done:
                    append_line(out, line)
    print(f"{name} is done", flush=True)


def seconds(arm: LoraGanArm) -> float:
    synchronize(arm.workload.device)
    began = time.perf_counter()
    arm.step()
    synchronize(arm.workload.device)
    return time.perf_counter() - began


def _where(axis: str, base: str) -> Line:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return describe(device) | {"axis": axis, "base": base}


def _key(line: Line) -> tuple[Any, ...]:
    return (*_group(line), line["axis"], line["value"], line["repeat"])


def _group(line: Line) -> tuple[Any, ...]:
    return line["code"], line["device"], line["threads"], line["torch"], line["base"]


# --- reporting --------------------------------------------------------------------------------------------------------


def points(lines: list[Line]) -> Iterator[tuple[str, dict[int, list[float]]]]:
    """Each axis of the last group in the file, with the seconds at each of its values."""
    latest = [line for line in lines if _group(line) == _group(lines[-1])] if lines else []
    for name in AXES:
        at: dict[int, list[float]] = {}
        for line in latest:
            if line["axis"] == name:
                at.setdefault(line["value"], []).append(line["seconds"])
        if at:
            yield name, dict(sorted(at.items()))


def expected(name: str, at: dict[int, list[float]]) -> list[float]:
    """Seconds that follow from the first value's."""
    first = next(iter(at))
    grows = AXES[name].grows
    return [statistics.median(at[first]) * grows(value) / grows(first) for value in at]


def report(lines: list[Line]) -> str:
    if not lines:
        return "nothing was measured"
    first = lines[-1]
    rows = [
        [AXES[name].unit, str(value), spread(at[value], 3), f"{its:.3f}", f"{statistics.median(at[value]) / its:.2f}"]
        for name, at in points(lines)
        for value, its in zip(at, expected(name, at), strict=True)
    ]
    heads = ["size", "value", "seconds per step: median (minimum–maximum)", "expected", "measured over expected"]
    where = (
        f"{first['device']}, {first['threads']} threads; base {first['base']}; code {first['code']}, torch "
        f"{first['torch']}. Otherwise {PLAIN.prompts} prompts × {PLAIN.group} responses × {PLAIN.tokens} tokens, "
        f"prompts of {PLAIN.prompt_tokens}."
    )
    return f"{where}\n\n{table(heads, rows)}"


def draw(lines: list[Line], file: Path) -> None:
    """One panel per axis: medians with their range, and the expected line."""
    from learning_report import figure_of, legend

    found = list(points(lines))
    columns = 4
    figure, panels = figure_of(
        -(-len(found) // columns), columns, "Time of one step as sizes grow", width=3.2, height=2.7
    )
    for axes, (name, at) in zip(panels.ravel(), found, strict=False):
        medians = [statistics.median(its) for its in at.values()]
        below = [median - min(its) for median, its in zip(medians, at.values(), strict=True)]
        above = [max(its) - median for median, its in zip(medians, at.values(), strict=True)]
        axes.plot(list(at), expected(name, at), "k--", linewidth=1, label="expected from the first value")
        axes.errorbar(list(at), medians, [below, above], marker="o", markersize=4, capsize=2, label="measured, median")
        most = max(max(max(its) for its in at.values()), *expected(name, at))
        axes.set(xlabel=AXES[name].unit, ylabel="seconds per step", ylim=(0, 1.15 * most))
        if len(set(expected(name, at))) == 1:  # expected to be flat, over a wide range of sizes
            axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for axes in panels.ravel()[len(found) :]:
        axes.axis("off")
    legend(figure, panels)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
