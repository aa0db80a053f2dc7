"""Opens the base: a causal language model with its tokenizer, and the facts about them that both players need.

The library has no list of models that work. It runs each base once on about ten tokens (base_trial.py). A base that
cannot work is refused by name before training. Used by `LoraGAN`.
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
    """A causal language model with its tokenizer, and the facts about them that both players need."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # as the user gave it: "tiny", "smollm2", a hub id, a folder, a GGUF file; "" for a model in memory
    path: str  # the hub id or absolute folder from which stock clients load it
    # config.pad_token_id, by which stock sequence classification pools; None if the embedding has no row for it
    pad_on_disk: int | None
    endings: Endings  # the ids that end a response
    fingerprint: str
    # For a multimodal base that is opened as its text model: the whole config, which stock clients find under `path`.
    composite: Any = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that stop sampling; the first closes a response to a plain prompt."""
        return self.endings.stop_ids

    @property
    def pad_id(self) -> int:
        """The id that fills padded positions, which are always masked.

        The embedding has a row for this id. A pad token that was added to the tokenizer alone has no row.
        """
        rows = base_checks.embedding_rows(self.model)
        candidates = (self.pad_on_disk, self.tokenizer.pad_token_id, self.eos_ids[0])
        return next(id for id in candidates if id is not None and 0 <= id < rows)

    @cached_property
    def _tokens(self) -> frozenset[int]:
        return base_checks.token_ids(self.tokenizer)

    def words(self, ids: list[int]) -> list[int]:
        """The ids that the tokenizer knows.

        An embedding may have more rows than the tokenizer has tokens, and sampling may draw such a row. The id stays in
        the response's ids, but adds nothing to its text.
        """
        return [id for id in ids if id in self._tokens] if self._tokens else ids

    @property
    def context(self) -> int:
        """The maximum tokens per row; `context.UNLIMITED` if the base sets no limit."""
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

    A model in memory needs its tokenizer, too.

    Raises:
        ValueError: one line that names the base, and says why it cannot be opened or cannot be a base.
    """
    device = _device(config)
    if tokenizer is not None:
        base_checks.require_tokenizer(tokenizer)
    if isinstance(model, Base):
        _require_bare(model.model)
        tokenizer, endings = _fitted(model.model, tokenizer or model.tokenizer, model.name, config)
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
    if any(parameter.device != device for parameter in lm.parameters()):  # a quantized base is already on its device
        lm.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides its signature
    tokenizer, endings = _fitted(lm, tokenizer, name, config)
    require_causal(lm, _label(lm, name))
    pad_on_disk = base_checks.pad_with_a_row(lm.config.get_text_config().pad_token_id, base_checks.embedding_rows(lm))
    return Base(lm, tokenizer, name, path, pad_on_disk, endings, _fingerprint(lm), composite)


def _fitted(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, config: Config
) -> tuple[PreTrainedTokenizerBase, Endings]:
    """The tokenizer, reduced to tokens with an embedding row, and the ids that end a response."""
    tokenizer = base_checks.fitted_tokenizer(tokenizer, base_checks.embedding_rows(lm), _label(lm, name))
    return tokenizer, Endings.of(lm, tokenizer, config.chat_template_kwargs)


def _label(lm: PreTrainedModel, name: str) -> str:
    """The base's name in messages."""
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
            gpus = f"the GPUs here are cuda:0 to cuda:{count - 1}" if count else "torch finds no CUDA GPU here"
            raise ValueError(f"device={config.device!r} cannot be used, {gpus}: set device='auto' or 'cpu'")
        return torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
    if device.type == "mps":
        raise ValueError("device='mps' cannot be used: sampling needs float64, which MPS lacks; set device='cpu'")
    return device


def _require_in_memory(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: Config, quantization_config: Any
) -> PreTrainedTokenizerBase:
    """Check that no setting contradicts a model that is loaded already. Returns its tokenizer."""
    if tokenizer is None:
        raise ValueError("a model in memory comes without a tokenizer: pass processing_class=")
    loading = {"quantization_config": quantization_config, "model_init_kwargs": config.model_init_kwargs}
    for name in (name for name, value in loading.items() if value):
        raise ValueError(
            f"{name}= says how to load a base, but this model is loaded already: drop {name}=, or pass the base by name"
        )
    if config.dtype != "auto" and lm.dtype != getattr(torch, config.dtype):
        raise ValueError(
            f"dtype={config.dtype!r}, but the model in memory is {lm.dtype}: drop dtype=, or convert the model"
        )
    require_supported(lm.config, type(lm))
    if not lm.can_generate():
        raise ValueError(
            f"{type(lm).__name__} cannot be the base, it is not a causal language model: it has no head that predicts "
            "tokens; load it with AutoModelForCausalLM"
        )
    return tokenizer


def _keep_differentiable(lm: PreTrainedModel) -> None:
    """Keep gradients through 4-bit layers.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights of a layer when it first runs without gradients. The
    product with repacked weights has no backward. After sampling, no gradient would reach the layers below.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # torch's stub: tensors and modules


def _require_bare(lm: PreTrainedModel) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in lm.modules()):
        raise ValueError(
            "this model has adapters already: pass the base as it was loaded, one model object per LoraGAN"
        )


def _fingerprint(model: PreTrainedModel) -> str:
    """A hash of the name, the shape and up to 4,096 evenly spaced values of every tensor. It identifies the base.

    Values are rounded to bfloat16, so the hash does not depend on the dtype. It does depend on quantization.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
