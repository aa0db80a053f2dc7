"""The task of `lora-gan demo-chat`: instructions that code can check, generated from templates and word lists.

A prompt asks for a short text about a topic and states one or two constraints: "Describe the sea. Write in lower case only.
Use between 3 and 6 words." A constraint is a short string, "lower" or "between:3-6", which `met` checks and `graded` grades.

The splits share neither topics nor pairs of kinds: every held-out prompt is about a topic that training never names, and two
constraints that meet in a held-out prompt never meet in training. This module needs neither torch nor NumPy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "validation", "heldout")

TASKS = (
    "Describe {}.",
    "Say something about {}.",
    "Tell me about {}.",
    "Write a line about {}.",
    "What do you think of {}?",
)
TOPICS = (
    "the sea", "a winter morning", "coffee", "old books", "a train ride", "the moon", "bread", "cats", "a quiet village",
    "thunder", "the first day of school", "bicycles", "a good friend", "the desert", "music", "apples", "a long walk", "snow",
    "the city at night", "dogs", "a small garden", "honey", "the wind", "chess", "a busy market", "horses", "autumn leaves",
    "tea", "an old clock", "the forest", "football", "a birthday party", "rain", "bridges", "a lighthouse", "soup",
    "the stars", "a kitchen", "elephants", "summer", "a sailing boat", "cheese", "mountains", "a library", "owls",
    "the sunrise", "painting", "a campfire", "oranges", "rivers", "a museum", "penguins", "spring", "chocolate",
    "a country road", "whales", "dancing", "an airport", "tigers", "sleep",
)  # fmt: skip
WORDS = (
    "quiet", "golden", "always", "simple", "together", "bright", "slowly", "gentle", "people", "morning", "wonder", "little",
)  # fmt: skip
OPENINGS = ("Well", "Surely", "Today", "Imagine", "Indeed", "Perhaps", "Often", "Yes")
ENDINGS = ("thank you", "the end", "my friend", "good night", "every day")
RANGES = ((2, 4), (3, 6), (4, 7), (5, 8), (6, 10))

TERMINATORS = re.compile(r"[.!?]+(?=[\s\"”']|$)")


class Kind(NamedTuple):
    """One kind of constraint.

    `values` fill {} in the phrasings. `met(answer, value)` is strict. `partial(answer, value)` in [0, 1] says how close
    an answer is that does not meet the constraint; None: there is no degree. Both get a stripped answer with a letter in it.
    """

    phrasings: tuple[str, ...]
    values: tuple[str, ...]
    met: Callable[[str, str], bool]
    partial: Callable[[str, str], float] | None = None


def _bounds(value: str) -> tuple[int, int]:
    low, high = map(int, value.split("-"))
    return low, high


def _between(answer: str, value: str) -> bool:
    low, high = _bounds(value)
    return low <= len(answer.split()) <= high


def _near_between(answer: str, value: str) -> float:
    low, high = _bounds(value)
    words = len(answer.split())
    return max(0.0, 1 - (max(low - words, words - high) / high))


def _share(letters: Sequence[bool]) -> float:
    return sum(letters) / len(letters) if letters else 0.0


def _plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def _list_lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _is_item(line: str) -> bool:
    return re.match(r"- *\w", line) is not None


KINDS: dict[str, Kind] = {
    "between": Kind(
        ("Use {} words.", "Your answer must have {} words.", "Answer in {} words."),
        tuple(f"{low}-{high}" for low, high in RANGES),
        _between,
        _near_between,
    ),
    "lower": Kind(
        ("Write in lower case only.", "Use only lowercase letters.", "Do not use capital letters."),
        ("",),
        lambda answer, _: answer == answer.lower(),
        lambda answer, _: _share([word == word.lower() for word in answer.split()]) / 2,
    ),
    "upper": Kind(
        ("Write in capital letters only.", "Use only UPPERCASE letters.", "ANSWER IN CAPITAL LETTERS."),
        ("",),
        lambda answer, _: answer == answer.upper(),
        lambda answer, _: _share([letter.isupper() for letter in answer if letter.isalpha()]),
    ),
    "contains": Kind(
        ('Use the word "{}".', 'Include the word "{}".', 'The word "{}" must appear in your answer.'),
        WORDS,
        lambda answer, value: value.lower() in _plain_words(answer),
    ),
    "starts": Kind(
        ('Begin with the word "{}".', 'Start your answer with "{}".', 'The first word must be "{}".'),
        OPENINGS,
        lambda answer, value: _plain_words(answer)[:1] == [value.lower()],
    ),
    "ends": Kind(
        ('End with the words "{}".', 'Finish your answer with "{}".', 'The last words must be "{}".'),
        ENDINGS,
        lambda answer, value: _plain_words(answer)[-2:] == value.lower().split(),
        lambda answer, value: 0.5 * (" ".join(value.lower().split()) in " ".join(_plain_words(answer))),
    ),
    "list": Kind(
        (
            'Give a list of three lines that begin with "- ".',
            'Answer with three bullet points, each on a line that starts with "- ".',
            'Write three items, one per line, each after "- ".',
        ),
        ("",),
        lambda answer, _: len(_list_lines(answer)) == 3 and all(map(_is_item, _list_lines(answer))),
        lambda answer, _: min(3, sum(map(_is_item, _list_lines(answer)))) / 4,
    ),
    "no_comma": Kind(
        ("Do not use commas.", "Use no comma.", "Write without any commas."),
        ("",),
        lambda answer, _: "," not in answer,
    ),
    "sentence": Kind(
        ("Answer in one sentence.", "Write exactly one sentence.", "Use a single full sentence."),
        ("",),
        lambda answer, _: [found.end() for found in TERMINATORS.finditer(answer.rstrip("\"”'"))]
        == [len(answer.rstrip("\"”'"))],
    ),
    "question": Kind(
        ("Answer with a question.", "Your answer must be a question.", "Reply with a question only."),
        ("",),
        lambda answer, _: answer.endswith("?"),
        lambda answer, _: 0.5 * ("?" in answer),
    ),
    "exclaim": Kind(
        ("End with an exclamation mark.", 'The last character must be "!".', "Finish with an exclamation mark."),
        ("",),
        lambda answer, _: answer.endswith("!"),
        lambda answer, _: 0.5 * ("!" in answer),
    ),
    "quoted": Kind(
        ("Put your answer in double quotes.", "Wrap the whole answer in double quotation marks.", 'Write it in "quotes".'),
        ("",),
        lambda answer, _: len(answer) > 2 and answer[0] in '"“' and answer[-1] in '"”',
        lambda answer, _: 0.5 * (answer[0] in '"“'),
    ),
}  # fmt: skip

#: Pairs of kinds that contradict each other, or that no short answer meets together.
CONTRADICTIONS = {
    frozenset(pair)
    for pair in (
        ("lower", "upper"), ("ends", "question"), ("ends", "exclaim"), ("ends", "quoted"), ("question", "exclaim"), ("question", "quoted"),
        ("exclaim", "quoted"), ("list", "between"), ("list", "sentence"), ("list", "question"), ("list", "exclaim"),
        ("list", "quoted"), ("list", "starts"), ("list", "ends"), ("sentence", "quoted"),
    )
}  # fmt: skip


def _split(constraint: str) -> tuple[Kind, str]:
    name, _, value = constraint.partition(":")
    if name not in KINDS:
        raise ValueError(f"the constraint {constraint!r} has no kind {name!r}; the kinds: {', '.join(KINDS)}")
    return KINDS[name], value


def met(constraint: str, answer: str) -> bool:
    """Whether the answer meets the constraint. An answer without a letter meets none.

    Raises:
        ValueError: the constraint is of an unknown kind.
    """
    kind, value = _split(constraint)
    answer = answer.strip()
    return any(letter.isalpha() for letter in answer) and kind.met(answer, value)


def share_met(constraints: Sequence[str], answer: str) -> float:
    """The share of the constraints that the answer meets, in [0, 1]: the metric that is reported."""
    return sum(met(constraint, answer) for constraint in constraints) / len(constraints)


def graded(constraint: str, answer: str) -> float:
    """1 where the answer meets the constraint, else how close it is, from 0 to 0.5."""
    if met(constraint, answer):
        return 1.0
    kind, value = _split(constraint)
    answer = answer.strip()
    if kind.partial is None or not any(letter.isalpha() for letter in answer):
        return 0.0
    return kind.partial(answer, value) / 2


def reward(completions: Sequence[Any], constraints: Sequence[Sequence[str]], **columns: Any) -> list[float]:
    """The mean of `graded` over the constraints of each prompt: a reward of TRL's form.

    Args:
        completions: B answers, as texts or chat messages.
        constraints: the constraints of each answer's prompt.

    Returns:
        B rewards in [0, 1].
    """
    from .rewards.messages import completion_text

    return [
        sum(graded(constraint, completion_text(completion)) for constraint in some) / len(some)
        for completion, some in zip(completions, constraints, strict=True)
    ]


def pairs_of(split: Split) -> list[tuple[str, str]]:
    """The pairs of kinds that may meet in a prompt of this split; no pair is in two splits."""
    possible = [pair for pair in combinations(KINDS, 2) if frozenset(pair) not in CONTRADICTIONS]
    random.Random("pairs of kinds").shuffle(possible)
    return possible[_part(split, len(possible))]


def topics_of(split: Split) -> list[str]:
    """The topics of this split; no topic is in two splits."""
    topics = list(TOPICS)
    random.Random("topics").shuffle(topics)
    return topics[_part(split, len(topics))]


def _part(split: Split, count: int) -> slice:
    """Training gets half, validation a fifth, the held-out split the rest."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not accepted: it must be one of {', '.join(SPLITS)}")
    ends = (0, count // 2, count // 2 + count // 5, count)
    place = SPLITS.index(split)
    return slice(ends[place], ends[place + 1])


def rows(split: Split, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` different rows of a split, each {"prompt": chat messages, "constraints": one or two strings}.

    Half of them state one constraint, half state two. Kinds and pairs come around evenly. Equal arguments give equal rows.

    Raises:
        ValueError: an unknown split, or more rows than are found.
    """
    pairs, topics = pairs_of(split), topics_of(split)
    draw = random.Random(f"{split} {seed}")
    kinds, both = list(KINDS), list(pairs)
    draw.shuffle(kinds)
    draw.shuffle(both)
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    for _ in range(50 * count):
        if len(made) == count:
            return made
        place = len(made)
        chosen = [kinds[place // 2 % len(kinds)]] if place % 2 == 0 else list(both[place // 2 % len(both)])
        draw.shuffle(chosen)
        constraints, texts = [], [draw.choice(TASKS).format(draw.choice(topics))]
        for name in chosen:
            value = draw.choice(KINDS[name].values)
            words = value.replace("-", " to ") if name == "between" else value
            phrase = draw.choice(KINDS[name].phrasings).format(words)
            texts.append(phrase)
            constraints.append(f"{name}:{value}" if value else name)
        text = " ".join(texts)
        if text not in seen:
            seen.add(text)
            made.append({"prompt": [{"role": "user", "content": text}], "constraints": constraints})
    if len(made) == count:
        return made
    raise ValueError(f"the {split} split has fewer than {count} different prompts: ask for fewer")
