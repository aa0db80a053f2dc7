"""GGUF files as bases: each is converted once into a transformers folder, which stock clients open too.

transformers reads a GGUF file with the help of the package `gguf` and dequantizes its weights. The result is an
ordinary model in float32, 4 bytes per parameter. It lies in the user's cache under the SHA-256 of the file, so that a
changed file is converted again.

transformers leaves some of what a file says unread. What is put right here: the split of text into words of SmolLM and
its like, a second end-of-text token, and the scaled rotary frequencies of Llama 3.1 and later.
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
AS_GPT2 = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais")  # text splits that are GPT-2's, by their names in GGUF
DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


# --- finding and converting once --------------------------------------------------------------------------------------


def is_one(path: Path) -> bool:
    """Whether the path is a file that is, or is meant as, a GGUF file: a file without a suffix may be called like a
    hub id."""
    return path.is_file() and (path.suffix != "" or _is_gguf(path))


def file_in(path: Path) -> Path | None:
    """The GGUF file that a path stands for: itself, or the only one in a folder. None: the folder is no such base.

    In a folder that has safetensors or PyTorch weights as well, those are the base.

    Raises:
        ValueError: a folder with several GGUF files, or a file that is no GGUF file.
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
    """The transformers folder of a GGUF file, in the user's cache; it is made at the first call.

    Raises:
        ValueError: one line that names the file, and why it cannot be converted.
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
    """Whether a recorded path is that of a converted GGUF file, in whatever cache."""
    return re.search(r"[/\\]gguf[/\\][0-9a-f]{64}$", path or "") is not None


# --- what a file says of itself ---------------------------------------------------------------------------------------


def require_reader() -> None:
    """Raises ValueError, with the command that installs it, where the package `gguf` is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"reading a GGUF file needs the package gguf: {INSTALL}")


def _header(file: Path) -> Any:
    """The file's gguf.GGUFReader, if the file holds one whole model."""
    require_reader()
    from gguf import GGUFReader

    try:
        header = GGUFReader(file)
    except Exception as error:  # IndexError, ValueError, KeyError ..., by where the file ends
        raise ValueError(f"the GGUF file {str(file)!r} is damaged or cut off: {error_line(error)}") from error
    if _value(header, "general.type") == "adapter":
        raise ValueError(f"the GGUF file {str(file)!r} cannot be the base: it is an adapter")
    if (parts := _value(header, "split.count") or 1) > 1:
        raise ValueError(
            f"the GGUF file {str(file)!r} is one of {parts} parts of a model: join them with llama.cpp's "
            "`llama-gguf-split --merge`, and give the whole file"
        )
    return header


def _value(header: Any, key: str) -> Any:
    field = header.get_field(key)
    return None if field is None else field.contents()


# --- converting -------------------------------------------------------------------------------------------------------


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into a folder as transformers' `from_pretrained` reads them.

    Weights are float32: dequantized values are not exact in a narrower type. A file without a tokenizer that
    transformers can read gives a folder without one, and a warning.

    Raises:
        ValueError: one line that names the file, and why it could not be converted.
    """
    import torch
    import transformers

    from ..storage.checkpoint import readable
    from .base_checks import require_complete
    from .pretrained import load_causal_lm, without_progress_bars

    header = _header(file)
    # Newer releases of transformers can keep weights in GGUF's blocks, which no adapter could be trained on.
    how: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loading = load_causal_lm(str(file.parent), gguf_file=file.name, dtype=torch.float32, **how)
    except Exception as error:  # of many kinds, as transformers and gguf raise them
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
    # transformers marks the model as quantized and would refuse to save it, though every weight is dequantized.
    marked = ("hf_quantizer", "is_quantized", "quantization_method")
    for holder, name in (*((model, name) for name in marked), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    with without_progress_bars():
        model.save_pretrained(folder)
    if tokenizer is not None:
        _split_as_trained(tokenizer, header, file)
        tokenizer.save_pretrained(folder)
    readable(folder)


def _end_as_trained(model: Any, header: Any) -> None:
    """A file may name a token that ends a turn (eot) beside the one that ends a text. transformers reads the latter."""
    end, turn = (_value(header, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    if end is not None and turn is not None and end != turn:
        model.generation_config.eos_token_id = [int(end), int(turn)]


def _rotate_as_trained(model: Any, header: Any, file: Path) -> None:
    """Llama 3.1 and later divide each rotary frequency by a factor of its own: the tensor `rope_freqs.weight`.

    transformers leaves that tensor out. Its "longrope" takes such factors; here they are the same at every length.
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
            "does not read: the base will not be quite the model that the file holds",
            stacklevel=3,
        )


def _split_as_trained(tokenizer: Any, header: Any, file: Path) -> None:
    """Split text into words as it was when the merges were trained; a GGUF file names how (`tokenizer.ggml.pre`).

    transformers 5.23 knows the splits of Llama 3, Qwen and others, and takes GPT-2's for the rest. SmolLM and its like
    split at every digit, then as GPT-2: without this, "\\n\\n1" would be three tokens, and the model learned it as two.
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
    except ImportError:  # another release, whose splits cannot be asked for
        return
    if kind not in known:
        warnings.warn(
            f"the GGUF file {str(file)!r} splits text as {str(kind)!r}, which transformers does not know: text is "
            "split as GPT-2 does, and some texts get other tokens than the model was trained on. Pass "
            "processing_class= with the model's own tokenizer to avoid this",
            stacklevel=3,
        )
