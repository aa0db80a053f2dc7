"""Both forms of a reward told apart and mixed, chats as TRL hands them on; the scales against NumPy."""

import functools
import inspect
import json
import math
import re

import numpy as np
import pytest

from lora_gan import rewards
from lora_gan.rewards import RewardError, Scales, score_parts, score_trl, takes_completions, weighted_total

# ---------------------------------------------------------------------------------------------------- the two forms


def pair(response, target):
    return float(len(response))


def pair_and_more(response, target=None, *, strict=False, **options):
    return float(len(response)) + strict


def trl(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def trl_by_keyword(*, completions, kind=None, **columns):
    return [1.0] * len(completions)


class PairObject:
    def __call__(self, response, target):
        return 1.0

    def method(self, response, target):
        return 1.0


class TrlObject:
    def __call__(self, prompts, completions, **columns):
        return [1.0] * len(prompts)

    def method(self, completions, **columns):
        return [1.0] * len(completions)

    @staticmethod
    def static(**columns):
        return [1.0] * len(columns["completions"])


class Batched(PairObject):
    def batch(self, responses, targets, **kwargs):
        return [2.0] * len(responses)


@functools.wraps(pair)
def wrapped(*args, **kwargs):
    return pair(*args, **kwargs)


def column_first(kind, **columns):
    return [1.0] * len(columns["completions"])


FORMS = [
    (pair, False), (pair_and_more, False), (lambda response, target: 1.0, False), (lambda r, t=None: 1.0, False),
    (lambda *texts: 1.0, False), (PairObject(), False), (PairObject().method, False), (Batched(), False),
    (functools.partial(pair_and_more, strict=True), False), (wrapped, False), (max, False), (rewards.chrf, False),
    (functools.partial(rewards.rouge, kind="rouge1"), False),
    (trl, True), (trl_by_keyword, True), (lambda completions, **c: [1.0] * len(completions), True),
    (lambda prompts, completions: [1.0] * len(prompts), True), (lambda **c: [1.0] * len(c["prompts"]), True),
    (lambda *a, **c: [1.0] * len(c["prompts"]), True), (lambda prompts, kind, **c: [1.0] * len(prompts), True),
    (TrlObject(), True), (TrlObject().method, True), (TrlObject.static, True), (column_first, True),
    (functools.partial(trl, threshold=2), True), (rewards.Perplexity(), True),
]  # fmt: skip


def name_of(value):
    """A test's name without an address, which differs between processes."""
    return getattr(value, "__qualname__", re.sub(r" at 0x.*", "", repr(value)))


@pytest.mark.parametrize(("func", "expected"), FORMS, ids=name_of)
def test_the_form_is_read_off_the_signature(func, expected):
    assert takes_completions(func) is expected


def test_what_has_no_signature_is_of_the_pair_form():
    with pytest.raises(ValueError):
        inspect.signature(max)
    assert takes_completions(max) is False


CALLED = [func for func, _ in FORMS if func not in (max, rewards.chrf) and not hasattr(func, "bind")]


@pytest.mark.parametrize("func", CALLED, ids=name_of)
def test_every_form_is_called_as_it_was_read(func):
    if isinstance(func, functools.partial) and func.func is rewards.rouge:
        pytest.importorskip("rouge_score", reason="the extra `metrics` brings it")
    columns = {"target": ["a", "c"], "kind": [1, 2]}
    if takes_completions(func) and "**" not in str(inspect.signature(func)):
        columns = {}
    (scores,) = score_parts([func], ["p", "q"], ["a", "bb"], columns).values()
    assert len(scores) == 2 and all(type(score) is float for score in scores)


def test_both_forms_in_one_list_by_hand():
    seen = []

    def exact(response, target):
        seen.append((response, target))
        return float(response == target)

    parts = score_parts([exact, trl, Batched()], ["p", "q"], ["a", "bb"], {"target": ["a", None]})
    assert parts == {"exact": [1.0, 0.0], "trl": [1.0, 2.0], "Batched": [2.0, 2.0]}
    assert seen == [("a", "a"), ("bb", None)]
    totals, same = score_trl([exact, trl], [10.0, 1.0], ["p", "q"], ["a", "bb"], {"target": ["a", None]})
    assert totals == [11.0, 2.0] and list(same) == ["exact", "trl"]
    assert score_parts([lambda response, target: target is None], ["p"], ["a"], {}) == {"<lambda>": [1.0]}


def test_trls_further_keywords_are_taken():
    further = {"trainer_state": [object()], "log_extra": [print], "target": ["t"], "completion_ids": [[1, 2]]}
    assert score_trl([trl], None, ["p"], ["abc"], further)[0] == [3.0]
    ready = rewards.Perplexity(), rewards.Classifier("x"), rewards.Entailment("x")
    for reward in ready:  # called directly, as GRPOTrainer does
        inspect.signature(reward).bind(
            prompts=[], completions=[], completion_ids=[], trainer_state=None, log_extra=print
        )


def test_chats_are_handed_on_as_trl_does():
    seen = {}

    def messages(prompts, completions, **columns):
        seen["prompts"], seen["completions"] = prompts, completions
        completions[0][0]["content"] = "spoilt"
        return [0.0] * len(prompts)

    def words(response, target):
        return len(response.split())

    chat = [{"role": "user", "content": "hi"}]
    parts = score_parts([messages, words, messages], [chat, "plain"], ["a b c", "d e"], {})
    assert seen["prompts"] == [chat, "plain"]
    assert seen["completions"] == [[{"role": "assistant", "content": "spoilt"}], "d e"]
    assert parts["words"] == [3.0, 2.0]
    answered = [[{"role": "assistant", "content": "a b"}]]  # chat messages already
    assert score_parts([words], [chat], answered, {}) == {"words": [2.0]}


def test_what_a_sum_of_rewards_refuses():
    def fragile(response, target):
        raise KeyError(response)

    with pytest.raises(RewardError, match=r"'fragile_2' raised KeyError on row 0 \(response 'a', target None\)"):
        score_parts([named("fragile", pair), named("fragile", fragile)], ["p"], ["a"], {})
    for column in ("prompts", "completions"):
        with pytest.raises(ValueError, match=f"a column must not be called '{column}'"):
            score_parts([trl], ["p"], ["a"], {column: ["x"]})
    with pytest.raises(ValueError, match="no reward functions"):
        score_parts([], ["p"], ["a"], {})
    asked = []
    with pytest.raises(ValueError, match="2 reward weights for 1"):
        score_trl([lambda r, t: asked.append(r)], [1.0, 2.0], ["p"], ["a"], {})
    assert asked == []  # nothing was paid for before the mistake was found


def named(name, func):
    func = functools.partial(func)
    func.__name__ = name
    return func


def test_weighted_total_by_hand():
    parts = {"a": [1.0, None, 2.0], "b": [10.0, None, None]}
    assert weighted_total(parts, [2.0, -1.0]) == [-8.0, None, 4.0]
    assert weighted_total(parts) == [11.0, None, 2.0]
    with pytest.raises(ValueError, match="1 reward weights for 2"):
        weighted_total(parts, [1.0])


# ---------------------------------------------------------------------------------------------------------- scales


def test_alone_in_their_groups_the_scale_is_numpys_standard_deviation():
    values = np.random.default_rng(0).normal(loc=1000.0, scale=3.0, size=200)  # a mean that naive sums of squares lose
    scales = Scales()
    for step in values.reshape(20, 10):
        scales.update({"a": step.tolist()})
    assert scales.scale("a") == pytest.approx(values.std(ddof=1), rel=1e-10)


def test_within_groups_the_scale_is_numpys_pooled_standard_deviation():
    rng = np.random.default_rng(1)
    between, within = rng.normal(scale=50.0, size=(10, 3, 1)), rng.normal(scale=2.0, size=(10, 3, 8))
    steps = between + within  # 10 steps of 3 prompts with 8 responses
    scales = Scales()
    for step in steps:
        scales.update({"a": step.ravel().tolist()}, np.repeat(np.arange(3), 8).tolist())
    assert scales.scale("a") == pytest.approx(math.sqrt(steps.var(axis=-1, ddof=1).mean()), rel=1e-10)
    assert scales.scale("a") < 3 < steps.std()


def test_groups_of_several_sizes_and_unanswered_rows():
    scores = [1.0, 4.0, None, 7.0, 2.0, 3.0, None]
    groups = ["x", "x", "x", "y", "x", "z", "z"]
    scales = Scales()
    scales.update({"a": scores}, groups)
    x = np.array([1.0, 4.0, 2.0])
    # y and z stand alone: each by its distance from the mean of all before it, Welford's increment
    y = (7.0 - x.mean()) * (7.0 - np.mean([*x, 7.0]))
    z = (3.0 - np.mean([*x, 7.0])) * (3.0 - np.mean([*x, 7.0, 3.0]))
    assert scales.scale("a") == pytest.approx(math.sqrt((((x - x.mean()) ** 2).sum() + y + z) / (2 + 1 + 1)))
    with pytest.raises(ValueError):
        scales.update({"a": scores}, groups[:-1])


def test_until_answers_differ_the_scale_is_one():
    scales = Scales()
    assert scales.scale("a") == 1.0
    for scores in ([5.0], [None], [5.0, 5.0]):
        scales.update({"a": scores})
        assert scales.scale("a") == 1.0
    scales.update({"a": [5.0 + 1e-9]})  # rounding is no difference
    assert scales.scale("a") == 1.0
    scales.update({"a": [6.0]})
    assert scales.scale("a") == pytest.approx(np.std([5.0, 5.0, 5.0, 5.0, 6.0], ddof=1))


def test_scales_freeze_after_the_window():
    scales = Scales(window=6)
    scales.update({"a": [0.0, 1.0, 2.0, 3.0], "b": [1.0, None, None, 3.0]})
    scales.update({"a": [4.0, 5.0, 60.0], "b": [5.0, None, None]})  # the update that reaches 6 still counts whole
    frozen = scales.scale("a")
    assert frozen == pytest.approx(np.std([0, 1, 2, 3, 4, 5, 60], ddof=1))
    scales.update({"a": [1e6, -1e6], "b": [7.0, 9.0]})
    assert scales.scale("a") == frozen
    assert scales.scale("b") == pytest.approx(np.std([1, 3, 5, 7, 9], ddof=1))  # b counts its own answers
    with pytest.raises(ValueError, match="window=1 is not accepted"):
        Scales(window=1)


def test_the_total_weighs_parts_in_their_own_spread():
    parts = {"cosine": [0.1, 0.2, None, None], "logit": [-30.0, 50.0, 10.0, None]}
    scales = Scales()
    assert scales.total(parts, [1.0, 0.5]) == weighted_total(parts, [1.0, 0.5])
    scales.update(parts)
    a, b = np.std([0.1, 0.2], ddof=1), np.std([-30.0, 50.0, 10.0], ddof=1)
    expected = [0.1 / a - 30.0 * 0.5 / b, 0.2 / a + 50.0 * 0.5 / b, 10.0 * 0.5 / b]
    totals = scales.total(parts, [1.0, 0.5])
    assert totals[:3] == pytest.approx(expected) and totals[3] is None
    assert scales.total({"logit": [1.0]}) == pytest.approx([1 / b])  # parts are known by name
    before = scales.state_dict()
    scales.total(parts)
    assert scales.state_dict() == before  # evaluation changes nothing


def test_scales_go_on_from_json_to_the_bit():
    rng = np.random.default_rng(2)
    steps = rng.normal(size=(6, 2, 8)).tolist()
    groups = [0, 0, 0, 0, 1, 1, 1, 2]
    straight, first, second = Scales(40), Scales(40), Scales(40)
    for step in steps:
        straight.update({"a": step[0], "b": step[1]}, groups)
    for step in steps[:3]:
        first.update({"a": step[0], "b": step[1]}, groups)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[3:]:
        second.update({"a": step[0], "b": step[1]}, groups)
    assert second.state_dict() == straight.state_dict()
    assert second.scale("a") == straight.scale("a") != first.scale("a")
    assert {type(v) for part in straight.state_dict().values() for v in part.values()} == {int, float}
