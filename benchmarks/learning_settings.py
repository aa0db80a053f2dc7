"""The settings file of the learning benchmark: experiments made into runs, and what is finished of them.

    {"defaults": {SETTINGS}, "tasks": {"e2e": {SETTINGS}},
     "arms": {"rloo": {"kind": "rl", "settings": {SETTINGS}, "by_task": {"e2e": {...}}, "by_reward": {"noisy": {...}},
                       "by_budget": {"125": {...}}, "by_reward_budget": {"noisy/500": {...}}},
              "rloo-2x8": {"like": "rloo", "settings": {"prompts_per_step": 2}}},
     "experiments": [{"name": "core", "task": "tiny", "rewards": ["exact", "noisy"], "budgets": [125, 500],
                      "arms": ["rloo"], "seeds": [0, 1, 2], "settings": {...}}]}

SETTINGS are LoraGAN's, and any of OPTIONS beside them; later ones override earlier ones, in the order above. An option
of the arm may also stand beside "settings", and one of the experiment beside its "name". An arm "like" another has all
that the other has, but for what it says itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a run is told beside LoraGAN's settings, with the values that hold where nothing is said.
OPTIONS: dict[str, Any] = {
    # rl; sft: imitation of the targets alone; null: shuffled labels; trl: GRPOTrainer on the true reward, trl-unscaled:
    # the same without division by a group's standard deviation
    "kind": "rl",
    "train_disc": True,
    "max_steps": None,  # the run ends here at the latest; what a run that asks for no reward is measured by
    "extra_steps": 0,  # steps that follow when the budget is spent, on the predicted reward
    "marks": None,  # evaluations at these numbers of calls; None: at 0, a quarter, half and all of the budget
    "step_marks": [],  # and after these numbers of steps
    "sweep": False,  # at the end, evaluations at several temperatures
    "best_of": False,  # half way, best of 8 by the discriminator against the oracle's
    "split": "heldout",  # of the prompts that judge: validation where settings are chosen
    "heldout": 160,  # prompts that judge
    "train": 4096,  # prompts to learn on
    "sigma": None,  # of the noisy reward; None: the task's own
}
LAYERS = ("by_task", "by_reward", "by_budget", "by_reward_budget")
KINDS = ("rl", "sft", "null", "trl", "trl-unscaled")


@dataclass(frozen=True)
class Planned:
    """One run: what it is called, and all that decides its result."""

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
        """Of everything but the names: a run whose settings were changed is another run."""
        values = [self.task, self.reward, self.budget, self.seed, self.options, self.settings]
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "hash": self.hash, **vars(self)}


def expand(file: Mapping[str, Any], seeds: Iterable[int] | None = None) -> list[Planned]:
    """Every run of the file, in the order in which they are best done: one seed of everything before the next."""
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
            raise ValueError(f"two runs are called {key}: give their experiments different names")
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
    """What an arm says, with what it takes over from the arm it is like."""
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
    """Finished runs by key; of several lines of one key the last one counts."""
    return {line["key"]: line for line in lines}


def read_settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
