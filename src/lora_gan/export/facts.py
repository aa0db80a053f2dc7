"""What is known of a run when its players are exported, for the cards: from memory and from the run's folder.

Files of the folder count only where they are this run's. What is not known stays empty.
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

# Told elsewhere in the card, or of no interest in it; so are all counts of reward calls.
COUNTS = ("step", "seconds")
COSINE = "`cosine`: similarity of sentence embeddings of response and target (all-MiniLM-L6-v2)"


@dataclass(frozen=True)
class RunFacts:
    """What is known of how the players came to be."""

    base: Base
    encoder: Encoder
    config: Config
    prompt_kinds: frozenset[str]  # of the prompts trained on: "messages", "texts"
    steps: int
    calls: str  # of the true reward, by purpose
    adapters: dict[str, PeftConfig]  # of each player
    scores: bool  # whether the discriminator's heads have learned anything
    reward: str | None  # the true reward
    data: str | None  # what the prompts were
    metrics: dict[str, float]  # the last line of metrics.jsonl
    evaluation: dict[str, dict[str, Any]]  # name -> what gan.evaluate() returned
    evaluations: list[dict[str, float]]  # fit()'s own, the first and the last, with their steps
    init_adapter: str | None  # the adapter that the generator started from
    kl_is_to_adapter: bool  # whether the KL is measured to that adapter; else to the base
    license: str | None  # its id on the hub

    @classmethod
    def of(cls, state: RunState, judged: dict[str, Any] | None, license: str | None = None) -> RunFacts:
        logged = _logged(state)
        metrics = _last_metrics(state, logged)
        options = kept_options(Path(state.config.output_dir)) if metrics else {}
        judged = {} if judged is None else {"generator": judged} if "metrics" in judged else judged
        if not all(isinstance(result, dict) and "metrics" in result for result in judged.values()):
            raise ValueError("evaluation= must be what gan.evaluate() returned, or several of these by name")
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
            evaluation=judged,
            evaluations=_evaluations(state, logged, bool(metrics)),
            init_adapter=state.init_adapter,
            kl_is_to_adapter=state.players.has_reference,
            license=license,
        )


def _logged(state: RunState) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to these weights; it may be another run's."""
    file = Path(state.config.output_dir) / "metrics.jsonl"
    lines = read_lines(file) if file.is_file() else ()
    return [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= state.global_step]


def _last_metrics(state: RunState, logged: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers logged last before these weights, empty where there are none, or those of another run."""
    first = state.global_step - state.config.logging_steps + 1
    lines = [line for line in logged if line["step"] >= first and "reward_calls" in line]
    if not lines:
        return {}
    last = lines[-1]
    if last["step"] == state.global_step and last["reward_calls"] != state.true_reward.budget.counts["training"]:
        return {}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    return {name: n for name, n in numbers.items() if name not in COUNTS and not name.startswith("reward_calls")}


def _evaluations(state: RunState, logged: list[dict[str, Any]], of_this_run: bool) -> list[dict[str, float]]:
    """The first and the last evaluation that fit() logged up to these weights, by metric; none of another run.

    Args:
        logged: the lines of metrics.jsonl up to these weights.
        of_this_run: whether the lines of training in it are this run's.
    """
    found = []
    for line in logged:
        judged = {name: value for name, value in line.items() if name.startswith("eval_")}
        metrics = {name: value for name, value in judged.items() if isinstance(value, int | float)}
        if metrics:
            found.append({"step": line["step"], **metrics})
    if not found or not state.global_step or not (of_this_run or found[-1]["step"] == state.global_step):
        return []
    return found[:1] + found[1:][-1:]


def _reward(state: RunState, options: dict[str, Any], metrics: dict[str, float]) -> str | None:
    """The reward the run was given, else the one it logged, else one that is set here.

    The default is no sign of anything: a run that was opened from a checkpoint has it, whatever it was trained on.
    """
    if "reward" in options:
        return _reward_text(options["reward"])
    logged = [found[1] for name in metrics if (found := re.fullmatch("rewards/(.+)/mean", name))]
    here = state.true_reward.names
    if not set(logged) <= set(here):
        return _reward_text(logged)
    if here == ["cosine"] and not logged:
        return None
    weights = (state.true_reward.weights if len(here) > 1 else None) or [1] * len(here)
    return _reward_text([{"name": name, "weight": w} for name, w in zip(here, weights, strict=True)])


def _reward_text(reward: Any) -> str:
    """A reward as the command line names it, and its weight. Not its other options: a key may be among them."""
    if isinstance(reward, list):
        return ", ".join(map(_reward_text, reward))
    if isinstance(reward, dict):
        weight = reward.get("weight", 1)
        return _reward_text(reward.get("name", "")) + (f" × {weight:g}" if weight != 1 else "")
    if reward == "cosine":
        return COSINE
    file, colon, function = str(reward).rpartition(":")
    return f"`{Path(file).name}:{function}`" if colon else f"`{reward}`"  # whose folder it lay in is no one's business
