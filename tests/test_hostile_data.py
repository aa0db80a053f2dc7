"""Files, settings and answers that nobody thought of: rows, a Config, scores, or the library's own error.

Generated cases are the same in every run (derandomize), and nothing is kept between runs.
"""

import json
import math
import os
import warnings

import pytest
from helpers import PROMPTS, small_gan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_gan import Config, LoraGAN, data
from lora_gan.json_lines import JsonLines
from lora_gan.rewards import RewardError, score_pairs, score_parts

few = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
texts = st.text(st.characters(), max_size=12)
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
odd = values | st.binary(max_size=4) | st.complex_numbers() | st.builds(object) | st.just(Ellipsis)


# --- data files -------------------------------------------------------------------------------------------------------

FILES = {
    "empty.jsonl": b"",
    "garbage.jsonl": bytes(range(256)) * 4,
    "garbage.parquet": bytes(range(256)) * 4,
    "cut.parquet": b"PAR1" + bytes(40),
    "garbage.csv": b"\xff\xfe\x00" * 50,
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "deep_column.jsonl": b'{"prompt": "a", "target": ' + b"[" * 100_000 + b"\n",
    "long_number.jsonl": b'{"prompt": ' + b"1" * 5000 + b"}\n",
    "lists.jsonl": b'["prompt", "a"]\n',
    "number.jsonl": b'{"prompt": 7}\n',
    "nothing.jsonl": b'{"prompt": null}\n',
    "deep.json": b"[" * 100_000,
    "cut.jsonl": b'{"prompt": "a"}\n{"prompt": "b\n',
    "no_prompt.jsonl": b'{"text": "a"}\n',
    "latin.jsonl": '{"prompt": "é"}\n'.encode("latin-1"),
    "null_bytes.jsonl": b'{"prompt": "a"}\n\x00\x00\x00\n',
    "target_of_lists.jsonl": b'{"prompt": "a", "target": [1, 2]}\n',
    "header_only.csv": b"prompt,target\n",
    "wide_field.csv": b"prompt,target\n" + b"a" * 200_000 + b',"unclosed\n',
    "ragged.csv": b"prompt,target\na,b,c,d\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_data_file_is_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError) as refused:
            list(data.read_rows(str(tmp_path / name)))
    assert name in str(refused.value) or "row" in str(refused.value), refused.value
    assert len(str(refused.value)) < 1500


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe", "missing"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        list(data.read_rows(str(path)))


@few
@given(st.lists(values, max_size=4))
def test_rows_or_an_error(rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read = list(data.read_rows(rows))
        except ValueError:
            return
    assert all(isinstance(row, data.Row) for row in read)


@few
@given(
    st.dictionaries(st.sampled_from(["prompt", "target", "messages", "role", "content"]) | texts, values, max_size=4)
)
def test_a_row_or_an_error(row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (read,) = data.read_rows([row])
        except ValueError:
            return
    assert isinstance(read, data.Row)


# --- settings ---------------------------------------------------------------------------------------------------------


@few
@given(st.dictionaries(st.sampled_from(sorted(Config.__dataclass_fields__)) | texts, odd, max_size=3))
def test_a_config_or_an_error(given_settings):
    try:
        config = Config.from_dict(given_settings)
    except ValueError as error:
        assert str(error)
        return
    assert Config.from_dict(config.to_dict()) == config or any(
        isinstance(value, float) and math.isnan(value) for value in config.to_dict().values()
    )


@pytest.mark.parametrize("name", sorted(Config.__dataclass_fields__))
@few
@given(value=odd)
def test_every_setting_takes_a_value_or_refuses_it(name, value):
    try:
        Config.from_dict({name: value})
    except ValueError as error:
        assert str(error)


# --- rewards ----------------------------------------------------------------------------------------------------------


@few
@given(odd)
def test_a_score_or_an_error(value):
    try:
        (score,) = score_pairs(lambda response, target: value, ["a"], [None])
    except RewardError:
        return
    assert score is None or (isinstance(score, float) and math.isfinite(score))


@few
@given(odd | st.lists(odd, max_size=3))
def test_scores_or_an_error(value):
    def rated(prompts, completions, **columns):
        return value

    try:
        parts = score_parts([rated], ["a", "b"], ["c", "d"], {})
    except RewardError:
        return
    assert len(parts["rated"]) == 2
    assert all(score is None or math.isfinite(score) for score in parts["rated"])


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
    (tmp_path / "rows.jsonl").write_bytes(FILES["cut.jsonl"])
    gan: LoraGAN = small_gan(output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError):
        gan.fit(str(tmp_path / "rows.jsonl"), steps=1, progress=False)
    assert not (tmp_path / "run").exists() and gan.global_step == 0
    assert gan.generate(PROMPTS[:1])
