"""An English/French grammar: pairs of sentences with the same meaning, with agreement and elision.

A sentence is generated from a plan: subject, verb, objects, mood, place, time. One function writes the plan in English,
another in French. Each English sentence has exactly one translation: ``you`` is always ``tu``, ``they`` always ``ils``,
a speaker is masculine. The words come from :mod:`lora_gan.tiny.lexicon`. :mod:`lora_gan.tiny.drawing` draws the plans.

**English is prefix-free**, and tests check this. Sentences have no full stop, so "Hello world" becomes "Bonjour le
monde". If one sentence were a prefix of another, a model could not know where such a prompt ends. Therefore:

- adverbials are at the start of the sentence;
- adjectives are before their noun;
- transitive verbs always have an object, intransitive verbs never have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import lexicon
from .lexicon import BE, Adjective, Noun, Verb

POSSESSIVES = {"my": "m", "your": "t", "his": "s", "her": "s"}
NUMBERS = {"two": "deux", "three": "trois", "four": "quatre", "five": "cinq"}
_PLURAL_DETERMINERS = NUMBERS | {"the": "les", "our": "nos", "these": "ces"}
_PLURAL_DETERMINERS |= {en: f"{fr}es" for en, fr in POSSESSIVES.items()}

# --- French forms

_VOWELS = "aeiouâàéèêëîïôûùœ"


def elides(word: str) -> bool:
    """Whether le, je, ne, de … lose their vowel before ``word``. In this lexicon, h is always mute, y a consonant."""
    return word[0].lower() in _VOWELS + "h"


def conjugate(infinitive: str) -> Sequence[str]:
    """The present tense for je, tu, il, nous, ils.

    Raises:
        ValueError: the infinitive is irregular and not in the lexicon's table.
    """
    if infinitive in lexicon.IRREGULAR_PRESENT:
        return lexicon.IRREGULAR_PRESENT[infinitive]
    stem = infinitive[:-2]
    if infinitive.endswith("er"):
        plural = {"g": stem + "e", "c": stem[:-1] + "ç"}.get(stem[-1], stem)  # mangeons, lançons
        strong = stem[:-1] + "i" if stem.endswith(("oy", "uy")) else stem  # envoie, nettoie
        return strong + "e", strong + "es", strong + "e", plural + "ons", strong + "ent"
    if infinitive.endswith("ir"):
        return stem + "is", stem + "is", stem + "it", stem + "issons", stem + "issent"
    if infinitive.endswith("re"):
        return stem + "s", stem + "s", stem, stem + "ons", stem + "ent"
    raise ValueError(f"no conjugation for {infinitive!r}")


def french_determiner(determiner: str, gender: str, plural: bool, following: str) -> str:
    """The French form of an English determiner. It depends on the noun and on the next word."""
    vowel, feminine = elides(following), gender == "f"
    if plural and determiner in _PLURAL_DETERMINERS:
        return _PLURAL_DETERMINERS[determiner]
    if determiner in POSSESSIVES:
        return POSSESSIVES[determiner] + ("a" if feminine and not vowel else "on")  # mon école
    de = "d'" if vowel else "de"
    return {
        "the": "l'" if vowel else "la" if feminine else "le",
        "a": "une" if feminine else "un",
        "our": "notre",
        "this": "cette" if feminine else "cet" if vowel else "ce",
        "many": f"beaucoup {de}",
        "no": de,
    }[determiner]


def french_preposition(preposition: str, phrase: str) -> str:
    """A preposition and a noun phrase, contracted to du, des, au, aux or d'."""
    start, _, last = preposition.rpartition(" ")
    first, _, rest = phrase.partition(" ")
    contraction = {"de": {"le": "du", "les": "des"}, "à": {"le": "au", "les": "aux"}}.get(last, {}).get(first)
    if contraction:
        joined = f"{contraction} {rest}"
    elif last == "de" and elides(first):
        joined = f"d'{phrase}"
    else:
        joined = f"{last} {phrase}"
    return f"{start} {joined}" if start else joined


def join_french(*words: str) -> str:
    """The words joined by spaces, without a space after an apostrophe. Empty words are left out."""
    return " ".join(word for word in words if word).replace("' ", "'")


def english_article(following: str) -> str:
    """a or an, by pronunciation: a useful book, an honest man."""
    vowel = following[0] in "aeiou" and not following.startswith("use") or following.startswith("honest")
    return "an" if vowel else "a"


# --- phrases


@dataclass(frozen=True)
class Phrase:
    """A subject or an object.

    ``person`` is the index in French conjugations (see `conjugate`). ``noun`` is None for pronouns and names.
    """

    lemma: str
    en: str
    fr: str
    person: int
    gender: str
    plural: bool
    tags: frozenset[str]
    kind: str
    noun: Noun | None = None
    determiner: str = ""
    adjective: Adjective | None = None


def noun_phrase(noun: Noun, determiner: str, plural: bool, adjective: Adjective | None) -> Phrase:
    """Determiner, adjective and noun with agreement in both languages."""
    en_noun = (plural and noun.en_plural) or noun.en
    fr_noun = (plural and noun.fr_plural) or noun.fr
    en_words, fr_words = [en_noun], [fr_noun]
    if adjective is not None:
        form = adjective.fr[noun.gender, plural]
        if adjective.position == "before" and not plural and noun.gender == "m" and elides(fr_noun):
            form = lexicon.LIAISON_ADJECTIVES.get(form, form)
        en_words.insert(0, adjective.en)
        fr_words.insert(0 if adjective.position == "before" else 1, form)
    en_determiner = english_article(en_words[0]) if determiner == "a" else determiner
    fr_determiner = french_determiner(determiner, noun.gender, plural, fr_words[0])
    return Phrase(
        lemma=noun.en,
        en=" ".join([en_determiner, *en_words]),
        fr=join_french(fr_determiner, *fr_words),
        person=4 if plural else 2,
        gender=noun.gender,
        plural=plural,
        tags=noun.tags,
        kind=noun.kind,
        noun=noun,
        determiner=determiner,
        adjective=adjective,
    )


_PERSON = frozenset(["person"])
NAMES = [Phrase(en, en, fr, 2, gender, False, _PERSON, "person") for en, fr, gender in lexicon.NAMES]
PRONOUNS = [
    Phrase(en, en, fr, person, gender, person > 2, _PERSON, "person") for en, fr, gender, person in lexicon.PRONOUNS
]


# --- verb phrases

#: The French modal verb of each mood.
MODALS = {"future": "aller", "want": "vouloir", "can": "pouvoir", "must": "devoir"}
_BE_ENGLISH = ("am", "are", "is", "are", "are")


@dataclass(frozen=True)
class Manner:
    """Mood, negation and adverb of a verb, and an opening adverbial of time or place (English, French)."""

    mood: str = "present"
    negative: bool = False
    adverb: str = ""
    opening: tuple[str, str] = ("", "")

    @property
    def denies(self) -> bool:
        """Whether an indefinite direct object becomes "de" in French."""
        return self.negative or self.adverb == "never"


def _direct_object(phrase: Phrase, manner: Manner) -> str:
    """A direct object in French, also with negation: je mange une pomme, je ne mange pas de pomme."""
    if not manner.denies or phrase.determiner != "a" or phrase.noun is None:
        return phrase.fr
    return noun_phrase(phrase.noun, "no", phrase.plural, phrase.adjective).fr


def english_verb(verb: Verb, subject: Phrase, manner: Manner) -> str:
    """The English verb with its auxiliaries. Adverbs occur in the present tense only."""
    third = subject.person == 2  # third person singular
    be = _BE_ENGLISH[subject.person]
    do = "does" if third else "do"
    not_ = "not " if manner.negative else ""
    if manner.mood == "future":
        return f"{be} {not_}going to {verb.en}"
    if manner.mood == "want":
        if manner.negative:
            return f"{do} not want to {verb.en}"
        return f"{'wants' if third else 'want'} to {verb.en}"
    if manner.mood == "can":
        return f"{'cannot' if manner.negative else 'can'} {verb.en}"
    if manner.mood == "must":
        return f"must {not_}{verb.en}"
    if verb is BE:
        return f"{be} {not_}{manner.adverb}".strip()
    if manner.negative:
        return f"{do} not {verb.en}"
    return f"{manner.adverb} {verb.en_third if third else verb.en}".strip()


def french_verb(verb: Verb, subject: Phrase, manner: Manner) -> str:
    """Subject and verb in French. Handled together because of j', and of ne ... pas around the finite verb."""
    finite = conjugate(MODALS.get(manner.mood, verb.fr))[subject.person]
    infinitive = verb.fr if manner.mood in MODALS else ""
    ne = ("n'" if elides(finite) else "ne") if manner.denies else ""
    if manner.adverb == "never":
        after = "jamais"
    else:
        after = "pas" if manner.negative else lexicon.ADVERBS.get(manner.adverb, "")
    who = subject.fr
    if who == "je" and not ne and elides(finite):
        who = "j'"
    return join_french(who, ne, finite, after, infinitive)


# --- sentences


@dataclass(frozen=True)
class Place:
    """A place in both languages, such as "in the garden"."""

    lemma: str
    en: str
    fr: str


@dataclass(frozen=True)
class Sentence:
    """A sentence in both languages, its signature, and its subject, which the next sentence may reuse."""

    en: str
    fr: str
    signature: tuple[str, ...]
    subject: Phrase


def place(preposition: str, phrase: Phrase) -> Place:
    """A place from an English preposition and a noun phrase."""
    fr = french_preposition(lexicon.PREPOSITIONS[preposition], phrase.fr)
    return Place(phrase.lemma, f"{preposition} {phrase.en}", fr)


def capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _finish(
    en: str, fr: str, signature: tuple[str, ...], subject: Phrase, opening: tuple[str, str] = ("", "")
) -> Sentence:
    """Add the opening adverbial, if any, and capitalize the first letter."""
    en, fr = f"{opening[0]} {en}".strip(), f"{opening[1]} {fr}".strip()
    return Sentence(capitalized(en), capitalized(fr), signature, subject)


def _says(
    kind: str, subject: Phrase, verb: Verb, manner: Manner, about: tuple[str, str], *, en: str = "", fr: str = ""
) -> Sentence:
    """A sentence of subject, verb, and the words after the verb in each language. ``about`` completes the signature."""
    return _finish(
        f"{subject.en} {english_verb(verb, subject, manner)} {en}".rstrip(),
        f"{french_verb(verb, subject, manner)} {fr}".rstrip(),
        (kind, subject.lemma, *about),
        subject,
        manner.opening,
    )


def does(subject: Phrase, verb: Verb, manner: Manner) -> Sentence:
    """The cat sleeps."""
    return _says("do", subject, verb, manner, (verb.en, ""))


def acts(subject: Phrase, verb: Verb, target: Phrase, manner: Manner) -> Sentence:
    """The cat sees the dog."""
    fr = french_preposition(verb.preposition, target.fr) if verb.preposition else _direct_object(target, manner)
    return _says("act", subject, verb, manner, (verb.en, target.lemma), en=target.en, fr=fr)


def gives(subject: Phrase, verb: Verb, gift: Phrase, receiver: Phrase, manner: Manner) -> Sentence:
    """The girl gives the book to the boy."""
    en = f"{gift.en} to {receiver.en}"
    fr = f"{_direct_object(gift, manner)} {french_preposition('à', receiver.fr)}"
    return _says("give", subject, verb, manner, (verb.en, gift.lemma), en=en, fr=fr)


def is_so(subject: Phrase, adjective: Adjective, manner: Manner) -> Sentence:
    """The cat is happy."""
    fr = adjective.fr[subject.gender, subject.plural]
    return _says("be", subject, BE, manner, (adjective.en, ""), en=adjective.en, fr=fr)


def is_somewhere(subject: Phrase, where: Place, manner: Manner) -> Sentence:
    """The cat is in the garden."""
    return _says("locate", subject, BE, manner, (where.lemma, ""), en=where.en, fr=where.fr)


def there_is(
    noun: Noun, determiner: str, plural: bool, adjective: Adjective | None, where: Place, opening: tuple[str, str]
) -> Sentence:
    """There is a red house near the river. The place is always given. The determiner "no" makes it a negation."""
    phrase = noun_phrase(noun, determiner, plural, adjective)
    existence = "il n'y a pas" if determiner == "no" else "il y a"
    return _finish(
        f"there {'are' if plural else 'is'} {phrase.en} {where.en}",
        f"{existence} {phrase.fr} {where.fr}",
        ("there", noun.en, where.lemma, ""),
        noun_phrase(noun, "the", plural, adjective),
        opening,
    )


def greets(greeting: tuple[str, str], subject: Phrase) -> Sentence:
    """Hello world. French has an article here, English has none."""
    return _finish(
        f"{greeting[0]} {subject.en.removeprefix('the ')}",
        f"{greeting[1]} {subject.fr}",
        ("greet", greeting[0], subject.lemma, ""),
        subject,
    )
