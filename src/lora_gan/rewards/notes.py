"""Metrics and columns that rewards of TRL's form log by `log_metric` and `log_extra`, in addition to their scores.

Each try of a call gets its own `Recorder`. Only the try that returned the scores enters the `Notes` of the step. A try
that failed, or that ends after its time limit, has no effect.
"""

import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

from ..wording import shown


class Recorder:
    """The values logged by one try of one call. Thread-safe: each call changes one list by one atomic operation."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number under a name. The values of a step with the same name are averaged.

        Raises:
            ValueError: the name is not a printable text, or the value is not a number.
        """
        _require_name("log_metric", name)
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except Exception as error:  # a foreign value may raise anything
            raise ValueError(
                f"log_metric({name!r}, {shown(value)}) is not accepted: the value must be a number"
            ) from error
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Log a column of values: one per completion, in the order of the completions. Further calls extend the column.

        Raises:
            ValueError: the name of the column is not a printable text, or the values are not a list.
        """
        _require_name("log_extra", column)
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(
                f"log_extra({column!r}, {shown(values)}) is not accepted: give a list, one value per completion"
            )
        self.extras.setdefault(column, []).extend([_plain(value) for value in values])


class Notes:
    """The values that all rewards logged for some rows.

    Attributes:
        metrics: {(reward, name): values}.
        extras: {(reward, column): one value per row}, as values that JSON supports.
    """

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, str], list[float]] = {}
        self.extras: dict[tuple[str, str], list[Any]] = {}

    def take(self, reward: str, recorder: Recorder, rows: int) -> None:
        """Add the values logged by a call that scored `rows` rows. A column of another length is dropped with a
        warning, because its values cannot be assigned to completions."""
        # Copies, because a thread of the reward may still be running and log more values.
        self.metrics |= {(reward, name): list(values) for name, values in dict(recorder.metrics).items()}
        for column, values in [(column, list(values)) for column, values in dict(recorder.extras).items()]:
            if len(values) == rows:
                self.extras[reward, column] = values
            else:
                warnings.warn(
                    f"the reward {reward!r} passed {len(values)} values of {column!r} to log_extra for {rows} "
                    "completions: the column is dropped; pass one value per completion",
                    stacklevel=2,
                )


def mean(values: list[float]) -> float:
    """The mean, independent of the order of the values; NaN if a value is not finite."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _require_name(channel: str, name: Any) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{channel}({shown(name)}, ...) is not accepted: the name must be a printable text")


def _plain(value: Any) -> Any:
    """A copy of the value in a form that JSON supports."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # trackers reject half a surrogate pair
    if type(value) is int:
        return value if abs(value) < 2**63 else shown(value, 1000)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_as_lists))
    except Exception:  # NaN inside, keys that are not texts, circular references, a foreign __str__
        return shown(value, 1000)


def _as_lists(value: Any) -> Any:
    """An array or a tensor as lists; every other value as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
