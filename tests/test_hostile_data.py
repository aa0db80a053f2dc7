"""Broken and hostile input: this library's own errors, which name the file and the row, and never another exception."""

import json
import os
import random
import string

import pytest
from helpers import PROMPTS, small_gan
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_gan import Config
from lora_gan.data import Row, Stream, read_rows, take
from lora_gan.rewards import RewardError, score_pairs, score_parts
from lora_gan.storage.json_lines import JsonLines

quick = settings(max_examples=200, derandomize=True, deadline=None, database=None)

GOOD = b'{"prompt": "a", "target": "b"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000
NOISE = random.Random(0).randbytes(4096)

BROKEN_FILES = {  # content, and what the message says beside the file's name
    "noise.jsonl": (NOISE, "line 1"),
    "noise.json": (NOISE, "line 1"),
    "noise.csv": (NOISE, "line 1"),
    "noise.txt": (NOISE, "line 1"),
    "noise.parquet": (NOISE, "Parquet"),
    "magic.parquet": (b"PAR1" + NOISE + b"PAR1", "Parquet"),
    "empty.jsonl": (b"", "no rows"),
    "empty.json": (b"", "no rows"),
    "empty.csv": (b"", "no rows"),
    "empty.txt": (b"\n \n", "no rows"),
    "empty.parquet": (b"", "Parquet"),
    "list.json": (b"[]", "no rows"),
    "header.csv": (b"prompt,target\n", "no rows"),
    "deep.jsonl": (GOOD + b'{"prompt": "a", "x": ' + DEEP + b"}\n", "line 2: the JSON is nested too deep"),
    "deep.json": (b"[" + DEEP + b"]", "nested too deep"),
    "deep-prompt.jsonl": (b'{"prompt": ' + b"[" * 600 + b"]" * 600 + b"}\n", "line 1.*must be a text"),
    "huge.jsonl": (b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}\n", "line 1.*digits"),
    "huge.json": (b'[{"prompt": ' + b"1" * 5000 + b"}]", "digits"),
    "nan.jsonl": (GOOD + b'{"prompt": "a", "x": NaN}\n', "line 2: NaN is not a JSON value"),
    "infinity.json": (b'[{"prompt": "a", "x": -Infinity}]', "-Infinity is not a JSON value"),
    "number.jsonl": (GOOD + b'{"prompt": 5}\n', "line 2: prompt must be a text"),
    "number-target.jsonl": (b'{"prompt": "a", "target": 5}\n', "line 1: the target must be a text"),
    "large-number.jsonl": (b'{"prompt": 1e999}\n', "line 1: prompt must be a text"),
    "surrogate.jsonl": (GOOD + b'{"prompt": "a\\ud800b"}\n', "line 2.*surrogate"),
    "surrogate-target.jsonl": (b'{"prompt": "a", "target": "\\udcff"}\n', "line 1.*surrogate"),
    "surrogate-message.jsonl": (b'{"prompt": [{"role": "user", "content": "\\ud800"}]}\n', "line 1.*surrogate"),
    "null-bytes.jsonl": (GOOD + b'{"prompt": "a\0b"}\n', "line 2.*binary"),
    "null-bytes.csv": (b"prompt\na\0b\n", "line 2.*binary"),
    "utf-16.jsonl": (GOOD.decode().encode("utf-16"), "line 1.*not UTF-8"),
    "utf-16.csv": ("prompt\na\n".encode("utf-16"), "line 1.*not UTF-8"),
    "lists.jsonl": (b'["prompt", "a"]\n', "line 1: expected an object"),
    "lists.json": (b'[["prompt", "a"]]', "row 1 is not a mapping"),
    "torn.jsonl": (GOOD + GOOD[:12], "line 2: not JSON"),
    "torn.json": (b'[{"prompt": "a"},\n{"prompt"', "line 2: not JSON"),
    "second-value.jsonl": (b'{"prompt": "a"} {"prompt": "b"}\n', "line 1: not JSON"),
    "second-bom.jsonl": (b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, "line 1: not JSON"),
    "quote.csv": (b'prompt,target\n"a,b\nc,d\n', "line 2: not CSV"),
    "fields.csv": (b"prompt,target\na,b,c\n", "line 2: 3 fields"),
    "twice.csv": (b"prompt,prompt\na,b\n", "line 1: two columns"),
    "column.csv": (b"question\na\n", "line 2 has no column 'prompt'"),
    "no-role.jsonl": (b'{"prompt": [{"content": "a"}]}\n', "line 1: a message has a 'role'"),
    "reserved.jsonl": (b'{"prompt": "a", "completions": 1}\n', "line 1: a column cannot be called"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_named(tmp_path, name, streaming):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    content, said = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{said}|{said}.*{name}") as refused:
        rows = read_rows(tmp_path / name, streaming=streaming)
        take(rows, 4, seed=0, position=0)  # a stream reads no further than it must
    assert type(refused.value) is ValueError and len(str(refused.value)) < 1000


def test_a_parquet_file_cut_anywhere_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [f"prompt {i}" for i in range(50)], "target": ["b"] * 50})
    parquet.write_table(table, path)
    content = path.read_bytes()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="rows.parquet could not be read as Parquet"):
            read_rows(path)
    changed = random.Random(0)
    for _ in range(200):  # a byte that flipped: rows or a refusal, as it may fall into a text
        place = changed.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ changed.randrange(1, 256)]) + content[place + 1 :])
        _rows_or_refused(path)


def test_parquet_text_that_is_not_utf_8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    text = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match="bytes.parquet could not be read as Parquet"):
        read_rows(tmp_path / "bytes.parquet")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train.jsonl").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "train.jsonl").symlink_to(tmp_path / "gone.jsonl")
    names = ["folder.jsonl", "split", "dangling.jsonl", "circle.jsonl", "dangling", "no\0name.jsonl"]
    for name in [*(os.path.join(tmp_path, name) for name in names), "~nobody-of-this-name/rows.jsonl", "x" * 5000]:
        with pytest.raises(ValueError) as refused:
            read_rows(name)
        assert type(refused.value) is ValueError
        assert os.path.basename(name).replace("\0", "\\x00")[:20] in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    monkeypatch.setattr(type(path), "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(ValueError, match="rows.jsonl could not be read: denied"):
        read_rows(path)


def test_what_looks_odd_and_is_not_broken_is_read(tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbfprompt,target\r\na,b\r\n")
    (tmp_path / "large.csv").write_bytes(b"prompt\n" + b"a" * 200_000 + b"\n")  # over the csv module's own limit
    (tmp_path / "pair.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n')
    assert read_rows(tmp_path / "bom.jsonl") == read_rows(tmp_path / "bom.csv") == [Row("a", "b")]
    assert len(read_rows(tmp_path / "large.csv")[0].prompt) == 200_000
    assert read_rows(tmp_path / "pair.jsonl")[0].prompt == "\U0001f600"


# --- anything at all --------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec=None), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.just(10**400)
names = texts | st.sampled_from(["prompt", "target", "completion", "messages", "role", "content", "completions"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
messages = st.fixed_dictionaries({}, optional={"role": values, "content": values, "tool_calls": values})
rows_of_anything = st.fixed_dictionaries(
    {}, optional={"prompt": values | st.lists(messages, max_size=2), "target": values, "messages": values, "x": values}
)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def _rows_or_refused(dataset, **options) -> None:
    try:
        rows = read_rows(dataset, **options)
    except ValueError as refused:
        assert type(refused) is ValueError, refused
        return
    assert isinstance(rows, Stream) or all(isinstance(row, Row) and row.prompt for row in rows)


class Hostile:
    """A value whose every method raises."""

    def __float__(self):
        raise KeyError("float")

    def __repr__(self):
        raise KeyError("repr")

    def __len__(self):
        raise KeyError("len")


UNSHOWN = {"deep": nested(100_000), "long": 10**5000, "hostile": Hostile()}  # what has no repr, not even in a message


@pytest.mark.parametrize("name", UNSHOWN)
def test_what_has_no_repr_is_refused_as_well(name):
    value = UNSHOWN[name]
    for row in (value, {"prompt": value}, {"prompt": "a", "target": value}, {"prompt": [{"role": value}]}):
        with pytest.raises(ValueError, match="row 1"):
            read_rows([row])
    with pytest.raises(ValueError, match="row 1"):
        read_rows([{"prompt": "a", "target": [{"role": "user", "content": value}]}])
    for setting in ("learning_rate", "dtype", "adversarial", "report_to", "output_dir"):
        with pytest.raises(ValueError, match=f"{setting}=.* is not accepted"):
            Config.from_dict({setting: value})
    with pytest.raises(ValueError, match="a mapping"):
        Config.from_dict(value)
    for reward in (lambda response, target: value, lambda prompts, completions: value):
        with pytest.raises(RewardError, match="lambda.*returned"):
            score_parts([reward], ["p"], ["a"], {})


@quick
@given(st.lists(rows_of_anything | values, max_size=3) | values)
def test_any_rows_are_read_or_refused(rows):
    _rows_or_refused(rows)
    _rows_or_refused(rows, streaming=True)


@quick
@given(rows=st.lists(rows_of_anything | values, max_size=3), lines=st.booleans())
def test_any_json_file_is_read_or_refused(tmp_path_factory, rows, lines):
    path = tmp_path_factory.getbasetemp() / ("any.jsonl" if lines else "any.json")
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows))
    _rows_or_refused(path)


@quick
@given(st.binary(max_size=60) | st.text('{}[]":,0aeE-\n\\u \ufeffpromt', max_size=40).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    for ending in ("jsonl", "json", "csv", "tsv", "txt"):
        path = tmp_path_factory.getbasetemp() / f"bytes.{ending}"
        path.write_bytes(content)
        _rows_or_refused(path)


@quick
@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)), values, max_size=3) | values)
@example({5: 1})
@example({None: 1})
@example([("seed", 1)])
@example({"learning_rate": 10**400})
@example({"adversarial": {}})
@example({"dtype": []})
@example({"report_to": [[]]})
def test_any_settings_are_taken_or_refused(given_settings):
    try:
        assert isinstance(Config.from_dict(given_settings), Config)
    except ValueError as refused:
        assert len(str(refused)) < 5000


class HostileArray:
    def tolist(self):
        raise KeyError("tolist")


returned = values | st.builds(Hostile) | st.builds(HostileArray) | st.sampled_from([1j, b"1", range(2), object, len])


def _check_scores(scores: list) -> None:
    assert all(score is None or (type(score) is float and abs(score) < float("inf")) for score in scores)


@quick
@given(returned)
def test_whatever_a_reward_returns_is_scores_or_a_reward_error(value):
    class InOneCall:
        def batch(self, responses, targets):
            return value

        def __call__(self, response, target):
            return value

    def of_trls_form(prompts, completions, **columns):
        return value

    for ask in (
        lambda: score_pairs(lambda response, target: value, ["a", "b"], [None, "c"]),
        lambda: score_pairs(InOneCall(), ["a", "b"], [None, "c"]),
        lambda: score_parts([of_trls_form], ["p", "q"], ["a", "b"], {})["of_trls_form"],
        lambda: score_parts([lambda response, target: value], ["p"], ["a"], {})["<lambda>"],
    ):
        try:
            _check_scores(ask())
        except RewardError as refused:
            assert "reward" in str(refused) and len(str(refused)) < 1000


@quick
@given(st.lists(returned, min_size=2, max_size=2))
def test_lists_of_whatever_too(answers):
    try:
        _check_scores(score_parts([lambda prompts, completions: answers], ["p", "q"], ["a", "b"], {})["<lambda>"])
    except RewardError as refused:
        assert "row" in str(refused)


def test_the_words_of_a_name_with_any_characters_are_printable():
    with pytest.raises(ValueError, match="no setting"):
        Config.from_dict({string.printable: 1})


@pytest.mark.parametrize("name", sorted(Config.__dataclass_fields__))
@quick
@given(value=values | st.builds(object) | st.binary(max_size=4))
def test_every_setting_takes_a_value_or_refuses_it(name, value):
    try:
        Config.from_dict({name: value})
    except ValueError as error:
        assert str(error)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_wherever_a_line_is_cut_whole_lines_of_steps_before_remain(tmp_path):
    lines = [{"step": step, "reward": step / 7, "note": "é"} for step in range(1, 5)]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with JsonLines(path, after=3) as log:
            assert log.kept == lines[: min(3, len(log.kept))]
            log.write({"step": 4, "reward": 0.0})
        steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 4


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'1\n[]\n{"no": "step"}\n{"step": "2"}\n\xff\xfe\n{"step": 2}\n')
    with JsonLines(path, after=3) as log:
        assert log.kept == [{"step": 2}]


def test_a_data_file_that_is_refused_leaves_no_run(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "b\n')
    gan = small_gan(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError):
        gan.fit(str(tmp_path / "rows.jsonl"), steps=1, progress=False)
    assert not (tmp_path / "run").exists() and gan.global_step == 0
    assert gan.generate(PROMPTS[:1])
