"""Collects the facts about a run for its model cards, from memory and from the run's folder.

Files in the folder are used only if they belong to this run. Unknown facts stay empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..config import Config
from ..model.base import Base
from ..model.encoding import Encoder
from ..run.options import kept_options
from ..state import RunState
from ..storage.json_lines import read_lines

# Metrics that the card has in another section, or does not need. Counts of reward calls are left out, too.
COUNTS = ("step", "seconds")
COSINE = "`cosine`: similarity of sentence embeddings of response and target (all-MiniLM-L6-v2)"


@dataclass(frozen=True)
class RunFacts:
    """Facts about the training of the players."""

    base: Base
    encoder: Encoder
    config: Config
    prompt_kinds: frozenset[str]  # kinds of the training prompts: "messages", "texts"
    steps: int
    calls: str  # number of true-reward calls, by purpose
    adapters: dict[str, PeftConfig]  # by player
    scores: bool  # whether the discriminator's score heads were trained
    reward: str | None  # the true reward
    data: str | None  # name of the training data
    metrics: dict[str, float]  # the last line of metrics.jsonl
    evaluation: dict[str, dict[str, Any]]  # results of gan.evaluate(), by name
    evaluations: list[dict[str, float]]  # the first and the last evaluation by fit(), with their steps
    init_adapter: str | None  # the adapter from which the generator started
    kl_is_to_adapter: bool  # whether the KL is measured to this adapter, not to the base
    license: str | None  # licence id of the hub

    @classmethod
    def of(cls, state: RunState, results: dict[str, Any] | None, license: str | None = None) -> RunFacts:
        """Collect the facts.

        Args:
            results: a result of gan.evaluate(), or several by name.
            license: licence id of the hub.

        Raises:
            ValueError: `results` is neither.
        """
        logged = _logged(state)
        metrics = _last_metrics(state, logged)
        options = kept_options(Path(state.config.output_dir)) if metrics else {}
        results = {} if results is None else {"generator": results} if "metrics" in results else results
        if not all(isinstance(result, dict) and "metrics" in result for result in results.values()):
            raise ValueError("evaluation= must be a result of gan.evaluate(), or a dict of several results by name")
        return cls(
            base=state.players.base,
            encoder=state.players.encoder,
            config=state.config,
            prompt_kinds=frozenset(state.prompt_kinds),
            steps=state.global_step,
            calls=state.true_reward.budget.in_words(),
            adapters=state.players.peft.peft_config,
            scores=bool(state.players.heads_MH.any()),
            reward=_reward(state, options, metrics),
            data=options.get("data"),
            metrics=metrics,
            evaluation=results,
            evaluations=_evaluations(state, logged, bool(metrics)),
            init_adapter=state.init_adapter,
            kl_is_to_adapter=state.players.has_reference,
            license=license,
        )


def _logged(state: RunState) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to the current step. The file may belong to another run."""
    file = Path(state.config.output_dir) / "metrics.jsonl"
    lines = read_lines(file) if file.is_file() else ()
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= state.global_step]


def _last_metrics(state: RunState, logged: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics that were logged last before the current step. Empty without any, or if they are of another run."""
    first = state.global_step - state.config.logging_steps + 1
    lines = [line for line in logged if line["step"] >= first and "reward_calls" in line]
    if not lines:
        return {}
    last = lines[-1]
    if last["step"] == state.global_step and last["reward_calls"] != state.true_reward.budget.counts["training"]:
        return {}
    names = (name for name in last if name not in COUNTS and not name.startswith("reward_calls"))
    return {name: last[name] for name in names if isinstance(last[name], int | float)}


def _evaluations(state: RunState, logged: list[dict[str, Any]], of_this_run: bool) -> list[dict[str, float]]:
    """The metrics of the first and the last evaluation that fit() logged up to the current step.

    Empty if the evaluations are of another run.

    Args:
        logged: the lines of metrics.jsonl up to the current step.
        of_this_run: whether its training lines belong to this run.
    """
    found = []
    for line in logged:
        metrics = {n: value for n, value in line.items() if n.startswith("eval_") and isinstance(value, int | float)}
        if metrics:
            found.append({"step": line["step"], **metrics})
    if not found or not state.global_step or not (of_this_run or found[-1]["step"] == state.global_step):
        return []
    return found[:1] + found[1:][-1:]


def _reward(state: RunState, options: dict[str, Any], metrics: dict[str, float]) -> str | None:
    """The reward from the run's options, else from its logged metrics, else the current reward.

    None if only the default is known: a run that was opened from a checkpoint has the default, whatever the reward in
    training was.
    """
    if "reward" in options:
        return _reward_text(options["reward"])
    logged = [found[1] for name in metrics if (found := re.fullmatch("rewards/(.+)/mean", name))]
    current = state.true_reward.names
    if not set(logged) <= set(current):
        return _reward_text(logged)
    if current == ["cosine"] and not logged:
        return None
    weights = (state.true_reward.weights if len(current) > 1 else None) or [1] * len(current)
    return _reward_text([{"name": name, "weight": w} for name, w in zip(current, weights, strict=True)])


def _reward_text(reward: Any) -> str:
    """The name and weight of a reward, as on the command line. Other options are left out: an API key may be one."""
    if isinstance(reward, list):
        return ", ".join(map(_reward_text, reward))
    if isinstance(reward, dict):
        weight = reward.get("weight", 1)
        return _reward_text(reward.get("name", "")) + (f" × {weight:g}" if weight != 1 else "")
    if reward == "cosine":
        return COSINE
    file, colon, function = str(reward).rpartition(":")
    return f"`{Path(file).name}:{function}`" if colon else f"`{reward}`"  # paths of the user's machine stay private
