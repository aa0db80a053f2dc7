"""The settings file of the learning benchmark: turns experiments into runs, and finds the finished runs.

    {"defaults": {SETTINGS}, "tasks": {"e2e": {SETTINGS}},
     "arms": {"rloo": {"kind": "rl", "settings": {SETTINGS}, "by_task": {"e2e": {...}}, "by_reward": {"noisy": {...}},
                       "by_budget": {"125": {...}}, "by_reward_budget": {"noisy/500": {...}}},
              "rloo-2x8": {"like": "rloo", "settings": {"prompts_per_step": 2}}},
     "experiments": [{"name": "core", "task": "tiny", "rewards": ["exact", "noisy"], "budgets": [125, 500],
                      "arms": ["rloo"], "seeds": [0, 1, 2], "settings": {...}}]}

SETTINGS are LoraGAN's settings and any of OPTIONS. Later ones override earlier ones, in the order above. An option of
an arm may also be a key of the arm, next to "settings". An option of an experiment may be a key of the experiment, next
to "name". An arm with "like" copies the other arm, and overrides the entries that it has itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Options of a run in addition to LoraGAN's settings, with their defaults.
OPTIONS: dict[str, Any] = {
    # rl; sft: imitation of the targets only; null: shuffled labels; trl: GRPOTrainer on the true reward; trl-unscaled:
    # the same without division by a group's standard deviation
    "kind": "rl",
    "train_disc": True,
    "max_steps": None,  # Last step of the run. Runs without a reward measure progress by it.
    "extra_steps": 0,  # Steps on the predicted reward after the budget is spent.
    "marks": None,  # Calls at which to evaluate; None: at 0, a quarter, half and all of the budget.
    "step_marks": [],  # Steps at which to evaluate, in addition.
    "sweep": False,  # Whether to evaluate at several temperatures at the end.
    "best_of": False,  # Whether to compare the discriminator's best of 8 with the oracle's, at half of the budget.
    "split": "heldout",  # Prompts to evaluate on: validation if the run chooses settings.
    "heldout": 160,  # Number of prompts to evaluate on.
    "train": 4096,  # Number of prompts to learn on.
    "sigma": None,  # Standard deviation of the noisy reward; None: the task's own.
}
LAYERS = ("by_task", "by_reward", "by_budget", "by_reward_budget")
KINDS = ("rl", "sft", "null", "trl", "trl-unscaled")


@dataclass(frozen=True)
class Planned:
    """One run: its name, and everything that determines its result."""

    experiment: str
    task: str
    reward: str
    arm: str
    budget: int
    seed: int
    options: dict[str, Any]
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.experiment}/{self.task}/{self.reward}/{self.arm}/{self.budget}/{self.seed}"

    @property
    def hash(self) -> str:
        """Hash of everything except the names. A run with changed settings is a different run."""
        values = [self.task, self.reward, self.budget, self.seed, self.options, self.settings]
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "hash": self.hash, **vars(self)}


def expand(file: Mapping[str, Any], seeds: Iterable[int] | None = None) -> list[Planned]:
    """Every run of the file, ordered so that each experiment finishes one seed before it starts the next."""
    planned = []
    for experiment in file["experiments"]:
        for seed in experiment["seeds"] if seeds is None else seeds:
            for budget in experiment["budgets"]:
                for reward in experiment["rewards"]:
                    for arm in experiment["arms"]:
                        planned.append(resolve(file, experiment, reward, arm, budget, seed))
    keys = [run.key for run in planned]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"two runs have the key {key}: give their experiments different names")
    return planned


def resolve(
    file: Mapping[str, Any], experiment: Mapping[str, Any], reward: str, arm: str, budget: int, seed: int
) -> Planned:
    if arm not in file["arms"]:
        raise ValueError(
            f"experiment {experiment['name']!r} names the arm {arm!r}: there are {', '.join(file['arms'])}"
        )
    told, task = like(file["arms"], arm), experiment["task"]
    unknown = set(told) - {"settings", *LAYERS, *OPTIONS}
    if unknown:
        raise ValueError(f"the arm {arm!r} has {sorted(unknown)}: only settings, {', '.join(LAYERS)} and options")
    values = dict(OPTIONS)
    names = {"by_task": task, "by_reward": reward, "by_budget": str(budget), "by_reward_budget": f"{reward}/{budget}"}
    layers = [file.get("defaults", {}), file.get("tasks", {}).get(task, {})]
    layers += [{name: told[name] for name in OPTIONS if name in told}, told.get("settings", {})]
    layers += [told.get(layer, {}).get(name, {}) for layer, name in names.items()]
    layers += [{name: experiment[name] for name in OPTIONS if name in experiment}, experiment.get("settings", {})]
    for layer in layers:
        values |= layer
    if values["kind"] not in KINDS:
        raise ValueError(f"the arm {arm!r} is of kind {values['kind']!r}: there are {', '.join(KINDS)}")
    return Planned(
        experiment["name"], task, reward, arm, int(budget), int(seed),
        options={name: values[name] for name in OPTIONS},
        settings={name: value for name, value in values.items() if name not in OPTIONS},
    )  # fmt: skip


def like(arms: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """An arm's entries, merged with those of the arm that its "like" names."""
    told = dict(arms[arm])
    other = told.pop("like", None)
    if other is None:
        return told
    if other not in arms or "like" in arms[other]:
        raise ValueError(f"the arm {arm!r} is like {other!r}, which is no arm of its own")
    taken = dict(arms[other])
    for name in ("settings", *LAYERS):
        if name in told and name in taken:
            told[name] = {**taken[name], **told[name]}
    return taken | told


def results(lines: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Finished runs by key. If a key has several lines, the last one counts."""
    return {line["key"]: line for line in lines}


def read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
