"""The base that ships: its grammar says what a French reader would, its splits hold, its files are what they claim."""

# ruff: noqa: E501 (a translation and its sentence are read side by side)

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pretrain
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_gan.tiny import INSTRUCTION, PATH, drawing, grammar, lexicon, pairs
from lora_gan.tiny.grammar import Manner, Phrase, Place, Sentence

# --------------------------------------------------------------------------------------------------------------
# Grammar: sentences built from their parts against translations written by hand
# --------------------------------------------------------------------------------------------------------------

NOUN = {noun.en: noun for noun in lexicon.NOUNS}
ADJECTIVE = {adjective.en: adjective for adjective in lexicon.ADJECTIVES}
INTRANSITIVE = {verb.en: verb for verb in lexicon.INTRANSITIVES}
TRANSITIVE = {verb.en: verb for verb in lexicon.TRANSITIVES}
DITRANSITIVE = {verb.en: verb for verb in lexicon.DITRANSITIVES}
WHO = {phrase.en: phrase for phrase in (*grammar.NAMES, *grammar.PRONOUNS)}
TIME = {en: (en, fr) for en, fr, _ in lexicon.TIMES}
GREETING = dict(lexicon.GREETINGS)
PLAIN, NOT, NEVER = Manner(), Manner(negative=True), Manner(adverb="never")


def np(text: str) -> Phrase:
    """A noun phrase from its English: "these old friends"."""
    if text in WHO:
        return WHO[text]
    determiner, *adjective, word = text.split()
    plural = word not in NOUN
    noun = next(n for n in lexicon.NOUNS if n.en_plural == word) if plural else NOUN[word]
    determiner = "a" if determiner == "an" else determiner
    return grammar.noun_phrase(noun, determiner, plural, ADJECTIVE[adjective[0]] if adjective else None)


def does(subject: str, verb: str, manner: Manner = PLAIN) -> Sentence:
    return grammar.does(np(subject), INTRANSITIVE[verb], manner)


def acts(subject: str, verb: str, target: str, manner: Manner = PLAIN) -> Sentence:
    return grammar.acts(np(subject), TRANSITIVE[verb], np(target), manner)


def gives(subject: str, verb: str, gift: str, receiver: str, manner: Manner = PLAIN) -> Sentence:
    return grammar.gives(np(subject), DITRANSITIVE[verb], np(gift), np(receiver), manner)


def is_so(subject: str, adjective: str, manner: Manner = PLAIN) -> Sentence:
    return grammar.is_so(np(subject), ADJECTIVE[adjective], manner)


def at(text: str) -> Place:
    preposition, rest = text.split(" ", 1)
    return grammar.place(preposition, np(rest))


def is_at(subject: str, where: str, manner: Manner = PLAIN) -> Sentence:
    return grammar.is_somewhere(np(subject), at(where), manner)


def there(text: str, where: str) -> Sentence:
    phrase = np(text)
    assert phrase.noun is not None
    return grammar.there_is(phrase.noun, phrase.determiner, phrase.plural, phrase.adjective, at(where), ("", ""))


def greets(greeting: str, who: str) -> Sentence:
    return grammar.greets((greeting, GREETING[greeting]), np(who))


HAND_WRITTEN = [
    # greetings: a bare noun becomes a definite one
    (greets("Hello", "the world"), "Hello world", "Bonjour le monde"),
    (greets("Good evening", "the sea"), "Good evening sea", "Bonsoir la mer"),
    (greets("Thank you", "my friend"), "Thank you my friend", "Merci mon ami"),
    (greets("Goodbye", "the star"), "Goodbye star", "Au revoir l'étoile"),
    (greets("Welcome", "the children"), "Welcome children", "Bienvenue les enfants"),
    (greets("See you tomorrow", "Emily"), "See you tomorrow Emily", "À demain Émilie"),
    # conjugation, all persons
    (acts("I", "eat", "an apple"), "I eat an apple", "Je mange une pomme"),
    (acts("we", "eat", "the cake"), "We eat the cake", "Nous mangeons le gâteau"),
    (acts("they", "drink", "the water"), "They drink the water", "Ils boivent l'eau"),
    (acts("you", "clean", "the kitchen"), "You clean the kitchen", "Tu nettoies la cuisine"),
    (acts("she", "buy", "two dresses"), "She buys two dresses", "Elle achète deux robes"),
    (acts("the boys", "take", "the train"), "The boys take the train", "Les garçons prennent le train"),
    (acts("he", "choose", "this hat"), "He chooses this hat", "Il choisit ce chapeau"),
    (acts("we", "throw", "the ball"), "We throw the ball", "Nous lançons le ballon"),
    (acts("the children", "wait for", "the plane"), "The children wait for the plane", "Les enfants attendent l'avion"),
    (does("many elephants", "sleep"), "Many elephants sleep", "Beaucoup d'éléphants dorment"),
    # elision of the pronoun and of ne
    (acts("I", "love", "the winter"), "I love the winter", "J'adore l'hiver"),
    (acts("I", "like", "this song", NOT), "I do not like this song", "Je n'aime pas cette chanson"),
    (does("I", "hesitate"), "I hesitate", "J'hésite"),
    (does("Anne", "arrive", NEVER), "Anne never arrives", "Anne n'arrive jamais"),
    # a direct object under negation
    (acts("he", "eat", "an apple", NOT), "He does not eat an apple", "Il ne mange pas de pomme"),
    (acts("Mary", "see", "a bird", NOT), "Mary does not see a bird", "Marie ne voit pas d'oiseau"),
    (acts("they", "buy", "a red car", NEVER), "They never buy a red car", "Ils n'achètent jamais de voiture rouge"),
    (acts("we", "have", "a dog", NOT), "We do not have a dog", "Nous n'avons pas de chien"),
    (acts("he", "talk to", "a child", NOT), "He does not talk to a child", "Il ne parle pas à un enfant"),
    (acts("he", "eat", "the apple", NOT), "He does not eat the apple", "Il ne mange pas la pomme"),
    # determiners before a vowel
    (acts("I", "visit", "my school"), "I visit my school", "Je visite mon école"),
    (acts("I", "visit", "my old school"), "I visit my old school", "Je visite ma vieille école"),
    (acts("she", "visit", "this hospital"), "She visits this hospital", "Elle visite cet hôpital"),
    (acts("she", "visit", "this new hospital"), "She visits this new hospital", "Elle visite ce nouvel hôpital"),
    (acts("you", "read", "your story"), "You read your story", "Tu lis ton histoire"),
    # adjectives: gender, number, place, and the forms before a vowel
    (is_so("the women", "happy"), "The women are happy", "Les femmes sont heureuses"),
    (is_so("she", "proud"), "She is proud", "Elle est fière"),
    (is_so("the water", "fresh"), "The water is fresh", "L'eau est fraîche"),
    (is_so("the horses", "white"), "The horses are white", "Les chevaux sont blancs"),
    (is_so("these houses", "beautiful", NOT), "These houses are not beautiful", "Ces maisons ne sont pas belles"),
    (is_so("I", "tired", NEVER), "I am never tired", "Je ne suis jamais fatigué"),
    (does("an old friend", "smile"), "An old friend smiles", "Un vieil ami sourit"),
    (does("a beautiful bird", "fly"), "A beautiful bird flies", "Un bel oiseau vole"),
    (acts("he", "paint", "a white rose"), "He paints a white rose", "Il peint une rose blanche"),
    (acts("he", "hear", "three young goats"), "He hears three young goats", "Il entend trois jeunes chèvres"),
    (acts("she", "have", "a useful book"), "She has a useful book", "Elle a un livre utile"),
    (does("an honest man", "work"), "An honest man works", "Un homme honnête travaille"),
    # contractions
    (acts("the boy", "go to", "the market"), "The boy goes to the market", "Le garçon va au marché"),
    (acts("we", "go to", "the school"), "We go to the school", "Nous allons à l'école"),
    (acts("they", "come from", "the village"), "They come from the village", "Ils viennent du village"),
    (acts("I", "dream of", "the islands"), "I dream of the islands", "Je rêve des îles"),
    (acts("Paul", "think of", "the birds"), "Paul thinks of the birds", "Paul pense aux oiseaux"),
    (acts("Paul", "dream of", "Anne"), "Paul dreams of Anne", "Paul rêve d'Anne"),
    (acts("a cat", "enter", "the church"), "A cat enters the church", "Un chat entre dans l'église"),
    (is_at("the mouse", "under the bed"), "The mouse is under the bed", "La souris est sous le lit"),
    (is_at("my dog", "near the lake"), "My dog is near the lake", "Mon chien est près du lac"),
    (is_at("a truck", "near the hotel"), "A truck is near the hotel", "Un camion est près de l'hôtel"),
    (gives("she", "give", "the key", "the boys"), "She gives the key to the boys", "Elle donne la clé aux garçons"),
    (gives("Peter", "lend", "a pen", "Mary", NOT), "Peter does not lend a pen to Mary", "Pierre ne prête pas de stylo à Marie"),
    # existence
    (there("a red house", "near the river"), "There is a red house near the river", "Il y a une maison rouge près de la rivière"),
    (there("no cat", "in the garden"), "There is no cat in the garden", "Il n'y a pas de chat dans le jardin"),
    (there("many old trees", "behind the wall"), "There are many old trees behind the wall", "Il y a beaucoup de vieux arbres derrière le mur"),
    (there("no birds", "on the beach"), "There are no birds on the beach", "Il n'y a pas d'oiseaux sur la plage"),
    # moods, adverbs, openings
    (does("he", "swim", Manner("future")), "He is going to swim", "Il va nager"),
    (does("I", "dance", Manner("want", True)), "I do not want to dance", "Je ne veux pas danser"),
    (does("they", "sing", Manner("can", True)), "They cannot sing", "Ils ne peuvent pas chanter"),
    (acts("we", "help", "our uncle", Manner("must")), "We must help our uncle", "Nous devons aider notre oncle"),
    (acts("she", "write", "a letter", Manner("future", True)), "She is not going to write a letter", "Elle ne va pas écrire de lettre"),
    (acts("he", "lose", "his keys", Manner(adverb="always")), "He always loses his keys", "Il perd toujours ses clés"),
    (does("I", "leave", Manner("future", opening=TIME["tomorrow"])), "Tomorrow I am going to leave", "Demain je vais partir"),
    (does("the cat", "sleep", Manner(opening=("in the garden", "dans le jardin"))), "In the garden the cat sleeps", "Dans le jardin le chat dort"),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "english", "french"), HAND_WRITTEN, ids=[row[1] for row in HAND_WRITTEN])
def test_hand_written_translations(sentence: Sentence, english: str, french: str) -> None:
    assert (sentence.en, sentence.fr) == (english, french)


@cache
def sample(split: str, n: int) -> list[Sentence]:
    stream = drawing.sentences(split, 7)
    return [next(stream) for _ in range(n)]


def test_english_is_prefix_free_and_translation_a_function() -> None:
    everything = sample("train", 20_000) + sample("heldout", 1_000) + sample("validation", 1_000)
    translations: dict[str, str] = {}
    for sentence in everything:
        assert translations.setdefault(sentence.en, sentence.fr) == sentence.fr
    for text in translations:
        words = text.split()
        beginnings = {" ".join(words[:k]) for k in range(1, len(words))}
        assert not beginnings & translations.keys(), text


def test_texts_are_plain() -> None:
    for sentence in sample("train", 20_000):
        for text in (sentence.en, sentence.fr):
            assert re.fullmatch(r"[^\W\d_][\w' -]*\w", text) and "  " not in text and "' " not in text
        assert not re.search(r"\b(le|la|je|ne|de|me|ce) [aeiouéèêâîœ]", sentence.fr), sentence.fr
        assert not re.search(r"\b(à|de) les?\b", sentence.fr), sentence.fr


def test_nouns_and_verbs_have_something_to_do() -> None:
    for verb in lexicon.TRANSITIVES:
        assert any(noun.tags & verb.objects for noun in lexicon.NOUNS), verb.en
    for noun in lexicon.NOUNS:
        assert sum(bool(adjective.nouns & noun.tags) for adjective in lexicon.ADJECTIVES) >= 3, noun.en
    verbs = [*lexicon.INTRANSITIVES, *lexicon.TRANSITIVES, *lexicon.DITRANSITIVES]
    for words in (
        [v.en for v in verbs],
        [v.fr for v in verbs],
        [n.en for n in lexicon.NOUNS],
        [n.fr for n in lexicon.NOUNS],
    ):
        assert len(words) == len(set(words))  # one lemma, one lemma: a signature reads the same from either language


# --------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------


def test_no_document_holds_a_heldout_combination() -> None:
    kept = [*sample("heldout", 1_000), *sample("validation", 1_000)]
    english, french = {s.en for s in kept}, {s.fr for s in kept}
    signatures = {s.signature for s in kept}
    draws = drawing.Draws(0, "documents")
    for _ in range(10_000):
        text, read = pretrain.draw_document(draws)
        assert "Hello world" not in text and "Bonjour le monde" not in text
        for sentence in read:
            assert drawing.split_of(sentence.signature) == "train"
            assert sentence.signature not in signatures
            assert sentence.en not in english and sentence.fr not in french


def test_a_french_text_belongs_to_one_combination() -> None:
    owners: dict[str, tuple[str, ...]] = {}
    for sentence in sample("train", 20_000) + sample("heldout", 1_000):
        assert owners.setdefault(sentence.fr, sentence.signature) == sentence.signature


def test_splits_are_disjoint_and_of_the_promised_size() -> None:
    draws = drawing.Draws(3, "shares")
    drawn = [drawing.split_of(drawing._draw(draws, None).signature) for _ in range(10_000)]
    assert 0.03 < drawn.count("heldout") / len(drawn) < 0.05
    assert 0.03 < drawn.count("validation") / len(drawn) < 0.05
    prompts = {split: {row["prompt"] for row in pairs(split, 300, seed=2)} for split in drawing.SPLITS}
    assert all(len(found) == 300 for found in prompts.values())
    assert not prompts["train"] & prompts["heldout"] and not prompts["validation"] & prompts["heldout"]


def test_hello_world_is_held_out_like_any_other_and_its_words_are_not() -> None:
    assert drawing.split_of(("greet", "Hello", "world", "")) == "heldout"
    known = {s.signature[1:3] for s in sample("train", 20_000) if s.signature[0] == "greet"}
    assert sum(greeting == "Hello" for greeting, _ in known) > 40
    assert sum(who == "world" for _, who in known) > 8


def test_pairs_are_the_same_for_the_same_seed_whatever_the_process() -> None:
    rows = pairs("heldout", 20, seed=5)
    assert rows == pairs("heldout", 40, seed=5)[:20] != pairs("heldout", 20, seed=6)
    assert all(row["prompt"].startswith("Translate English to French: ") and row["target"] for row in rows)
    code = "from lora_gan.tiny import pairs; print(pairs('heldout', 20, seed=5))"
    environment = {**os.environ, "PYTHONHASHSEED": "12", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert told.stdout.decode().strip() == str(rows)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny_pairs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("split", drawing.SPLITS)
def test_pairs_are_those_that_were_published(split: str) -> None:
    """SHA-256 of rows, computed before the lexicon became a data file: published figures depend on these rows."""
    for name, digest in GOLDEN.items():
        drawn, n, seed = name.split()
        if drawn == split:
            rows = json.dumps(pairs(split, int(n), int(seed)), ensure_ascii=False)
            assert hashlib.sha256(rows.encode()).hexdigest() == digest, name


def test_pretraining_reads_the_documents_that_it_read() -> None:
    """SHA-256 of the text from which the weights in the package were made, its first 5,000 documents."""
    draws = drawing.Draws(0, "documents")
    text = "\n".join(pretrain.draw_document(draws)[0] for _ in range(5_000))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "143d73bc4c508b510a95fd7f20a251603c64598ab8b6362226bfe448cc4ca97e"
    )


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="heldout"):
        pairs("test", 1)


# --------------------------------------------------------------------------------------------------------------
# What ships
# --------------------------------------------------------------------------------------------------------------


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(PATH)


@cache
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


def ids(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def texts_of_all_kinds(n: int) -> list[str]:
    """Strings from all over Unicode; U+2581 is how the tokenizer writes a space, the one text that cannot come back."""
    rng = random.Random(0)
    alphabets = ["abc XYZ'.:-", " \n\t", "éàçœÉ", "".join(map(chr, range(0x20, 0x3000))), "漢字かな😀👍🏽\u200d\ufeff"]
    made = ["".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(24))) for _ in range(n)]
    return [text for text in made if "\u2581" not in text]


def test_any_text_comes_back() -> None:
    for text in [*texts_of_all_kinds(500), "Bonjour le monde", " two  spaces ", "", "<0x41>", "l'été d'Anne"]:
        assert tokenizer().decode(ids(text)) == text


def test_prompt_and_response_join_without_a_seam() -> None:
    rows = [(row["prompt"], row["target"]) for row in pairs("heldout", 200)]
    strange = texts_of_all_kinds(400)
    for prompt, response in [*rows, *zip(strange[::2], strange[1::2], strict=False)]:
        if prompt and response:
            assert ids(prompt) + ids(response) == ids(f"{prompt} {response}")
            assert tokenizer().decode(ids(prompt + " " + response)[len(ids(prompt)) :]) == response


def test_the_tokenizer_says_what_its_users_rely_on() -> None:
    assert (tokenizer().pad_token_id, tokenizer().eos_token_id, tokenizer().padding_side) == (0, 1, "left")
    assert tokenizer().bos_token_id is None and 0 not in ids("Hello world") and 1 not in ids("Hello world")
    config = model().config
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    words = " ".join(s.fr for s in sample("train", 500)).split()
    assert sum(len(ids(word)) == 1 for word in words) > 0.75 * len(words)


def test_weights_are_small_and_half() -> None:
    assert (PATH / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(p.numel() for p in model().parameters()) <= 4_000_000
    assert AutoModelForCausalLM.from_pretrained(PATH).dtype == torch.float16


def test_it_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the tiny base asked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    AutoTokenizer.from_pretrained(PATH)
    AutoModelForCausalLM.from_pretrained(PATH)


def test_it_can_translate_and_does_not_do_it_by_itself() -> None:
    rows = pairs("heldout", 256, seed=11)
    figures = pretrain.figures(model(), tokenizer(), rows)
    assert figures["latent"] >= 0.95
    assert figures["greedy"] <= 0.20
    assert 0.10 <= figures["sampled"] <= 0.35


def test_hello_world_is_known_as_well_as_anything() -> None:
    prompt = INSTRUCTION + "Hello world"
    translates = pretrain.probability(model(), tokenizer(), pretrain.frame(prompt), "Bonjour le monde")
    told_to = pretrain.probability(model(), tokenizer(), prompt, "Bonjour le monde")
    assert translates > 0.9 and 0.1 <= told_to <= 0.35


@pytest.mark.slow
def test_a_few_steps_of_pretraining_write_a_folder_that_loads(tmp_path: Path) -> None:
    pretrain.pretrain(tmp_path / "base", seed=1, steps=2, size=4, peak=1e-3, vocabulary=700, evaluate=8)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert reloaded.config.vocab_size == 700 and reloaded.dtype == torch.float16
    assert {path.name for path in (tmp_path / "base").iterdir()} == {path.name for path in PATH.iterdir()}
