"""Multimodal bases that are opened as their text model alone, and the names that stock clients have for it.

AutoModelForCausalLM makes the text model of such a folder, so the generator's adapter keeps its names. Stock sequence
classification makes the whole model of the same folder, and its text model stands one level deeper. A discriminator's
adapter on such a base is saved under those deeper names, and read under both.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: Model types that are opened this way: those for which the tests show all of docs/reference/bases.md.
OPENS_AS_TEXT = ("qwen3_5", "qwen3_5_moe")
BODY, WITHIN = "model.", "model.language_model."  # the text model's modules: on their own, and in the whole model
ADAPTER = "base_model.model."  # what PEFT puts in front of a module's name


def opens_as_text(config: Any, kind: type | None) -> bool:
    """Whether AutoModelForCausalLM makes the text model alone of this multimodal config.

    Args:
        config: as it is on the disk.
        kind: the class that AutoModelForCausalLM would make.
    """
    text = config.sub_configs.get("text_config")
    return config.model_type in OPENS_AS_TEXT and text is not None and getattr(kind, "config_class", None) is text


def stock_name(module: str) -> str:
    """A module's name in the text model, as stock sequence classification has it."""
    return WITHIN + module.removeprefix(BODY) if module.startswith(BODY) else module


def stock_tensors(weights: dict[str, Any]) -> dict[str, Any]:
    """A discriminator's weights by PEFT's names, under stock sequence classification's names."""
    return {ADAPTER + stock_name(name.removeprefix(ADAPTER)): tensor for name, tensor in weights.items()}


def plain_name(name: str) -> str:
    """The inverse of `stock_tensors` for one name; other names stay as they are."""
    return name.replace(ADAPTER + WITHIN, ADAPTER + BODY, 1)


def targets_of_both(targets: Collection[str]) -> list[str]:
    """Full module names, cut so that PEFT finds them in the text model and in the whole model: it compares ends."""
    return sorted({target.removeprefix(BODY) for target in targets})
