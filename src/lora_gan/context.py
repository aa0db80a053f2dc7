"""How many tokens a model reads at once, from its config. Used for bases and for classifiers that are rewards."""

from typing import Any

#: Names under which transformers' configs, and those of remote code, say how many tokens a row may have. Where a config
#: has several, the first one counts. GPT-2's n_positions is max_position_embeddings by transformers' attribute map.
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "seq_len", "n_ctx",
    "context_length", "model_max_length",
)  # fmt: skip
#: Base.context where the config names no limit (Bloom). Compare with it; never multiply it to size anything.
UNLIMITED = 2**31


def context_of(config: Any) -> int:
    """Tokens that fit in one row by the model's config; `UNLIMITED` where it names no limit."""
    for name in CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < UNLIMITED:
            return value
    return UNLIMITED
