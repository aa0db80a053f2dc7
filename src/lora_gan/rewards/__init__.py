"""True rewards: what a response is worth, as a float, higher being better."""

from .combine import RewardError, reward_name, reward_names, score_pairs, score_trl
from .cosine import CosineReward, RewardUnavailable
from .text import bleu, chrf, corpus_chrf, distinct_n, exact_match

__all__ = [
    "CosineReward",
    "RewardError",
    "RewardUnavailable",
    "bleu",
    "chrf",
    "corpus_chrf",
    "distinct_n",
    "exact_match",
    "reward_name",
    "reward_names",
    "score_pairs",
    "score_trl",
]
