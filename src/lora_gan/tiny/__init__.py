"""The base model that ships with the package: small, of this project's own making, and there without a network.

It is fluent in a little English and a little French, knows how to translate, and does not do it by itself: what it
writes after "Translate English to French: ..." is a translation about one time in five. Teaching it to, by reward, is
the library's first example. ``DATA_CARD.md`` says how it was made.
"""

from __future__ import annotations

from pathlib import Path

from . import grammar

#: The folder of config, weights and tokenizer, as transformers' ``from_pretrained`` reads it.
PATH = Path(__file__).parent / "base"


def pairs(split: str = "train", n: int = 1024, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows of prompt and target, no prompt twice; the same for the same arguments.

    ``train`` rows are of combinations the base saw in pretraining (the rows themselves it may or may not have seen).
    ``validation`` and ``heldout`` rows are of combinations that no pretraining text contains, and of different ones.
    """
    rows: dict[str, str] = {}
    for sentence in grammar.sentences(split, seed):
        if len(rows) >= n:
            break
        rows[grammar.INSTRUCTION + sentence.en] = sentence.fr
    return [{"prompt": prompt, "target": target} for prompt, target in rows.items()]


__all__ = ["PATH", "pairs"]
