"""Makes docs/learning from the results file of the learning benchmark: a page of tables, and plots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from learning_settings import expand, read_settings, results
from learning_stats import Interval, calls_to_reach, gap_closed, interval, over_seeds, saving, t_interval

BASELINE = "rloo"  # All other arms are compared with this one; without it, with the first arm.
LEVELS = (1000, 2000)  # Calls of the baseline. Others need fewer calls for the same level.
LEAST_GAP = 0.02  # Below this gain of the oracle, best_of is not reported.
SECOND = ("chrf", "rule")  # Metrics that the reward does not see, in percent and in [0, 1].
WORDS = {
    "reward": "true reward, held out, without noise",
    "chrf": "chrF, 0 to 100",
    "rule": "share of whole denials, 0 to 1",
    "exact": "exact match, share",
    "distinct_2": "distinct-2, share of word pairs",
    "length": "length, words",
    "kl": "KL to the base, nats per response",
}
DIGITS = {"chrf": 1, "length": 1, "kl": 2, "seconds": 0}


@dataclass(frozen=True)
class Cell:
    """All seeds of one arm at one reward and budget."""

    experiment: str
    task: str
    reward: str
    arm: str
    budget: int
    runs: tuple[Mapping[str, Any], ...]  # in order of seeds

    @property
    def name(self) -> tuple[str, str, str, int]:
        """Arms with the same value of this are compared with each other."""
        return self.experiment, self.task, self.reward, self.budget

    @property
    def labels(self) -> list[str]:
        """The marks that all seeds have, in order. The last mark of each run is called "last"."""
        shared = set.intersection(*({mark["at"] for mark in run["marks"][:-1]} for run in self.runs))
        return [mark["at"] for mark in self.runs[0]["marks"][:-1] if mark["at"] in shared] + ["last"]

    def marks(self, label: str) -> list[Mapping[str, Any]]:
        return [
            run["marks"][-1] if label == "last" else next(mark for mark in run["marks"] if mark["at"] == label)
            for run in self.runs
        ]

    def has(self, metric: str) -> bool:
        return metric in self.runs[0]["marks"][-1]

    def values(self, metric: str, label: str = "last") -> np.ndarray:
        """One number per seed and prompt, [S, P]."""
        return np.array([mark[metric] for mark in self.marks(label)], dtype=float)

    def scalar(self, metric: str, label: str = "last") -> list[float | None]:
        return [mark.get(metric) for mark in self.marks(label)]

    def mean_over_seeds(self, metric: str, label: str) -> float:
        return float(np.mean([mark[metric] for mark in self.marks(label)]))

    def only(self, seeds: Sequence[int]) -> Cell:
        runs = tuple(run for run in self.runs if run["seed"] in seeds)
        return Cell(self.experiment, self.task, self.reward, self.arm, self.budget, runs)

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]


def cells(lines: Iterable[Mapping[str, Any]], only: str = "", seeds: Sequence[int] | None = None) -> list[Cell]:
    grouped: dict[tuple[str, str, str, str, int], list[Mapping[str, Any]]] = {}
    for line in results(lines).values():
        if re.search(only, line["key"]) and (seeds is None or line["seed"] in seeds):
            name = (line["experiment"], line["task"], line["reward"], line["arm"], line["budget"])
            grouped.setdefault(name, []).append(line)
    return [Cell(*name, tuple(sorted(runs, key=lambda run: run["seed"]))) for name, runs in grouped.items()]


def paired(cell: Cell, baseline: Cell, metric: str) -> Interval | None:
    """The arm minus the baseline, on the seeds and prompts that both have. None if they share none."""
    shared = [seed for seed in cell.seeds if seed in baseline.seeds]
    if not shared or not (cell.has(metric) and baseline.has(metric)):
        return None
    ours, theirs = cell.only(shared).values(metric), baseline.only(shared).values(metric)
    return interval(ours - theirs) if ours.shape == theirs.shape else None  # else the two used different prompts


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(
    lines: Iterable[Mapping[str, Any]],
    docs: Path,
    only: str,
    seeds: Sequence[int] | None,
    settings: Path,
    out: Path,
) -> list[Path]:
    """Write table.md and the plots. Returns the files."""
    docs.mkdir(parents=True, exist_ok=True)
    every = in_order(cells(lines, only, seeds), settings)
    plots = draw_plots(every, docs)
    page = docs / "table.md"
    page.write_text(table(every, plots, settings, out), encoding="utf-8")
    return [page, *plots.values()]


def in_order(every: list[Cell], settings: Path) -> list[Cell]:
    """The cells in the order of the settings file. Cells that it no longer names come last."""
    planned = expand(read_settings(settings), seeds=[0]) if settings.exists() else []
    rank = {(run.experiment, run.reward, run.budget, run.arm): place for place, run in enumerate(planned)}
    return sorted(every, key=lambda c: rank.get((c.experiment, c.reward, c.budget, c.arm), len(rank)))


def table(every: list[Cell], plots: Mapping[str, Path], settings: Path, out: Path) -> str:
    runs = [run for cell in every for run in cell.runs]
    seeds = sorted({run["seed"] for run in runs})
    parts = [
        "# Learning: every arm against RLOO tuned for the same budget",
        f"Made by `python benchmarks/learning.py report` from `{here(out)}`, which\n"
        f"`python benchmarks/learning.py run --settings {here(settings)} --out {here(out)}` made:\n"
        f"{len(runs)} runs, seeds {', '.join(map(str, seeds))}.",
        "Each held-out prompt gets one response at temperature 1. The true reward is measured without noise.\n"
        "Brackets are 95 % bootstrap intervals over seeds and prompts. For metrics with one number per run they are\n"
        "intervals over seeds. Differences are paired by seed and prompt. Corr. within: Spearman's correlation of\n"
        "predicted reward and the reward that the players saw, within groups, fresh, over the last 10 steps. Seconds\n"
        "are seconds of training on one core, without evaluations.",
    ]
    for name in dict.fromkeys(cell.name for cell in every):
        parts += section([cell for cell in every if cell.name == name])
    parts += [part for part in (savings(every), best_of(every), sweeps(every)) if part]
    parts += [f"![{title}]({file.name})" for title, file in plots.items()]
    return "\n\n".join(parts) + "\n"


def here(path: Path) -> str:
    """The path relative to the working folder."""
    return (path.resolve().relative_to(Path.cwd()) if path.resolve().is_relative_to(Path.cwd()) else path).as_posix()


def is_baseline(cell: Cell) -> bool:
    """Whether the arm is RLOO, in one of the settings of its tuning."""
    return cell.arm == BASELINE or cell.arm.startswith(f"{BASELINE}-")


def section(arms: list[Cell]) -> list[str]:
    """One experiment at one reward and budget."""
    first = arms[0]
    second = next(name for name in SECOND if first.has(name))
    metrics = ["reward", second] + ["exact"] * first.has("exact") + ["length"]
    # The others are compared with the RLOO setting that ended best.
    tuned = [cell for cell in arms if is_baseline(cell)]
    baseline = max(tuned, key=lambda cell: cell.values("reward").mean(), default=first)
    head = ["arm", "seeds", "reward", f"− {baseline.arm}", WORDS[second].split(",")[0], f"− {baseline.arm}"]
    head += ["exact"] * first.has("exact") + ["words", "distinct-2", "KL", "corr. within", "alarms", "calls", "s"]
    rows = []
    for cell in arms:
        judged = {name: interval(cell.values(name)).text(DIGITS.get(name, 3)) for name in metrics}
        row = [cell.arm, str(len(cell.runs))]
        for name in metrics:
            row.append(judged[name])
            if name in ("reward", second):
                against = paired(cell, baseline, name) if cell is not baseline else None
                row.append(against.text(DIGITS.get(name, 3)) if against else "")
        for name, digits in (("distinct_2", 3), ("kl", 2), ("rank_correlation_within", 2)):
            its = over_seeds(cell.scalar(name))
            row.append(its.text(digits) if its else "–")
        row.append(f"{cell.mean_over_seeds('alarms', 'last'):.1f}")
        row.append(f"{cell.mean_over_seeds('calls', 'last'):,.0f}")
        row.append(f"{cell.mean_over_seeds('seconds', 'last'):.0f}")
        rows.append(row)
    start = Cell(*first.name[:3], "before", first.budget, baseline.runs)
    if start.runs[0]["marks"][0]["step"] == 0:
        label = start.runs[0]["marks"][0]["at"]
        row = ["(before)", ""]
        for name in metrics:
            row.append(interval(start.values(name, label)).text(DIGITS.get(name, 3)))
            row += [""] if name in ("reward", second) else []
        row += [f"{start.mean_over_seeds('distinct_2', label):.3f}", *[""] * 5]
        rows.insert(0, row)
    title = f"## {first.experiment}: {first.task}, {first.reward} reward, {first.budget:,} calls"
    return [title, markdown(head, rows)]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def savings(every: list[Cell]) -> str:
    """For noisy rewards: how many times fewer calls than the baseline an arm needs for the same level."""
    rows = []
    noisy = [cell for cell in every if cell.reward != "exact"]
    for name in dict.fromkeys(cell.name[:3] for cell in noisy):
        arms = [cell for cell in noisy if cell.name[:3] == name]
        for level_calls in LEVELS:
            level = baseline_at(arms, level_calls)
            if level is None:
                continue
            whose, level_SP = level
            for cell in arms:
                if cell.runs[0]["calls"] == 0:
                    continue  # it queries no reward
                calls_M = np.array([cell.mean_over_seeds("calls", label) for label in cell.labels])
                marks_MSP = np.stack([cell.values("reward", label) for label in cell.labels])
                at = calls_to_reach(calls_M, marks_MSP.mean((1, 2)), float(level_SP.mean()))
                ratio = saving(calls_M, marks_MSP, level_calls, level_SP)
                rows.append(
                    [
                        *name, f"{level_calls:,} ({level_SP.mean():.3f}, {whose})", f"{cell.arm}, {cell.budget:,}",
                        f"{at:,.0f}" if np.isfinite(at) else "not reached", ratio.text(2),
                    ]
                )  # fmt: skip
    if not rows:
        return ""
    head = [
        "experiment",
        "task",
        "reward",
        f"level of {BASELINE} at calls",
        "arm, budget",
        "calls to reach it",
        "ratio",
    ]
    note = (
        f"The level is the mean held-out reward of {BASELINE} at that many calls, with its best setting there.\n"
        "Calls to reach it: the first point at which the line through an arm's marks reaches the level. Ratio: the\n"
        "level's calls divided by these calls. A bootstrap draw that does not reach the level counts as 0."
    )
    return f"## Calls to reach the level of {BASELINE}\n\n{note}\n\n{markdown(head, rows)}"


def baseline_at(arms: list[Cell], calls: int) -> tuple[str, np.ndarray] | None:
    """The baseline's rewards at that many calls, [S, P], with the name of its best setting there.

    Other arms are thus never compared with a setting that was tuned for another budget.
    """
    found = []
    for cell in arms:
        if not is_baseline(cell):
            continue
        for label in cell.labels:
            if abs(cell.mean_over_seeds("calls", label) - calls) <= 0.02 * calls:
                found.append((cell.arm, cell.values("reward", label)))
    return max(found, key=lambda pair: pair[1].mean(), default=None)


def best_of(every: list[Cell]) -> str:
    rows = []
    for cell in every:
        runs = [run["best_of"] for run in cell.runs if run.get("best_of")]
        if not runs:
            continue
        first, picked, oracle = (
            np.array([run[name] for run in runs], dtype=float) for name in ("first", "picked", "oracle")
        )
        gap = float((oracle - first).mean())
        share = gap_closed(first, picked, oracle).text(2) if gap >= LEAST_GAP else f"gap under {LEAST_GAP}"
        rows.append(
            [
                cell.experiment, cell.task, cell.reward, f"{cell.budget:,}", cell.arm, str(len(runs)),
                *(interval(values).text() for values in (first, picked, oracle)), share,
            ]
        )  # fmt: skip
    if not rows:
        return ""
    head = ["experiment", "task", "reward", "budget", "arm", "seeds", "first", "discriminator's pick", "oracle's pick"]
    note = (
        "Measured at half of the budget: the true reward of the first of 8 samples, of the pick, and of the best.\n"
        "The pick is the sample with the highest predicted reward."
    )
    return f"## Best of 8 by the discriminator\n\n{note}\n\n{markdown([*head, 'share of the gap closed'], rows)}"


def sweeps(every: list[Cell]) -> str:
    rows = []
    for cell in every:
        for points in sweep_of(cell):
            second = next(name for name in SECOND if name in points[0])
            values = {name: np.array([point[name] for point in points], dtype=float) for name in ("reward", second)}
            distinct = over_seeds([point["distinct_2"] for point in points])
            rows.append(
                [
                    cell.experiment, cell.task, cell.reward, f"{cell.budget:,}", cell.arm,
                    f"{points[0]['temperature']:g}", interval(values["reward"]).text(),
                    interval(values[second]).text(DIGITS.get(second, 3)), distinct.text() if distinct else "–",
                ]
            )  # fmt: skip
    if not rows:
        return ""
    head = ["experiment", "task", "reward", "budget", "arm", "temperature", "reward", "second metric", "distinct-2"]
    return f"## Quality against diversity\n\n{markdown(head, rows)}"


def sweep_of(cell: Cell) -> list[list[Mapping[str, Any]]]:
    """The points of a sweep. Each point is a list over seeds."""
    runs = [run["sweep"] for run in cell.runs if run.get("sweep")]
    return [list(points) for points in zip(*runs, strict=True)] if runs else []


# --- plots ------------------------------------------------------------------------------------------------------------


def draw_plots(every: list[Cell], docs: Path) -> dict[str, Path]:
    """Draw all plots that have data. Returns title -> file."""
    plots: dict[str, Path] = {}
    from matplotlib import colormaps

    palette = colormaps["tab20"].colors  # twenty colours, so that no two arms of one plot look equal
    colours = {arm: palette[i % 20] for i, arm in enumerate(dict.fromkeys(cell.arm for cell in every))}
    for name in dict.fromkeys((cell.experiment, cell.task, cell.budget) for cell in every):
        arms = [cell for cell in every if (cell.experiment, cell.task, cell.budget) == name]
        experiment, task, budget = name
        for against, unit in (("calls", "calls of the true reward"), ("seconds", "training time on one core, s")):
            title = f"{experiment} ({task}), budget {budget:,} calls: against {unit.partition(',')[0]}"
            file = docs / f"{experiment}-{budget}-{against}.png"
            plots[title] = curves(arms, against, unit, title, file, colours)
        title = f"{experiment} ({task}), budget {budget:,} calls: predicted and true reward over training"
        trained = [cell for cell in arms if any(run["options"]["train_disc"] for run in cell.runs)]
        trained = [
            cell for cell in trained if cell.runs[0]["curve"] and cell.runs[0]["options"]["kind"] in ("rl", "null")
        ]
        if trained:
            plots[title] = predicted(trained, title, docs / f"{experiment}-{budget}-predicted.png")
    for experiment in dict.fromkeys(cell.experiment for cell in every):
        swept = [cell for cell in every if cell.experiment == experiment and sweep_of(cell)]
        if swept:
            title = f"{experiment}: quality against diversity over sampling temperatures"
            plots[title] = quality(swept, title, docs / f"{experiment}-sweep.png", colours)
    return plots


def figure_of(rows: int, columns: int, title: str, width: float = 4.6, height: float = 3.4) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure  # the object interface has no global state and needs no display

    figure = Figure(figsize=(max(7.0, width * columns), height * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend(figure: Any, panels: np.ndarray) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    entries = {
        label: handle
        for axes in panels.ravel()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, len(entries)), frameon=False
    )


def curves(arms: list[Cell], against: str, unit: str, title: str, file: Path, colours: Mapping[str, Any]) -> Path:
    """Reward and second metric at the marks, one column per reward. Bands are intervals over seeds and prompts."""
    rewards = list(dict.fromkeys(cell.reward for cell in arms))
    second = next(name for name in SECOND if arms[0].has(name))
    figure, panels = figure_of(2, len(rewards), title)
    for column, reward in enumerate(rewards):
        for row, metric in enumerate(("reward", second)):
            axes = panels[row, column]
            for cell in (cell for cell in arms if cell.reward == reward):
                at = [interval(cell.values(metric, label), 1000) for label in cell.labels]
                if against == "calls" and cell.runs[0]["calls"] == 0:
                    axes.axhline(at[-1].mean, color=colours[cell.arm], linestyle="--", label=f"{cell.arm} (no calls)")
                    continue
                x = [cell.mean_over_seeds(against, label) for label in cell.labels]
                low, high = [i.low for i in at], [i.high for i in at]
                axes.plot(x, [i.mean for i in at], marker="o", markersize=4, color=colours[cell.arm], label=cell.arm)
                axes.fill_between(x, low, high, color=colours[cell.arm], alpha=0.12, linewidth=0)
            axes.set(xlabel=unit, ylabel=WORDS[metric], title=f"{reward} reward" if row == 0 else "")
            axes.grid(alpha=0.3)
    legend(figure, panels)
    figure.savefig(file, dpi=110)
    return file


def predicted(arms: list[Cell], title: str, file: Path) -> Path:
    """Predicted and true reward of each step's responses, and the true reward of held-out responses."""
    rewards = list(dict.fromkeys(cell.reward for cell in arms))
    names = list(dict.fromkeys(cell.arm for cell in arms))
    figure, panels = figure_of(len(rewards), len(names), title, width=3.2, height=2.7)
    for cell in arms:
        axes = panels[rewards.index(cell.reward), names.index(cell.arm)]
        for name, label, style in (
            ("pred_reward_mean", "predicted, fresh", "-"),
            ("reward_mean", "true, as queried", "-"),
        ):
            axes.plot(*curve_of(cell, name), style, label=label, linewidth=1.5)
        held = [float(cell.values("reward", label).mean()) for label in cell.labels]
        steps = [cell.mean_over_seeds("step", label) for label in cell.labels]
        axes.plot(steps, held, "k.--", label="true, held out, without noise", linewidth=1)
        axes.set(xlabel="step", ylabel="reward", title=f"{cell.arm}, {cell.reward} reward")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    for axes in panels.ravel():
        if not axes.lines:
            axes.axis("off")
    legend(figure, panels)
    figure.savefig(file, dpi=110)
    return file


def curve_of(cell: Cell, name: str) -> tuple[list[int], list[float]]:
    """A metric of the steps, averaged over the seeds that have the metric at that step."""
    at: dict[int, list[float]] = {}
    for run in cell.runs:
        for point in run["curve"]:
            if point[name] is not None:
                at.setdefault(point["step"], []).append(point[name])
    steps = sorted(at)
    return steps, [float(np.mean(at[step])) for step in steps]


def quality(arms: list[Cell], title: str, file: Path, colours: Mapping[str, Any]) -> Path:
    """Reward and second metric against distinct-2: one line per arm, one point per temperature."""
    groups = list(dict.fromkeys((cell.reward, cell.budget) for cell in arms))
    second = next(name for name in SECOND if arms[0].has(name))
    figure, panels = figure_of(2, len(groups), title)
    for column, group in enumerate(groups):
        for row, metric in enumerate(("reward", second)):
            axes = panels[row, column]
            for cell in (cell for cell in arms if (cell.reward, cell.budget) == group):
                points = sweep_of(cell)
                x = [float(np.mean([point["distinct_2"] for point in seeds])) for seeds in points]
                y = [float(np.mean([point[metric] for point in seeds])) for seeds in points]
                axes.plot(x, y, marker="o", markersize=4, color=colours[cell.arm], label=cell.arm)
                for point, here in zip(points, zip(x, y, strict=True), strict=True):
                    label = f"{point[0]['temperature']:g}"
                    axes.annotate(label, here, textcoords="offset points", xytext=(4, 4), fontsize=7)
            axes.set(xlabel=WORDS["distinct_2"], ylabel=WORDS[metric])
            axes.set(title=f"{group[0]} reward, {group[1]:,} calls; numbers: temperature" if row == 0 else "")
            axes.title.set_fontsize(10)
            axes.grid(alpha=0.3)
    legend(figure, panels)
    figure.savefig(file, dpi=110)
    return file


# --- each seed --------------------------------------------------------------------------------------------------------


def plot_seeds(lines: Iterable[Mapping[str, Any]], file: Path, only: str = "") -> None:
    """Plot each seed's last reward by arm, with the mean and its 95 % t interval; one panel per reward and budget."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, int], dict[str, list[float]]] = {}
    for key, line in results(lines).items():
        if re.search(only, key):
            arms = panels.setdefault((line["task"], line["reward"], line["budget"]), {})
            arms.setdefault(line["arm"], []).append(float(np.mean(line["marks"][-1]["reward"])))
    colors = {arm: f"C{i}" for i, arm in enumerate(sorted({arm for arms in panels.values() for arm in arms}))}
    figure = Figure(figsize=(4.2 * len(panels), 3.4))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, ((task, reward, budget), arms) in zip(axes[0], panels.items(), strict=True):
        for place, (arm, values) in enumerate(sorted(arms.items())):
            color = colors[arm]
            spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0.0]
            axis.plot(place + np.asarray(spread), sorted(values), "o", markersize=4, alpha=0.6, color=color)
            low, high = t_interval(values)
            axis.plot([place + 0.28] * 2, [low, high], color="black")
            axis.plot(place + 0.28, np.mean(values), "_", color="black", markersize=14, markeredgewidth=2)
        axis.set_xticks(range(len(arms)), [f"{arm}\n{len(values)} seeds" for arm, values in sorted(arms.items())])
        axis.set_title(f"{task}, {reward} reward, {budget} calls", fontsize=10)
        axis.set_xlim(-0.5, len(arms) - 0.4)
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("true reward, held out, without noise")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
