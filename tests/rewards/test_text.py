"""ROUGE and METEOR against the libraries called directly and by hand; length and repetition by hand."""

import sys
import types

import pytest

from lora_gan import rewards
from lora_gan.rewards import RewardUnavailable, text

PAIRS = [
    ("The cat sat on the mat.", "A cat was sitting on the mat"),
    ("It's a cheap pub, by the river!", "An inexpensive riverside pub."),
    ("the the the", "the cat"),
    ("Une café très bon", "Une cafe tres bon"),
    ("", "a target"),
]


@pytest.fixture
def wordnet():
    try:
        return text._wordnet()
    except (RewardUnavailable, ImportError) as error:
        pytest.skip(str(error))


# ----------------------------------------------------------------------------------------------------------- ROUGE


def test_rouge_equals_rouge_score():
    scorers = pytest.importorskip("rouge_score.rouge_scorer", reason="the extra `metrics` brings it")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = scorers.RougeScorer(kinds)
    for response, target in PAIRS:
        stock = scorer.score(target, response)
        for kind in kinds:
            assert rewards.rouge(response, target, kind=kind) == stock[kind].fmeasure
        assert rewards.rouge(response, target) == stock["rougeL"].fmeasure


def test_rouge_by_hand():
    pytest.importorskip("rouge_score", reason="the extra `metrics` brings it")
    # the cat sat / the cat ran away: 2 of 3 and 2 of 4 words, 1 of 2 and 1 of 3 pairs
    response, target = "The cat sat.", "the cat ran away"
    assert rewards.rouge(response, target, "rouge1") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rewards.rouge(response, target, "rouge2") == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert rewards.rouge("a b c", "c b a", "rouge1") == 1.0 and rewards.rouge("a b c", "c b a") == pytest.approx(1 / 3)
    assert type(rewards.rouge("", "a")) is float and rewards.rouge("", "a") == 0.0


def test_rouge_refuses():
    pytest.importorskip("rouge_score", reason="the extra `metrics` brings it")
    with pytest.raises(ValueError, match="kind='rouge7' is not accepted: .*rouge1, rouge2, rougeL"):
        rewards.rouge("a", "b", "rouge7")
    with pytest.raises(ValueError, match="no target"):
        rewards.rouge("a", None)


# ---------------------------------------------------------------------------------------------------------- METEOR


@pytest.fixture
def nothing_loaded():
    """Neither before the test nor, whatever it did, after it."""
    for cached in (text._rouge_scorer, text._wordnet):
        cached.cache_clear()
    yield
    for cached in (text._rouge_scorer, text._wordnet):
        cached.cache_clear()


def test_meteor_equals_nltk(wordnet):
    from nltk.translate.meteor_score import single_meteor_score

    # the example in nltk's documentation of single_meteor_score, whose answer is 0.6944
    response = "It is a guide to action which ensures that the military always obeys the commands of the party"
    target = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert rewards.meteor(response, target) == pytest.approx(0.6944, abs=5e-5)
    words = (["It", "'", "s", "a", "cheap", "pub", ",", "by", "the", "river", "!"], [*"An inexpensive".split(), "pub"])
    stock = single_meteor_score(words[1], words[0], wordnet=wordnet)
    assert rewards.meteor("It's a cheap pub, by the river!", "An inexpensive pub") == stock > 0


def test_meteor_by_hand(wordnet):
    # all three words match in one chunk: "a", and two by synonym; penalty 0.5 · (1/3)³
    assert rewards.meteor("a fast car", "a quick auto") == pytest.approx(1 - 0.5 / 27)
    assert rewards.meteor("dogs", "dog") == pytest.approx(0.5)  # by stem: one chunk of one word
    assert rewards.meteor("", "a cat") == rewards.meteor("zzz", "a cat") == 0.0
    assert rewards.meteor("a", "") == 0.0
    with pytest.raises(ValueError, match="no target"):
        rewards.meteor("a", None)


def test_rouge_and_meteor_name_the_extra_they_need(monkeypatch, nothing_loaded):
    for module in ("rouge_score.rouge_scorer", "nltk"):
        monkeypatch.setitem(sys.modules, module, None)
    for metric in (rewards.rouge, rewards.meteor):
        with pytest.raises(ImportError, match=r"lora-gan\[metrics\]"):
            metric("a", "b")


def test_meteor_without_wordnet_says_both_ways_to_get_it(monkeypatch, tmp_path, nothing_loaded):
    corpus = pytest.importorskip("nltk.corpus", reason="the extra `metrics` brings it")

    def absent():
        raise LookupError

    monkeypatch.setattr(corpus, "wordnet", types.SimpleNamespace(ensure_loaded=absent))
    monkeypatch.setattr(text, "DEBIANS_WORDNET", tmp_path / "absent")
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    with pytest.raises(RewardUnavailable, match="nltk.downloader wordnet.*wordnet-base.*WNSEARCHDIR.*absent"):
        rewards.meteor("a", "b")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "named"))
    with pytest.raises(RewardUnavailable, match="named"):
        rewards.meteor("a", "b")


def test_meteor_takes_nltks_own_wordnet_first(monkeypatch, nothing_loaded):
    corpus = pytest.importorskip("nltk.corpus", reason="the extra `metrics` brings it")

    def lemmas():
        return [types.SimpleNamespace(name=lambda: "wog")]

    own = types.SimpleNamespace(
        ensure_loaded=lambda: None, synsets=lambda word: [types.SimpleNamespace(lemmas=lemmas)] * (word == "wug")
    )
    monkeypatch.setattr(corpus, "wordnet", own)
    assert rewards.meteor("wug", "wog") == pytest.approx(0.5)  # a synonym in this WordNet alone


# --------------------------------------------------------------------------------------------------------- shaping


@pytest.mark.parametrize(
    ("words", "expected"),
    [(0, 0.0), (4, 0.5), (8, 1.0), (10, 1.0), (12, 1.0), (16, 0.5), (20, 0.0), (50, 0.0)],
)
def test_length_by_hand(words, expected):
    """10 wanted, missed by 2 for nothing: straight lines from 8 to 0 and from 12 to 20."""
    response = " a\n" * words
    assert rewards.Length(10, tolerance=0.2)(response) == pytest.approx(expected)
    assert rewards.Length(tolerance=0.2)(response, "b " * 10) == pytest.approx(expected)


def test_length_at_its_edges():
    assert [rewards.Length(2, tolerance=0)("a " * n) for n in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert rewards.Length()("", " ") == 1.0 and rewards.Length()("a", " ") == 0.0
    with pytest.raises(ValueError, match="no target"):
        rewards.Length()("a")
    with pytest.raises(ValueError, match="target_words is 0"):
        rewards.Length(0)
    for tolerance in (-0.1, 1.0):
        with pytest.raises(ValueError, match="it must be a share"):
            rewards.Length(5, tolerance)


def test_repetition_by_hand():
    assert rewards.repetition("a b c a b c") == pytest.approx(-1 / 4)  # abc bca cab abc: one of four has been before
    assert rewards.repetition("cheap, " * 9, "any target", 1) == pytest.approx(-8 / 9)
    assert rewards.repetition("a b c d") == rewards.repetition("a a") == rewards.repetition("") == 0.0
    assert rewards.repetition("a a", n=2) == 0.0 and rewards.repetition("a a a", n=2) == -0.5
    with pytest.raises(ValueError, match="n is 0"):
        rewards.repetition("a", n=0)
