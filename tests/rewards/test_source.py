"""A reward is the one that answered before only while its source is: the digest, and what an answer log makes of it."""

import functools
import json
import linecache
import textwrap
import types
import warnings
from unittest.mock import Mock

import pytest
from helpers import PROMPTS, Gone, dies, python, reward, small_gan

from lora_gan import rewards
from lora_gan.rewards import CosineReward, Judge, Length, from_spec, source_digest
from lora_gan.rewards.answers import FILE

BODY = """
import functools

SCALE = 2.0
calls = 0

def helper(text):
    return len(text)

def plain(response, target=None, power=1):
    return SCALE * helper(response) ** power

def other(response):
    return 0.0

class Scored:
    def __init__(self, threshold=3):
        self.threshold, self.calls = threshold, 0
    def __call__(self, response, target=None):
        return self.score(response)
    def score(self, response):
        return float(len(response) > self.threshold)

def decorated(func):
    def wrapper(response, target=None):
        return func(response)
    return wrapper

def closure(n, seen=()):
    asked = []
    def scored(response):
        asked.append(response)
        return float(n)
    return scored

lambda_one, lambda_two = lambda response: 1.0, lambda response: 2.0
bound = Scored().score
wrapped = decorated(other)
cached = functools.lru_cache(other)
five = closure(5)
partial = functools.partial(plain, power=2)
"""
NAMES = ["plain", "scored", "lambda_one", "lambda_two", "bound", "wrapped", "cached", "five", "partial"]


def loaded(folder, body, name="mine", *, interactive=False):
    """The names of a module with this text; in an interactive session nobody can read the text again."""
    body = textwrap.dedent(body)
    spaces: dict = {"__name__": name}
    file = "<stdin>" if interactive else str(folder / f"{name}.py")
    if not interactive:
        (folder / f"{name}.py").write_text(body)
        linecache.checkcache(file)
    exec(compile(body, file, "exec"), spaces)
    spaces["scored"] = spaces["Scored"]()
    return spaces


def digests(spaces):
    return {name: source_digest(spaces[name]) for name in NAMES}


@pytest.mark.parametrize("interactive", [False, True])
def test_the_same_source_has_the_same_digest(tmp_path, interactive):
    first = digests(loaded(tmp_path, BODY, interactive=interactive))
    assert digests(loaded(tmp_path, BODY, interactive=interactive)) == first
    if not interactive:
        moved = tmp_path / "elsewhere"
        moved.mkdir()
        assert digests(loaded(moved, BODY, "renamed")) == first, "where a file lies is no part of its source"
    assert len(set(first.values())) == len(NAMES)


CHANGES = [
    ("SCALE = 2.0", "SCALE = 3.0", {"plain", "partial"}),  # a constant that it names
    ("return len(text)", "return len(text) + 1", {"plain", "partial"}),  # a function that it names
    ("** power", "* power", {"plain", "partial"}),  # its own
    ("power=1", "power=3", {"plain", "partial"}),  # a default value
    ("power=2", "power=4", {"partial"}),
    ("return 0.0", "return 1.5", {"wrapped", "cached"}),  # what is wrapped
    ("return func(response)", "return -func(response)", {"wrapped"}),  # what wraps it
    ("> self.threshold", ">= self.threshold", {"scored", "bound"}),
    ("return self.score(response)", "return -self.score(response)", {"scored"}),
    ("closure(5)", "closure(6)", {"five"}),
    ("return float(n)", "return float(n) / 2", {"five"}),
    ("calls = 0", "calls = 7", set()),  # a count is no source
    ("def other(", "ELSEWHERE = 1\n\ndef other(", set()),
]


@pytest.mark.parametrize("interactive", [False, True], ids=["file", "interactive"])
@pytest.mark.parametrize(("before", "after", "changed"), CHANGES, ids=[change[1][:24] for change in CHANGES])
def test_what_changes_the_answers_changes_the_digest(tmp_path, before, after, changed, interactive):
    first = digests(loaded(tmp_path, BODY, interactive=interactive))
    assert BODY.count(before) == 1
    second = digests(loaded(tmp_path, BODY.replace(before, after), interactive=interactive))
    assert {name for name in NAMES if first[name] != second[name]} == changed


def test_running_a_reward_does_not_change_it(tmp_path):
    spaces = loaded(tmp_path, BODY)
    first = digests(spaces)
    for name in NAMES:
        spaces[name]("text")
    spaces["scored"].calls += 1
    assert digests(spaces) == first


def test_it_is_the_same_in_every_process():
    code = (
        "from lora_gan.rewards import *\n"
        "from lora_gan.rewards import source_digest\n"
        "def chosen(response, words={'a', 'b', 'c'}, names=('x', 1)): return float(response in {'k', 'l', 'm', 'n'})\n"
        "def made(n):\n"
        "    return lambda response: n\n"
        "funcs = [chosen, made(3), len, max, CosineReward(), Length(3), chrf, print.__call__]\n"
        "print([source_digest(func) for func in funcs])"
    )
    assert python(code, hash_seed=1) == python(code, hash_seed=2)


def test_settings_of_ready_made_rewards():
    same = [
        (Length(3), Length(3)), (CosineReward(batch_size=2), CosineReward(batch_size=9, device="cpu")),
        (from_spec({"name": "length", "target_words": 3}), Length(3)), (rewards.chrf, from_spec("chrf")),
    ]  # fmt: skip
    other = [
        (Length(3), Length(4)), (CosineReward(), CosineReward("some/folder")), (Length(), CosineReward()),
        (from_spec({"name": "rouge", "kind": "rouge1"}), from_spec({"name": "rouge", "kind": "rouge2"})),
        (from_spec({"name": "length", "tolerance": 0.2}), Length()),
    ]  # fmt: skip
    for one, two in same:
        assert source_digest(one) == source_digest(two)
    for one, two in other:
        assert source_digest(one) != source_digest(two)


def test_settings_of_a_judge():
    pytest.importorskip("openai", reason="the judge's client is not installed")

    def digest(model="m", key="secret", **options):
        return source_digest(Judge(model, api_key=key, base_url="http://127.0.0.1:9", **options))

    assert digest() == digest(key="another") == digest(max_concurrency=2)
    assert (
        len({digest(), digest("n"), digest(rubric="{response}?"), digest(temperature=1.0), digest(scale=(0, 5))}) == 5
    )


def test_options_by_which_a_reward_was_made(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, n, api_key=None): self.n = n\n"
        "    def __call__(self, response): return 1.0\n"
        "def make(n=1):\n    return Mine(n)\n"
    )

    def digest(name, **options):
        return source_digest(from_spec({"name": f"{tmp_path / 'mine.py'}:{name}", **options}))

    assert digest("Mine", n=1) == digest("Mine", n=1, api_key="x") != digest("Mine", n=2)
    assert digest("make", n=1) == digest("make", n=1) != digest("make", n=2)
    pytest.importorskip("trl")

    def of_trl(cache):
        return source_digest(
            from_spec({"name": "trl.rewards:get_soft_overlong_punishment", "max_completion_len": 9,
                       "soft_punish_cache": cache})
        )  # fmt: skip

    assert of_trl(3) == of_trl(3) != of_trl(4)


def test_a_bound_callable_is_described_by_what_is_called():
    class Owner:
        pass

    def bound(value):
        return source_digest(types.MethodType(functools.partial(max, value), Owner()))

    assert bound(1) == bound(1) != bound(2)


def test_odd_callables_have_a_digest():
    class Text(str):
        def __repr__(self):
            raise RuntimeError

    loop: list = []
    loop.append(loop)
    given = [loop, 10**5000, Text("x"), reward, {1: loop}]
    odd = [max, len, str.upper, str.lower, "".join, Mock(), *(functools.partial(max, value) for value in given)]
    found = [source_digest(func) for func in odd]
    assert found == [source_digest(func) for func in odd] and all(len(digest) == 32 for digest in found)
    assert len(set(found[:6])) == 6


# --- and the log of answers -------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}"} for i in range(6)]


def paid(value, asked, goes_at=None):
    """A reward whose source is told apart by a value in its closure; lists in a closure do not count."""
    state = [goes_at]

    def scored(response, target=None):
        if len(asked) == state[0]:
            raise Gone
        asked.append(response)
        return value * reward(response)

    return scored


def run(folder, func, steps, **settings):
    gan = small_gan(output_dir=str(folder), reward=func, save_steps=2, query_rate=0.5, **settings)
    if list(folder.glob("step-*")):
        gan.load_checkpoint()
    return gan.fit(ROWS, steps=steps - gan.global_step, progress=False)


@pytest.fixture
def broken_off(tmp_path):
    """A run of two steps that was gone after six of eight answers."""
    with dies():
        run(tmp_path, paid(1.0, [], 6), 2)
    return tmp_path


def test_the_same_reward_goes_on(broken_off):
    asked = []
    with pytest.warns(UserWarning, match="6 answers of the true reward are reused"):
        run(broken_off, paid(1.0, asked), 2)
    assert len(asked) == 2


def test_a_changed_reward_asks_again_and_says_why_once(broken_off):
    asked = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        records = run(broken_off, paid(2.0, asked), 2)
    (said,) = [str(warning.message) for warning in told if "answers" in str(warning.message)]
    assert "6 answers" in said and "are not reused" in said and "'scored' has changed" in said
    assert "reuse_answers=True" in said
    assert len(asked) == 8
    true = [value for value in sum(records[0]["true_rewards"], []) if value is not None]
    assert true == [2.0 * reward(text) for text in asked[:4]]


def test_a_changed_reward_is_reused_where_that_is_asked_for(broken_off):
    asked = []
    with pytest.warns(UserWarning, match=r"6 answers .* are reused .*6 answers are from another source of 'scored'"):
        run(broken_off, paid(2.0, asked), 2, reuse_answers=True)
    assert len(asked) == 2


@pytest.mark.parametrize("reuse", [False, True])
def test_after_the_warning_it_is_not_too_late(broken_off, reuse):
    """The run that does not take them leaves them in the file: for the old source, or for the next start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dies():
            run(broken_off, paid(2.0, [], 1), 2)
        asked = []
        run(broken_off, paid(2.0 if reuse else 1.0, asked), 2, reuse_answers=reuse)
    # No answer of the first step is asked for again. With one of the new source among them the second step is another.
    assert len(asked) == (4 if reuse else 2)
    lines = [json.loads(line) for line in (broken_off / FILE).read_text().splitlines()]
    assert all(len(digest) == 32 for digest in lines[0]["run"]["sources"].values())


def test_its_own_answer_comes_before_one_of_another_source(broken_off):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dies():
            run(broken_off, paid(2.0, [], 1), 2)
        records = run(broken_off, paid(2.0, []), 2, reuse_answers=True)
    first, *others = [
        true / reward(text)
        for group, trues in zip(records[0]["responses"], records[0]["true_rewards"], strict=True)
        for text, true in zip(group, trues, strict=True)
        if true is not None
    ]
    assert first == pytest.approx(2.0) and others == pytest.approx([1.0] * 3)


def test_each_reward_is_looked_at_on_its_own(tmp_path):
    def other(response, target=None):
        others.append(response)
        return 1.0

    def both(value, asked, goes_at=None):
        return small_gan(output_dir=str(tmp_path), reward_funcs=[other, paid(value, asked, goes_at)], save_steps=2)

    others: list = []
    with dies():
        both(1.0, [], 4).fit(ROWS, steps=1, progress=False)
    assert len(others) == 8
    with pytest.warns(UserWarning) as told:
        both(2.0, asked := []).fit(ROWS, steps=1, progress=False)
    said = [str(warning.message) for warning in told if "answers of" in str(warning.message)]
    assert len(others) == 8 and len(asked) == 8
    assert "8 answers of the true reward are reused" in said[0] and "the source of 'scored'" in said[1]


def test_a_log_of_an_older_release_is_not_taken_silently(broken_off):
    path = broken_off / FILE
    header, *lines = path.read_text().splitlines()
    run_before = json.loads(header)["run"]
    del run_before["sources"]
    path.write_text("\n".join([json.dumps({"run": run_before}), *lines]) + "\n")
    with pytest.warns(UserWarning, match="6 answers .* are not reused.*or was not logged"):
        run(broken_off, paid(1.0, asked := []), 1)
    assert len(asked) == 4
    with pytest.warns(UserWarning, match="answers of the true reward are reused"):
        run(broken_off, paid(1.0, asked := []), 2, reuse_answers=True)


@pytest.mark.parametrize("header", ['{"run": []}', '{"run": {"sources": 3}}', "{}", '{"run": null}'])
def test_a_header_that_is_damaged_takes_nothing(broken_off, header):
    path = broken_off / FILE
    path.write_text("\n".join([header, *path.read_text().splitlines()[1:]]) + "\n")
    run(broken_off, paid(1.0, asked := []), 1)
    assert len(asked) == 4
