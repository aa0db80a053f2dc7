"""Rewards and judges that compare words and characters: cheap, unrelated to any embedding, the same on every machine.

Sentence level, f(response, target) -> float in [0, 1], fit for reward=: exact_match, chrf, bleu.
Corpus level, over a whole evaluation: corpus_chrf in [0, 100], as papers print it, and distinct_n in [0, 1].
chrF and BLEU are sacrebleu's, with its defaults, so that figures compare with published ones.
"""

from collections.abc import Sequence
from types import ModuleType


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


def corpus_chrf(responses: Sequence[str], targets: Sequence[str | None]) -> float:
    """chrF over a corpus, in [0, 100]: n-grams are counted over all rows first, so it is not the mean of `chrf`.

    Raises:
        ValueError: no rows, lists of different length, or a row without a target.
        ImportError: sacrebleu is not installed.
    """
    if not responses or len(responses) != len(targets):
        raise ValueError(
            f"{len(responses)} responses and {len(targets)} targets; give one target for each, and at least one"
        )
    return float(_sacrebleu().corpus_chrf(list(responses), [[_given(target) for target in targets]]).score)


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Share of distinct word n-grams among all those of `responses`, in [0, 1] (Li et al. 2016).

    Words are what stands between spaces, case kept. 0.0 where no response has n words. It falls as a corpus grows:
    compare only equal numbers of responses.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be 1 or more")
    seen: set[tuple[str, ...]] = set()
    total = 0
    for response in responses:
        words = response.split()
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen) / total if total else 0.0


def _given(target: str | None) -> str:
    if target is None:
        raise ValueError("there is no target: this metric compares a response with its target; give target_text")
    return target


def _unit(percent: float) -> float:
    return min(percent / 100.0, 1.0)  # sacrebleu's perfect BLEU is 100.00000000000004


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError('BLEU and chrF are computed by sacrebleu: pip install "lora-gan[metrics]"') from error
    return sacrebleu
