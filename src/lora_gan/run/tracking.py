"""The record that a step returns, and the values for metrics.jsonl, completions.jsonl and trackers.

# P = prompts, K = responses per prompt, B = P·K

`step()` returns a record with this library's own names (`step_record`). Logs use TRL's name and definition for each
metric that TRL has (`summary`). docs/reference/metrics.md lists every name.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..data import Row
from ..rewards.notes import Notes, mean
from ..training.experience import Experience
from ..training.fresh_metrics import fresh_metrics
from ..wording import did_you_mean

#: The project of every run, in trackers that have projects.
PROJECT = "lora-gan"


def step_record(
    rows: list[Row],
    experience: Experience | None,
    gen: dict[str, Any],
    disc: dict[str, Any],
    *,
    step: int,
    reward_calls: int,
    eos_ids: Sequence[int],
    single: bool,
    alarms: Sequence[str] = (),
    reward_failures: int = 0,
) -> dict[str, Any]:
    """The dict that step() returns: six keys in a fixed order, all K responses, then metrics, as plain Python values.

    `step` and `reward_calls` include this step. Values that rewards logged come last: each metric under its name, and
    `extra`, {column: values in the shape of the rewards}, if a reward logged columns.
    """
    responses, true, predicted = _by_group(experience, len(rows))

    def shaped(values: list[Any]) -> Any:
        return values[0] if single else values

    def first(groups: list[Any]) -> Any:
        return shaped([None if group is None else group[0] for group in groups])

    record: dict[str, Any] = {
        "prompt": shaped([row.prompt for row in rows]),
        "response": first(responses),
        "true_reward": first(true),
        "disc_loss": disc.get("disc_loss"),
        "pred_reward": first(predicted),
        "gen_loss": gen.get("gen_loss"),
        "responses": shaped(responses),
        "true_rewards": shaped(true),
        "pred_rewards": shaped(predicted),
        "reward_mean": None,
        "pred_reward_mean": None,
        "step": step,
        "reward_calls": reward_calls,
    }
    if experience is not None:
        record |= _measured_in(experience, eos_ids, reward_failures)
    record |= {k: v for k, v in (gen | disc).items() if k not in record}
    record |= {"alarms": list(alarms), "notices": []}  # notices: from `health`
    if experience is not None:
        record |= logged_metrics(experience.notes)
        extras = logged_extras(experience.notes)
        if extras:
            record["extra"] = {
                column: shaped(_grouped(_spread(values, experience.asked_B), len(rows)))
                for column, values in extras.items()
            }
    return record


def _measured_in(experience: Experience, eos_ids: Sequence[int], reward_failures: int) -> dict[str, Any]:
    """A step's numbers about its responses and rewards."""
    asked = int(experience.asked_B.sum())
    numbers = {
        "reward_mean": _mean(experience.true_B),
        "reward_std": _std(experience.true_B),
        "pred_reward_mean": _mean(experience.predicted_B),
        "asked": asked,
        "reward_failures": reward_failures,
        "unanswered": asked - int((~np.isnan(experience.true_B)).sum()),
        "frac_asked": float(experience.asked_B.mean()),
        "frac_reward_zero_std": _share_without_spread(experience),
        **_lengths(experience, eos_ids),
        **fresh_metrics(experience.compared_MB, experience.true_B, experience.group_B),
    }
    for name, reward_B in experience.parts.items():
        numbers |= {f"rewards/{name}": _mean(reward_B), f"rewards/{name}/std": _std(reward_B)}
    return numbers


def _by_group(experience: Experience | None, prompts: int) -> tuple[list[Any], ...]:
    """Responses, true and predicted rewards, each as P lists of K; None for missing values."""
    if experience is None:
        return tuple([None] * prompts for _ in range(3))
    columns: list[list[Any]] = [experience.rollout.texts]
    for reward_B in (experience.true_B, experience.predicted_B):
        columns.append([None if math.isnan(value) else value for value in reward_B.tolist()])
    return tuple(_grouped(column, prompts) for column in columns)


def _grouped(column_B: list[Any], prompts: int) -> list[list[Any]]:
    """P lists of K."""
    per_prompt = len(column_B) // prompts
    return [column_B[j * per_prompt : (j + 1) * per_prompt] for j in range(prompts)]


def _spread(values: list[Any], asked_B: np.ndarray) -> list[Any]:
    """A list of B values: those of the asked responses at their indices, None at the others."""
    all_B: list[Any] = [None] * len(asked_B)
    for i, value in zip(np.flatnonzero(asked_B), values, strict=True):
        all_B[i] = value
    return all_B


def _mean(values_B: np.ndarray) -> float | None:
    known = values_B[~np.isnan(values_B)]
    return float(known.mean()) if len(known) else None


def _std(values_B: np.ndarray) -> float | None:
    """With Bessel's correction, as in TRL."""
    known = values_B[~np.isnan(values_B)]
    return float(known.std(ddof=1)) if len(known) > 1 else None


def _share_without_spread(experience: Experience) -> float | None:
    """The share of groups with equal true rewards, among groups with two answers or more. Such groups teach nothing."""
    groups = [experience.true_B[experience.group_B == j] for j in range(len(experience.rows))]
    answered = [group[~np.isnan(group)] for group in groups]
    is_equal = [bool(np.isclose(np.ptp(group), 0)) for group in answered if len(group) > 1]
    return float(np.mean(is_equal)) if is_equal else None


def _lengths(experience: Experience, eos_ids: Sequence[int]) -> dict[str, Any]:
    """Tokens of the responses. A response without an end token is clipped."""
    rollout, lengths_B = experience.rollout, experience.rollout.lengths_B
    ended_B = np.array([ids[-1] in eos_ids for ids in rollout.responses])
    return {
        "step_tokens": sum(len(rollout.prompts[j]) for j in rollout.group_B) + int(lengths_B.sum()),
        "completion_length": float(lengths_B.mean()),
        "completions/min_length": int(lengths_B.min()),
        "completions/max_length": int(lengths_B.max()),
        "completions/clipped_ratio": float(1 - ended_B.mean()),
        "completions/mean_terminated_length": float(lengths_B[ended_B].mean()) if ended_B.any() else None,
    }


# --- what is logged ---------------------------------------------------------------------------------------------------

TEXTS = {
    "prompt", "response", "true_reward", "pred_reward", "responses", "true_rewards", "pred_rewards", "alarms", "extra",
    "notices",
}  # fmt: skip
LOGGED_AS = {
    "reward_mean": "reward",
    "pred_reward_mean": "pred_reward",
    "gen_loss": "loss",
    "gen_grad_norm": "grad_norm",
    "gen_learning_rate": "learning_rate",
    "completion_length": "completions/mean_length",
    "kl": "kl_per_response",
}
#: Names of this library's records and logs; `logged_metrics` renames a reward's metric with one of these names.
OWN = {
    *TEXTS, *LOGGED_AS, *LOGGED_AS.values(), "step", "epoch", "num_tokens", "step_tokens", "step_time", "reward_calls",
    "reward_std", "reward_spread", "asked", "reward_failures", "unanswered", "frac_asked", "frac_reward_zero_std",
    "kl_per_token", "beta", "trust", "exploit_evidence", "audit_passed", "imitation_loss", "calibration_slope",
    "uncertainty_correlation", "rank_correlation", "rank_correlation_within",
}  # fmt: skip
OWN_PREFIXES = ("rewards/", "reward_calls/", "completions/", "gen_", "disc_", "eval_", "train/", "eval/")
SAMPLE = ("step", "prompt", "completion", "true_reward", "pred_reward", "target")  # the columns of a sample
# These are not averaged.
LATEST = {
    "step", "epoch", "num_tokens", "reward_calls", "learning_rate", "disc_learning_rate", "exploit_evidence",
}  # fmt: skip


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's measured numbers under their names in the logs."""
    values = {name: value for name, value in record.items() if name not in TEXTS}
    if record.get("kl") is not None and record.get("completion_length"):
        values["kl_per_token"] = record["kl"] / record["completion_length"]
    names = LOGGED_AS | {
        name: f"{name}/mean" for name in values if name.startswith("rewards/") and f"{name}/std" in values
    }
    logged = {names.get(name, name): value for name, value in values.items()}
    if "kl_per_token" in logged:
        logged["kl"] = logged.pop("kl_per_token")  # TRL's kl is per token
    return measured(logged)


def measured(values: Mapping[str, Any]) -> dict[str, Any]:
    """The finite numbers. JSON and some trackers do not accept NaN and infinities."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def logged_metrics(notes: Notes, taken: Collection[str] = ()) -> dict[str, float]:
    """The metrics that rewards logged by log_metric: the mean of all values per name, as in TRL.

    A name in `OWN` or `taken` becomes REWARD/NAME. A record must not use one name twice, and a reward that was written
    for TRL must run unchanged.
    """
    values: dict[str, list[float]] = {}
    for (reward, name), logged in notes.metrics.items():
        is_own = name in OWN or name in taken or name.startswith(OWN_PREFIXES)
        values.setdefault(f"{_prefix(reward)}{name}" if is_own else name, []).extend(logged)
    return {name: mean(logged) for name, logged in values.items()}


def logged_extras(notes: Notes, taken: Collection[str] = SAMPLE) -> dict[str, list[Any]]:
    """The columns that rewards logged by log_extra.

    A column becomes REWARD/COLUMN if its name is in `taken`, or if another reward logged other values under this name.
    """
    columns: dict[str, list[Any]] = {}
    for (reward, column), values in notes.extras.items():
        if column in taken or columns.get(column, values) != values:
            column = f"{_prefix(reward)}{column}"
        columns[column] = values
    return columns


def _prefix(reward: str) -> str:
    """The prefix for a name that a reward logged, so that the full name is none of this library's names."""
    return f"{reward}/" if not f"{reward}/".startswith(OWN_PREFIXES) else f"reward:{reward}/"


def reward_of(name: str) -> str | None:
    """The reward of a metric rewards/REWARD/mean; None for other metrics."""
    is_mean = name.startswith("rewards/") and name.endswith("/mean")
    return name.removeprefix("rewards/").removesuffix("/mean") if is_mean else None


def averaged(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each number's mean over the steps that measured it, or its latest value if it is a total or a setting."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for values in steps:
        for name, value in values.items():
            columns[name].append(value)
    latest = {name for name in columns if name in LATEST or name.startswith("reward_calls/")}
    return {
        name: column[-1] if name in latest or len(column) == 1 else sum(column) / len(column)
        for name, column in columns.items()
    }


def samples_of(record: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every response of a step with its rewards, in the form of completions.jsonl; `record` has lists of P prompts."""
    samples = []
    for j, row in enumerate(rows):
        for i, response in enumerate(record["responses"][j] or ()):
            predicted = record["pred_rewards"][j][i]
            sample = {
                "step": record["step"],
                "prompt": row.prompt,
                "completion": response,
                "true_reward": record["true_rewards"][j][i],
                "pred_reward": predicted if predicted is not None and math.isfinite(predicted) else None,
            }
            if row.target is not None:
                sample["target"] = row.target
            samples.append(sample | {column: groups[j][i] for column, groups in record.get("extra", {}).items()})
    return samples


# --- trackers ---------------------------------------------------------------------------------------------------------

TRACKERS = ("tensorboard", "wandb", "trackio")  # also the names of their packages


def trackers_of(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `config.report_to` names.

    Raises:
        ValueError: a tracker does not exist, or is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["none"]:
        return []
    if "all" in names:
        return [name for name in TRACKERS if find_spec(name)]
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, [*TRACKERS, "all", "none"])
            raise ValueError(
                f"report_to={name!r} is not accepted{hint}: it must be {', '.join(map(repr, TRACKERS))}, several of "
                "these, 'all' or 'none'"
            )
        if find_spec(name) is None:
            raise ValueError(f"report_to={name!r} needs a package that is not installed: pip install {name}")
    return list(dict.fromkeys(names))


class Trackers:
    """TensorBoard, Weights & Biases and trackio through accelerate's classes; metrics are under train/ and eval/.

    A resumed run (`after` > 0) continues its step numbers. TensorBoard hides values that were logged after that step.
    trackio continues the run of this name. wandb does so with WANDB_RUN_ID and WANDB_RESUME=allow.

    Raises:
        ValueError: a tracker does not exist, is not installed, or could not start.
    """

    def __init__(self, config: Config, settings: Mapping[str, Any], *, after: int) -> None:
        self.trackers: list[Any] = []
        for name in trackers_of(config.report_to):
            try:
                tracker = _tracker(name, config, after)
                tracker.start()
                self.trackers.append(tracker)
                tracker.store_init_configuration(_flat(settings))
            except Exception as error:
                self.__exit__()
                raise ValueError(f"the tracker {name} could not start: {error}") from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in values.items()
        }
        for tracker in self.trackers:
            tracker.log(dict(named), step=step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log samples as a table; TensorBoard has no tables and gets Markdown."""
        extras = sorted({column for sample in samples for column in sample} - set(SAMPLE))
        columns = [*SAMPLE, *extras]
        cells = [[sample.get(column) for sample in samples] for column in SAMPLE]
        cells += [_one_type([sample.get(column) for sample in samples]) for column in extras]
        data = [list(row) for row in zip(*cells, strict=True)]
        for tracker in self.trackers:
            if tracker.name == "wandb":
                tracker.log_table("completions", columns=columns, data=data, step=step)
            elif tracker.name == "trackio":
                table = importlib.import_module("trackio").Table(columns=columns, data=data)
                tracker.log({"completions": table}, step=step)
            else:
                tracker.log({"completions": _markdown(columns, data)}, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self.trackers:
            tracker.finish()
        self.trackers = []


def _tracker(name: str, config: Config, after: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers log through it
    importlib.import_module(name)  # a broken installation raises here
    run_name = Path(config.output_dir).resolve().name
    if name == "tensorboard":
        folder = Path(config.output_dir) / "tensorboard"
        return LOGGER_TYPE_TO_CLASS[name](run_name, logging_dir=folder, purge_step=after + 1 if after else None)
    if name == "wandb":  # an argument would override wandb's environment variables
        project, run_name = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", run_name)
        return LOGGER_TYPE_TO_CLASS[name](project, name=run_name, dir=config.output_dir)
    return LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run_name, resume="allow" if after else "never")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters in types that every tracker accepts: numbers, booleans and texts."""
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
        for name, value in settings.items()
        if value is not None
    }


def _one_type(values: list[Any]) -> list[Any]:
    """A column in a form that every tracker accepts: numbers, or texts, or booleans; mixed values become texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        return values
    return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]


def _markdown(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    def cells(row: Sequence[Any]) -> str:
        return "| " + " | ".join(str(value).replace("|", "\\|").replace("\n", " ") for value in row) + " |"

    return "\n".join([cells(columns), "|" + " --- |" * len(columns), *map(cells, data)])
