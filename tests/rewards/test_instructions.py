"""The demo's instructions: checkers against cases judged by hand, and the promises about the splits."""

import pytest
from test_imports import heavy_after

from lora_gan.rewards import instructions

MET = [
    ("at_most:5", "The sea is wide."),
    ("at_most:5", "One two three four five"),
    ("contains:quiet", "A Quiet, lovely place."),
    ("ends:the end", "That was all. The end!"),
    ("ends:in the world", "It is the best bread in the world."),
    ("exclaim", "We like it! "),
    ("list", "- salt\n- a wave\n- sand"),
    ("list", "\n- salt and pepper\n\n- fish\n- red sand\n"),
    ("no_comma", "Salt and sand; waves"),
    ("question", "Is it blue?"),
    ("sentence", "The sea is 3.5 km wide."),
    ("sentence", 'He said "it is wide."'),
    ("starts:Today", '"Today," she said'),
    ("starts:Well", "well it is wide"),
]
MISSED = [
    ("at_most:5", "One two three four five six"),
    ("at_most:5", "One."),  # a single word is no answer
    ("contains:quiet", "It was quietly done."),
    ("ends:the end", "The end is near."),
    ("ends:the end", "the"),
    ("exclaim", "We like it! Yes."),
    ("list", "- salt\n- sand"),
    ("list", "- salt\n- sand\n- waves\n- fish"),
    ("list", "Here:\n- salt\n- sand\n- waves"),
    ("list", "* salt\n* sand\n* waves"),
    ("list", "- red\n- salt\n- sand"),  # copied from the example of a phrasing
    ("list", "-\n- \n- sand"),
    ("no_comma", "Salt, sand"),
    ("question", "Is it blue? Yes."),
    ("sentence", "It is wide. It is blue."),
    ("sentence", "It is wide and"),
    ("starts:Today", "It is today."),
]


@pytest.mark.parametrize(("constraint", "answer"), MET)
def test_met_by_hand(constraint, answer):
    assert instructions.met(constraint, answer) is True
    assert instructions.graded(constraint, answer) == 1


@pytest.mark.parametrize(("constraint", "answer"), MISSED)
def test_missed_by_hand(constraint, answer):
    assert instructions.met(constraint, answer) is False
    assert 0 <= instructions.graded(constraint, answer) <= 0.5


def test_the_cases_cover_every_kind():
    for cases in (MET, MISSED):
        assert {constraint.partition(":")[0] for constraint, _ in cases} == set(instructions.KINDS)


@pytest.mark.parametrize("kind", instructions.KINDS)
@pytest.mark.parametrize("answer", ["", " \n", "?!", "- 1\n- 2\n- 3", "5 6 7!"])
def test_an_answer_without_letters_meets_nothing(kind, answer):
    constraint = f"{kind}:{instructions.KINDS[kind].values[0]}".rstrip(":")
    assert not instructions.met(constraint, answer)
    assert instructions.graded(constraint, answer) == 0


def test_closeness_by_hand():
    assert instructions.graded("at_most:4", "a b c d e f") == pytest.approx((1 - 2 / 4) / 2)
    assert instructions.graded("at_most:4", "a b c d e f g h i") == 0
    assert instructions.graded("no_comma", "a, b, c, d") == pytest.approx(1 / 4 / 2)
    assert instructions.graded("list", "- salt\n- sand") == pytest.approx(2 / 4 / 2)
    assert instructions.graded("starts:Today", "Tomorrow") == 0
    assert instructions.share_met(["question", "no_comma"], "Red, or blue?") == 0.5


def test_the_reward_takes_texts_and_messages():
    constraints = [["question", "no_comma"], ["exclaim"]]
    answers = ["Red, or blue?", "No."]
    messages = [[{"role": "assistant", "content": answer}] for answer in answers]
    wanted = [(1 + 1 / 2 / 2) / 2, 0.0]
    assert instructions.reward(answers, constraints) == pytest.approx(wanted)
    assert instructions.reward(completions=messages, constraints=constraints, prompts=[]) == pytest.approx(wanted)


def test_unknown_names_say_what_exists():
    with pytest.raises(ValueError, match=r"'rhyme'.*at_most"):
        instructions.met("rhyme:sea", "the sea")
    with pytest.raises(ValueError, match=r"'test'.*heldout"):
        instructions.rows("test", 3)


def test_the_splits_share_no_topic_and_no_pair():
    topics = [set(instructions.topics_of(split)) for split in instructions.SPLITS]
    pairs = [set(map(frozenset, instructions.pairs_of(split))) for split in instructions.SPLITS]
    for parts in (topics, pairs):
        assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*topics) == set(instructions.TOPICS)
    assert not set().union(*pairs) & instructions.CONTRADICTIONS


@pytest.mark.parametrize("split", instructions.SPLITS)
def test_rows_keep_to_their_split(split):
    rows = instructions.rows(split, 128)
    assert rows == instructions.rows(split, 128) and rows[:64] == instructions.rows(split, 64)
    assert rows != instructions.rows(split, 128, seed=1)
    texts = [row["prompt"][0]["content"] for row in rows]
    assert len(set(texts)) == 128
    allowed = set(map(frozenset, instructions.pairs_of(split)))
    topics = instructions.topics_of(split)
    for row, text in zip(rows, texts, strict=True):
        kinds = [constraint.partition(":")[0] for constraint in row["constraints"]]
        assert len(kinds) == 1 or frozenset(kinds) in allowed
        assert any(task.format(topic) in text for task in instructions.TASKS for topic in topics)
        for constraint in row["constraints"]:
            assert constraint.partition(":")[2] in text
    assert {len(row["constraints"]) for row in rows} == {1, 2}
    assert {c.partition(":")[0] for row in rows for c in row["constraints"]} == set(instructions.KINDS)


def test_more_rows_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(instructions, "TASKS", ("Describe {}.",))
    monkeypatch.setattr(instructions, "TOPICS", ("the sea", "bread", "owls", "rain", "tea"))
    with pytest.raises(ValueError, match="fewer than 500"):
        instructions.rows("validation", 500)


def test_the_module_brings_no_torch():
    assert heavy_after("from lora_gan.rewards import instructions; instructions.rows('train', 4)") == []
