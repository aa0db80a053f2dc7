"""Opens a base from the disk or the hub. A failure gives one line with the reason.

`load_base` calls `open_pretrained` for each base that is given by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..config import Config
from ..wording import error_line
from . import base_checks, gguf_files, named_bases
from .composite import opens_as_text
from .kv_cache import cache_argument
from .pretrained import load_causal_lm

# Keys of model_init_kwargs that are set elsewhere, with the place to set them.
DECIDED_ELSEWHERE = {
    "dtype": "dtype=", "torch_dtype": "dtype=", "device_map": "device=", "trust_remote_code": "trust_remote_code=",
    "quantization_config": "quantization_config=", "load_in_8bit": "quantization_config=",
    "load_in_4bit": "quantization_config=", "pretrained_model_name_or_path": "model=", "config": "model=",
    "state_dict": "model=", "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "output_loading_info": "the library itself",
}  # fmt: skip
REPOSITORY_OPTIONS = ("revision", "token", "cache_dir", "subfolder")  # these apply to the tokenizer, too
OTHER_FOLDERS = {  # kinds of folders without a config.json, by a file in the folder
    "adapter_config.json":
        "it is an adapter, not a base: open it with load_generator(), load_discriminator() or from_checkpoint()",
    "modules.json":
        "it is a sentence-transformers model, which embeds texts: give a causal language model. If its transformer is "
        "one, give the subfolder with a config.json",
    "trainer_state.json": "it is a checkpoint, not a base: open it with LoraGAN.from_checkpoint()",
    "step-*/trainer_state.json": "it is the folder of a checkpoint, not a base: open it with LoraGAN.from_checkpoint()",
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def open_pretrained(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    device: torch.device,
    quantization_config: Any,
    local_files_only: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, Any]:
    """Open a base by name.

    Returns:
        The model, its tokenizer, the path from which stock clients load the model, and the whole config if the base is
        multimodal (else None).

    Raises:
        ValueError: one line that names the base, and says why it cannot be opened.
    """
    extra = dict(config.model_init_kwargs or {})
    for key in extra.keys() & DECIDED_ELSEWHERE.keys():
        raise ValueError(
            f"model_init_kwargs has {key!r}, which is set by {DECIDED_ELSEWHERE[key]}: drop it from model_init_kwargs"
        )
    repository = {key: extra[key] for key in REPOSITORY_OPTIONS if key in extra}
    if name in named_bases.NAMES:
        path = source = str(named_bases.folder_of(name))
    elif Path(name).is_dir() or gguf_files.is_one(Path(name)):
        file = gguf_files.file_in(Path(name))
        path = source = str(Path(name).resolve() if file is None else gguf_files.converted(file))
    elif name.endswith(".gguf"):
        raise ValueError(f"the base {name!r} cannot be opened: there is no such GGUF file")
    else:
        path, source = name, _reach_hub(name, repository, local_files_only)
    if Path(source).is_dir():
        _require_files(Path(source, extra.get("subfolder", "")), name, tokenizer is None)

    shared = {**repository, "trust_remote_code": config.trust_remote_code}
    with _opening(name, "model"):
        lm_config = AutoConfig.from_pretrained(source, **shared)
    kind = cast("type[PreTrainedModel] | None", MODEL_FOR_CAUSAL_LM_MAPPING.get(type(lm_config), None))
    require_supported(lm_config, kind)

    quantized = quantization_config or getattr(lm_config, "quantization_config", None)
    if quantized:  # quantized weights are created on their device; some kinds cannot be moved
        extra["device_map"] = {"": device}
    if quantization_config is not None:
        extra["quantization_config"] = quantization_config
    # The check below names mismatched tensors; transformers' own error only refers to a logged table.
    options = {"dtype": _dtype(config, device), "ignore_mismatched_sizes": True}
    with _opening(name, "model"):
        lm, loading = load_causal_lm(source, **{**options, **extra, **shared})
    base_checks.require_matching(loading["mismatched_keys"], name)
    note = f" and would be random. It holds {_architectures(lm_config)}"
    base_checks.require_complete(lm, loading["missing_keys"], f"the base {name!r}", note)
    if tokenizer is None:
        with _opening(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    return lm, tokenizer, path, lm_config if lm_config.get_text_config() is not lm_config else None


@contextmanager
def _opening(name: str, what: str) -> Iterator[None]:
    """Errors inside the block become a ValueError of one line, with the original error as its cause."""
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, RuntimeError ...
        reason = error_line(error, 600)
        if not isinstance(error, OSError | ValueError | ImportError | RuntimeError):  # a KeyError's text is its key
            reason = f"{type(error).__name__}: {reason}"
        remedy = "; save it there, or pass processing_class=" if what == "tokenizer" else ""
        raise ValueError(f"the {what} of the base {name!r} could not be opened: {reason}{remedy}") from error


def _require_files(folder: Path, name: str, needs_tokenizer: bool) -> None:
    """Raise a ValueError if a folder lacks config, weights or tokenizer.

    Without tokenizer files, transformers would create an empty tokenizer.
    """

    def has(*patterns: str) -> bool:
        return any(any(folder.glob(pattern)) for pattern in patterns)

    if not (folder / "config.json").is_file():
        kind = next((kind for file, kind in OTHER_FOLDERS.items() if has(file)), "it has no config.json")
        raise ValueError(f"the folder {name!r} cannot be the base: {kind}")
    if not has("*.safetensors", "*.bin", "*.gguf", "*.safetensors.index.*"):
        raise ValueError(f"the folder {name!r} cannot be the base: it has a config.json, but no weights")
    if needs_tokenizer and not has(*TOKENIZER_FILES):
        raise ValueError(
            f"the folder {name!r} has no tokenizer (no tokenizer.json): save it there with "
            "tokenizer.save_pretrained(), or pass processing_class="
        )


def _reach_hub(name: str, repository: dict[str, Any], local_files_only: bool) -> str:
    """The source to open a hub id from: the id itself, or its folder in the cache if the hub cannot be reached.

    This sends one request. Without a network, the hub's client would try each of several files six times, about 45 s
    in all, and nearly as long for a cached base. If this request times out on reading, the network is slow but present,
    and the hub is used.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    where = {key: repository[key] for key in ("revision", "subfolder") if key in repository}
    file = "/".join(filter(None, [where.get("subfolder"), "config.json"]))
    try:
        cached = try_to_load_from_cache(name, file, repository.get("cache_dir"), where.get("revision"))
    except ValueError as error:
        raise ValueError(
            f"the base {name!r} was not found: give a folder with a transformers model, a GGUF file, a hub id "
            f"(name, or owner/name), or {named_bases.listed()} ({error_line(error)})"
        ) from error
    folder = cached.removesuffix(file) if isinstance(cached, str) else None
    cause: Exception | None = None
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "only local files are allowed" if local_files_only else "HF_HUB_OFFLINE=1 forbids access to the hub"
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", **where), token=repository.get("token"))
            return name
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            raise ValueError(
                f"the base {name!r} is neither a folder here nor a model on the hub: {error_line(error)}"
            ) from error
        except errors.HfHubHTTPError:
            return name  # for example an overloaded hub: its client retries
        except Exception as error:  # the kind depends on the HTTP client of huggingface_hub
            if "Timeout" in type(error).__name__ and "Connect" not in type(error).__name__:
                return name
            cause, why = error, f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    if folder is None:
        raise ValueError(f"the base {name!r} is neither a folder here nor in the hub's cache, and {why}") from cause
    return folder


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype, from the device and not from the checkpoint: a bf16 product without bf16 units is 300 times slower."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _architectures(config: Any) -> str:
    return ", ".join(getattr(config, "architectures", None) or [f"a model of type {config.model_type!r}"])


def require_supported(config: Any, kind: type[PreTrainedModel] | None) -> None:
    """Refuse kinds of models that cannot be a base, before their weights are read.

    Raises:
        ValueError: it names the kind and the reason.
    """
    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    name = kind.__name__ if kind else _architectures(config)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, but both players need a decoder that reads prompt and response"
    elif kind is None and not is_remote:
        reason = "transformers knows no causal language model of its type"
    elif config.get_text_config() is not config and not opens_as_text(config, kind):
        reason = (
            "it is multimodal: the modules for images or sound would get adapters that stay untrained; save its text "
            "model as a separate folder, and give this folder"
        )
    elif kind is not None and cache_argument(inspect.signature(kind.forward).parameters) is None:
        reason = "it has no key-value cache for sampling (its forward takes neither past_key_values nor cache_params)"
    else:
        return
    raise ValueError(f"{name} cannot be the base, it is not a suitable causal language model: {reason}")
