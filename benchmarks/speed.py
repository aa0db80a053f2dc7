"""How long does one training step take, next to peers? What share of it could the machine not save?

    python benchmarks/speed.py --shapes tiny --repeats 5
    python benchmarks/speed.py --shapes gpt2 --arms lora_gan two_models trl plain_rl --out docs/results/speed.jsonl
    python benchmarks/speed.py --out docs/results/speed.jsonl --report        # only the tables of --out

All arms (see arms.py) train the same base on the same prompts and response length. Each arm runs in its own process,
as a user would run it. After one warm-up step each, the arms take turns, one step at a time, for `--repeats` rounds.
The other arms wait, so other load on the machine affects all arms equally.

Each step is one line of the results file. An interrupted run continues where it stopped. Other code, another machine
or another number of threads starts a new set of lines in the same file.

A ratio compares two steps of one round: the peer's seconds over ours. The report gives the median, minimum and maximum
over rounds. Once per round, two more things are measured:

- how fast the machine multiplies this base's matrices and reads memory (machine.py; the best round counts);
- the time of one more step of each of our arms by phase (phases.py). The table gives the share of the time that matrix
  products alone would take, and for decoding the share that reading the weights alone would take.

The bases "gpt2" and "llama-0.5b" are made here with random weights, because the time of a step does not depend on the
values. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, OURS, SHAPES, STORIES, LoraGanArm, Shape, Workload, built, prepare, quiet
from machine import Rates, describe, measure, synchronize
from phases import PHASES, Work, measured, work

from lora_gan.storage.json_lines import append_line, open_lines

PEERS = tuple(name for name in ARMS if name not in OURS)
PHASED = (*OURS, "plain_rl")  # the arms that are this library
DEFAULT = tuple(name for name in ARMS if not name.endswith("_checkpointed"))
Line = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["tiny"], choices=list(SHAPES), help="default: tiny")
    parser.add_argument(
        "--arms", nargs="+", default=list(DEFAULT), choices=list(ARMS), help=f"default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of one step per arm (default 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps of each arm before the first round (default 1)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed.jsonl"), help="JSON Lines, one per step")
    add_shape_options(parser)
    given = parser.parse_args(arguments)
    if not given.report:
        quiet()
        if given.threads:
            torch.set_num_threads(given.threads)
        for name in given.shapes:
            run(shape_of(name, given), given.arms, given.repeats, given.warmup, given.out)
    if given.report and not given.out.is_file():
        raise SystemExit(f"{given.out} does not exist: run the benchmark first, or name another --out")
    print(report(open_lines(given.out)))


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Options of all benchmarks that run several shapes."""
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--stories", type=Path, default=STORIES, help="the folder of the stories260K model")
    parser.add_argument("--prompts", type=int, help="prompts per step; default: the shape's own")
    parser.add_argument("--group", type=int, help="responses per prompt; default: the shape's own")
    parser.add_argument("--tokens", type=int, help="tokens per response; default: the shape's own")
    parser.add_argument("--report", action="store_true", help="print the tables of the lines in --out; measure nothing")


def shape_of(name: str, given: argparse.Namespace) -> Shape:
    changes = {key: getattr(given, key) for key in ("prompts", "group", "tokens") if getattr(given, key)}
    if name == "stories260K":
        changes["base"] = str(given.stories)
    return dataclasses.replace(SHAPES[name], **changes)


# --- measuring --------------------------------------------------------------------------------------------------------


def run(shape: Shape, names: Iterable[str], repeats: int, warmup: int, out: Path) -> None:
    """Measure the steps of this shape that the results file lacks. Each step is written as soon as it is done."""
    with tempfile.TemporaryDirectory(prefix="lora-gan-benchmark-") as folder:
        try:
            workload = prepare(shape, Path(folder))
        except FileNotFoundError as missing:
            print(f"{shape.name} is left out: {missing}", file=sys.stderr)
            return
        where = describe(workload.device) | {"shape": plain(shape), "dtype": str(workload.dtype).rpartition(".")[2]}
        done = {_key(line) for line in open_lines(out)}
        due = [
            (repeat, name, kind)
            for repeat in range(repeats)
            for name in names
            for kind in ("step", "phases")
            if _key(where | {"kind": kind, "arm": name, "repeat": repeat}) not in done
            and (kind == "step" or name in PHASED)
        ]
        if not due:
            return
        with processes(dict.fromkeys(name for _, name, _ in due), workload) as arms:
            ours = [name for name in arms if name in PHASED]
            for _ in range(warmup):
                for ask in arms.values():
                    ask("step")
            for repeat, name, kind in due:
                rates: Line = where | {"kind": "rates", "repeat": repeat}
                if ours and _key(rates) not in done:
                    append_line(out, rates | arms[ours[0]]("rates"))
                    done.add(_key(rates))
                line: Line = where | {"kind": kind, "arm": name, "repeat": repeat} | arms[name](kind)
                append_line(out, line)
                print(f"{shape.name} {repeat + 1}/{repeats} {name} {kind}: {line['seconds']:.3f} s", flush=True)


@contextmanager
def processes(names: Iterable[str], workload: Workload) -> Iterator[dict[str, Callable[[str], Line]]]:
    """These arms, each built in its own process. A returned function takes the name of a task and returns its line."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    try:
        for name in names:
            pipes[name], theirs = context.Pipe()
            arguments = (theirs, name, workload, torch.get_num_threads())
            context.Process(target=_serve, args=arguments, daemon=True).start()
            theirs.close()

        def asking(pipe: Connection) -> Callable[[str], Line]:
            def ask(what: str) -> Line:
                pipe.send(what)
                return dict(pipe.recv())

            return ask

        for pipe in pipes.values():
            pipe.recv()  # the arm is built
        yield {name: asking(pipe) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            pipe.close()


def _serve(pipe: Connection, name: str, workload: Workload, threads: int) -> None:
    """The process of one arm. It ends when the other end of the pipe is closed."""
    quiet()
    torch.set_num_threads(threads)
    with built([name], workload) as arms:
        arm = arms[name]
        pipe.send("built")
        while True:
            try:
                what = pipe.recv()
            except EOFError:
                return
            line: Line = {}
            gc.collect()
            synchronize(workload.device)
            began = time.perf_counter()
            if what == "rates":
                pipe.send(rates_of(arm, workload).to_dict())
                continue
            if what == "step":
                wrote = arm.step()
                synchronize(workload.device)
            else:
                wrote, line["phases"] = measured(arm)
                line["work"] = {phase: dataclasses.asdict(its) for phase, its in work(arm).items()}
            pipe.send(line | {"seconds": time.perf_counter() - began, "wrote": dataclasses.asdict(wrote)})


def rates_of(arm: LoraGanArm, workload: Workload) -> Rates:
    """The machine's rates at the sizes of the matrix products in the phases of our arms."""
    needed = work(arm).values()
    lm = arm.gan.players.lm
    rows = {its.body_rows for its in needed}, {its.head_rows for its in needed if its.head}
    return measure(lm, *rows, workload.device)


def plain(shape: Shape) -> dict[str, Any]:
    """The shape as a dict, with the name of the base's folder instead of its full path."""
    return dataclasses.asdict(shape) | {"base": Path(shape.base).name}


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a measurement. A measurement with this key is made once."""
    setting = (line["code"], line["device"], line["threads"], line["torch"], tuple(line["shape"].items()))
    return (*setting, line["kind"], line.get("arm"), line.get("repeat"))


# --- reporting --------------------------------------------------------------------------------------------------------


def report(lines: list[Line]) -> str:
    """All tables, as Markdown: one section per shape, machine and version of the code."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(_key(line)[:5], []).append(line)
    return "\n\n".join(section(group) for group in groups.values())


def section(lines: list[Line]) -> str:
    first, shape = lines[0], lines[0]["shape"]
    steps = {line["arm"]: {} for line in lines if line["kind"] == "step"}
    for line in lines:
        if line["kind"] == "step":
            steps[line["arm"]][line["repeat"]] = line
    text = [
        f"## {shape['name']}: {shape['prompts']} prompts × {shape['group']} responses × {shape['tokens']} tokens",
        f"{first['device']}, {first['threads']} threads, {first['dtype']}; code {first['code']}, Python "
        f"{first['python']}, torch {first['torch']}, transformers {first['transformers']}, peft {first['peft']}, trl "
        f"{first['trl']}.",
        table(
            [
                "arm",
                "seconds per step: median (minimum–maximum)",
                "responses per second",
                "tokens per response",
                "rounds",
            ],
            [_step_row(name, list(rounds.values())) for name, rounds in in_order(steps)],
        ),
    ]
    if ratios := [_ratio_row(name, steps) for name in OURS if name in steps]:
        peers = [name for name in PEERS if name in steps]
        text += [
            "How many times as fast our arm is: the peer's seconds over ours, median (minimum–maximum) over rounds.",
            table(["arm", *(f"against {peer}" for peer in peers)], ratios),
        ]
    if measurements := [Rates.from_dict(line) for line in lines if line["kind"] == "rates"]:
        rates = Rates.best(measurements)
        text.append(_rates_text(rates))
        phased: dict[str, list[Line]] = {}
        for line in lines:
            if line["kind"] == "phases":
                phased.setdefault(line["arm"], []).append(line)
        text += [_phase_table(name, rounds, rates) for name, rounds in in_order(phased)]
    return "\n\n".join(text)


def in_order(by_arm: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, by_arm[name]) for name in ARMS if name in by_arm]


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _step_row(name: str, rounds: list[Line]) -> list[str]:
    seconds = [line["seconds"] for line in rounds]
    responses = {line["wrote"]["responses"] for line in rounds}
    lengths = {round(line["wrote"][name], 2) for line in rounds for name in ("mean", "least", "most")}
    return [
        name, spread(seconds, 3), f"{max(responses) / statistics.median(seconds):.2f}",
        " to ".join(f"{length:g}" for length in sorted({min(lengths), max(lengths)})), str(len(rounds)),
    ]  # fmt: skip


def _ratio_row(name: str, steps: dict[str, dict[int, Line]]) -> list[str]:
    row = [name]
    for peer in (peer for peer in PEERS if peer in steps):
        shared = [repeat for repeat in steps[name] if repeat in steps[peer]]
        ratios = [steps[peer][repeat]["seconds"] / steps[name][repeat]["seconds"] for repeat in shared]
        row.append(spread(ratios) if ratios else "–")
    return row


def _rates_text(rates: Rates) -> str:
    def listed(by_rows: dict[int, float]) -> str:
        return ", ".join(f"{rate / 1e9:.1f} at {rows} rows" for rows, rate in by_rows.items())

    return (
        f"Matrix products of this base on this machine in GFLOP/s, best of the rounds: layers {listed(rates.body)}; "
        f"vocabulary head {listed(rates.head)}. Memory: reading {rates.read / 1e9:.1f} GB/s, copying "
        f"{rates.copy / 1e9:.1f} GB/s (read and written)."
    )


def _phase_table(name: str, rounds: list[Line], rates: Rates) -> str:
    whole = statistics.median(line["seconds"] for line in rounds)
    rows, accounted = [], 0.0
    for phase in PHASES:
        seconds = statistics.median(line["phases"][phase] for line in rounds)
        accounted += seconds
        needed = rounds[0]["work"].get(phase)
        row = [phase, f"{seconds:.4f}", f"{seconds / whole:.0%}"]
        if needed is None or not seconds:
            rows.append([*row, "", "", ""])
            continue
        its = Work(**needed)
        read = f"{its.bytes / rates.bandwidth / seconds:.0%}" if its.bytes else ""
        rows.append([*row, f"{its.flops / 1e9:.2f}", f"{its.product_seconds(rates) / seconds:.0%}", read])
    products = sum(Work(**needed).product_seconds(rates) for needed in rounds[0]["work"].values())
    flops = sum(Work(**needed).flops for needed in rounds[0]["work"].values())
    share = f"{products / whole:.0%}"
    rows.append(["whole step", f"{whole:.4f}", f"{accounted / whole:.0%}", f"{flops / 1e9:.2f}", share, ""])
    heads = ["phase", "seconds", "of the step", "GFLOP", "of what matrix products allow", "of what bandwidth allows"]
    return f"{name}, by phase:\n\n" + table(heads, rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
