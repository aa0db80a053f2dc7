"""Rewards and metrics that compare words and characters. They are cheap, independent of embeddings, and equal on every
machine.

- Per sentence, f(response, target) -> float in [0, 1], for reward=: exact_match, chrf, bleu, rouge, meteor.
- Per corpus, for an evaluation: corpus_chrf in [0, 100], as in papers, and distinct_n in [0, 1].

chrF and BLEU are computed by sacrebleu, ROUGE by rouge-score and METEOR by nltk. All use the default settings of the
library, so that results are comparable with published ones.
"""

import functools
import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..extras import need
from .calling import RewardUnavailable

Rouge = Literal["rouge1", "rouge2", "rougeL"]
DEBIANS_WORDNET = Path("/usr/share/wordnet")


def exact_match(response: str, target: str | None) -> float:
    """1.0 where response and target are equal but for space at their ends, else 0.0."""
    return float(response.strip() == _given(target).strip())


def chrf(response: str, target: str | None) -> float:
    """chrF of one sentence, in [0, 1]: F-score over character n-grams up to 6 (Popović 2015).

    Raises:
        ValueError: there is no target.
        ImportError: sacrebleu is not installed.
    """
    return _unit(_sacrebleu().sentence_chrf(response, [_given(target)]).score)


def bleu(response: str, target: str | None) -> float:
    """BLEU of one sentence, in [0, 1] (Papineni et al. 2002; smoothing and effective order as sacrebleu sets them).

    Raises:
        ValueError: there is no target.
        ImportError: sacrebleu is not installed.
    """
    return _unit(_sacrebleu().sentence_bleu(response, [_given(target)]).score)


def rouge(response: str, target: str | None, kind: Rouge = "rougeL") -> float:
    """ROUGE F-measure of one sentence, in [0, 1] (Lin 2004): of words, pairs of words, or longest common subsequence.

    As rouge-score has it, without stemming: lower case, and whatever is not a–z or 0–9 parts words. A metric for
    English: letters with accents part words too, and a text in another script scores 0.

    Raises:
        ValueError: there is no target, or no such kind.
        ImportError: rouge-score is not installed.
    """
    if kind not in get_args(Rouge):
        raise ValueError(f"kind={kind!r} is not accepted: it must be one of {', '.join(get_args(Rouge))}")
    return float(_rouge_scorer(kind).score(_given(target), response)[kind].fmeasure)


def meteor(response: str, target: str | None) -> float:
    """METEOR of one sentence, in [0, 1]: words matched as they are, by stem, or by synonym (Lavie & Agarwal 2007).

    As nltk has it, with its defaults (alpha 0.9, beta 3, gamma 0.5). It wants words: here those are the runs of
    letters, digits and underscores, and every other visible character by itself. Its synonyms and stems are English.

    Raises:
        ValueError: there is no target.
        ImportError: nltk is not installed.
        RewardUnavailable: WordNet is not on this machine.
    """
    wanted = _words(_given(target))
    wordnet = _wordnet()
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(wanted, _words(response), wordnet=wordnet))


for _reward in (exact_match, chrf, bleu, rouge, meteor):
    _reward.needs_target = True  # type: ignore[attr-defined]  # so that LoraGAN checks for a target before sampling


def corpus_chrf(responses: Sequence[str], targets: Sequence[str | None]) -> float:
    """chrF over a corpus, in [0, 100]. N-grams are first counted over all rows, so it is not the mean of `chrf`.

    Raises:
        ValueError: there are no rows, the lists differ in length, or a row has no target.
        ImportError: sacrebleu is not installed.
    """
    if not responses or len(responses) != len(targets):
        raise ValueError(
            f"{len(responses)} responses and {len(targets)} targets; give one target per response, and at least one row"
        )
    return float(_sacrebleu().corpus_chrf(list(responses), [[_given(target) for target in targets]]).score)


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all word n-grams of `responses`, in [0, 1] (Li et al. 2016).

    Words are separated by whitespace, and case matters. The value is 0.0 if no response has n words. It falls as a
    corpus grows, so compare only equal numbers of responses.

    Raises:
        ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be 1 or more")
    split = [response.split() for response in responses]
    ngrams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _given(target: str | None) -> str:
    if target is None:
        raise ValueError("there is no target: this metric compares a response with its target; give target_text")
    return target


def _unit(percent: float) -> float:
    return min(percent / 100.0, 1.0)  # sacrebleu's perfect BLEU is 100.00000000000004


def _sacrebleu() -> Any:
    return need("sacrebleu", "BLEU and chrF are computed by sacrebleu", "metrics")


@functools.lru_cache
def _rouge_scorer(kind: Rouge) -> Any:
    return need("rouge_score.rouge_scorer", "ROUGE is computed by rouge-score", "metrics").RougeScorer([kind])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@functools.lru_cache
def _wordnet() -> Any:
    """WordNet as an nltk reader: from nltk's own data, else from the dict folder of WordNet or of Debian's package."""
    nltk = need("nltk", "METEOR is computed by nltk", "metrics")
    from nltk.corpus import wordnet
    from nltk.corpus.reader import WordNetCorpusReader

    class DictFolder(WordNetCorpusReader):  # type: ignore[misc]  # nltk has no types
        """A folder with WordNet's data alone, which is what Debian ships: METEOR reads no more."""

        def open(self, file: str) -> Any:
            if file == "lexnames":  # names of WordNet's 45 source files; the reader wants them to be there
                return io.StringIO("".join(f"{i:02d} {i:02d} 0\n" for i in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """No map from another release: only other languages' synonyms need one, from a file that is not there."""

    try:
        wordnet.ensure_loaded()
        return wordnet
    except LookupError:
        pass
    named = os.environ.get("WNSEARCHDIR")  # WordNet's own variable
    folder = Path(named) if named else DEBIANS_WORDNET
    if not (folder / "data.noun").is_file():
        raise RewardUnavailable(
            "METEOR looks synonyms up in WordNet, which is not on this machine: python -m nltk.downloader wordnet, or "
            "Debian's package (apt-get install wordnet-base), or WNSEARCHDIR naming a folder with its data "
            f"(looked in {folder})"
        )
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))  # nltk opens files below these folders only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other languages
        return DictFolder(str(folder), None)
