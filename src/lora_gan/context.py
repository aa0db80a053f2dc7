"""The context length of a model, from its config. Used for bases, and for classifiers as rewards."""

from typing import Any

#: Names of the context length in the configs of transformers and of remote code. If a config has several, the first one
#: counts. transformers maps GPT-2's n_positions to max_position_embeddings.
CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "seq_len", "n_ctx",
    "context_length", "model_max_length",
)  # fmt: skip
#: Base.context if the config has no limit (Bloom). Compare with this value; never compute a size from it.
UNLIMITED = 2**31


def context_of(config: Any) -> int:
    """Most tokens of a row, by the model's config. `UNLIMITED` if the config has no limit."""
    for name in CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < UNLIMITED:
            return value
    return UNLIMITED
