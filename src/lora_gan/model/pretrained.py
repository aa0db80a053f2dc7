"""transformers' from_pretrained for causal language models, without its progress bars; names on the hub. Used by
`opening`, `gguf_files`, `initial_adapter` and the export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging


def load_causal_lm(source: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that AutoModelForCausalLM makes of a folder or hub id, and transformers' loading info."""
    with without_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    model, loading = loaded
    return model, loading


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """A small base loads before its bar is drawn; the user's own setting comes back."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def hub_id(name: str) -> str | None:
    """The name, if the hub accepts it: an absolute path is none."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name
