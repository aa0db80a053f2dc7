"""Opening the base: a causal language model with its tokenizer, and what both players must know of them.

The library does not keep a list of models that work. It runs each base once, on a dozen tokens (base_trial.py), and
refuses what cannot work by name, before anything is trained. `LoraGAN` opens its base here.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import Config
from ..context import context_of
from . import base_checks, named_bases
from .base_trial import require_causal
from .endings import Endings
from .opening import open_pretrained, require_supported


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
        """Tokens that fit in one row; `context.UNLIMITED` where the base names no limit."""
        return context_of(self.model.config.get_text_config())


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
            raise ValueError(
                f"the base has no name: give a hub id, a local folder, a GGUF file, or {named_bases.listed()}"
            )
        lm, tokenizer, path, composite = open_pretrained(
            name, tokenizer, config, device, quantization_config, local_files_only
        )
    else:
        raise ValueError(
            f"the base is a {type(model).__name__}: it must be a hub id, a local folder, a GGUF file, "
            f"{named_bases.listed()}, or a transformers model without adapters"
        )
    _require_bare(lm)
    base_checks.require_weights_here(lm)
    base_checks.require_floating(lm)
    lm.eval().requires_grad_(False)
    _keep_differentiable(lm)
    if any(parameter.device != device for parameter in lm.parameters()):  # a quantized base is there already
        lm.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides its signature
    rows, called = base_checks.embedding_rows(lm), _called(lm, name)
    tokenizer = base_checks.fitted_tokenizer(tokenizer, rows, called)
    endings = Endings.of(lm, tokenizer, config.chat_template_kwargs)
    require_causal(lm, called)
    pad_on_disk = base_checks.pad_with_a_row(lm.config.get_text_config().pad_token_id, rows)
    return Base(lm, tokenizer, name, path, pad_on_disk, endings, _fingerprint(lm), composite)


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
    require_supported(lm.config, type(lm))
    if not lm.can_generate():
        raise ValueError(
            f"{type(lm).__name__} cannot be the base, it is not a causal language model: it has no head that predicts "
            "tokens; load it with AutoModelForCausalLM"
        )
    return tokenizer


def _keep_differentiable(lm: PreTrainedModel) -> None:
    """Keep gradients through layers in 4 bits.

    On a CPU with AVX512-BF16, bitsandbytes packs the weights of a layer again when it first runs without gradients, and
    its product with packed weights has no backward: after sampling, no gradient would reach the layers below.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # torch's stub: tensors and modules


# --- what can be a base -----------------------------------------------------------------------------------------------


def _require_bare(lm: PreTrainedModel) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in lm.modules()):
        raise ValueError("this model has adapters already: pass the base as it was loaded, one object a LoraGAN")


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
