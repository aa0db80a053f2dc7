"""What did each change gain? One training step with the package of several commits, side by side.

    python benchmarks/changes.py --revisions e230b2b HEAD --shape gpt2 --out docs/results/changes.jsonl

Each revision's package is extracted from git into its own folder and runs in its own process. The arms and shapes are
the current ones (arms.py). The processes take turns, one step at a time, for `--repeats` rounds; the others wait. The
table gives median seconds, and the ratio to the first revision within each round: median, minimum and maximum. Each
step is one line of the results file. `--words` names the revisions in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from arms import ARMS, SHAPES, STORIES, prepare, quiet
from speed import shape_of, spread, table

from lora_gan.storage.json_lines import append_line

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revisions", nargs="+", required=True, help="commits; all are compared with the first one")
    parser.add_argument("--words", nargs="+", help="what each revision changed, for the table")
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--arm", default="lora_gan_fresh", choices=list(ARMS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("changes.jsonl"), help="JSON Lines, one per step")
    parser.add_argument("--stories", type=Path, default=STORIES, help="the folder of the stories260K model")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # starts the process of one revision
    given = parser.parse_args(namespace=argparse.Namespace(prompts=None, group=None, tokens=None))
    quiet()
    if given.serve:
        serve(given)
        return
    words = given.words or given.revisions
    if len(words) != len(given.revisions):
        raise SystemExit(f"{len(given.revisions)} revisions and {len(words)} words: give one text per revision")
    with tempfile.TemporaryDirectory(prefix="lora-gan-changes-") as folder:
        runs = [start(revision, Path(folder) / str(i), given) for i, revision in enumerate(given.revisions)]
        seconds: list[list[float]] = [[] for _ in runs]
        for repeat in range(-1, given.repeats):  # the first round is the warm-up
            for i, (revision, run) in enumerate(zip(given.revisions, runs, strict=True)):
                taken = ask(run)
                if repeat >= 0:
                    seconds[i].append(taken)
                    line = {"shape": given.shape, "arm": given.arm, "revision": revision, "repeat": repeat}
                    append_line(given.out, line | {"seconds": taken})
        for run in runs:
            run.stdin.close()
            run.wait()
    rows = [
        [word, revision, f"{statistics.median(its):.3f}", spread([b / a for a, b in zip(seconds[0], its, strict=True)])]
        for word, revision, its in zip(words, given.revisions, seconds, strict=True)
    ]
    print(f"{given.shape}, {given.arm}, {given.repeats} rounds:\n")
    print(table(["", "commit", "seconds per step", "ratio to the first, median (minimum–maximum)"], rows))


def start(revision: str, folder: Path, given: argparse.Namespace) -> subprocess.Popen[str]:
    """A process that runs one step of that revision's package per line of input, and prints its seconds."""
    archive = subprocess.run(["git", "archive", revision, "src"], cwd=HERE.parent, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    command = [sys.executable, __file__, "--serve", str(folder), "--shape", given.shape, "--arm", given.arm]
    command += ["--revisions", revision, "--stories", str(given.stories)]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(folder / "src")},
    )  # fmt: skip
    ask(run)  # the arm is built
    return run


def ask(run: subprocess.Popen[str]) -> float:
    assert run.stdin is not None and run.stdout is not None
    run.stdin.write("step\n")
    run.stdin.flush()
    for line in run.stdout:  # skip the lines that libraries print
        if line.startswith("{"):
            return float(json.loads(line)["seconds"])
    raise SystemExit("a revision's process ended: its package may be too old for the current arms")


def serve(given: argparse.Namespace) -> None:
    import time

    import lora_gan

    assert Path(lora_gan.__file__).is_relative_to(given.serve), "the package of another revision"
    with tempfile.TemporaryDirectory() as folder:
        arm = ARMS[given.arm](prepare(shape_of(given.shape, given), Path(folder)))
        for i, _ in enumerate(sys.stdin):
            began = time.perf_counter()
            if i:
                arm.step()
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
