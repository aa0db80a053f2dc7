"""GGUF files as bases: each is converted once into a transformers folder, which stock clients open too.

transformers reads a GGUF file with the help of the package `gguf` and dequantizes its weights. What it then holds is an
ordinary model in float32, 4 bytes per parameter.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

INSTALL = "pip install 'lora-gan[gguf]'"


def require_reader() -> None:
    """Raises ValueError, with the command that installs it, where the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading a GGUF file needs the package gguf: {INSTALL}")


def convert(file: Path, folder: Path) -> int:
    """Write the model and tokenizer of a GGUF file into a folder as transformers' `from_pretrained` reads them.

    Weights are float32: dequantized values are not exact in a narrower type.

    Returns:
        The number of parameters.

    Raises:
        ValueError: one line that names the file, and why it could not be converted.
    """
    import torch
    import transformers

    from .base import without_progress_bars
    from .checkpoint import readable

    require_reader()
    # Newer releases of transformers can keep weights in GGUF's blocks, which no adapter could be trained on.
    how: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, name = str(file.parent), file.name
    try:
        with without_progress_bars():
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                where, gguf_file=name, dtype=torch.float32, output_loading_info=True, **how
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
    except Exception as error:  # of many kinds, as transformers and gguf raise them
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"the GGUF file {str(file)!r} could not be read: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"the GGUF file {str(file)!r} does not hold all of a {type(model).__name__}: {missing[0]} is missing "
            f"({len(missing)} tensors in all)"
        )
    _split_as_trained(tokenizer, file)
    # transformers marks the model as quantized and would refuse to save it, though every weight is dequantized.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable(folder)
    return model.num_parameters()


def _split_as_trained(tokenizer: Any, file: Path) -> None:
    """Split text into words as the merges were trained, where transformers does not know the file's kind of split.

    A GGUF file names its split (`tokenizer.ggml.pre`). transformers 5.23 knows those of Llama 3, Qwen and others, and
    takes GPT-2's for the rest. llama.cpp splits "smollm" and its like at every digit, then as GPT-2: without this,
    "\\n\\n1" would be three tokens where the model was trained on two.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    kind = None if field is None else field.contents()
    if kind in ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
