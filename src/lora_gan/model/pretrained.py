"""transformers' from_pretrained for causal language models without progress bars, and the check of hub ids.

Used by `opening`, `gguf_files`, `initial_adapter` and the export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging


def load_causal_lm(source: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that AutoModelForCausalLM loads from a folder or hub id, and transformers' loading info."""
    with without_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, loading = loaded
    return model, loading


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Inside the block, transformers shows no progress bars. The user's setting is restored at the end."""
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def hub_id(name: str) -> str | None:
    """The name if its form is that of a hub id, else None. An absolute path is not a hub id."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
