"""Held-out evaluation: the reward beside metrics it was not trained on, with intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from .. import randomness
from ..data import Row
from ..model.players import Player
from ..rewards import Notes, text
from ..rewards.combine import Parts
from . import tables, tracking


def evaluate(
    rows: list[Row],
    *,
    generate: Callable[..., list[str]],
    score: Callable[..., list[float]],
    ask: Callable[..., tuple[list[float | None], Parts]],
    temperature: float | None = None,
    player: Player = "generator",
    best_of: int = 1,
    seed: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """One response per row, and what every judge says of it.

    Args:
        rows: as they are sent: `LoraGAN.evaluate` has made messages of plain prompts where that is wanted.
        generate, score, ask: `LoraGAN`'s methods.
        temperature: of sampling, the config's where not given; 0 is greedy.
        player: "reference" evaluates what the KL is measured to (the untouched base, or the adapter that the generator
            started from), "base" the untouched base.
        best_of: responses sampled per row; the discriminator picks.
        seed: of the sampling; the same one gives the same responses at the same step.
        batch_size: rows in one batch; changes memory, and results only to rounding.

    Returns:
        metrics: name -> {"mean", "low", "high"}, a 95 % bootstrap interval over rows, None where nothing was measured:
        true_reward, pred_reward, length (words); of several rewards each one, unweighted, as rewards/NAME; where rows
        have targets exact_match (0 or 1) and, with sacrebleu installed, chrf (0 to 100, mean over rows).
        distinct_2 (share of word pairs that differ, over all responses) as a plain number.
        per_row: name -> the metric's value of every row, None where it was not measured.
        samples: prompt, target, response, true_reward, pred_reward of every row, and what rewards gave log_extra.
        logged: name -> mean of what rewards gave log_metric.
    """
    as_they_are = {"batch_size": batch_size, "apply_chat_template": False}
    responses = generate(rows, best_of, temperature=temperature, seed=seed, player=player, **as_they_are)
    predicted = score(rows, responses, **as_they_are)
    notes = Notes()
    ids = getattr(responses, "token_ids", None)  # a generate() of the user's own may return plain texts
    true, parts = ask(rows, responses, completion_ids=ids, notes=notes, purpose="evaluation")
    columns: dict[str, list[float | None]] = {
        "true_reward": true,
        "pred_reward": [*predicted],
        "length": [float(len(response.split())) for response in responses],
    }
    if len(parts) > 1:
        columns |= {f"rewards/{name}": part for name, part in parts.items()}
    columns |= _compared(rows, responses)
    metrics = {name: interval(values) for name, values in columns.items()}
    return {
        "metrics": metrics,
        "distinct_2": text.distinct_n(responses, 2),
        "per_row": columns,
        "samples": _samples(rows, responses, true, predicted, notes),
        "logged": tracking.measured(tracking.logged_metrics(notes, (*metrics, "distinct_2"))),
    }


def _samples(
    rows: list[Row], responses: list[str], true: list[float | None], predicted: list[float], notes: Notes
) -> list[dict[str, Any]]:
    """Each row with its response and rewards, and what rewards gave log_extra."""
    names = ("prompt", "target", "response", "true_reward", "pred_reward")
    columns = ([row.prompt for row in rows], [row.target for row in rows], responses, true, predicted)
    whole = dict(zip(names, columns, strict=True)) | tracking.logged_extras(notes, names)
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def _compared(rows: list[Row], responses: list[str]) -> dict[str, list[float | None]]:
    """Metrics of each response against its target, by name; none where a row has no target."""
    pairs = [(response, row.target) for row, response in zip(rows, responses, strict=True) if row.target is not None]
    if len(pairs) < len(rows):
        return {}
    columns: dict[str, list[float | None]] = {"exact_match": [text.exact_match(*pair) for pair in pairs]}
    if find_spec("sacrebleu"):
        columns["chrf"] = [100 * text.chrf(*pair) for pair in pairs]
    return columns


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two evaluations on the same rows, compared row by row: one − other.

    Pairing removes what the rows have in common, so an interval is narrower than the two evaluations' own. It holds
    for these two samples of one response per row; it says nothing of another training run.

    Returns:
        metrics: name -> {"mean", "low", "high"} of the rows' differences, a 95 % bootstrap interval over rows; rows
        where either is not measured are left out, and None stands where none is left.
        distinct_2, logged: differences of the plain numbers, without an interval.
    """
    metrics = {}
    for name, values in one["per_row"].items():
        others = other["per_row"].get(name, values)
        if len(values) != len(others):
            raise ValueError(
                f"the evaluations are of {len(values)} and {len(others)} rows: compare two of the same rows"
            )
        if name in other["per_row"]:
            pairs = zip(values, others, strict=True)
            metrics[name] = interval([None if a is None or b is None else a - b for a, b in pairs])
    return {
        "metrics": metrics,
        "distinct_2": one["distinct_2"] - other["distinct_2"],
        "logged": {
            name: value - other["logged"][name] for name, value in one["logged"].items() if name in other["logged"]
        },
    }


def table(judged: dict[str, dict[str, Any]]) -> str:
    """Evaluations side by side, as text: a line a metric, mean and interval in each evaluation's column."""
    results, first = judged.values(), next(iter(judged.values()))
    rows = [[name, *(tables.cell(result["metrics"].get(name)) for result in results)] for name in first["metrics"]]
    rows.append(["distinct_2", *(f"{result['distinct_2']:.3f}" for result in results)])
    for name in first.get("logged", {}):
        values = [result.get("logged", {}).get(name) for result in results]
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in values)])
    return tables.table(list(judged), rows)


def interval(values: list[float | None], draws: int = 2000) -> dict[str, float | None]:
    """Mean, and the 2.5 and 97.5 percentiles of its bootstrap distribution over rows (Efron 1979); None without any."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) == 0:
        return {"mean": None, "low": None, "high": None}
    picks = randomness.generator(0, 0, "bootstrap").integers(len(known), size=(draws, len(known)))
    low, high = np.quantile(known[picks].mean(-1), (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}
