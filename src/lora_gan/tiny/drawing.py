"""Draws random sentences of the tiny base's grammar, and assigns them to splits.

**Whole combinations of words are held out**, and tests check this. Each sentence has a signature such as ``("act",
"cat", "see", "dog")``. A hash of the signature decides whether pretraining may contain the combination. Determiners,
adjectives, number and mood do not matter. A signature has the same lemmas in both languages, so the English and the
French sentence are in the same split.

Every draw comes from a Philox generator with an explicit seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from . import grammar, lexicon
from .grammar import Manner, Phrase, Place, Sentence, noun_phrase
from .lexicon import ADJECTIVES, DITRANSITIVES, INTRANSITIVES, NOUNS, TRANSITIVES, Noun

T = TypeVar("T")

#: Determiners by number. Repeated entries are drawn more often.
INDEFINITE_PLURALS = ("many", *grammar.NUMBERS)
SINGULAR_DETERMINERS = ("the",) * 5 + ("a",) * 5 + ("my", "your", "his", "her", "our", "this", "this")
PLURAL_DETERMINERS = ("the",) * 5 + ("my", "your", "his", "her", "our", "these", "these", *INDEFINITE_PLURALS)
UNCOUNTED_DETERMINERS = ("the",) * 4 + ("my", "your", "his", "her", "our")

# Precomputed, because pretraining draws from these lists a few million times.
_NOUNS_BY_TAG = {tag: [n for n in NOUNS if tag in n.tags] for tag in {tag for n in NOUNS for tag in n.tags}}
_ADJECTIVES_FOR = {
    tags: [a for a in ADJECTIVES if a.nouns & tags] for tags in {frozenset(["person"]), *(n.tags for n in NOUNS)}
}
_ATTRIBUTES_FOR = {
    tags: [a for a in adjectives if a.position != "predicate"] for tags, adjectives in _ADJECTIVES_FOR.items()
}
_OBJECTS = {verb.en: [n for n in NOUNS if n.tags & verb.objects] for verb in (*TRANSITIVES, *DITRANSITIVES)}
_VOCATIVES = {
    kind: [n for n in NOUNS if n.kind == kind and "kin" not in n.tags] for kind in ("nature", "person", "animal")
}


class Draws:
    """Uniform draws from a Philox generator, in blocks, because single draws are slow."""

    def __init__(self, seed: int, stream: str) -> None:
        key = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=16).digest()
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(8192).tolist()
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choose(self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """One option; the weights need not sum to one."""
        left = self.uniform() * sum(weight for _, weight in options)
        for option, weight in options:
            left -= weight
            if left < 0:
                return option
        return options[-1][0]


def draw_phrase(draws: Draws, noun: Noun, indefinite: bool = True, many: bool = True, adjective: float = 0.3) -> Phrase:
    """A noun phrase with a random determiner and number and, sometimes, an adjective."""
    plural = noun.countable and draws.chance(0.3)
    if noun.kind == "nature":
        determiner = "the"
    elif plural:
        determiner = draws.choose(PLURAL_DETERMINERS)
    else:
        determiner = draws.choose(SINGULAR_DETERMINERS if noun.countable else UNCOUNTED_DETERMINERS)
    if determiner == "a" and not indefinite or determiner == "many" and not (many and indefinite):
        determiner = "the"
    chosen = draws.choose(_ATTRIBUTES_FOR[noun.tags]) if draws.chance(adjective) else None
    return noun_phrase(noun, determiner, plural, chosen)


def draw_subject(draws: Draws) -> Phrase:
    """Mostly a person or an animal, which can act. Sometimes a thing, which can only have a property or a location."""
    who = draws.weighted((("pronoun", 20), ("name", 12), ("person", 28), ("animal", 22), ("other", 18)))
    if who == "pronoun":
        return draws.choose(grammar.PRONOUNS)
    if who == "name":
        return draws.choose(grammar.NAMES)
    if who == "other":
        who = draws.choose(("thing", "thing", "food", "drink", "plant", "place", "work", "nature"))
    return draw_phrase(draws, draws.choose(_NOUNS_BY_TAG[who]), adjective=0.25)


def draw_place(draws: Draws) -> Place:
    """A preposition with a suitable noun."""
    preposition, tag = draws.choose(lexicon.PLACES)
    noun = draws.choose(_NOUNS_BY_TAG[tag])
    determiner = "the" if draws.chance(0.8) else draws.choose(("my", "your", "our", "this"))
    return grammar.place(preposition, noun_phrase(noun, determiner, False, None))


def draw_manner(draws: Draws, acting: bool) -> Manner:
    """A manner with an adverb, an opening, or neither.

    Args:
        acting: False for the verb "be", which has the present tense only, and not the adverb "also" ("est aussi
            heureux" would mean "is as happy").
    """
    mood = "present"
    if acting:
        mood = draws.weighted((("present", 60), ("future", 12), ("want", 12), ("can", 8), ("must", 8)))
    negative = draws.chance(0.2)
    if draws.chance(0.2):
        return Manner(mood, negative, "", draws.choose([(en, fr) for en, fr, suits in lexicon.TIMES if mood in suits]))
    if mood == "present" and not negative and draws.chance(0.2):
        adverbs = list(lexicon.ADVERBS) if acting else ["always", "often", "sometimes"]
        return Manner(mood, negative, draws.choose([*adverbs, "never"]))
    return Manner(mood, negative)


def _draw_does(draws: Draws, subject: Phrase) -> Sentence:
    verb = draws.choose([v for v in INTRANSITIVES if v.subjects & subject.tags])
    manner = draw_manner(draws, acting=True)
    if manner.opening == ("", "") and draws.chance(0.25):
        where = draw_place(draws)
        manner = replace(manner, opening=(where.en, where.fr))
    return grammar.does(subject, verb, manner)


def _draw_acts(draws: Draws, subject: Phrase) -> Sentence:
    """Subject and object have different lemmas, so no reflexive verbs are needed."""
    verb = draws.choose([v for v in TRANSITIVES if v.subjects & subject.tags])
    if "person" in verb.objects and draws.chance(0.2):
        target = draws.choose([name for name in grammar.NAMES if name.lemma != subject.lemma])
    else:
        noun = draws.choose([noun for noun in _OBJECTS[verb.en] if noun.en != subject.lemma])
        target = draw_phrase(draws, noun, indefinite=verb.indefinite_object, many=not verb.preposition)
    return grammar.acts(subject, verb, target, draw_manner(draws, acting=True))


def _draw_gives(draws: Draws, subject: Phrase) -> Sentence:
    verb = draws.choose(DITRANSITIVES)
    gift = draw_phrase(draws, draws.choose(_OBJECTS[verb.en]), adjective=0.15)
    if draws.chance(0.25):
        receiver = draws.choose([name for name in grammar.NAMES if name.lemma != subject.lemma])
    else:
        others = [noun for noun in _NOUNS_BY_TAG["person"] if noun.en != subject.lemma]
        receiver = draw_phrase(draws, draws.choose(others), many=False, adjective=0.1)
    # Without an adverb, because these sentences are long already.
    return grammar.gives(subject, verb, gift, receiver, replace(draw_manner(draws, acting=True), adverb=""))


def _draw_is_so(draws: Draws, subject: Phrase) -> Sentence:
    adjective = draws.choose([a for a in _ADJECTIVES_FOR[subject.tags] if a is not subject.adjective])
    return grammar.is_so(subject, adjective, draw_manner(draws, acting=False))


def _draw_is_somewhere(draws: Draws, subject: Phrase) -> Sentence:
    return grammar.is_somewhere(subject, draw_place(draws), draw_manner(draws, acting=False))


def _draw_there_is(draws: Draws) -> Sentence:
    noun = draws.choose([n for n in NOUNS if n.countable and n.kind in ("person", "animal", "thing", "plant")])
    plural = draws.chance(0.4)
    determiner = "no" if draws.chance(0.2) else (draws.choose(INDEFINITE_PLURALS) if plural else "a")
    adjective = draws.choose(_ATTRIBUTES_FOR[noun.tags]) if draws.chance(0.3) else None
    where = draw_place(draws)
    opening = draws.choose((("today", "aujourd'hui"), ("now", "maintenant"))) if draws.chance(0.1) else ("", "")
    return grammar.there_is(noun, determiner, plural, adjective, where, opening)


def _draw_greets(draws: Draws) -> Sentence:
    greeting = draws.choose(lexicon.GREETINGS)
    who = draws.weighted((("name", 15), ("mine", 15), ("nature", 25), ("person", 25), ("animal", 20)))
    if who == "name":
        return grammar.greets(greeting, draws.choose(grammar.NAMES))
    noun = draws.choose(_NOUNS_BY_TAG["person"] if who == "mine" else _VOCATIVES[who])
    plural = noun.countable and draws.chance(0.4)
    return grammar.greets(greeting, noun_phrase(noun, "my" if who == "mine" else "the", plural, None))


#: Shares of the kinds of sentences without a given subject. Greetings are frequent, so that the base learns them well.
_OPENERS = (("greet", 8.0), ("there", 8.0), ("about", 84.0))


def _draw(draws: Draws, subject: Phrase | None) -> Sentence:
    if subject is None:
        shape = draws.weighted(_OPENERS)
        if shape == "greet":
            return _draw_greets(draws)
        if shape == "there":
            return _draw_there_is(draws)
        subject = draw_subject(draws)
    shapes = [(_draw_is_so, 15.0)]
    if subject.kind in ("person", "animal", "thing"):
        shapes.append((_draw_is_somewhere, 10.0))
    if subject.kind in ("person", "animal"):
        shapes += [(_draw_does, 20.0), (_draw_acts, 55.0)]
    elif subject.tags & {"bright", "flier", "vehicle", "plant", "rain"}:
        shapes.append((_draw_does, 10.0))
    if subject.kind == "person":
        shapes.append((_draw_gives, 8.0))
    return draws.weighted(shapes)(draws, subject)


# --------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "heldout")

#: The first number for which ("greet", "Hello", "world") is held out: the prompt of the library's first example must
#: not be in the pretraining texts.
SALT = "lora-gan tiny 18"
HELDOUT_SHARE = 0.04
VALIDATION_SHARE = 0.04


def split_of(signature: tuple[str, ...]) -> str:
    """The split of a combination, from a hash of its signature. It does not depend on a seed."""
    digest = hashlib.blake2b("|".join(signature).encode(), digest_size=8, key=SALT.encode()).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < HELDOUT_SHARE:
        return "heldout"
    return "validation" if position < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def draw_sentence(draws: Draws, split: str = "train", subject: Phrase | None = None) -> Sentence:
    """A sentence of ``split``. If ``subject`` is given, the sentence starts with this phrase."""
    while True:
        sentence = _draw(draws, subject)
        # A sentence about `subject` may start with an adverbial instead.
        starts = subject is None or sentence.en.startswith(grammar.capitalized(subject.en))
        if starts and split_of(sentence.signature) == split:
            return sentence


def sentences(split: str, seed: int) -> Iterator[Sentence]:
    """An endless stream of sentences of one split.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    draws = Draws(seed, f"sentences/{split}")
    while True:
        yield draw_sentence(draws, split)
