"""Settings are declared once: what each accepts, what `lora-gan train --help` says, and that no list repeats them.

The oracle of the first part is golden/settings.json: the values that each setting accepted when the checks were still
code beside the declarations. It is not written anew.
"""

import ast
import json
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from annotated_types import Unit

import lora_gan
from lora_gan import Config
from lora_gan.cli import main as cli
from lora_gan.config import REMOVED
from lora_gan.settings import RANGE, Group, Mark, group, marked, markers, plain_type

BEFORE = json.loads((Path(__file__).parent / "golden" / "settings.json").read_text(encoding="utf-8"))
VALUES = {
    repr(value): value
    for value in (
        None, True, False, -1, 0, 1, 2, -0.5, 0.0, 0.5, 1.0, 1.5, float("nan"), float("inf"), "", "x", [], ["x"], [1],
        ["x", None], {}, {"a": 1}, "auto", "none", "bin", "predicted", "base", "linear", "float16",
    )
} | {"10**400": 10**400}  # fmt: skip
NAMES = [field.name for field in fields(Config)]
FLAGS = {field.name for field in fields(Config) if plain_type(field) in (bool, bool | None)}

MAY_BE_NONE = ("reward_signal", "query_rate", "on_exploit")  # the library then chooses


def accepts(name: str, value: object) -> bool:
    try:
        Config(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name}=") and "it must be" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", [name for name in BEFORE if name not in REMOVED])
def test_a_setting_accepts_what_it_accepted_before(name):
    """Two things were added since: every flag accepts 0 and 1 as False and True, and some settings accept None."""
    added = {"0", "1", "0.0", "1.0"} if name in FLAGS else {"None"} if name in MAY_BE_NONE else set()
    assert {shown for shown, value in VALUES.items() if accepts(name, value)} == set(BEFORE[name]) | added


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_r": 0}, "lora_r=0 is not accepted: it must be a whole number, 1 or more"),
        ({"save_steps": 1.5}, "save_steps=1.5 is not accepted: it must be a whole number, 1 or more, or None"),
        ({"beta": -1}, "beta=-1 is not accepted: it must be a number, 0 or more"),
        ({"query_rate": 0}, "query_rate=0 is not accepted: it must be a number, above 0, at most 1, or None"),
        ({"dtype": "int8"}, "dtype='int8' is not accepted: it must be one of auto, float32, bfloat16, float16"),
        ({"kl_reference": "x"}, "kl_reference='x' is not accepted: it must be one of base, init_adapter, or None"),
        ({"report_to": []}, "report_to=[] is not accepted: it must be a text, or a list of texts, not empty"),
        ({"query_design": "uncertain"}, "query_design='uncertain' is not accepted: it must be one of uniform, groups"),
        ({"device": ""}, "device='' is not accepted: it must be a text, not empty"),
        ({"save_best": 2}, "save_best=2 is not accepted: it must be True or False"),
        ({"model_init_kwargs": 1}, "model_init_kwargs=1 is not accepted: it must be a mapping, or None"),
    ],
)
def test_an_error_says_the_value_and_what_is_accepted(settings, words):
    with pytest.raises(ValueError) as refused:
        Config(**settings)
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_target": 1.0, "beta": 0}, "set beta above 0"),
        ({"disc_objective": "real_vs_generated"}, "set adversarial=True"),
        ({"adversarial": True, "reward_signal": "true"}, "set one of the two"),
        ({"reward_signal": "true", "query_rate": 0.5}, "set query_rate=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_a_config_is_plain_data():
    config = Config(report_to="wandb, trackio", output_dir=Path("run"), adversarial=0)
    assert config.report_to == ("wandb", "trackio") == Config(report_to=["wandb", "trackio"]).report_to
    assert config.output_dir == "run" and config.adversarial is False
    assert pickle.loads(pickle.dumps(config)) == Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert replace(config, beta=0.1).beta == 0.1
    with pytest.raises(AttributeError):
        config.beta = 1  # type: ignore[misc]


# --- the help of the command line


def sections(capsys, monkeypatch, columns: int) -> dict[str, dict[str, str]]:
    """{heading: {option: its help}} of `lora-gan train --help`, in the order of the page."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= columns
    parts = re.split(r"^(\S.*):\n(?=  -)", page, flags=re.MULTILINE)[1:]
    return {
        heading: {
            option: " ".join(text.split())
            for option, text in re.findall(r"^  --(\w+)((?:.*\n(?!  -|\n))*.*)", body, re.M)
        }
        for heading, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_help_has_ten_settings_first_and_the_others_by_group(capsys, monkeypatch):
    found = sections(capsys, monkeypatch, columns=80)
    headings = list(found)
    assert headings[3:] == [one.value for one in Group]
    first = list(found[headings[1]])
    assert len(first) == 10 and set(first) == marked(Config, Mark.FIRST)
    for one in Group:
        members = [field.name for field in fields(Config) if group(field) is one]
        assert list(found[one.value]) == [name for name in members if name not in first]


def test_help_has_the_range_and_the_unit_of_each_setting(capsys, monkeypatch):
    found = {
        option: text for section in sections(capsys, monkeypatch, 1000).values() for option, text in section.items()
    }
    assert found["save_steps"].endswith("(type: int | null, 1 or more, unit: steps, default: 100)")
    assert found["query_rate"].endswith("above 0, at most 1, unit: share of responses, default: null)")
    assert found["temperature"].endswith("(type: float, above 0, unit: none, default: 1.0)")
    for field in fields(Config):
        is_number = re.search(r"\(type: (int|float)\b", found[field.name])
        assert bool(is_number) == ("unit: " in found[field.name]), field.name


def test_every_setting_is_in_one_group_and_its_markers_are_understood():
    for field in fields(Config):
        kinds = [type(marker) for marker in markers(field)]
        assert kinds.count(Group) == 1 and set(kinds) <= {Group, Mark, Unit, *RANGE}, field.name


# --- no second list


def test_no_list_repeats_the_settings():
    repeated = []
    for file in Path(lora_gan.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                texts = {part.value for part in node.elts if isinstance(part, ast.Constant)}
                if len(texts & set(NAMES)) > 3:
                    repeated.append(f"{file.name}:{node.lineno}")
    assert repeated == []


# --- settings that are gone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_accepted_with_its_old_default_alone(name):
    default, successor = REMOVED[name]
    assert name not in NAMES
    assert Config.from_dict({name: default}) == Config()
    with pytest.raises(ValueError, match=re.escape(f"the setting {name} is gone: {successor}")):
        Config.from_dict({name: "another value"})


@pytest.mark.parametrize("name", sorted(REMOVED.keys() - {"reuse_answers"}))  # an option still
def test_a_yaml_file_may_hold_a_removed_setting_with_its_old_default_alone(name, tmp_path, monkeypatch, capsys):
    """Such as the train.yaml of a run that an earlier version made."""
    default, successor = REMOVED[name]
    configs, file = [], tmp_path / "train.yaml"
    monkeypatch.setattr("lora_gan.cli.training.run", lambda config, options: configs.append(config))
    run = {"model": "tiny", "data": "x.jsonl"}
    file.write_text(json.dumps(run | {name: default}), encoding="utf-8")
    assert cli.main(["train", "--config", str(file)]) == 0 and configs == [Config()]
    file.write_text(json.dumps(run | {name: "another value"}), encoding="utf-8")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert f"the setting {name} is gone: {successor}" in " ".join(capsys.readouterr().err.split())
