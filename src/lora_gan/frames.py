"""Rows of a data frame. pandas and polars are never imported here: the user of a data frame has imported them."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np


def records(dataset: Any) -> Iterable[Any]:
    """The rows of a pandas or polars data frame as mappings of Python values. Other data sets are returned unchanged.

    At any depth NaN, NaT and NA become None, NumPy numbers and arrays become Python numbers and lists, and pandas times
    become datetime objects. The index is not a column.

    Raises:
        ValueError: a column name that is not a text, or two columns with the same name.
    """
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(dataset, pandas.DataFrame):
        return _of_pandas(dataset, pandas)
    to_dicts = getattr(dataset, "to_dicts", None)  # polars returns Python values
    return to_dicts() if callable(to_dicts) and not isinstance(dataset, Mapping) else dataset


def _of_pandas(frame: Any, pandas: Any) -> Iterator[dict[str, Any]]:
    names = list(frame.columns)
    if strange := [name for name in names if not isinstance(name, str)]:
        raise ValueError(
            f"the data frame has a column called {strange[0]!r}, a {type(strange[0]).__name__}: column names must be "
            "texts; rename it with df.rename(columns=...)"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the data frame has two columns called {twice[0]!r}: rename or drop a column")
    for values in frame.itertuples(index=False, name=None):
        yield {name: _plain(value, pandas) for name, value in zip(names, values, strict=True)}


def _plain(value: Any, pandas: Any) -> Any:
    if isinstance(value, np.datetime64 | np.timedelta64):
        value = pandas.Timestamp(value) if isinstance(value, np.datetime64) else pandas.Timedelta(value)
    elif isinstance(value, np.ndarray):
        value = list(value) if value.ndim else value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry, pandas) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, pandas) for entry in value]
    if pandas.api.types.is_scalar(value) and pandas.isna(value):
        return None
    if isinstance(value, pandas.Timestamp):
        return value.to_pydatetime(warn=False)
    return value.to_pytimedelta() if isinstance(value, pandas.Timedelta) else value
