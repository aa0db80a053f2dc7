"""Held-out evaluation: the reward, and metrics that training did not use, with bootstrap intervals over rows."""

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
    """Sample one response per row and compute the rewards and the metrics of all responses.

    Args:
        rows: rows as they are sent to the model: `LoraGAN.evaluate` has applied the chat template where needed.
        generate, score, ask: `LoraGAN`'s methods.
        temperature: sampling temperature; 0 is greedy; None: the setting of the config.
        player: "reference" evaluates the reference of the KL: the untouched base, or the adapter that the generator
            started from. "base" evaluates the untouched base.
        best_of: responses sampled per row; the discriminator picks one.
        seed: seed of sampling; the same seed gives the same responses at the same step.
        batch_size: rows per batch; changes memory, and results only by rounding.

    Returns:
        metrics: name -> {"mean", "low", "high"}, with a 95 % bootstrap interval over rows; None where nothing was
        measured. Names:

        - true_reward, pred_reward, and length in words;
        - rewards/NAME: each of several rewards, unweighted;
        - where rows have targets: exact_match (0 or 1), and with sacrebleu chrf (0 to 100, mean over rows).

        distinct_2: distinct word pairs as a share of all word pairs, over all responses; a float.
        per_row: name -> the metric's value of every row, None where a row was not measured.
        samples: per row prompt, target, response, true_reward, pred_reward, and values that rewards gave to log_extra.
        logged: name -> mean of the values that rewards gave to log_metric.
    """
    unchanged = {"batch_size": batch_size, "apply_chat_template": False}
    responses = generate(rows, best_of, temperature=temperature, seed=seed, player=player, **unchanged)
    predicted = score(rows, responses, **unchanged)
    notes = Notes()
    ids = getattr(responses, "token_ids", None)  # an overridden generate() may return plain texts
    true, parts = ask(rows, responses, completion_ids=ids, notes=notes, purpose="evaluation")
    columns: dict[str, list[float | None]] = {
        "true_reward": true,
        "pred_reward": [*predicted],
        "length": [float(len(response.split())) for response in responses],
    }
    if len(parts) > 1:
        columns |= {f"rewards/{name}": values for name, values in parts.items()}
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
    """Each row with its response, its rewards, and the values that rewards gave to log_extra."""
    names = ("prompt", "target", "response", "true_reward", "pred_reward")
    values = ([row.prompt for row in rows], [row.target for row in rows], responses, true, predicted)
    columns = dict(zip(names, values, strict=True)) | tracking.logged_extras(notes, names)
    return [dict(zip(columns, sample, strict=True)) for sample in zip(*columns.values(), strict=True)]


def _compared(rows: list[Row], responses: list[str]) -> dict[str, list[float | None]]:
    """name -> each response's metric against its target; empty if a row has no target."""
    pairs = [(response, row.target) for row, response in zip(rows, responses, strict=True) if row.target is not None]
    if len(pairs) < len(rows):
        return {}
    columns: dict[str, list[float | None]] = {"exact_match": [text.exact_match(*pair) for pair in pairs]}
    if find_spec("sacrebleu"):
        columns["chrf"] = [100 * text.chrf(*pair) for pair in pairs]
    return columns


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference one − other of two evaluations on the same rows, row by row.

    Pairing cancels the variation between rows, so the intervals are narrower than those of the two evaluations. An
    interval holds for these two samples of one response per row, and not for another training run.

    Returns:
        metrics: name -> {"mean", "low", "high"} of the rows' differences, with a 95 % bootstrap interval over rows.
        Rows that one evaluation did not measure are left out; None without any row.
        distinct_2, logged: differences of the plain numbers, without an interval.

    Raises:
        ValueError: the evaluations have different numbers of rows.
    """
    metrics = {}
    for name, values in one["per_row"].items():
        others = other["per_row"].get(name, values)
        if len(values) != len(others):
            raise ValueError(
                f"the evaluations are of {len(values)} and {len(others)} rows: compare two evaluations of the same rows"
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
    """Evaluations next to each other as text: one line per metric, one column per evaluation, mean with interval."""
    results, first = judged.values(), next(iter(judged.values()))
    rows = [[name, *(tables.cell(result["metrics"].get(name)) for result in results)] for name in first["metrics"]]
    rows.append(["distinct_2", *(f"{result['distinct_2']:.3f}" for result in results)])
    for name in first.get("logged", {}):
        values = [result.get("logged", {}).get(name) for result in results]
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in values)])
    return tables.table(list(judged), rows)


def interval(values: list[float | None], draws: int = 2000) -> dict[str, float | None]:
    """Mean, with the 2.5 and 97.5 percentiles of its bootstrap distribution over rows (Efron 1979).

    Without any value all three are None.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) == 0:
        return {"mean": None, "low": None, "high": None}
    picks = randomness.generator(0, 0, "bootstrap").integers(len(known), size=(draws, len(known)))
    low, high = np.quantile(known[picks].mean(-1), (0.025, 0.975))
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}
