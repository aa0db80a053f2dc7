"""True rewards: what a response is worth, as a float, higher being better."""

import importlib
from typing import TYPE_CHECKING, Any

from .calling import RewardError, RewardUnavailable
from .combine import reward_names, score_pairs, score_parts, score_trl, weighted_total
from .model import Classifier, Entailment
from .named import from_spec, from_specs
from .notes import Notes
from .perplexity import Perplexity
from .scales import Scales
from .shaping import Length, repetition
from .signatures import check_reward, needs_columns, require_columns, reward_name, takes_completions
from .source import source_digest
from .text import bleu, chrf, corpus_chrf, distinct_n, exact_match, meteor, rouge

if TYPE_CHECKING:
    from .cosine import CosineReward
    from .human import Human
    from .judge import Judge

__all__ = [
    "Classifier",
    "CosineReward",
    "Entailment",
    "Human",
    "Judge",
    "Length",
    "Notes",
    "Perplexity",
    "RewardError",
    "RewardUnavailable",
    "Scales",
    "bleu",
    "check_reward",
    "chrf",
    "corpus_chrf",
    "distinct_n",
    "exact_match",
    "from_spec",
    "from_specs",
    "meteor",
    "needs_columns",
    "repetition",
    "require_columns",
    "reward_name",
    "reward_names",
    "rouge",
    "score_pairs",
    "score_parts",
    "score_trl",
    "source_digest",
    "takes_completions",
    "weighted_total",
]

_LATER = {"CosineReward": "cosine", "Human": "human", "Judge": "judge"}


def __getattr__(name: str) -> Any:
    """What brings a library along is imported when it is asked for: naming rewards must cost nothing."""
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
