"""GGUF files as bases. Each file is converted once into a transformers folder, which stock clients can open, too.

transformers reads a GGUF file with the package `gguf`, and dequantizes its weights. The result is an ordinary model in
float32, 4 bytes per parameter. It is stored in the user's cache under the SHA-256 of the file, so a changed file is
converted again.

transformers does not read all metadata of a GGUF file. This module adds three items: how SmolLM and similar models
split text into words, a second end-of-text token, and the scaled rotary frequencies of Llama 3.1 and later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from ..storage import user_cache
from ..wording import error_line, size

INSTALL = "pip install 'lora-gan[gguf]'"
# Names in GGUF of pre-tokenizers: those equal to GPT-2's, and those that split at each digit before GPT-2's split.
AS_GPT2 = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais")
DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


# --- finding and converting once --------------------------------------------------------------------------------------


def is_one(path: Path) -> bool:
    """Whether the path is a file with a suffix, or a GGUF file without one.

    Other files without a suffix may have the same name as a hub id, so the name is then taken for a hub id.
    """
    return path.is_file() and (path.suffix != "" or _is_gguf(path))


def file_in(path: Path) -> Path | None:
    """The GGUF file at a path: the file itself, or the only GGUF file in a folder.

    None for a folder without GGUF files, or with safetensors or PyTorch weights, which have priority.

    Raises:
        ValueError: the folder has several GGUF files, or the file is not a GGUF file.
    """
    if path.is_file():
        if not _is_gguf(path):
            raise ValueError(
                f"{str(path)!r} cannot be the base: it is not a GGUF file. Give a GGUF file, or the folder of a "
                "transformers model"
            )
        return path
    if any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.safetensors.index.*")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
        raise ValueError(f"the folder {str(path)!r} has {len(files)} GGUF files: give one of {names}")
    return files[0] if files else None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def converted(file: Path) -> Path:
    """The transformers folder of a GGUF file in the user's cache. The first call converts the file.

    Raises:
        ValueError: one line that names the file, and says why it cannot be converted.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = user_cache.cache_folder() / "gguf" / digest
    if not user_cache.is_whole(folder):
        weights = 4 * sum(int(tensor.n_elements) for tensor in _header(file).tensors)  # bytes
        print(f"Converting {file} to float32, {size(weights)}, in {folder}", file=sys.stderr, flush=True)
        user_cache.get(folder, lambda new: convert(file, new), needs=weights + 2**26)  # 64 MB: a tokenizer is smaller
    return folder


def is_converted(path: str | None) -> bool:
    """Whether a recorded path is a converted GGUF file, in any cache folder."""
    return re.search(r"[/\\]gguf[/\\][0-9a-f]{64}$", path or "") is not None


# --- the metadata of a file -------------------------------------------------------------------------------------------


def require_reader() -> None:
    """Raises ValueError with the install command if the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading a GGUF file needs the package gguf: {INSTALL}")


def _header(file: Path) -> Any:
    """The gguf.GGUFReader of a file that contains one whole model."""
    require_reader()
    from gguf import GGUFReader

    try:
        header = GGUFReader(file)
    except Exception as error:  # IndexError, ValueError, KeyError ...: depends on where the file ends
        raise ValueError(
            f"the GGUF file {str(file)!r} is damaged or cut off ({error_line(error)}): download it again"
        ) from error
    if _value(header, "general.type") == "adapter":
        raise ValueError(f"the GGUF file {str(file)!r} cannot be the base: it is an adapter. Give a model's file")
    if (splits := _value(header, "split.count") or 1) > 1:
        raise ValueError(
            f"the GGUF file {str(file)!r} is one of {splits} files of a model: join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the joined file"
        )
    return header


def _value(header: Any, key: str) -> Any:
    field = header.get_field(key)
    return None if field is None else field.contents()


# --- converting -------------------------------------------------------------------------------------------------------


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder, for transformers' `from_pretrained`.

    Weights are float32: dequantized values are not exact in a narrower type. If transformers cannot read the file's
    tokenizer, the folder has no tokenizer, and a warning is given.

    Raises:
        ValueError: one line that names the file, and says why it could not be converted.
    """
    import torch
    import transformers

    from ..storage.checkpoint import readable
    from .base_checks import require_complete
    from .pretrained import load_causal_lm, without_progress_bars

    header = _header(file)
    # Newer releases of transformers can keep the weights quantized. Adapters cannot be trained on such weights.
    how: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loading = load_causal_lm(str(file.parent), gguf_file=file.name, dtype=torch.float32, **how)
    except Exception as error:  # transformers and gguf raise many kinds
        raise ValueError(f"transformers cannot read the GGUF file {str(file)!r}: {error_line(error)}") from error
    require_complete(model, loading["missing_keys"], f"the GGUF file {str(file)!r}")
    tokenizer = None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:
        warnings.warn(
            f"transformers cannot read the tokenizer of the GGUF file {str(file)!r} ({error_line(error)}): pass "
            "processing_class=",
            stacklevel=2,
        )
    _end_as_trained(model, header)
    _rotate_as_trained(model, header, file)
    # All weights are dequantized, but transformers marks the model as quantized and would refuse to save it.
    marks = ("hf_quantizer", "is_quantized", "quantization_method")
    for owner, name in (*((model, name) for name in marks), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    with without_progress_bars():
        model.save_pretrained(folder)
    if tokenizer is not None:
        _split_as_trained(tokenizer, header, file)
        tokenizer.save_pretrained(folder)
    readable(folder)


def _end_as_trained(model: Any, header: Any) -> None:
    """Add the end-of-turn token (eot) of the file. transformers reads the end-of-text token (eos) only."""
    end, turn = (_value(header, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    if end is not None and turn is not None and end != turn:
        model.generation_config.eos_token_id = [int(end), int(turn)]


def _rotate_as_trained(model: Any, header: Any, file: Path) -> None:
    """Apply the rotary scaling of Llama 3.1 and later: the tensor `rope_freqs.weight` has one divisor per frequency.

    transformers ignores this tensor. Its "longrope" scaling accepts such divisors, here the same for every length.
    """
    config = model.config
    factors = next((tensor.data for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None and config.model_type == "llama":
        listed = [float(factor) for factor in factors]
        config.rope_parameters = {
            "rope_type": "longrope", "rope_theta": config.rope_parameters["rope_theta"], "factor": 1.0,
            "short_factor": listed, "long_factor": listed, "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }  # fmt: skip
        return
    scaling = _value(header, f"{_value(header, 'general.architecture')}.rope.scaling.type")
    parameters = getattr(config, "rope_parameters", None) or {}
    if (scaling not in (None, "none") or factors is not None) and parameters.get("rope_type") == "default":
        warnings.warn(
            f"the GGUF file {str(file)!r} scales its rotary positions ({scaling or 'rope_freqs'}), which transformers "
            "does not read: the base will differ slightly from the model in the file",
            stacklevel=3,
        )


def _split_as_trained(tokenizer: Any, header: Any, file: Path) -> None:
    """Set the pre-tokenizer that the model was trained with; the file has its name (`tokenizer.ggml.pre`).

    transformers 5.23 knows the pre-tokenizers of Llama 3, Qwen and others, and uses GPT-2's for the rest. SmolLM and
    similar models split at every digit, then as GPT-2. Without this, "\\n\\n1" would be three tokens instead of two.
    """
    from tokenizers import pre_tokenizers

    kind = _value(header, "tokenizer.ggml.pre")
    if _value(header, "tokenizer.ggml.model") != "gpt2" or kind is None or kind in AS_GPT2:
        return
    if kind in DIGITS_THEN_GPT2:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError:  # another release of transformers, without this table
        return
    if kind not in known:
        warnings.warn(
            f"the GGUF file {str(file)!r} splits text as {str(kind)!r}, which transformers does not know: text is "
            "split as in GPT-2, so some texts get other tokens than in the model's training. To avoid this, pass "
            "the model's own tokenizer as processing_class=",
            stacklevel=3,
        )
