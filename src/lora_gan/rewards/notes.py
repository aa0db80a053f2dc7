"""What rewards of TRL's form log beside their scores, by `log_metric` and `log_extra`.

Every try of a call gets a `Recorder` of its own. Only the try that gave the scores is taken into the step's `Notes`: a
try that failed, or that was given up on and ends later, leaves no trace.
"""

import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

from ..wording import shown


class Recorder:
    """The side channels of one try of one call. Thread-safe: each call changes one list, by one operation of Python."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number under a name. A step's values of one name are averaged.

        Raises:
            ValueError: the name is not a text, or the value is not a number.
        """
        _require_name("log_metric", name)
        try:
            number = float(value.item() if hasattr(value, "item") else value)
        except Exception as error:  # a stranger's value may raise anything
            raise ValueError(
                f"log_metric({name!r}, {shown(value)}) is not accepted: the value must be a number"
            ) from error
        self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Log a column of values, one per completion, in their order. Several calls extend the column.

        Raises:
            ValueError: the column's name is not a text, or the values are not a list.
        """
        _require_name("log_extra", column)
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(
                f"log_extra({column!r}, {shown(values)}) is not accepted: give a list, one value per completion"
            )
        self.extras.setdefault(column, []).extend([_plain(value) for value in values])


class Notes:
    """What all rewards logged about some rows, by the reward and the name it chose.

    Attributes:
        metrics: {(reward, name): values}.
        extras: {(reward, column): one value per row}, as JSON can hold them.
    """

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, str], list[float]] = {}
        self.extras: dict[tuple[str, str], list[Any]] = {}

    def take(self, reward: str, recorder: Recorder, rows: int) -> None:
        """Add what a call logged that gave the scores of `rows` rows. A column of another length is left out with a
        warning: it is not known which completions its values belong to."""
        # Copies: a thread that the reward left behind may go on to log.
        self.metrics |= {(reward, name): list(values) for name, values in dict(recorder.metrics).items()}
        for column, values in [(column, list(values)) for column, values in dict(recorder.extras).items()]:
            if len(values) == rows:
                self.extras[reward, column] = values
            else:
                warnings.warn(
                    f"the reward {reward!r} gave log_extra {len(values)} values of {column!r} for {rows} completions: "
                    "the column is left out; give one value per completion",
                    stacklevel=2,
                )


def mean(values: list[float]) -> float:
    """The mean, in whatever order the values came; NaN where one of them is not finite."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _require_name(channel: str, name: Any) -> None:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"{channel}({shown(name)}, ...) is not accepted: the name must be a printable text")


def _plain(value: Any) -> Any:
    """The value as JSON can hold it, independent of what its owner does to it later."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text to a tracker
    if type(value) is int:
        return value if abs(value) < 2**63 else shown(value, 1000)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_as_lists))
    except Exception:  # NaN inside, keys that are no texts, circles, a stranger's __str__
        return shown(value, 1000)


def _as_lists(value: Any) -> Any:
    """An array or a tensor as lists, everything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
