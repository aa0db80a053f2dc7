"""Where the discriminator pays: arms compared with RLOO, tuned for the same number of true-reward calls.

    python benchmarks/learning.py run --settings benchmarks/learning.json --out docs/learning/results.jsonl --workers 2
    python benchmarks/learning.py report --settings benchmarks/learning.json --out docs/learning/results.jsonl \\
        --docs docs/learning
    python benchmarks/learning.py list --settings benchmarks/learning.json --out docs/learning/results.jsonl
    python benchmarks/learning.py bound --out docs/learning/tiny.jsonl --arms mixed rloo
    python benchmarks/learning.py seeds --out docs/learning/tiny.jsonl --only never-worse --png docs/learning/seeds.png

Each run is its own process and writes one line to --out. A run with a line there is not run again, unless its settings
have changed. An interrupted benchmark therefore continues. `report` makes table.md and the plots from this file only.

- learning_settings.py: the format of the settings file
- learning_tasks.py: prompts, rewards and metrics of each task
- learning_run.py: the measurements of a run

The task e2e needs --model (the story model stories260K) and --data (E2E's rows as JSON Lines).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from learning_settings import Planned, expand, read_settings, results
from learning_stats import paired_bound

from lora_gan.storage.json_lines import append_line, open_lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".json"))
    shared.add_argument("--out", type=Path, default=Path("docs/learning/results.jsonl"), help="JSON Lines, one per run")
    shared.add_argument("--only", default="", metavar="REGEX", help="only runs with a key that matches")
    shared.add_argument("--seeds", type=int, nargs="+", help="seeds that replace the settings file's")
    runs = commands.add_parser("run", parents=[shared], help="make the runs that --out lacks")
    runs.add_argument("--workers", type=int, default=1, help="parallel processes; each takes one core")
    runs.add_argument("--model", help="for e2e: folder or hub id of the story model")
    runs.add_argument("--data", type=Path, help="for e2e: JSON Lines with prompt and target")
    runs.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of e2e's warm-up")
    runs.add_argument("--warm-up-steps", type=int, default=1000, help="for e2e")
    commands.add_parser("list", parents=[shared], help="list every run, and whether it is done")
    report = commands.add_parser("report", parents=[shared], help="make the table and plots from --out")
    report.add_argument("--docs", type=Path, default=Path("docs/learning"))
    bound = commands.add_parser("bound", parents=[shared], help="paired difference of two arms, with its lower bound")
    bound.add_argument("--arms", nargs=2, required=True, metavar=("ARM", "BASELINE"))
    seeds = commands.add_parser("seeds", parents=[shared], help="plot each seed's last reward, by arm")
    seeds.add_argument("--png", type=Path, required=True)
    one = commands.add_parser("one", help="one run: each process of `run` calls this")
    one.add_argument("plan", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "one":
        return one_run(given.plan)
    if given.command == "report":
        from learning_report import write_report

        for file in write_report(open_lines(given.out), given.docs, given.only, given.seeds, given.settings, given.out):
            print(file)
        return 0
    if given.command == "seeds":
        from learning_report import plot_seeds

        plot_seeds(open_lines(given.out), given.png, given.only)
        return 0
    if given.command == "bound":
        print_bounds(open_lines(given.out), given.only, *given.arms)
        return 0
    planned = [run for run in expand(read_settings(given.settings), given.seeds) if re.search(given.only, run.key)]
    done = results(open_lines(given.out)) if given.command == "run" or given.out.exists() else {}
    if given.command == "list":
        for run in planned:
            line = done.get(run.key)
            print(f"{'missing' if line is None else 'done' if line['hash'] == run.hash else 'changed':8} {run.key}")
        return 0
    return run_missing(planned, done, given)


def print_bounds(lines: Iterable[Mapping[str, Any]], only: str, arm: str, baseline: str) -> None:
    """Print the difference of two arms over paired seeds, for each experiment and each mark that both have."""
    rewards: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for key, line in results(lines).items():
        if line["arm"] in (arm, baseline) and re.search(only, key):
            for mark in (*line["marks"], {**line["marks"][-1], "at": "last"}):
                place = (line["experiment"], line["task"], line["reward"], line["budget"], mark["at"])
                arms = rewards.setdefault(place, {arm: {}, baseline: {}})
                arms[line["arm"]][line["seed"]] = sum(mark["reward"]) / len(mark["reward"])
    for place, arms in rewards.items():
        seeds = sorted(set(arms[arm]) & set(arms[baseline]))
        if len(seeds) > 1:
            differences = [arms[arm][seed] - arms[baseline][seed] for seed in seeds]
            mean, lower = paired_bound(differences)
            print(
                f"{'/'.join(map(str, place[:4]))} at {place[4]}: {arm} {mean_of(arms[arm], seeds):.3f}, {baseline} "
                f"{mean_of(arms[baseline], seeds):.3f}, difference {mean:+.3f}, 95 % bound {lower:+.3f}, least "
                f"{min(differences):+.3f}, {len(seeds)} seeds"
            )


def mean_of(values: Mapping[int, float], seeds: Sequence[int]) -> float:
    return sum(values[seed] for seed in seeds) / len(seeds)


def run_missing(planned: Sequence[Planned], done: Mapping[str, Any], given: argparse.Namespace) -> int:
    """Make the runs that --out lacks, `workers` in parallel. Returns 1 if a run failed, else 0."""
    missing = [run for run in planned if run.key not in done or done[run.key]["hash"] != run.hash]
    alike = {line["hash"]: line for line in done.values()}
    for run in [run for run in missing if run.hash in alike]:  # two experiments may share an arm, which runs only once
        append_line(given.out, {**alike[run.hash], **run.to_dict()})
        missing.remove(run)
    print(f"{len(planned)} runs, {len(planned) - len(missing)} of them done", flush=True)
    e2e = None
    if any(run.task == "e2e" for run in missing):
        if given.model and given.data and Path(given.data).exists():
            e2e = in_process({"prepare_e2e": [given.model, str(given.data), str(given.runs), given.warm_up_steps]})
        else:
            print("e2e is skipped: it needs --model and --data", flush=True)
            missing = [run for run in missing if run.task != "e2e"]
    walls = [(line["task"], line["budget"], line["arm"], line["wall"]) for line in done.values()]
    waiting, active, failed, finished = list(missing), [], [], 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the finally below
    try:
        while waiting or active:
            while waiting and len(active) < given.workers:
                active.append(Child(waiting.pop(0), e2e))
            time.sleep(0.1)
            for child in [child for child in active if child.process.poll() is not None]:
                active.remove(child)
                try:
                    result = child.result()
                except Failed as failure:
                    failed.append(child.run.key)
                    print(f"FAILED {child.run.key}\n{failure}", flush=True)
                    continue
                append_line(given.out, result)
                with given.out.open("rb") as file:
                    os.fsync(file.fileno())
                finished += 1
                walls.append((child.run.task, child.run.budget, child.run.arm, result["wall"]))
                left = estimate(walls, [*waiting, *(other.run for other in active)]) / given.workers
                reward = sum(result["marks"][-1]["reward"]) / len(result["marks"][-1]["reward"])
                print(
                    f"{finished + len(failed)}/{len(missing)} {child.run.key}: reward {reward:.3f} at "
                    f"{result['calls']:,} calls, {result['wall']:.0f} s; about {left / 60:.0f} min left",
                    flush=True,
                )
    finally:
        for child in active:
            child.stop()
    for key in failed:
        print(f"failed: {key}")
    return int(bool(failed))


def estimate(walls: Sequence[tuple[str, int, str, float]], left: Sequence[Planned]) -> float:
    """Seconds of the remaining runs in one process, estimated from the most similar finished runs."""

    def like(run: Planned) -> float:
        for same in (
            lambda task, budget, arm: (task, budget, arm) == (run.task, run.budget, run.arm),
            lambda task, budget, arm: (task, budget) == (run.task, run.budget),
            lambda task, budget, arm: True,
        ):
            alike = [wall for task, budget, arm, wall in walls if same(task, budget, arm)]
            if alike:
                return sum(alike) / len(alike)
        return 0.0

    return sum(map(like, left))


# --- processes --------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """The process of a run ended without a result."""


class Child:
    """A run in its own process: no run affects the next one, and a crash ends only one run."""

    def __init__(self, run: Planned | None, e2e: Any = None, work: dict[str, Any] | None = None) -> None:
        self.run = run
        self.folder = tempfile.TemporaryDirectory()
        plan = Path(self.folder.name) / "plan.json"
        plan.write_text(
            json.dumps({"parent": os.getpid()} | (work or {"run": vars(run), "e2e": e2e})), encoding="utf-8"
        )
        self.errors = Path(self.folder.name) / "errors.txt"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "one", str(plan)], stdout=errors, stderr=errors, stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip

    def result(self) -> Any:
        code = self.process.wait()
        try:
            if code != 0:
                tail = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
                raise Failed("\n".join([*(f"    {line}" for line in tail), f"    exit code {code}"]))
            return json.loads((Path(self.folder.name) / "result.json").read_text(encoding="utf-8"))
        finally:
            self.folder.cleanup()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait()
        self.folder.cleanup()


def in_process(work: dict[str, Any]) -> Any:
    child = Child(None, work=work)
    try:
        return child.result()
    finally:
        child.stop()


def one_run(plan: Path) -> int:
    """The work of a child process: execute the plan, and write result.json next to the plan."""
    work = json.loads(plan.read_text(encoding="utf-8"))
    threading.Thread(target=end_with, args=(work["parent"],), daemon=True).start()
    if "prepare_e2e" in work:
        from learning_tasks import prepare_e2e

        model, rows, runs, steps = work["prepare_e2e"]
        result: Any = prepare_e2e(model, Path(rows), Path(runs), steps=steps)
    else:
        from learning_run import run

        result = run(Planned(**work["run"]), work["e2e"])
    plan.with_name("result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


def end_with(parent: int) -> None:
    """End this process when its parent is gone. Otherwise it would continue next to the run that replaces it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
