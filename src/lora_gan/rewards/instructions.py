"""The task of `lora-gan demo-chat`: instructions that code can check, generated from templates and word lists.

A prompt asks for a short text about a topic and states one or two constraints: "Describe the sea. Do not use commas.
Use at most 8 words." A constraint is a short string such as "no_comma" or "at_most:8". `met` checks it and `graded`
grades it.

The splits share no topic and no pair of kinds. The topic of a held-out prompt never occurs in training, and two
constraints of a held-out prompt never occur together in training. This module imports no torch and no NumPy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")

TASKS = ("Describe {}.", "Say something about {}.", "Write about {}.", "What is special about {}?")
TOPICS = (
    "the sea", "a winter morning", "coffee", "old books", "a train ride", "the moon", "bread", "cats",
    "a quiet village", "thunder", "the first day of school", "bicycles", "a good friend", "the desert", "music",
    "apples", "a long walk", "snow", "the city at night", "dogs", "a small garden", "honey", "the wind", "chess",
    "a busy market", "horses", "autumn leaves", "tea", "an old clock", "the forest", "football", "a birthday party",
    "rain", "bridges", "a lighthouse", "soup", "the stars", "a kitchen", "elephants", "summer", "a sailing boat",
    "cheese", "mountains", "a library", "owls", "the sunrise", "painting", "a campfire", "oranges", "rivers",
    "a museum", "penguins", "spring", "chocolate", "a country road", "whales", "dancing", "an airport", "tigers",
    "sleep",
)  # fmt: skip
WORDS = (
    "quiet", "golden", "always", "simple", "together", "bright", "slowly", "gentle", "people", "morning", "wonder",
    "little",
)  # fmt: skip
OPENINGS = ("Today", "Well", "Surely", "Imagine", "Often", "Here", "Every", "Yes")
ENDINGS = ("the end", "thank you", "my friend", "every day", "in the world")
LIMITS = ("5", "6", "8", "10")
LEADS = ("Name three things", "Write three words", "Give three answers")  # before a list
EXAMPLES = (("red", "green", "blue"), ("north", "south", "east"), ("one", "two", "three"))

TERMINATORS = re.compile(r"[.!?]+(?=[\s\"”']|$)")


class Kind(NamedTuple):
    """One kind of constraint.

    `values` fill {} in the phrasings. `met(answer, value)` is strict. `partial(answer, value)`, from 0 to 1, grades an
    answer that does not meet the constraint; None: every such answer gets 0. Both get a stripped answer with at least
    one letter.
    """

    phrasings: tuple[str, ...]
    values: tuple[str, ...]
    met: Callable[[str, str], bool]
    partial: Callable[[str, str], float] | None = None


def _near(answer: str, limit: str) -> float:
    over = len(answer.split()) - int(limit)
    return max(0.0, 1 - over / int(limit)) if over > 0 else 0.0


def _plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def _list_lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _is_item(line: str) -> bool:
    """Whether the line is "- " and some words, and not one word copied from the example of a phrasing."""
    words = _plain_words(line)
    copied = len(words) == 1 and any(words[0] in example for example in EXAMPLES)
    return line.startswith("- ") and bool(words) and not copied


def _is_list(answer: str) -> bool:
    lines = _list_lines(answer)
    return len(lines) == 3 and all(map(_is_item, lines))


def _is_sentence(answer: str) -> bool:
    """Whether the answer contains one end of a sentence, at its end. A closing quotation mark may follow."""
    answer = answer.rstrip("\"”'")
    return [found.end() for found in TERMINATORS.finditer(answer)] == [len(answer)]


def _ends(answer: str, words: str) -> bool:
    wanted = _plain_words(words)
    return _plain_words(answer)[-len(wanted) :] == wanted


KINDS: dict[str, Kind] = {
    "at_most": Kind(
        ("Use at most {} words.", "Use 2 to {} words.", "Your answer has at most {} words."),
        LIMITS,
        lambda answer, value: 2 <= len(answer.split()) <= int(value),
        _near,
    ),
    "contains": Kind(
        ('Use the word "{}".', 'Include the word "{}".', 'Write a sentence with the word "{}".'),
        WORDS,
        lambda answer, value: value.lower() in _plain_words(answer),
    ),
    "ends": Kind(
        ('End with "{}".', "Your last words are: {}.", 'Finish with "{}".'),
        ENDINGS,
        _ends,
        lambda answer, value: 0.5 * (" ".join(_plain_words(value)) in " ".join(_plain_words(answer))),
    ),
    "exclaim": Kind(
        ("End with an exclamation mark.", "Finish with an exclamation mark, like this: We like it!", 'End with "!".'),
        ("",),
        lambda answer, _: answer.endswith("!"),
        lambda answer, _: 0.5 * ("!" in answer),
    ),
    "list": Kind(
        tuple(
            f"{lead}, as a list like this:\n" + "\n".join(f"- {word}" for word in example)
            for lead, example in zip(LEADS, EXAMPLES, strict=True)
        ),
        ("",),
        lambda answer, _: _is_list(answer),
        lambda answer, _: min(3, sum(map(_is_item, _list_lines(answer)))) / 4,
    ),
    "no_comma": Kind(
        ("Do not use commas.", "Use no commas.", "Write without any commas."),
        ("",),
        lambda answer, _: "," not in answer,
        lambda answer, _: 1 / (1 + answer.count(",")),
    ),
    "question": Kind(
        ('Write it as a question that ends with "?".', "Answer with a question.", "End with a question mark."),
        ("",),
        lambda answer, _: answer.endswith("?"),
        lambda answer, _: 0.5 * ("?" in answer),
    ),
    "sentence": Kind(
        ("Answer in one sentence.", "Write one short sentence.", "One full sentence only."),
        ("",),
        lambda answer, _: _is_sentence(answer),
    ),
    "starts": Kind(
        ('Begin with "{}".', 'Start like this: "{} ..."', 'The first word is "{}".'),
        OPENINGS,
        lambda answer, value: _plain_words(answer)[:1] == [value.lower()],
    ),
}  # fmt: skip

#: Pairs of kinds that contradict each other, or that a short answer cannot meet together.
CONTRADICTIONS = {
    frozenset(pair)
    for pair in (
        ("ends", "question"), ("ends", "exclaim"), ("question", "exclaim"), ("list", "at_most"), ("list", "sentence"),
        ("list", "question"), ("list", "exclaim"), ("list", "starts"), ("list", "ends"),
    )
}  # fmt: skip


def met(constraint: str, answer: str) -> bool:
    """Whether the answer meets the constraint. An answer without a letter meets none.

    Raises:
        ValueError: the constraint is of an unknown kind.
    """
    return graded(constraint, answer) == 1.0


def share_met(constraints: Sequence[str], answer: str) -> float:
    """The share of the constraints that the answer meets, in [0, 1]: the metric that is reported."""
    return sum(met(constraint, answer) for constraint in constraints) / len(constraints)


def graded(constraint: str, answer: str) -> float:
    """1 where the answer meets the constraint, else how close it is, from 0 to 0.5. An answer without a letter: 0.

    Raises:
        ValueError: the constraint is of an unknown kind.
    """
    name, _, value = constraint.partition(":")
    if name not in KINDS:
        raise ValueError(f"the constraint {constraint!r} has no kind {name!r}; the kinds: {', '.join(KINDS)}")
    kind, answer = KINDS[name], answer.strip()
    if not any(letter.isalpha() for letter in answer):
        return 0.0
    if kind.met(answer, value):
        return 1.0
    return kind.partial(answer, value) / 2 if kind.partial else 0.0


def reward(completions: Sequence[Any], constraints: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """The mean of `graded` over the constraints of each prompt: a reward of TRL's form.

    Args:
        completions: B answers, as texts or chat messages.
        constraints: the constraints of each answer's prompt.

    Returns:
        B rewards in [0, 1].
    """
    from ..messages import completion_text

    return [
        sum(graded(constraint, completion_text(completion)) for constraint in some) / len(some)
        for completion, some in zip(completions, constraints, strict=True)
    ]


def pairs_of(split: Split) -> list[tuple[str, str]]:
    """The pairs of kinds that may occur together in a prompt of this split. No pair is in two splits."""
    possible = [pair for pair in combinations(KINDS, 2) if frozenset(pair) not in CONTRADICTIONS]
    random.Random("pairs of kinds").shuffle(possible)
    return possible[_slice_of(split, len(possible))]


def topics_of(split: Split) -> list[str]:
    """The topics of this split. No topic is in two splits."""
    topics = list(TOPICS)
    random.Random("topics").shuffle(topics)
    return topics[_slice_of(split, len(topics))]


def _slice_of(split: Split, count: int) -> slice:
    """Training gets half, validation a fifth, and the held-out split the rest."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not accepted: it must be one of {', '.join(SPLITS)}")
    ends = (0, count // 2, count // 2 + count // 5, count)
    index = SPLITS.index(split)
    return slice(ends[index], ends[index + 1])


def rows(split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different rows of a split, each {"prompt": chat messages, "constraints": one or two strings}.

    Half of the rows state one constraint, half state two. Kinds and pairs occur equally often. Equal arguments give
    equal rows.

    Raises:
        ValueError: an unknown split, or `count` is more than the number of different prompts that were found.
    """
    pairs, topics = pairs_of(split), topics_of(split)
    draw = random.Random(f"{split} {seed}")
    kinds, both = list(KINDS), list(pairs)
    draw.shuffle(kinds)
    draw.shuffle(both)
    made: dict[str, dict[str, Any]] = {}  # {text of the prompt: row}
    tries = 0
    while (index := len(made)) < count:
        if (tries := tries + 1) > 50 * count:
            raise ValueError(f"the {split} split has fewer than {count} different prompts: ask for fewer")
        chosen = [kinds[index // 2 % len(kinds)]] if index % 2 == 0 else list(both[index // 2 % len(both)])
        draw.shuffle(chosen)
        constraints, texts = [], [draw.choice(TASKS).format(draw.choice(topics))]
        for name in chosen:
            value = draw.choice(KINDS[name].values)
            texts.append(draw.choice(KINDS[name].phrasings).format(value))
            constraints.append(f"{name}:{value}" if value else name)
        text = " ".join(texts)
        made.setdefault(text, {"prompt": [{"role": "user", "content": text}], "constraints": constraints})
    return list(made.values())
