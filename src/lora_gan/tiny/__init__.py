"""The base model that ships with the package: small, made by this project, and usable without a network.

It knows a little English and French, and how to translate. It does not translate by itself: after "Translate English to
French: ..." it writes the translation about one time in five. Teaching it to translate, by reward, is the library's
first example. ``DATA_CARD.md`` says how the base was made.
"""

from __future__ import annotations

from pathlib import Path

from . import drawing

#: The folder of config, weights and tokenizer, as transformers' ``from_pretrained`` reads it.
PATH = Path(__file__).parent / "base"
INSTRUCTION = "Translate English to French: "


def pairs(split: str = "train", n: int = 1024, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows of prompt and target, with distinct prompts; equal arguments give equal rows.

    ``train`` rows are of combinations that pretraining contained; the rows themselves may or may not be among them.
    ``validation`` and ``heldout`` rows are of combinations that no pretraining text contains, and of different ones.

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
