"""Multimodal bases that are opened as their text model, and the module names that stock clients use for it.

From such a folder, AutoModelForCausalLM builds the text model only. The generator's adapter keeps its names.
AutoModelForSequenceClassification builds the whole model, in which the text model is one level deeper. The
discriminator's adapter is saved with those deeper names, and is read with either.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: Model types that are opened this way. For each, the tests check every property in docs/reference/bases.md.
OPENS_AS_TEXT = ("qwen3_5", "qwen3_5_moe")
BODY, WITHIN = "model.", "model.language_model."  # prefix of the text model's modules: alone, and in the whole model
ADAPTER = "base_model.model."  # PEFT's prefix of module names


def opens_as_text(config: Any, kind: type | None) -> bool:
    """Whether this is a supported multimodal config from which AutoModelForCausalLM builds the text model only.

    Args:
        config: the config on the disk.
        kind: the class that AutoModelForCausalLM would build.
    """
    text = config.sub_configs.get("text_config")
    return config.model_type in OPENS_AS_TEXT and text is not None and getattr(kind, "config_class", None) is text


def stock_name(module: str) -> str:
    """The name in the whole model of a module of the text model."""
    return WITHIN + module.removeprefix(BODY) if module.startswith(BODY) else module


def stock_tensors(weights: dict[str, Any]) -> dict[str, Any]:
    """A discriminator's weights, renamed from the text model to the whole model."""
    return {ADAPTER + stock_name(name.removeprefix(ADAPTER)): tensor for name, tensor in weights.items()}


def plain_name(name: str) -> str:
    """The inverse of `stock_tensors` for one name. Other names stay unchanged."""
    return name.replace(ADAPTER + WITHIN, ADAPTER + BODY, 1)


def targets_of_both(targets: Collection[str]) -> list[str]:
    """Module names without the prefix. PEFT compares the ends of names, so it finds them in both models."""
    return sorted({target.removeprefix(BODY) for target in targets})
