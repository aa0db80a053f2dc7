"""True rewards: what a response is worth, as a float, higher being better."""

from .calling import RewardError, RewardUnavailable
from .combine import Parts, reward_names, score_pairs, score_parts, score_trl, weighted_total
from .cosine import CosineReward
from .human import Human
from .judge import Judge
from .model import Classifier, Entailment
from .named import from_spec, from_specs
from .notes import Notes
from .perplexity import Perplexity
from .scales import Scales
from .shaping import Length, repetition
from .signatures import check_reward, needs_columns, require_columns, reward_name, takes_completions
from .source import source_digest
from .text import bleu, chrf, corpus_chrf, distinct_n, exact_match, meteor, rouge

__all__ = [
    "Classifier",
    "CosineReward",
    "Entailment",
    "Human",
    "Judge",
    "Length",
    "Notes",
    "Parts",
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
