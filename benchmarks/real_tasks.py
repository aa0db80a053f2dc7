"""Tasks of the learning benchmark on a real chat model: `facts` (E2E descriptions) and `constraints` (demo-chat).

A task's judges get responses and targets. A target holds everything that its judges need, one item per line: for
`facts` the meaning representation and then the reference texts, for `constraints` the constraints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_gan.data import Row, read_rows
from lora_gan.rewards import CosineReward, chrf, instructions

E2E = Path(__file__).parents[1] / "../shared/data/e2e_nlg.jsonl"
MODEL = "smollm2"
HELD_OUT = {"heldout": (0, 128), "validation": (128, 224)}  # places in the shuffled list of prompts; the rest trains
ASK = "Write one sentence about a restaurant that states all of these facts and nothing else. {}"
FRIENDLY = ("family", "families", "child", "kid")
RATINGS = {"1 out of 5": ("1 out of 5", "one star", "low"), "3 out of 5": ("3 out of 5", "three star", "average")}


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(split: str, count: int, *, seed: int = 0, data: Path = E2E) -> list[Row]:
    """Rows of meaning representations with all of their references, split by meaning representation.

    Args:
        split: train, validation or heldout.
        count: rows at most. Training rows come in an order of their own for each seed.
        data: rows of prompt and target; several rows share a prompt.
    """
    if not data.exists():
        raise ValueError(f"the task facts needs the E2E data, and {data} is not there")
    references: dict[str, list[str]] = {}
    for row in read_rows(data):
        references.setdefault(str(row.prompt).strip(), []).append(str(row.target))
    prompts = sorted(references)
    order = [prompts[int(i)] for i in np.random.Generator(np.random.Philox(0)).permutation(len(prompts))]
    if split == "train":
        rest = order[max(last for _, last in HELD_OUT.values()) :]
        chosen = [rest[int(i)] for i in np.random.Generator(np.random.Philox(seed)).permutation(len(rest))]
    else:
        first, last = HELD_OUT[split]
        chosen = order[first:last]
    return [
        Row(_message(ASK.format(readable(meaning))), "\n".join([meaning, *references[meaning]]))
        for meaning in chosen[:count]
    ]


def slots(meaning: str) -> dict[str, str]:
    """{slot: value} of "name[Alimentum], area[city centre]"."""
    return dict(re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning))


def readable(meaning: str) -> str:
    names = {"eatType": "type", "familyFriendly": "family friendly", "priceRange": "price range"}
    return "; ".join(f"{names.get(name, name)}: {value}" for name, value in slots(meaning).items()) + "."


def chrf_to_any(response: str, target: str | None) -> float:
    """The largest chrF to a reference, in [0, 1]."""
    return max(chrf(response, reference) for reference in str(target).split("\n")[1:])


def coverage(response: str, target: str | None) -> float:
    """The share of facts that a response names, by words: a rough measure that does not look at the references."""
    text = response.lower()
    found = []
    for name, value in slots(str(target).split("\n")[0]).items():
        words = FRIENDLY if name == "familyFriendly" else RATINGS.get(value, (value.lower(),))
        found.append(any(word in text for word in words))
    return float(np.mean(found))


def cosine_to_first(responses: list[str], targets: list[str | None]) -> list[float]:
    return list(CosineReward().batch(list(responses), [str(target).split("\n")[1] for target in targets]))


# --- constraints ------------------------------------------------------------------------------------------------------


def constraints(split: str, count: int, *, seed: int = 0) -> list[Row]:
    rows = instructions.rows(split, count, seed=seed if split == "train" else 0)  # type: ignore[arg-type]
    return [Row(row["prompt"], "\n".join(row["constraints"])) for row in rows]


def graded(response: str, target: str | None) -> float:
    """The reward of demo-chat: the share of constraints met; one that is nearly met counts up to a half."""
    return float(np.mean([instructions.graded(constraint, response) for constraint in str(target).split("\n")]))


def strict(response: str, target: str | None) -> float:
    return float(instructions.share_met(str(target).split("\n"), response))


def _message(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
