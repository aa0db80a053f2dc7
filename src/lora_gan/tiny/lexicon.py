"""The words of the tiny base's grammar, read from ``lexicon.json``.

Each table of the file becomes a list in the same order. Draws are indices into these lists: adding, removing or moving
a word changes all later texts. Tags define which words can be combined: a verb lists the tags of its subjects and
objects, an adjective or a preposition lists the tags of its nouns. A noun's own English word is one of its tags.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_TABLES = json.loads((Path(__file__).parent / "lexicon.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Noun:
    """A noun in both languages. ``kind`` is its semantic class, and one of its tags.

    Nouns with the tag ``single`` are unique (king, mother, moon), nouns with the tag ``mass`` are uncountable (bread,
    water). Both have no plural, and no "a".
    """

    en: str
    en_plural: str | None
    fr: str
    fr_plural: str | None
    gender: str
    kind: str
    tags: frozenset[str]

    @property
    def countable(self) -> bool:
        return self.en_plural is not None


@dataclass(frozen=True)
class Adjective:
    """An adjective. ``fr`` has the French forms by (gender, plural).

    ``position`` is the position relative to a French noun: ``before``, ``after``, or ``predicate`` (only after être).
    """

    en: str
    fr: dict[tuple[str, bool], str]
    position: str
    nouns: frozenset[str]


@dataclass(frozen=True)
class Verb:
    """A verb. A transitive verb always has an object.

    ``objects`` is empty for an intransitive verb. ``preposition`` is the French preposition before the object.
    ``indefinite_object`` is False for verbs that need a definite object in French, such as "aimer".
    """

    en: str
    en_third: str
    fr: str
    subjects: frozenset[str] = frozenset()
    objects: frozenset[str] = frozenset()
    preposition: str = ""
    indefinite_object: bool = True


def _verbs(table: str) -> list[Verb]:
    sets = ("subjects", "objects")
    return [Verb(**{**row, **{name: frozenset(row[name]) for name in sets if name in row}}) for row in _TABLES[table]]


NOUNS = [Noun(**{**row, "tags": frozenset([row["kind"], row["en"], *row["tags"]])}) for row in _TABLES["nouns"]]
ADJECTIVES = [
    Adjective(
        en=row["en"],
        fr=dict(zip((("m", False), ("f", False), ("m", True), ("f", True)), row["fr"], strict=True)),
        position=row["position"],
        nouns=frozenset(row["nouns"]),
    )
    for row in _TABLES["adjectives"]
]
INTRANSITIVES = _verbs("intransitive_verbs")
TRANSITIVES = _verbs("transitive_verbs")
#: For example "gives the book to the child". Subjects and receivers are persons, objects are small things.
DITRANSITIVES = _verbs("ditransitive_verbs")
BE = Verb("be", "is", "être")
#: The present tense for je, tu, il, nous, ils. Verbs that are not listed are regular; see `grammar.conjugate`.
IRREGULAR_PRESENT: dict[str, list[str]] = _TABLES["irregular_present"]
#: Special masculine singular forms before a vowel: un vieil ami, un bel arbre.
LIAISON_ADJECTIVES: dict[str, str] = _TABLES["liaison_adjectives"]
#: English, French, gender.
NAMES: list[tuple[str, str, str]] = [(row["en"], row["fr"], row["gender"]) for row in _TABLES["names"]]
#: English, French, gender, and the index of the French person (je, tu, il, nous, ils).
PRONOUNS: list[tuple[str, str, str, int]] = [
    (row["en"], row["fr"], row["gender"], row["person"]) for row in _TABLES["pronouns"]
]
#: English, French.
GREETINGS: list[tuple[str, str]] = [(en, fr) for en, fr in _TABLES["greetings"]]
#: English, French, and the moods that the adverbial can have.
TIMES: list[tuple[str, str, list[str]]] = [(row["en"], row["fr"], row["moods"]) for row in _TABLES["times"]]
#: English to French, for adverbs that may occur with "pas". "never" replaces "pas" and is not in this table.
ADVERBS: dict[str, str] = _TABLES["adverbs"]
#: English to French.
PREPOSITIONS: dict[str, str] = {row["en"]: row["fr"] for row in _TABLES["prepositions"]}
#: English preposition, and the tag of its nouns.
PLACES: list[tuple[str, str]] = [(row["en"], row["nouns"]) for row in _TABLES["prepositions"]]
