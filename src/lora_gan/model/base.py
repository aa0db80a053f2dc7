"""Opening the base: a causal language model with its tokenizer, and what both players must know of them.

What the library needs of a base is asked of the base itself, not of a list of names: it is run once, on a dozen tokens
(`_require_causal`). What cannot work is refused here, by name, before anything is trained.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from ..config import Config
from ..wording import error_line
from . import base_checks, gguf_files, named_bases
from .composite import opens_as_text
from .endings import Endings
from .kv_cache import cache_argument, cache_inputs, roomy_cache

# Keys of model_init_kwargs that another setting decides.
DECIDED_ELSEWHERE = {
    "dtype": "dtype=", "torch_dtype": "dtype=", "device_map": "device=", "trust_remote_code": "trust_remote_code=",
    "quantization_config": "quantization_config=", "load_in_8bit": "quantization_config=",
    "load_in_4bit": "quantization_config=", "pretrained_model_name_or_path": "model=", "config": "model=",
    "state_dict": "model=", "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "output_loading_info": "nothing: the library reads it itself",
}  # fmt: skip
OF_THE_REPOSITORY = ("revision", "token", "cache_dir", "subfolder")  # which concern the tokenizer's files too
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Base:
    """A causal language model with its tokenizer, and what the two players must know of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # what the user called it: "tiny", "smollm2", a hub id, a folder, a GGUF file; "" for one in memory
    path: str  # what stock clients can load it by: a hub id or an absolute folder
    # config.pad_token_id, by which stock sequence classification pools; None where the embedding has no row for it
    pad_on_disk: int | None
    endings: Endings  # the ids that end a response
    fingerprint: str
    # The config that stock clients find under `path`, where it is not the model's own: of a multimodal base that is
    # opened as its text model alone.
    composite: Any = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that stop sampling; the first closes a response to a plain prompt."""
        return self.endings.stop_ids

    @property
    def pad_id(self) -> int:
        """The id that fills unused places, which are always masked. It has a row in the embedding table, which a pad
        token that was added to the tokenizer alone has not."""
        rows = base_checks.embedding_rows(self.model)
        candidates = (self.pad_on_disk, self.tokenizer.pad_token_id, self.eos_ids[0])
        return next(id for id in candidates if id is not None and 0 <= id < rows)

    @cached_property
    def _tokens(self) -> frozenset[int]:
        return base_checks.token_ids(self.tokenizer)

    def words(self, ids: list[int]) -> list[int]:
        """The ids that the tokenizer knows. An embedding may have more rows than the tokenizer has tokens, and sampling
        may draw such a row: it stays in the response's ids, and is no part of its text."""
        return [id for id in ids if id in self._tokens] if self._tokens else ids

    @property
    def context(self) -> int:
        """Tokens that fit in one row; `base_checks.UNLIMITED` where the base names no limit."""
        return base_checks.context_of(self.model.config.get_text_config())


def load_base(
    model: str | os.PathLike[str] | PreTrainedModel | Base,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    *,
    quantization_config: Any = None,
    local_files_only: bool = False,
) -> Base:
    """Open the base by its own name ("tiny", "smollm2"), folder, GGUF file or hub id, or take a model in memory.

    A model in memory needs its tokenizer too.

    Raises:
        ValueError: one line that names what could not be opened, or why it cannot serve as a base.
    """
    device = _device(config)
    if tokenizer is not None:
        base_checks.require_tokenizer(tokenizer)
    if isinstance(model, Base):
        _require_bare(model.model)
        tokenizer = tokenizer or model.tokenizer
        rows, called = base_checks.embedding_rows(model.model), _called(model.model, model.name)
        tokenizer = base_checks.fitted_tokenizer(tokenizer, rows, called)
        endings = Endings.of(model.model, tokenizer, config.chat_template_kwargs)
        return replace(model, tokenizer=tokenizer, endings=endings)
    composite = None
    if isinstance(model, PreTrainedModel):
        lm, name = model, str(model.config._name_or_path or "")
        path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
        tokenizer = _require_in_memory(lm, tokenizer, config, quantization_config)
    elif isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        if not name:
            raise ValueError(f"the base has no name: give a hub id, a local folder, a GGUF file, or {_own_names()}")
        lm, tokenizer, path, composite = _open(name, tokenizer, config, quantization_config, local_files_only)
    else:
        raise ValueError(
            f"the base is a {type(model).__name__}: it must be a hub id, a local folder, a GGUF file, {_own_names()}, "
            "or a transformers model without adapters"
        )
    _require_bare(lm)
    base_checks.require_weights_here(lm)
    base_checks.require_floating(lm)
    lm.eval().requires_grad_(False)
    _keep_differentiable(lm)
    if any(parameter.device != device for parameter in lm.parameters()):  # a quantized base is there already
        lm.to(device)
    rows, called = base_checks.embedding_rows(lm), _called(lm, name)
    tokenizer = base_checks.fitted_tokenizer(tokenizer, rows, called)
    endings = Endings.of(lm, tokenizer, config.chat_template_kwargs)
    _require_causal(lm, called)
    pad_on_disk = base_checks.pad_with_a_row(lm.config.get_text_config().pad_token_id, rows)
    return Base(lm, tokenizer, name, path, pad_on_disk, endings, _fingerprint(lm), composite)


def _own_names() -> str:
    return " or ".join(map(repr, named_bases.NAMES))


def _called(lm: PreTrainedModel, name: str) -> str:
    return f"{type(lm).__name__} of {name!r}" if name else type(lm).__name__


def _device(config: Config) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ValueError(f"device={config.device!r} is not a device: it must be auto, cpu, cuda, or cuda:N") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"the GPUs here are cuda:0 to cuda:{count - 1}" if count else "torch finds no CUDA GPU here"
            raise ValueError(f"device={config.device!r} cannot be used, {there}: set device='auto' or 'cpu'")
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "mps":
        raise ValueError("device='mps' cannot be used: sampling counts in float64, which MPS lacks; set device='cpu'")
    return device


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype is the device's choice, not the checkpoint's: without bf16 units a bf16 product is 300 times slower."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


# --- opening ----------------------------------------------------------------------------------------------------------


def _require_in_memory(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: Config, quantization_config: Any
) -> PreTrainedTokenizerBase:
    """What a model that is loaded already can be asked for, and what it cannot; its tokenizer."""
    if tokenizer is None:
        raise ValueError("a model in memory comes without a tokenizer: pass processing_class=")
    for name, value in (
        ("quantization_config", quantization_config), ("model_init_kwargs", config.model_init_kwargs),
    ):  # fmt: skip
        if value:
            raise ValueError(f"{name}= says how a base is loaded, and this one is loaded: pass its name, or drop it")
    if config.dtype != "auto" and lm.dtype != getattr(torch, config.dtype):
        raise ValueError(f"dtype={config.dtype!r}, but the model in memory is {lm.dtype}: drop dtype=, or convert it")
    _require_supported(lm.config, type(lm))
    if not lm.can_generate():
        raise ValueError(
            f"{type(lm).__name__} cannot be the base, it is not a causal language model: it has no head that predicts "
            "tokens; load it with AutoModelForCausalLM"
        )
    return tokenizer


def _open(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    quantization_config: Any,
    local_files_only: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, Any]:
    """Model, tokenizer, the path that stock clients load the model by, and its config there if it is multimodal."""
    extra = dict(config.model_init_kwargs or {})
    for key in extra.keys() & DECIDED_ELSEWHERE.keys():
        raise ValueError(f"model_init_kwargs has {key!r}, which is decided by {DECIDED_ELSEWHERE[key]}: drop it there")
    repository = {key: extra[key] for key in OF_THE_REPOSITORY if key in extra}
    if name in named_bases.NAMES:
        path = source = str(named_bases.folder_of(name))
    elif Path(name).is_dir() or gguf_files.is_one(Path(name)):
        file = gguf_files.file_in(Path(name))
        path = source = str(Path(name).resolve() if file is None else gguf_files.converted(file))
    elif gguf_files.is_missing(name):
        raise ValueError(f"the base {name!r} is not there: there is no such GGUF file")
    else:
        path, source = name, _reach_hub(name, repository, local_files_only)
    if Path(source).is_dir():
        _require_files(Path(source, extra.get("subfolder", "")), name, tokenizer is None)

    shared = {**repository, "trust_remote_code": config.trust_remote_code}
    with _opening(name, "model"):
        lm_config = AutoConfig.from_pretrained(source, **shared)
    _require_supported(lm_config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(lm_config), None))

    device = _device(config)
    quantized = quantization_config or getattr(lm_config, "quantization_config", None)
    if quantized:  # packed weights are made on their device: not all of them can be moved
        extra["device_map"] = {"": device}
    if quantization_config is not None:
        extra["quantization_config"] = quantization_config
    # Mismatched tensors are refused below by name; transformers would only point to a table that it logs.
    options = {"dtype": _dtype(config, device), "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _opening(name, "model"), base_checks.naming_the_pad_id(lm_config), without_progress_bars():
        lm, loading = AutoModelForCausalLM.from_pretrained(source, **{**options, **extra, **shared})
    base_checks.require_matching(loading["mismatched_keys"], name)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"the base {name!r} does not hold all of a {type(lm).__name__}: {missing[0]} is missing "
            f"({len(missing)} tensors in all) and would be random. It holds {_architectures(lm_config)}"
        )
    if tokenizer is None:
        with _opening(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    return lm, tokenizer, path, lm_config if lm_config.get_text_config() is not lm_config else None


def _keep_differentiable(lm: PreTrainedModel) -> None:
    """Keep gradients through layers in 4 bits.

    On a CPU with AVX512-BF16, bitsandbytes packs the weights of a layer anew when it first runs without gradients, and
    its product with packed weights has no backward: after sampling, no gradient would reach the layers below.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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


def _require_files(folder: Path, name: str, needs_tokenizer: bool) -> None:
    """Say which part of a base a folder lacks; transformers would make up an empty tokenizer where there is none."""
    if not (folder / "config.json").is_file():
        found = "it has no config.json"
        if (folder / "adapter_config.json").is_file():
            found = (
                "it is an adapter, not a base: open it with load_generator(), load_discriminator() or from_checkpoint()"
            )
        elif (folder / "modules.json").is_file():
            found = (
                "it is a sentence-transformers model, which embeds texts: give a causal language model (if its "
                "transformer is one, the folder within it that has a config.json)"
            )
        elif (folder / "trainer_state.json").is_file() or any(folder.glob("step-*/trainer_state.json")):
            found = "it is a checkpoint, not a base: open it with LoraGAN.from_checkpoint()"
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

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ValueError(
            f"the base {name!r} is not there: it must be a folder with a transformers model, a GGUF file, a hub id "
            f"(name, or owner/name), or {_own_names()}"
        )
    where = {key: repository[key] for key in ("revision", "subfolder") if key in repository}
    file = "/".join(filter(None, [where.get("subfolder"), "config.json"]))
    try:
        cached = try_to_load_from_cache(name, file, repository.get("cache_dir"), where.get("revision"))
    except ValueError as error:  # two dots, a dash at the end
        raise ValueError(f"the base {name!r} is neither a folder nor a hub id ({error})") from error
    folder = cached.removesuffix(file) if isinstance(cached, str) else None
    if local_files_only or constants.HF_HUB_OFFLINE:
        if folder is not None:
            return folder
        asked = "only this machine is asked" if local_files_only else "HF_HUB_OFFLINE=1 forbids to ask the hub"
        raise ValueError(f"the base {name!r} is neither a folder here nor in the hub's cache, and {asked}")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", **where), token=repository.get("token"))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"the base {name!r} is gated: accept its terms at {constants.ENDPOINT}/{name} and log in with "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no base {name!r}, neither as a folder here nor at {constants.ENDPOINT} (a private one needs "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"the base {name!r} has no revision {where.get('revision')!r}") from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{name!r} is on the hub, but has no {file}: it is not a transformers model") from error
    except errors.HfHubHTTPError:
        return name  # an overloaded hub: its client waits and asks again
    except Exception as error:  # of whichever client the hub's library uses
        if "Timeout" in type(error).__name__ and "Connect" not in type(error).__name__:
            return name
        if folder is not None:
            return folder
        raise ValueError(
            f"the base {name!r} is neither a folder here nor in the hub's cache, and {constants.ENDPOINT} cannot be "
            f"reached ({str(error) or type(error).__name__})"
        ) from error
    return name


# --- what can be a base -----------------------------------------------------------------------------------------------


def _architectures(config: Any) -> str:
    return ", ".join(getattr(config, "architectures", None) or [f"a model of type {config.model_type!r}"])


def _require_supported(config: Any, kind: type | None) -> None:
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


def _require_bare(lm: PreTrainedModel) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in lm.modules()):
        raise ValueError("this model has adapters already: pass the base as it was loaded, one object a LoraGAN")


TRIAL = 8, 3  # tokens of the trial's text, and the padding in front of it


@torch.no_grad()
def _require_causal(lm: PreTrainedModel, called: str) -> None:
    """Run the base on one text: alone; behind padding and without its last tokens; and those with the cache.

    A causal model that leaves padding alone says the same of the tokens both rows have. One whose cache can be sampled
    with says the same of the last tokens, after its rows were repeated and selected as sampling does.

    Raises:
        ValueError: it names the base and the difference that was found.
    """
    rows = lm.get_input_embeddings().num_embeddings
    # The whole text is read, and then as many tokens as the other row is padded with: all of them need a position.
    tokens = min(TRIAL[0], max(2, base_checks.context_of(lm.config.get_text_config()) - TRIAL[1]))
    pads = min(TRIAL[1], tokens // 2)
    short = tokens - pads
    ids = (torch.arange(tokens) * 7 + 3) % rows
    batch = torch.stack([ids, ids.roll(pads)]).to(next(lm.parameters()).device)  # the second begins with padding
    mask = torch.ones_like(batch)
    mask[1, :pads] = 0
    takes = inspect.signature(lm.forward).parameters
    # Far above rounding, far below what another context does; quantized products round like bfloat16.
    exact = lm.dtype == torch.float32 and getattr(lm, "hf_quantizer", None) is None

    def run(ids_BL: Tensor, mask_BL: Tensor, **cache: Any) -> Tensor:
        place = positions(mask_BL)[:, -ids_BL.shape[1] :]
        more = {"position_ids": place} if "position_ids" in takes else {}
        with base_checks.trial(called):
            logits = lm(input_ids=ids_BL, **{"attention_mask": mask_BL, **more, **cache}).logits.float()
        base_checks.require_finite(lm, logits, called)
        return logits.masked_fill(logits == -torch.inf, 0.0)  # tokens that the base forbids

    def agree(one: Tensor, other: Tensor, allowed: float) -> bool:
        return bool((one - other).square().mean().sqrt() <= allowed * other.std())

    whole = run(batch, mask, use_cache=False)
    allowed = 1e-3 if exact else 0.05
    if not agree(whole[1, pads:], whole[0, :short], allowed):
        other_end = batch[:1].repeat(2, 1)
        other_end[1, -1] = (other_end[1, -1] + 1) % rows
        ends = run(other_end, torch.ones_like(mask), use_cache=False)
        if agree(ends[1, :-1], ends[0, :-1], allowed):
            raise ValueError(
                f"{called} cannot be the base: padding on the left changes what it says of a text, and rows of "
                "different lengths could not stand in one batch"
            )
        raise ValueError(
            f"{called} cannot be the base, it is not a causal language model: what it says of a token depends "
            "on the tokens after it"
        )

    def decoded() -> Tensor:
        """Logits of the second row's text, its last tokens read one by one; its cache is that of a group's row."""
        with base_checks.trial(called):
            cache = roomy_cache(lm.config, 2 * tokens)
        said = [run(batch, mask, use_cache=True, **cache_inputs(takes, cache))[1, pads:]]
        with base_checks.trial(called):
            cache.batch_repeat_interleave(2)
        seen, fed = mask.repeat_interleave(2, 0), torch.stack([ids.flip(0), ids.flip(0), ids, ids.flip(0)])
        for place in range(short, tokens):
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], -1)
            inputs = {"attention_mask": None, **cache_inputs(takes, cache, seen)}
            logits = run(fed[:, place : place + 1].to(batch.device), seen, use_cache=True, **inputs)
            said.append(logits[-2])
            if place == short:  # the first prompt's rows leave
                keep = torch.tensor([0, 2, 3], device=batch.device)
                with base_checks.trial(called):
                    cache.batch_select_indices(keep)
                seen, fed = seen[keep], fed[keep.cpu()]
        return torch.cat(said)

    # Cached steps run other kernels than a whole text does, and a router may choose another expert.
    if not agree(decoded(), whole[0], 1e-3 if exact else 0.2):
        raise ValueError(
            f"{called} cannot be the base: read token by token with its cache, as sampling reads it, a text gets other "
            "logits than in one forward"
        )


def positions(mask_BL: Tensor) -> Tensor:
    """Positions counted from the first real token, [B, L]: rows are padded on the left."""
    return (mask_BL.cumsum(-1) - 1).clamp(min=0)


# --- what must be known of it -----------------------------------------------------------------------------------------


def _fingerprint(model: PreTrainedModel) -> str:
    """Names, shapes and up to 4,096 evenly spaced numbers of every tensor: enough to tell one base from another.

    Rounded to bfloat16, so that a base is the same in whatever dtype it was loaded; not so where it was quantized.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
