"""Rows of prompt and target, and the order in which they are taken: a function of (seed, epoch), so that the position
in it is one number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import randomness

TARGET_NAMES = ("target", "target_text", "completion")


@dataclass(frozen=True)
class Row:
    prompt: str
    target: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)  # whatever else the row has; rewards get it by keyword


def read_rows(dataset: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows from a JSON Lines file, or from anything that yields mappings (a list, a `datasets.Dataset`).

    A row has `prompt`, and may have `target` (or `target_text`, or `completion`); a row without a prompt raises.
    """
    if isinstance(dataset, (str, os.PathLike)):
        lines = Path(dataset).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at U+2028, too
        dataset = [_parse(line, number, dataset) for number, line in enumerate(lines, 1) if line.strip()]
    rows = []
    for number, values in enumerate(dataset, 1):
        if not isinstance(values, Mapping):
            raise ValueError(f"row {number} is not a mapping with 'prompt' (and 'target'), but {values!r:.60}")
        rest = dict(values)
        prompt = rest.pop("prompt", None)
        if not isinstance(prompt, str):
            raise ValueError(f"row {number} has no text under 'prompt'; its columns are {', '.join(map(str, values))}")
        names = [name for name in TARGET_NAMES if name in rest]
        target = rest.pop(names[0]) if names else None
        if not (target is None or isinstance(target, str)):
            raise ValueError(f"row {number}: {names[0]} must be a text, or absent, not {target!r:.60}")
        rows.append(Row(prompt, target, rest))
    if not rows:
        raise ValueError("the dataset has no rows: give at least one mapping with 'prompt' (and 'target')")
    return rows


def _parse(line: str, number: int, source: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(source)}, line {number}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{os.fspath(source)}, line {number}: expected an object with 'prompt', got {line[:60]!r}")
    return values


def take(rows: list[Row], count: int, *, seed: int, position: int) -> list[Row]:
    """The `count` rows from `position` on in the endless sequence of shuffled epochs."""
    taken: list[Row] = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, len(rows))
        if not taken or offset == 0:
            order = randomness.generator(seed, epoch, "data").permutation(len(rows))
        taken.append(rows[int(order[offset])])
    return taken


def rows_of(prompt: str | list[str], target: str | list[str | None] | None, columns: Mapping[str, Any]) -> list[Row]:
    """Rows from step()'s arguments: one of each, or lists of equal length."""
    if isinstance(prompt, str):
        if not (target is None or isinstance(target, str)):
            raise ValueError(f"one prompt takes one target_text, a text or None, not {type(target).__name__}")
        return [Row(prompt, target, dict(columns))]
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError("prompt must be a text, or a list of at least one text")
    targets = [None] * len(prompts) if target is None else target
    for name, values in {"target_text": targets, **columns}.items():
        if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need a list of {len(prompts)} values under {name}, got {values!r}"
            )
    if not all(target is None or isinstance(target, str) for target in targets):
        raise ValueError(f"target_text must be texts or None, got {targets!r:.80}")
    return [
        Row(text, targets[i], {name: values[i] for name, values in columns.items()}) for i, text in enumerate(prompts)
    ]


def columns_of(rows: list[Row]) -> dict[str, list[Any]]:
    """Further columns of some rows, by name; None where a row lacks one."""
    names = sorted(set().union(*(row.columns for row in rows)))
    return {name: [row.columns.get(name) for row in rows] for name in names}
