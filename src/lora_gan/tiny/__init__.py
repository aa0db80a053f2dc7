"""The base model in this package: small, made by this project, and usable without a network.

It was pretrained on simple English and French. After "Translate English to French: ..." it writes the translation about
one time in five. The library's first example trains it to translate by reward. ``DATA_CARD.md`` says how the base was
made.
"""

from __future__ import annotations

from pathlib import Path

from . import drawing

#: The folder of config, weights and tokenizer, for transformers' ``from_pretrained``.
PATH = Path(__file__).parent / "base"
INSTRUCTION = "Translate English to French: "


def pairs(split: str = "train", n: int = 1024, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows of prompt and target with distinct prompts. Equal arguments give equal rows.

    ``train`` rows use combinations of words that pretraining texts may contain, and may be pretraining texts
    themselves. ``validation`` and ``heldout`` rows use combinations that no pretraining text contains. The two splits
    share no combination.

    Args:
        split: ``train``, ``validation`` or ``heldout``.
        n: number of rows.
        seed: seed of the draws.

    Raises:
        ValueError: there is no such split.
    """
    rows: dict[str, str] = {}
    for sentence in drawing.sentences(split, seed):
        if len(rows) >= n:
            break
        rows[INSTRUCTION + sentence.en] = sentence.fr
    return [{"prompt": prompt, "target": target} for prompt, target in rows.items()]


__all__ = ["INSTRUCTION", "PATH", "pairs"]
