"""Rows of prompt and target: reading them from files, hub data sets and Python objects, and their order in a run.

A prompt is a text, or a conversation: a list of messages {"role", "content"}, as in TRL. The order is a function of
(seed, epoch), or the order of a stream. A single number is the position, and a resumed run continues with the next row.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from . import frames, randomness
from .extras import need
from .messages import completion_text
from .wording import did_you_mean, shortened, shown

Conversation = list[dict[str, Any]]  # messages, each with a role and a content
Prompt = str | Conversation
Numbered = Iterator[tuple[str, Any]]  # (location for error messages, values of the row)

TARGET_NAMES = ("target", "target_text", "completion")
# Rewards receive other values under these names (rewards.signatures.GIVEN).
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # passed to the chat template of the row, as in TRL's SFTTrainer


@dataclass(frozen=True)
class Row:
    """One prompt with its target and further columns.

    Attributes:
        prompt: a text, or chat messages.
        target: the text for imitation, and for rewards that compare; for chat messages the assistant's text.
        columns: further values by name. Rewards receive them as keyword arguments.
        target_messages: the target's messages, if they hold more than a single text.
        where: the row's location for error messages: file and line, or number of the row.
    """

    prompt: Prompt
    target: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    target_messages: Conversation | None = None
    where: str = field(default="", compare=False)

    @property
    def template_options(self) -> dict[str, Any]:
        """Keyword arguments for the chat template from the columns `tools` and `chat_template_kwargs`.

        Both columns may be JSON text. A plain prompt has no options.

        Raises:
            ValueError: `tools` is no list, or `chat_template_kwargs` is no mapping.
        """
        if isinstance(self.prompt, str):
            return {}  # no template renders a plain prompt, so any values are allowed
        tools, options = (self._json(name) for name in TEMPLATE_COLUMNS)
        if not isinstance(tools, list | None):
            raise RowError(self, f"the column 'tools' must be a list of tools, or None, not {shown(tools)}")
        if not isinstance(options, Mapping | None) or not all(isinstance(name, str) for name in options or ()):
            raise RowError(self, f"chat_template_kwargs must be a mapping of names, or None, not {shown(options)}")
        return ({"tools": tools} if tools else {}) | dict(options or {})

    def _json(self, name: str) -> Any:
        value = self.columns.get(name)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise RowError(self, f"the column {name!r} is a text that is not JSON: {error}") from error


class RowError(ValueError):
    """A row cannot be used. The message begins with the row's location."""

    def __init__(self, row: Row, message: str) -> None:
        super().__init__(f"{row.where}: {message}" if row.where else message)


# --- reading --------------------------------------------------------------------------------------------------------


def read_rows(
    dataset: Any,
    *,
    prompt_column: str = "prompt",
    target_column: str | None = None,
    split: str = "train",
    streaming: bool = False,
    columns: bool = True,
) -> list[Row] | Stream:
    """Read rows from a file, a folder, a hub data set, a `datasets` object, or any iterable of mappings.

    A row's prompt is a text or a list of messages. Its target is a text, or messages that begin and end with the
    assistant's messages. With TRL's `messages` instead of a prompt, a last message of the assistant is the target. All
    other values are columns, which rewards receive as keyword arguments. Rewards receive the target as `target`, and
    under the name `target_column`. The chat template receives the columns `tools` and `chat_template_kwargs`.

    Args:
        dataset: one of these sources:
            - a file: .jsonl, .json (a list, or an object per line), .csv, .tsv, .txt (a prompt per line) or .parquet.
              Text is UTF-8. An empty cell of a CSV file is a missing value.
            - a folder of `datasets.save_to_disk`, or with files named after the split (train.jsonl, train-*.parquet)
            - "OWNER/NAME" or "OWNER/NAME:CONFIG" on the hub, or a `datasets` object
            - a data frame of pandas or polars. NaN, NaT and NA are missing values.
            - an iterable of mappings, or a function that returns one
            - a `Stream`, which is returned unchanged
        prompt_column: the column that holds the prompt.
        target_column: the column that holds the target in every row. None: the first of target, target_text and
            completion that a row has.
        split: the split to read from a source with several splits.
        streaming: read rows when they are needed, in the order of the source, instead of reading all rows and
            shuffling. A `datasets.IterableDataset` is always streamed.
        columns: whether rows keep their columns. False keeps only those for the chat template.

    Returns:
        A list of rows, or a `Stream`, which has no length.

    Raises:
        ValueError: a source or row that cannot be read. The message names the file, and the line or row.
        ImportError: `datasets` or `pyarrow` is needed and not installed.
    """
    if isinstance(dataset, Stream):
        return dataset
    if target_column is not None and target_column == prompt_column:
        raise ValueError(f"prompt_column and target_column are both {prompt_column!r}: name two columns")
    name = os.fspath(dataset) if isinstance(dataset, (str, os.PathLike)) else "the data set"
    dataset = _with_rows(dataset, name, split, streaming, prompt_column)
    source = _source(dataset, streaming)
    fills = _fills_with_none(dataset)

    def to_row(where: str, values: Any) -> Row:
        return _row(where, values, prompt_column, target_column, columns, fills)

    if streaming or _is_iterable_dataset(dataset):
        stream = Stream(name, source, to_row)
        stream.take(1, 0)  # report a wrong column or missing rows now, not at the first step
        return stream
    rows = [to_row(where, values) for where, values in source(0)]
    if not rows:
        raise ValueError(_no_rows(name))
    return rows


def _with_rows(dataset: Any, name: str, split: str, streaming: bool, prompt_column: str) -> Any:
    """The data set opened, if it is a name, and reduced to one split, if it has several."""
    if isinstance(dataset, (str, os.PathLike)):
        dataset = _opened(name, split, streaming, prompt_column)
    if isinstance(dataset, Mapping):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}; its splits: {', '.join(map(repr, dataset)) or 'none'}")
        return dataset[split]
    return dataset


def _no_rows(name: str) -> str:
    return f"{name} has no rows: give at least one with a prompt (and a target)"


def _source(dataset: Any, streaming: bool) -> Callable[[int], Numbered]:
    """A function from the number of an epoch to the epoch's rows, each with its location."""
    if isinstance(dataset, _Files):
        return lambda epoch: dataset.read()
    if isinstance(dataset, Iterator) and streaming:
        raise ValueError("streaming repeats the data each epoch, but an iterator ends: give a function that returns it")
    if not (callable(dataset) or hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise ValueError(f"a data set is a file, a name, or rows to iterate over, not {shown(dataset)}")

    def rows(epoch: int) -> Numbered:
        if _is_iterable_dataset(dataset):
            dataset.set_epoch(epoch)  # gives a shuffled data set a new order per epoch, from its seed
        for number, values in enumerate(frames.records(dataset() if callable(dataset) else dataset), 1):
            yield f"row {number}", values

    return rows


def _is_iterable_dataset(dataset: Any) -> bool:
    datasets = sys.modules.get("datasets")  # imported already if such an object exists
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def _fills_with_none(dataset: Any) -> bool:
    """Whether this is an Arrow table. Arrow gives all mappings of a column the same keys, and fills missing ones with
    None. So a key with the value None was most likely not in the original data."""
    if isinstance(dataset, _Files):
        return any(path.suffix.lower() == ".parquet" for path in dataset.paths)
    return type(dataset).__module__.partition(".")[0] == "datasets"


def _row(where: str, values: Any, prompt_column: str, target_column: str | None, columns: bool, fills: bool) -> Row:
    if isinstance(values, Row):
        require_unicode([values.prompt, values.target, values.columns], where)
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is not a mapping with 'prompt' (and 'target'), but {shown(values)}")
    rest = dict(values)
    if prompt_column == "prompt" and "prompt" not in rest and "messages" in rest:
        prompt_column = "messages"
    prompt = _popped(rest, prompt_column, where, "prompt_column")
    if target_column is not None:
        target = _popped(rest, target_column, where, "target_column", known=(prompt_column,))
        if columns and target_column != "target" and "target" in rest:
            raise ValueError(
                f"{where} has a column 'target' in addition to target_column={target_column!r}, but rewards receive "
                "the target under the name 'target': rename or remove a column"
            )
    else:
        names = [name for name in TARGET_NAMES if name in rest]
        target_name = next((name for name in names if rest[name] is not None), names[0] if names else None)
        target = rest.pop(target_name) if target_name else None

    if prompt is None or (isinstance(prompt, (str, list, tuple)) and not prompt):
        raise ValueError(f"{where}: {prompt_column} is empty: give at least one character, or one message")
    if fills:
        prompt, target = _without_none(prompt), _without_none(target)
        rest |= {name: _without_none(rest[name]) for name in TEMPLATE_COLUMNS if name in rest}
    if is_conversation(prompt):
        prompt = _messages(prompt, where)
        if prompt_column == "messages" and target is None and prompt[-1]["role"] == "assistant":
            prompt, target = prompt[:-1], prompt[-1:]
            if not prompt:
                raise ValueError(f"{where}: {prompt_column} has no message before the assistant's answer: add a prompt")
    elif not isinstance(prompt, str):
        raise ValueError(f"{where}: {prompt_column} must be a text, or a list of messages, not {shown(prompt)}")
    target, target_messages = _target(target, where)
    require_unicode([prompt, target, target_messages], where)
    if not columns:
        rest = {name: rest[name] for name in TEMPLATE_COLUMNS if name in rest}
    require_unicode(rest, where)
    if columns and target_column is not None and target_column not in TARGET_NAMES:
        rest[target_column] = target
    _require_free_names(rest, where)
    row = Row(prompt, target, rest, target_messages, where)
    _ = row.template_options  # raises an error for invalid options
    return row


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, at any depth of its lists and mappings, keys included."""
    stack = [value]
    while stack:  # not recursive, because user data may be nested too deep for Python's stack
        entry = stack.pop()
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, Mapping):
            stack += [*entry.values(), *entry.keys()]
        elif isinstance(entry, (list, tuple)):
            stack += entry


def require_unicode(value: Any, where: str) -> None:
    """Check that no text in a value, at any depth, holds half a surrogate pair.

    JSON and Python strings may hold such halves, but tokenizers and UTF-8 files fail on them, possibly late in a run.

    Raises:
        ValueError: the message names the half and its text.
    """
    for text in _texts(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {ascii(text[error.start])} in {excerpt(text)} is half a surrogate pair, not a character: "
                "replace or remove it"
            ) from error


def _popped(rest: dict[str, Any], name: str, where: str, setting: str, *, known: tuple[str, ...] = ()) -> Any:
    """Remove a column from `rest` and return its value; `known` are columns that are removed already."""
    if name not in rest:
        names = [*known, *map(str, rest)]
        columns = ", ".join(map(repr, names)) or "none"
        raise ValueError(
            f"{where} has no column {name!r}{did_you_mean(name, names)}; its columns: {columns}. Set {setting} to "
            "another name"
        )
    return rest.pop(name)


def _require_free_names(columns: Mapping[str, Any], where: str) -> None:
    for name in columns:
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                f"{where}: a column cannot be called {name!r}: rewards receive columns as keyword arguments, and "
                f"{', '.join(RESERVED)} are reserved; rename or remove the column"
            )


# --- conversations --------------------------------------------------------------------------------------------------


def is_conversation(value: Any) -> TypeGuard[Conversation]:
    """Whether this is chat messages."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(m, Mapping) for m in value)


def is_prompt(value: Any) -> TypeGuard[Prompt]:
    """Whether this is one prompt, a text or chat messages, and not several."""
    return isinstance(value, str) or is_conversation(value)


def require_targets(rows: list[Row], need: str, remedy: str = "") -> None:
    """Check that each row has a target, before responses are sampled or true rewards are queried.

    Args:
        need: the purpose of the target, which begins the message.
        remedy: advice at the end of the message.

    Raises:
        RowError: a row without a target.
    """
    for row in rows:
        if row.target is None:
            raise RowError(row, f"{need}, and the prompt {excerpt(row.prompt)} has none{remedy}")


def excerpt(prompt: Prompt) -> str:
    """The beginning of a prompt, or of a conversation's last message, quoted for messages."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    return repr(shortened(text, 60))


def as_rows(
    prompts: Any, tools: list[Any] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[Row]:
    """Convert one or several prompts to rows. All prompts get the same tools and options. Rows stay unchanged."""
    if isinstance(prompts, Mapping) or not (is_prompt(prompts) or isinstance(prompts, Iterable)):
        remedy = ": give a prompt of one message as [message]" if isinstance(prompts, Mapping) else ""
        raise ValueError(f"prompts must be texts or chat messages, not {shown(prompts)}{remedy}")
    columns = dict(zip(TEMPLATE_COLUMNS, (tools, chat_template_kwargs), strict=True))
    columns = {name: value for name, value in columns.items() if value is not None}
    rows: list[Row] = []
    for prompt in [prompts] if is_prompt(prompts) else list(prompts):
        if not (is_prompt(prompt) or isinstance(prompt, Row)):
            raise ValueError(f"a prompt must be a text or chat messages, not {shown(prompt)}")
        if not isinstance(prompt, Row):
            require_unicode(prompt, "the prompt" if is_prompt(prompts) else f"prompt {len(rows) + 1}")
            prompt = Row(_given(prompt), None, columns)
        rows.append(prompt)
    return rows


def as_user_message(row: Row) -> Row:
    """The row with its plain prompt as one user message."""
    return replace(row, prompt=[{"role": "user", "content": row.prompt}])


def _messages(messages: Iterable[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message.get("role"), str) or not ({"content", "tool_calls"} & message.keys()):
            raise ValueError(f"{where}: a message has a 'role' and a 'content', not {shown(dict(message))}")
    # Tables fill missing keys with None, but chat templates distinguish None from a missing key.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _without_none(value: Any) -> Any:
    """Messages and tools without the keys that an Arrow table has filled with None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(entry) for entry in value]
    return value


def _target(target: Any, where: str) -> tuple[str | None, Conversation | None]:
    """A target's text, and its messages if they hold more than the text."""
    if not is_conversation(target):
        if not (target is None or isinstance(target, str)):
            raise ValueError(
                f"{where}: the target must be a text, messages of the assistant, or None, not {shown(target)}"
            )
        return target, None
    messages = _messages(target, where)
    if any(messages[i]["role"] != "assistant" for i in (0, -1)):
        raise ValueError(
            f"{where}: the first and the last message of a target must be the assistant's, not {shown(messages)}; move "
            "messages before the answer to the prompt"
        )
    text = completion_text(
        [message for message in messages if message["role"] == "assistant" and message.get("content")]
    )
    plain = len(messages) == 1 and isinstance(messages[0].get("content"), str) and len(messages[0]) == 2
    return text, None if plain else messages


# --- files, folders, names ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    paths: list[Path]
    prompt_column: str  # column name for the lines of a .txt file

    def read(self) -> Numbered:
        for path in self.paths:
            suffix = path.suffix.lower()
            try:
                for where, values in READERS[suffix](path):
                    yield where, {self.prompt_column: values} if suffix == ".txt" else values
            except OSError as error:
                raise ValueError(f"{path} could not be read: {error.strerror or error}") from error


def _opened(name: str, split: str, streaming: bool, prompt_column: str) -> Any:
    """The file, the folder's files, or the `datasets` object of a hub name or of a folder written by `datasets`."""
    suffixes = ", ".join(READERS)
    try:
        path = Path(name).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # name too long, permission denied, unknown user in ~user
        raise ValueError(f"{name!r:.80} cannot be opened: {error!s:.80}") from error
    if is_file:
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{name}: data files end in {suffixes}, not {path.suffix or 'nothing'!r}")
        return _Files([path], prompt_column)
    written_by_datasets = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if name and path.is_dir() and not written_by_datasets:
        return _Files(_files_of_split(path, split), prompt_column)
    on_hub = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", name) and path.suffix.lower() not in READERS
    if not (written_by_datasets or on_hub):
        raise ValueError(
            f"there is no file or folder {name!r}; give a file ({suffixes}), a folder, or OWNER/NAME on the hub"
        )
    why = f"{name!r} is not a file ({suffixes}) or a folder of such files; data sets of the hub, and folders written by"
    datasets = need("datasets", f"{why} datasets, need the library datasets", "data")
    try:
        if written_by_datasets:
            return datasets.load_from_disk(str(path))
        hub_name, _, config = name.partition(":")
        return datasets.load_dataset(hub_name, config or None, split=split, streaming=streaming)
    except Exception as error:  # hub, network and file formats raise many types of errors
        source = "the folder" if written_by_datasets else "there is no such file or folder, and the data set"
        raise ValueError(f"{source} {name!r} could not be opened by datasets, split {split!r}: {error}") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The split's data files in a folder or its data/, named as in hub repositories: train.csv,
    train-00000-of-00002.parquet."""
    folders = [path for path in (folder, folder / "data") if path.is_dir()]
    found = (file for path in folders for file in path.iterdir())
    files = sorted(file for file in found if file.suffix.lower() in READERS and file.is_file())
    chosen = [file for file in files if re.split(r"[-_.]", file.name)[0] == split]
    if not chosen:
        names = ", ".join(file.name for file in files[:10]) or "none"
        raise ValueError(
            f"the folder {folder} has no data of the split {split!r}: add a file {split}.SUFFIX or {split}-*.SUFFIX, "
            f"where SUFFIX is one of {', '.join(READERS)}; its data files: {names}"
        )
    return chosen


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their line ends. Only \\n ends a line, because JSON texts may contain U+2028."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} is not UTF-8: save the file as UTF-8 text"
                ) from error
            if "\0" in text:
                raise ValueError(f"{path}, line {number}: this is a binary file, not UTF-8 text")
            yield text


def _json_lines(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), 1):
        if not line.isspace():
            values = _parsed(line.rstrip(), path, number)
            if not isinstance(values, dict):
                raise ValueError(f"{path}, line {number}: expected an object with 'prompt', got {line.strip():.60}")
            yield f"{path}, line {number}", values


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """Parse JSON text that begins at the given line of a file."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        advice = "write one object per line, or in a .json file a list of objects"
        raise ValueError(f"{path}, line {line}: not JSON ({error}); {advice}") from error
    except RecursionError as error:
        raise ValueError(f"{path}, line {line}: the JSON is nested too deep; flatten it") from error
    except ValueError as error:  # NaN, or a whole number of thousands of digits
        raise ValueError(f"{path}, line {line}: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value: write null for a missing number")


def _json(path: Path) -> Numbered:
    """A list of objects, or one object per line, as in many .json files."""
    if not next((line for line in _lines(path) if not line.isspace()), "").lstrip().startswith("["):
        yield from _json_lines(path)
        return
    rows = _parsed("".join(_lines(path)), path)
    for number, values in enumerate(rows, 1):
        yield f"{path}, row {number}", values


def _csv(path: Path) -> Numbered:
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default of 128 KiB is less than a long context
    header_line = next(_lines(path), "")
    semicolons = ";" in header_line and "," not in header_line  # as in locales with a decimal comma
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if semicolons else ","
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1  # the row's first line; a quoted field may span several lines
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not header:
                header = cells
                if twice := [name for name in header if header.count(name) > 1]:
                    raise ValueError(f"{where}: two columns are called {twice[0]!r}: rename or remove a column")
            elif len(cells) == len(header):
                yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
            elif cells:
                raise ValueError(
                    f"{where}: {len(cells)} fields, but the header has {len(header)}; put quotes around a field that "
                    f"contains {delimiter!r}"
                )
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error}); close each quoted field with a quote") from error


def _text(path: Path) -> Numbered:
    for number, line in enumerate(_lines(path), 1):
        if not line.isspace():
            yield f"{path}, line {number}", line.rstrip("\r\n")


def _parquet(path: Path) -> Numbered:
    pyarrow = need("pyarrow", f"{path}: Parquet files need pyarrow", "data")
    from pyarrow.parquet import ParquetFile

    numbers = itertools.count(1)
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):  # memory: this number of rows, plus one row group
                for values in batch.to_pylist():
                    yield f"{path}, row {next(numbers)}", values
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also invalid UTF-8, invalid dates
        raise ValueError(f"{path} could not be read as Parquet: {error}") from error


READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": _parquet,
}  # fmt: skip


# --- the order ------------------------------------------------------------------------------------------------------


class Stream:
    """Rows that are read when needed, in the order of the source, epoch after epoch. Iterating yields one epoch.

    A stream only reads forward. To reach an earlier position, or to resume, it reads again from the first row of the
    first epoch. This is exact for every source that repeats its rows, including a shuffled `IterableDataset` with a
    seed. The state_dict() of an `IterableDataset` is not exact: it lacks the shuffling buffer.

    Attributes:
        columns: column names of all rows read so far, including rows that were skipped to reach a position. So a
            resumed run knows the same names as an uninterrupted run.
    """

    def __init__(self, name: str, source: Callable[[int], Numbered], to_row: Callable[[str, Any], Row]) -> None:
        self._name, self._source, self._to_row = name, source, to_row
        self._keep: Callable[[Row], bool] | None = None
        self.columns: set[str] = set()
        self._seek(0)

    def _seek(self, position: int) -> None:
        self._position = position
        self._read: list[Row] = []  # buffered rows from the position on, for a repeat of a failed step
        self._unread = itertools.islice(self._endless(), position, None)

    def only(self, keep: Callable[[Row], bool]) -> None:
        """Skip the rows for which `keep` returns False. Positions then count only the rows that are kept."""
        self._keep = keep
        self._seek(self._position)

    def take(self, count: int, position: int) -> list[Row]:
        """`count` rows from `position` on. The position counts rows over all epochs, from 0."""
        if not self._position <= position <= self._position + len(self._read):
            self._seek(position)
        del self._read[: position - self._position]
        self._position = position
        try:
            while len(self._read) < count:
                self._read.append(next(self._unread))
        except BaseException:  # the generator has ended; start over, so that a retry meets the same row
            self._seek(position)
            raise
        return self._read[:count]

    def _endless(self) -> Iterator[Row]:
        for epoch in itertools.count():
            row: Row | None = None
            for row in self._epoch(epoch):
                self.columns.update(row.columns)
                yield row
            if row is None:
                raise ValueError(_no_rows(self._name))

    def _epoch(self, number: int) -> Iterator[Row]:
        return filter(self._keep, (self._to_row(where, values) for where, values in self._source(number)))

    def __iter__(self) -> Iterator[Row]:
        return self._epoch(0)


def take(rows: list[Row] | Stream, count: int, *, seed: int, position: int) -> list[Row]:
    """`count` rows from `position` on in the endless sequence of epochs. A list is shuffled in each epoch.

    Args:
        rows: a list, or a stream, which keeps its own order.
        seed: seed of the shuffling.
        position: number of rows before the first one, over all epochs.
    """
    if isinstance(rows, Stream):
        return rows.take(count, position)
    taken: list[Row] = []
    for index in range(position, position + count):
        epoch, offset = divmod(index, len(rows))
        if not taken or offset == 0:
            order = randomness.generator(seed, epoch, "data").permutation(len(rows))
        taken.append(rows[int(order[offset])])
    return taken


# --- arguments of step() --------------------------------------------------------------------------------------------


def rows_of(
    prompt: Prompt | list[Prompt], target: str | list[str | None] | None, columns: Mapping[str, Any]
) -> list[Row]:
    """Rows from step()'s arguments: single values, or lists of equal length.

    Raises:
        ValueError: lists of different lengths, or a value that is not accepted.
    """
    _require_free_names(columns, "step()")
    single = is_prompt(prompt)
    prompts = [prompt] if single else list(prompt) if isinstance(prompt, (list, tuple)) else []
    if not prompts or not all(map(is_prompt, prompts)):
        raise ValueError("prompt must be a text or chat messages, or a non-empty list of prompts")
    given: dict[str, Any] = {"target_text": target, **columns}
    if single:
        given = {name: [value] for name, value in given.items()}
    elif target is None:
        given["target_text"] = [None] * len(prompts)
    for name, values in given.items():
        if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need a list of {len(prompts)} values under {name}, got {shown(values)}"
            )
    rows = []
    for i, one in enumerate(prompts):
        others = {name: values[i] for name, values in given.items()}
        for name, value in {"prompt": one, **others}.items():
            require_unicode(value, f"step(): {name}" + ("" if single else f", row {i + 1}"))
        text, messages = _target(others.pop("target_text"), "target_text")
        rows.append(Row(_given(one), text, others, messages))
    return rows


def _given(prompt: Any) -> Prompt:
    return prompt if isinstance(prompt, str) else _messages(prompt, "prompt")


def column_names(rows: list[Row] | Stream) -> set[str]:
    """Names of all rows' columns. For a stream this is the live set of the names read so far."""
    return rows.columns if isinstance(rows, Stream) else set().union(*(row.columns for row in rows))


def columns_of(rows: list[Row], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Values of the rows' columns, by name, including the columns `names`. None: the row lacks the column."""
    return {name: [row.columns.get(name) for row in rows] for name in sorted(column_names(rows).union(names))}
