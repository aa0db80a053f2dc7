"""Rewards by name, by file and by module, and every way of naming none."""

import sys

import pytest
from helpers import python

from lora_gan import rewards
from lora_gan.rewards import from_spec, from_specs, named, reward_name, score_parts

MINE = '''"""A user's file."""
import dataclasses
from neighbour import FACTOR

ran = []


def pair(response, target, scale=1.0, *, shift=0.0):
    return len(response) * scale + shift


def needs(response, target, threshold):
    return len(response) > threshold


def trl(prompts, completions, kind=None, **columns):
    ran.append(1)
    return [FACTOR * len(completion) for completion in completions]


@dataclasses.dataclass
class Judge:
    strict: bool = False
    threshold: int = 3

    def __call__(self, response, target):
        return float(len(response) > self.threshold)


class Silent:
    pass


number = 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbour.py").write_text("FACTOR = 10.0\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("neighbour", "mine"):
        sys.modules.pop(name, None)


def test_ready_made_rewards_by_name():
    assert from_spec("chrf") is rewards.chrf and from_spec("exact_match") is rewards.exact_match
    assert isinstance(from_spec("cosine"), rewards.CosineReward)
    assert isinstance(from_spec("length"), rewards.Length) and isinstance(from_spec("perplexity"), rewards.Perplexity)
    for name in set(named.READY) - {"human", "judge", "classifier", "entailment"}:
        assert reward_name(from_spec(name)) == name
    for name in ("classifier", "entailment"):
        reward = from_spec({"name": name, "model": "somewhere", "device": "cpu", "batch_size": 3})
        assert reward_name(reward) == name and (reward.model, reward.batch_size) == ("somewhere", 3)


@pytest.mark.parametrize("name", ["human", "judge"])
def test_human_and_judge_stand_where_they_are_named(name):
    module = pytest.importorskip(f"lora_gan.rewards.{name}", reason="not written yet", exc_type=ModuleNotFoundError)
    assert named._find(name) is getattr(module, name.capitalize()) is getattr(rewards, name.capitalize())


def test_options_reach_the_function_or_class():
    length = from_spec({"name": "length", "target_words": 4, "tolerance": 0})
    assert length("a b") == 0.5 and reward_name(length) == "length"
    twos = from_spec({"name": "repetition", "n": 2})
    assert twos("a b a b", None) == rewards.repetition("a b a b", n=2) == pytest.approx(-1 / 3)
    assert reward_name(twos) == "repetition"
    assert reward_name(from_spec({"name": "length", "as": "brevity"})) == "brevity"
    assert reward_name(from_spec({"name": "chrf", "as": "judge"})) == "judge" and reward_name(rewards.chrf) == "chrf"
    assert score_parts([twos], ["p"], ["a b a b"], {}) == {"repetition": [pytest.approx(-1 / 3)]}


def test_functions_and_classes_of_a_file(folder):
    pair, trl = from_spec("mine.py:pair"), from_spec(str(folder / "mine.py:trl"))
    scaled = from_spec({"name": "./mine.py:pair", "scale": 2.0, "shift": 1})
    judge = from_spec({"name": "mine.py:Judge", "threshold": 1})
    parts = score_parts([pair, trl, scaled, judge, from_spec("mine.py:Judge")], ["p"], ["abc"], {"kind": ["k"]})
    assert parts == {"pair": [3.0], "trl": [30.0], "pair_2": [7.0], "Judge": [1.0], "Judge_2": [0.0]}
    assert pair.__globals__["ran"] is trl.__globals__["ran"] == [1]  # one file is run once
    bound = from_spec({"name": "mine.py:trl", "note": 3})  # **columns takes any option
    assert score_parts([bound], ["p"], ["ab"], {}) == {"trl": [20.0]}


def test_a_file_that_changed_is_run_again(folder):
    (folder / "changing.py").write_text("def f(response, target):\n    return 1.0\n")
    assert from_spec("changing.py:f")("", None) == 1.0
    (folder / "changing.py").write_text("def f(response, target):\n    return 2.0\n")
    import os

    os.utime(folder / "changing.py", ns=(1, 1))
    assert from_spec("changing.py:f")("", None) == 2.0


def test_a_function_of_a_module(folder):
    assert from_spec("lora_gan.rewards.text:chrf") is rewards.chrf
    assert from_spec("mine:pair")("abc", None) == 3.0  # in the folder one stands in


def test_several_with_weights(folder):
    def own(response, target):
        return 0.0

    funcs, weights = from_specs(["chrf", {"name": "mine.py:pair", "weight": -2}, {"name": "length"}, own])
    assert [reward_name(func) for func in funcs] == ["chrf", "pair", "length", "own"]
    assert weights == [1.0, -2.0, 1.0, 1.0] and funcs[3] is own
    assert from_specs("chrf") == ([rewards.chrf], [1.0])
    assert from_specs({"name": "chrf", "weight": 0.5}) == ([rewards.chrf], [0.5])
    with pytest.raises(ValueError, match="empty list"):
        from_specs([])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("chfr", r"there is no reward 'chfr' \(did you mean 'chrf'\?\).*exact_match, chrf.*file.py:function"),
        ("zzz", r"there is no reward 'zzz'\. Ready-made rewards"),
        ("mine.py", "'mine.py' names a file: add the name of a function, as mine.py:function"),
        ("absent.py:f", "there is no file absent.py"),
        ("mine.py:", "names no function"),
        (":f", "names no function"),
        ("mine.py:pear", r"there is no 'pear' in mine.py \(did you mean 'pair'\?\)"),
        ("mine.py:number", "'mine.py:number' is of type int, not a function"),
        ("mine.py:Silent", r"which is not callable. A class needs __call__\(response, target\)"),
        ("mine.py:needs", "needs threshold: give it as {name: mine.py:needs, threshold: ...}"),
        ("classifier", "the reward 'classifier' needs model: give it as {name: classifier, model: ...}"),
        ("no_such_package.rewards:f", "there is no module 'no_such_package.rewards'"),
        ("lora_gan.rewards.absent:f", "there is no module 'lora_gan.rewards.absent'"),
        ("lora_gan.rewards.text:absent", "there is no 'absent' in lora_gan.rewards.text"),
        (3, "3 is not a reward"),
        ({"weight": 1}, "has no name"),
        ({"name": "chrf", "n": 3}, "'chrf' has no option 'n'; its options are weight, as"),
        (
            {"name": "length", "target_word": 3},
            r"no option 'target_word' \(did you mean 'target_words'\?\); its options are",
        ),
        ({"name": "rouge", "response": "x"}, "no option 'response'; its options are kind"),
        ({"name": "perplexity", "prompts": 3}, "no option 'prompts'; its options are batch_size"),
        (
            {"name": "mine.py:pair", "scales": 3},
            r"no option 'scales' \(did you mean 'scale'\?\); its options are scale, shift",
        ),
        ({"name": "length", "target_words": 0}, "target_words is 0"),
        ({"name": "chrf", "weight": "2"}, "weight='2' of the reward 'chrf'"),
        ({"name": "chrf", "weight": True}, "weight=True"),
        ({"name": "chrf", "weight": float("nan")}, "weight=nan"),
        ({"name": "chrf", "as": ""}, "as='' of the reward 'chrf'"),
    ],
    ids=str,
)
def test_what_names_no_reward_says_so_in_one_line(folder, spec, said):
    with pytest.raises(ValueError, match=said) as error:
        from_specs([spec])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(response, target)\n    return 1.0\n", r"broken.py, line 1: expected ':'"),
        ("x = 1\n\ny = x / 0\n", r"broken.py raised ZeroDivisionError when imported \(.*broken.py, line 3\): division"),
        ("import no_such_library\n", "raised ModuleNotFoundError .*line 1.*no_such_library"),
        ("import sys\nsys.exit(2)\n", "raised SystemExit when imported .*line 2"),
        ("raise ValueError\n", r"raised ValueError when imported \(.*line 1\)$"),
    ],
)
def test_a_file_that_cannot_be_imported_says_where(folder, source, said):
    (folder / "broken.py").write_text(source)
    for spec in ("broken.py:f", "broken:f"):
        with pytest.raises(ValueError, match=said.replace("broken.py raised", "broken(.py)? raised")) as error:
            from_spec(spec)
        assert "\n" not in str(error.value)
        sys.modules.pop("broken", None)


FACTORIES = """
from __future__ import annotations
from collections.abc import Callable
import typing


def make(scale=2.0, shift=0.0):
    def scaled(response):
        return scale * len(response) + shift
    return scaled


def annotated(scale, shift=0.0) -> Callable[[str], float]:
    return make(scale, shift)


def annotated_by_typing(reference=None) -> typing.Callable:
    return lambda completions, **columns: [float(text == reference) for text in completions]


def of_trls_form(scale=2.0):
    return lambda completions, **columns: [scale * len(text) for text in completions]


def no_options():
    return Object()


class Object:
    def __call__(self, prompt, response):
        return float(len(prompt))


def shared(n=1):
    return module_level


def module_level(response):
    return 7.0


def makes_nothing(n=1):
    return n


def makes_what_cannot_be_called_so(n=1):
    return lambda prompt, answer: 1.0


def either(reference=None):
    return 1.0


def either_too(scale=1.0, reference=None):
    return 1.0


def not_annotated(scale, shift):
    return make(scale, shift)


def by_position(text, scale):
    return scale * len(text)
"""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("made.py:make", 6.0),
        ({"name": "made.py:make", "scale": 3.0, "shift": 1}, 10.0),
        ({"name": "made.py:annotated", "scale": 3.0}, 9.0),
        ("made.py:annotated_by_typing", 0.0),
        ({"name": "made.py:annotated_by_typing", "reference": "abc"}, 1.0),
        ({"name": "made.py:of_trls_form", "scale": 4.0}, 12.0),
        ("made.py:no_options", 1.0),
        ({"name": "made.py:not_annotated", "scale": 3.0, "shift": 1}, 10.0),
        ({"name": "made.py:by_position", "scale": 5.0}, 15.0),
        ({"name": "made.py:shared", "as": "seven"}, 7.0),
    ],
    ids=str,
)
def test_a_function_that_makes_a_reward_is_called_with_its_options(folder, spec, expected):
    (folder / "made.py").write_text(FACTORIES)
    made = from_spec(spec)
    assert list(score_parts([made], ["p"], ["abc"], {}).values()) == [[expected]]
    if isinstance(spec, dict) and "as" in spec:
        assert reward_name(made) == "seven" and reward_name(from_spec("made.py:module_level")) == "module_level"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("made.py:annotated", r"needs scale: give it as {name: made.py:annotated, scale: ...}"),
        ({"name": "made.py:annotated", "scales": 1}, r"no option 'scales' \(did you mean 'scale'\?\)"),
        ({"name": "made.py:annotated", "shift": 1}, "needs scale"),
        (
            "made.py:makes_nothing",
            "so it was called to make a reward. It returned 1, which is not callable",
        ),
        ("made.py:makes_what_cannot_be_called_so", "no value is known for answer, only for prompt"),
        (
            "made.py:either",
            "a reward that gets a response as reference, or a function that makes a reward.*->",
        ),
        ("made.py:either_too", "could be a reward that gets a response as reference"),
        ({"name": "made.py:make", "scale": 1, "n": 3}, "no option 'n'; its options are scale, shift"),
    ],
    ids=str,
)
def test_what_makes_no_reward_or_could_be_one_is_refused(folder, spec, said):
    (folder / "made.py").write_text(FACTORIES)
    with pytest.raises(ValueError, match=said) as error:
        from_spec(spec)
    assert "\n" not in str(error.value)


def test_a_factory_without_its_options_is_noticed_when_it_is_asked(folder):
    """By its names alone it looks like a reward of (response, target)."""
    (folder / "made.py").write_text(FACTORIES.replace("make(scale, shift)", "make()"))
    with pytest.raises(rewards.RewardError, match="If the function makes a reward, call it first"):
        score_parts([from_spec("made.py:not_annotated")], ["p"], ["abc"], {})


def test_naming_rewards_brings_nothing_heavy():
    out = python(
        "import sys\n"
        "from lora_gan.rewards import from_specs\n"
        "from_specs(['chrf', 'rouge', 'meteor', 'length', 'perplexity', {'name': 'classifier', 'model': 'x'}])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'nltk') if name in sys.modules])"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    "options", [{"name": "length", "target_words": "many"}, {"name": "judge", "model": "m", "scale": 5}]
)
def test_an_option_of_the_wrong_type_is_said(options):
    if options["name"] == "judge":
        pytest.importorskip("openai", reason="the judge's client is not installed")
    with pytest.raises(ValueError, match=f"the reward '{options['name']}' cannot be made with"):
        from_spec(options)
