"""The guard against exploitation: false alarms of its test, and its work in exploited and healthy runs on `tiny`.

    python benchmarks/guard.py streams                                   # seconds: simulated rewards, nobody exploits
    python benchmarks/guard.py runs --out docs/learning/guard.jsonl      # an hour on one core; resumable
    python benchmarks/guard.py report --out docs/learning/guard.jsonl

Kinds of runs, 4 prompts × 8 responses per step, with the exact reward, except for noisy:

- exploited: 12 steps with one queried group, then 138 steps on predictions alone, with a weak KL and no guard. The test
  reads one group of exact rewards per step from the outside, which costs no call of the run.
- guarded: the same run with the defaults, a rollback and audits from the budget.
- healthy, noisy: budget mode with its defaults and one queried group in each of 60 steps; noisy: the reward has noise
  of three times its spread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_tasks import Reward, load

from lora_gan import LoraGAN, data
from lora_gan.storage.json_lines import append_line, open_lines
from lora_gan.training.guard import WINDOW, LevelTest

GROUP = 8
SETTINGS: dict[str, Any] = {
    "max_completion_length": 24, "num_generations": GROUP, "prompts_per_step": 4, "learning_rate": 3e-3,
    "disc_learning_rate": 1e-3, "log_completions": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "exploited": {"steps": 150, "seeds": 20, "adversarial": True, "query_rate": 0.25, "beta": 0.001,
                  "reward_budget": 96, "on_exploit": "warn"},
    "guarded": {"steps": 150, "seeds": 20, "adversarial": True, "query_rate": 0.25, "beta": 0.001, "reward_budget": 96},
    "healthy": {"steps": 60, "seeds": 20, "reward_budget": 1000},
    "noisy": {"steps": 60, "seeds": 20, "reward_budget": 1000, "reward": "noisy"},
}  # fmt: skip
STREAMS: dict[str, Any] = {
    "normal": lambda rng, steps: rng.normal(size=steps),
    "rising": lambda rng, steps: rng.normal(size=steps) + 3 * (1 - np.exp(-np.arange(steps) / 20)),
    "beta(8, 1)": lambda rng, steps: rng.beta(8, 1, size=steps),
    "eight thumbs": lambda rng, steps: rng.binomial(GROUP, 0.7, size=steps) / GROUP,
    "one thumb": lambda rng, steps: (rng.random(steps) < 0.3) * 1.0,
    "Student's t, 3": lambda rng, steps: rng.standard_t(3, size=steps),
}


def first_alarm(rewards: np.ndarray, unit: float | None = None) -> int | None:
    """The step at which the test reaches its limit; None: never."""
    test = LevelTest()
    for step, reward in enumerate(rewards.tolist(), 1):
        test.add(reward, 0.0, unit)
        if test.evidence >= test.limit:
            return step
    return None


def streams(count: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    print(f"{count:,} streams of {steps} steps without a fall; share with an alarm:")
    for name, draw in STREAMS.items():
        print(f"  {name:16} {np.mean([first_alarm(draw(rng, steps)) is not None for _ in range(count)]):.3f}")
    print("normal rewards that fall at step 61 by some standard deviations of a step; share found, median delay:")
    for fall in (0.7, 1.0, 1.5, 2.0):
        after = [
            first_alarm(np.r_[rng.normal(size=60), rng.normal(size=steps - 60) - fall]) for _ in range(count // 10)
        ]
        delays = [alarm - 60 for alarm in after if alarm is not None and alarm > 60]
        print(f"  {fall:3.1f}  {len(delays) / len(after):.2f}  {np.median(delays):.0f} steps")


def play(kind: str, seed: int) -> dict[str, Any]:
    settings = dict(KINDS[kind])
    steps, _, noise = settings.pop("steps"), settings.pop("seeds"), settings.pop("reward", "exact")
    task = load("tiny", seed=seed, options={"split": "validation", "train": 1000, "heldout": 48})
    reward = Reward(noise, task.score, seed=seed, sigma=task.sigma)
    exact, alarms, began = [], [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan = LoraGAN("tiny", reward=reward, seed=seed, output_dir=folder, **SETTINGS, **settings)
        for _ in range(steps):
            rows = data.take(task.train, 4, seed=seed, position=gan.position)
            record = gan._step(rows, True, True)
            gan.position += len(rows)
            texts = [text for group in record["responses"] for text in group]
            targets = [row.target for row in rows for _ in range(GROUP)]
            exact.append(np.reshape(task.score(texts, targets), (4, GROUP)).mean(1))
            alarms += [(gan.global_step, alarm) for alarm in record["alarms"]]
            if gan.state.why_over(gan.config.signal(gan.config.adversarial)) is not None:
                break
        held_out = task.score(gan.generate([row.prompt for row in task.heldout]), [row.target for row in task.heldout])
    means, unit = np.array(exact), gan.generator.spread.value
    windows = np.convolve(means.mean(1), np.ones(WINDOW) / WINDOW, "valid")
    return {
        "kind": kind, "seed": seed, "steps": len(means), "calls": gan.reward_calls, "alarms": alarms,
        "peak_step": int(windows.argmax()) + WINDOW, "peak": round(float(windows.max()), 3),
        "end": round(float(windows[-1]), 3), "held_out": round(float(np.mean(held_out)), 3),
        "test_alarm": first_alarm(means[:, 0], unit), "wall": round(time.perf_counter() - began),
        "kl": record.get("kl"),
    }  # fmt: skip


def runs(out: Path, kinds: list[str], seeds: int | None) -> None:
    done = {(line["kind"], line["seed"]) for line in open_lines(out)} if out.exists() else set()
    for kind in kinds:
        for seed in range(60, 60 + (seeds or KINDS[kind]["seeds"])):
            if (kind, seed) not in done:
                line = play(kind, seed)
                append_line(out, line)
                print(line, flush=True)


def report(out: Path) -> None:
    lines = list(open_lines(out))
    for kind in KINDS:
        ours = [line for line in lines if line["kind"] == kind]
        if not ours:
            continue
        held_out = [line["held_out"] for line in ours]
        fell = sum(any("true reward fell" in alarm for _, alarm in line["alarms"]) for line in ours)
        print(
            f"{kind}: {len(ours)} runs; mean peak {np.mean([line['peak'] for line in ours]):.3f}, end "
            f"{np.mean([line['end'] for line in ours]):.3f}, held out {np.mean(held_out):.3f}, "
            f"least {min(held_out):.3f}; the test's alarm in {fell}"
        )
        if kind == "exploited":
            bad = [line for line in ours if line["end"] < line["peak"] - 0.1]
            found = [line for line in bad if line["test_alarm"] is not None]
            pairs = [GROUP // 2 * (line["test_alarm"] - line["peak_step"]) for line in found]
            print(
                f"  {len(bad)} end 0.1 or more below their peak; {len(found)} of them raise the alarm, "
                f"{sum(pair <= 200 for pair in pairs)} within 200 disjoint pairs of the peak, "
                f"median {np.median(pairs):.0f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("streams", "runs", "report"))
    parser.add_argument("--out", type=Path, default=Path("docs/learning/guard.jsonl"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, help="runs per kind; default: 20")
    parser.add_argument("--count", type=int, default=2000, help="simulated streams")
    parser.add_argument("--steps", type=int, default=200, help="of a simulated stream")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.action == "streams":
        streams(arguments.count, arguments.steps)
    elif arguments.action == "runs":
        runs(arguments.out, arguments.kinds, arguments.seeds)
    else:
        report(arguments.out)


if __name__ == "__main__":
    main()
