"""Opening a base from the disk or the hub: the model and its tokenizer, or one line that says why not. `load_base`
calls `open_pretrained` for every base that is given by name.
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

# Keys of model_init_kwargs that another setting decides.
DECIDED_ELSEWHERE = {
    "dtype": "dtype=", "torch_dtype": "dtype=", "device_map": "device=", "trust_remote_code": "trust_remote_code=",
    "quantization_config": "quantization_config=", "load_in_8bit": "quantization_config=",
    "load_in_4bit": "quantization_config=", "pretrained_model_name_or_path": "model=", "config": "model=",
    "state_dict": "model=", "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "output_loading_info": "nothing: the library reads it itself",
}  # fmt: skip
REPOSITORY_OPTIONS = ("revision", "token", "cache_dir", "subfolder")  # which concern the tokenizer's files too
OTHER_FOLDERS = {  # what a folder without a config.json is, by a file in it
    "adapter_config.json":
        "it is an adapter, not a base: open it with load_generator(), load_discriminator() or from_checkpoint()",
    "modules.json":
        "it is a sentence-transformers model, which embeds texts: give a causal language model (if its transformer is "
        "one, the folder within it that has a config.json)",
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
    """Model, tokenizer, the path that stock clients load the model by, and its config there if it is multimodal."""
    extra = dict(config.model_init_kwargs or {})
    for key in extra.keys() & DECIDED_ELSEWHERE.keys():
        raise ValueError(f"model_init_kwargs has {key!r}, which is decided by {DECIDED_ELSEWHERE[key]}: drop it there")
    repository = {key: extra[key] for key in REPOSITORY_OPTIONS if key in extra}
    if name in named_bases.NAMES:
        path = source = str(named_bases.folder_of(name))
    elif Path(name).is_dir() or gguf_files.is_one(Path(name)):
        file = gguf_files.file_in(Path(name))
        path = source = str(Path(name).resolve() if file is None else gguf_files.converted(file))
    elif name.endswith(".gguf"):
        raise ValueError(f"the base {name!r} is not there: there is no such GGUF file")
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
    if quantized:  # packed weights are made on their device: not all of them can be moved
        extra["device_map"] = {"": device}
    if quantization_config is not None:
        extra["quantization_config"] = quantization_config
    # Mismatched tensors are refused below by name; transformers would only point to a table that it logs.
    options = {"dtype": _dtype(config, device), "ignore_mismatched_sizes": True}
    with _opening(name, "model"):
        lm, loading = load_causal_lm(source, **{**options, **extra, **shared})
    base_checks.require_matching(loading["mismatched_keys"], name)
    holds = f" and would be random. It holds {_architectures(lm_config)}"
    base_checks.require_complete(lm, loading["missing_keys"], f"the base {name!r}", holds)
    if tokenizer is None:
        with _opening(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    return lm, tokenizer, path, lm_config if lm_config.get_text_config() is not lm_config else None


@contextmanager
def _opening(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside, in one line; the whole of it stays behind as the cause."""
    try:
        yield
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError, RuntimeError ...
        reason = error_line(error, 600)
        tells = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
        if not tells:  # the text of a KeyError is its key alone
            reason = f"{type(error).__name__}: {reason}"
        remedy = "; save it there, or pass processing_class=" if what == "tokenizer" else ""
        raise ValueError(f"the {what} of the base {name!r} could not be opened: {reason}{remedy}") from error


def _require_files(folder: Path, name: str, needs_tokenizer: bool) -> None:
    """Say which part of a base a folder lacks; transformers would make up an empty tokenizer where there is none."""
    if not (folder / "config.json").is_file():
        kinds = (there for file, there in OTHER_FOLDERS.items() if any(folder.glob(file)))
        found = next(kinds, "it has no config.json")
        raise ValueError(f"the folder {name!r} cannot be the base: {found}")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.safetensors.index.*")):
        raise ValueError(f"the folder {name!r} cannot be the base: it has a config.json, but no weights")
    if needs_tokenizer and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(
            f"the folder {name!r} has no tokenizer (no tokenizer.json): save it there with "
            "tokenizer.save_pretrained(), or pass processing_class="
        )


def _reach_hub(name: str, repository: dict[str, Any], local_files_only: bool) -> str:
    """What a hub id is to be opened by: itself, or where the hub cannot be asked its folder in the cache.

    One request, once: without a network the hub's client would try each of several files six times, for some 45 s in
    all, and nearly as long for a base that is cached. A slow network makes this request late, and is then waited for.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    where = {key: repository[key] for key in ("revision", "subfolder") if key in repository}
    file = "/".join(filter(None, [where.get("subfolder"), "config.json"]))
    try:
        cached = try_to_load_from_cache(name, file, repository.get("cache_dir"), where.get("revision"))
    except ValueError as error:
        raise ValueError(
            f"the base {name!r} is not there: it must be a folder with a transformers model, a GGUF file, a hub id "
            f"(name, or owner/name), or {named_bases.listed()} ({error_line(error)})"
        ) from error
    folder = cached.removesuffix(file) if isinstance(cached, str) else None
    cause: Exception | None = None
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "only this machine is asked" if local_files_only else "HF_HUB_OFFLINE=1 forbids to ask the hub"
    else:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json", **where), token=repository.get("token"))
            return name
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            raise ValueError(
                f"the base {name!r} is no folder here, and the hub has none: {error_line(error)}"
            ) from error
        except errors.HfHubHTTPError:
            return name  # an overloaded hub: its client waits and asks again
        except Exception as error:  # of whichever client the hub's library uses
            if "Timeout" in type(error).__name__ and "Connect" not in type(error).__name__:
                return name
            cause, why = error, f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__})"
    if folder is None:
        raise ValueError(f"the base {name!r} is neither a folder here nor in the hub's cache, and {why}") from cause
    return folder


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype is the device's choice, not the checkpoint's: without bf16 units a bf16 product is 300 times slower."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _architectures(config: Any) -> str:
    return ", ".join(getattr(config, "architectures", None) or [f"a model of type {config.model_type!r}"])


def require_supported(config: Any, kind: type[PreTrainedModel] | None) -> None:
    """Refuse by kind what cannot be a base, before its weights are read."""
    is_remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    name = kind.__name__ if kind else _architectures(config)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, and both players are one stack that reads prompt and response"
    elif kind is None and not is_remote:
        reason = "transformers knows no causal language model of its type"
    elif config.get_text_config() is not config and not opens_as_text(config, kind):
        reason = (
            "it is multimodal: its other towers would get adapters that nothing trains, and stock PEFT would look for "
            "them; use the text model alone, saved from it"
        )
    elif kind is not None and cache_argument(inspect.signature(kind.forward).parameters) is None:
        reason = "it has no key-value cache to sample with (its forward takes neither past_key_values nor cache_params)"
    else:
        return
    raise ValueError(
        f"{name} cannot be the base, it is not a causal language model of the kind that is needed: {reason}"
    )
