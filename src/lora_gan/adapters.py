"""One frozen base, its two adapters, the reference, and the score heads. The only place that switches adapters.

# B = rows, L = tokens of a row (prompt left-padded, response right-padded), V = vocabulary, H = hidden size, M = heads

Two rules, each broken silently by stock PEFT:

- Switching never touches `requires_grad`. PEFT's `set_adapter` clears it on the adapter that goes, and autograd then
  drops every gradient of a graph that is still waiting for its backward.
- Nothing is switched between a forward and its backward: under gradient checkpointing the recomputation would run with
  the wrong adapter (peft#2832). `playing` raises when a graph is still open.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from . import randomness
from .config import Config

Player = Literal["generator", "discriminator", "reference"]


@dataclass(frozen=True)
class Base:
    """A causal language model with its tokenizer, and what the two players must know of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # what the user called it: "tiny", a hub id, a folder, or "" for a model in memory
    path: str  # what stock clients can load it by: a hub id or an absolute folder
    pad_on_disk: int | None  # config.pad_token_id as stored: stock sequence classification pools by it
    eos_ids: tuple[int, ...]  # all ids that end a text; the first is the one appended to a text
    fingerprint: str

    @property
    def pad_id(self) -> int:
        """What unused places are filled with; always masked. A pad token that was added to the tokenizer alone has no
        row in the embedding table."""
        rows = self.model.get_input_embeddings().num_embeddings
        candidates = (self.pad_on_disk, self.tokenizer.pad_token_id, self.eos_ids[0])
        return next(id for id in candidates if id is not None and 0 <= id < rows)

    @property
    def context(self) -> int:
        """Tokens that fit in one row."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or 2**31


def load_base(
    model: str | os.PathLike[str] | PreTrainedModel | Base,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    *,
    quantization_config: Any = None,
    local_files_only: bool = False,
) -> Base:
    """Open the base by hub id, folder, "tiny", or take a model in memory (then its tokenizer is needed too)."""
    in_memory = model.model if isinstance(model, Base) else model
    if isinstance(in_memory, PreTrainedModel) and any(isinstance(m, BaseTunerLayer) for m in in_memory.modules()):
        raise ValueError("this model has adapters already: pass the base as it was loaded, one object a LoraGAN")
    if isinstance(model, Base):
        return model
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("a model in memory comes without a tokenizer: pass processing_class=")
        lm, name = model, model.config._name_or_path
        path = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    else:
        name = os.fspath(model)
        if not name:
            raise ValueError("the base has no name: give a hub id, a local folder, or 'tiny'")
        if name == "tiny":
            from . import tiny

            path = str(tiny.PATH)
        else:
            path = str(Path(name).resolve()) if Path(name).is_dir() else name
        try:
            with _without_progress_bars():
                lm = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(config), local_files_only=local_files_only)
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"the base {name!r} could not be opened as a causal language model: it must be a folder with a "
                f"transformers model, a hub id that can be reached or is cached, or 'tiny' ({error})"
            ) from error
    lm.eval().requires_grad_(False).to(_device(config))
    return Base(
        lm, tokenizer, name, path, lm.config.get_text_config().pad_token_id, _eos_ids(lm, tokenizer), _fingerprint(lm)
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """A small base loads before its bar is drawn; the user's own setting comes back."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _device(config: Config) -> str:
    return config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(config: Config) -> torch.dtype:
    """The dtype is the device's choice, not the checkpoint's: without bf16 units a bf16 product is 300 times slower."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    on_gpu = _device(config).startswith("cuda")
    return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Generation config first: it knows of bases that end a text by another id than their tokenizer says."""
    generation = getattr(model.generation_config, "eos_token_id", None)
    for ids in (generation, tokenizer.eos_token_id, model.config.get_text_config().eos_token_id):
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    raise ValueError("the base names no end-of-text token: set tokenizer.eos_token, a response could never end")


def _fingerprint(model: PreTrainedModel) -> str:
    """Names, shapes and up to 4,096 evenly spaced numbers of every tensor: enough to tell one base from another.

    Rounded to bfloat16, so that a base is the same in whatever dtype it was loaded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


class Players:
    """The base with its two LoRA adapters, and M score heads that stand outside the model.

    Outside, because "all-linear" would adapt a head inside, and `modules_to_save` would give the generator one too.
    """

    def __init__(
        self,
        base: Base,
        config: Config,
        *,
        peft_config: LoraConfig | None = None,
        disc_peft_config: LoraConfig | None = None,
    ) -> None:
        self.base = base
        transposed = any(isinstance(module, Conv1D) for module in base.model.modules())  # GPT-2's kind of linear layer
        lora = {
            "generator": _lora_config(config.lora_r, config.lora_alpha, config.target_modules, transposed),
            "discriminator": _lora_config(
                config.disc_lora_r, config.disc_lora_alpha, config.disc_target_modules, transposed
            ),
        }
        with randomness.seeded_torch(config.seed, "lora"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
            self.peft = get_peft_model(base.model, lora["generator"], adapter_name="generator")
            self.peft.add_adapter("discriminator", lora["discriminator"])
        self.peft.eval()  # train mode would switch on the base's own dropout
        self.lm: Any = self.peft.get_base_model()
        self.body: nn.Module = getattr(self.lm, self.lm.base_model_prefix)
        hidden = base.model.config.get_text_config().hidden_size
        device = next(base.model.parameters()).device
        self.heads_MH = nn.Parameter(torch.zeros(config.disc_heads, hidden, device=device, dtype=torch.float32))
        self.reward_unit = 1.0  # the heads count in it, so that their learning rate does not depend on the reward's
        self._layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        self._takes_positions = "position_ids" in inspect.signature(self.lm.forward).parameters
        self._playing: Player = "reference"
        self._open: dict[int, weakref.ref[_Graph]] = {}
        for parameters in (self.parameters("generator"), self.parameters("discriminator")):
            for parameter in parameters:
                parameter.requires_grad_(True)
        self._switch("reference")

    @property
    def device(self) -> torch.device:
        return self.heads_MH.device

    def parameters(self, player: Literal["generator", "discriminator"]) -> list[nn.Parameter]:
        """What this player trains, in a fixed order: its adapter, and for the discriminator its heads, last."""
        mine = re.compile(rf"\.lora_\w+\.{player}(\.|$)")
        adapter = [parameter for name, parameter in self.peft.named_parameters() if mine.search(name)]
        return adapter + ([self.heads_MH] if player == "discriminator" else [])

    # --- switching

    @contextmanager
    def playing(self, player: Player) -> Iterator[None]:
        """Forwards inside the block run as this player; the one before comes back at its end, on exceptions too."""
        if player not in get_args(Player):
            raise ValueError(f"player={player!r} is not accepted: it must be one of {', '.join(get_args(Player))}")
        before = self._playing
        self._require_closed(f"{before} → {player}")
        self._switch(player)
        try:
            yield
        except BaseException:
            self._open.clear()  # the graph is lost anyway; the cause must not be covered by a second error
            self._switch(before)
            raise
        try:
            self._require_closed(f"{player} → {before}")
        finally:
            self._switch(before)

    def _switch(self, player: Player) -> None:
        # PEFT's public set_adapter would also rewrite requires_grad, which is the trap described above.
        active: list[str] = [] if player == "reference" else [player]
        for layer in self._layers:
            layer._active_adapter = active
        self._playing = player

    def _require_closed(self, switch: str) -> None:
        if any(graph() is not None for graph in self._open.values()):
            raise RuntimeError(
                f"adapter switched ({switch}) between a forward and its backward: its gradients could land on the "
                "wrong adapter. Call backward inside the same `playing` block, or run the forward under no_grad()."
            )
        self._open.clear()

    def _watch(self, output: Tensor) -> Tensor:
        """Remember a differentiable output until its backward has run, or its graph is gone."""
        if output.grad_fn is not None:
            graph = _Graph()
            key = id(graph)
            output.grad_fn.metadata["lora_gan"] = graph  # lives as long as the graph does
            self._open[key] = weakref.ref(graph)
            output.register_hook(lambda _: self._open.pop(key, None) and None)
        return output

    # --- forwards

    def logits(self, ids_BL: Tensor, mask_BL: Tensor, keep: int) -> Tensor:
        """Logits of the active player at the last `keep` places, [B, keep, V], float32."""
        output = self.lm(
            input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, logits_to_keep=keep, **self.positions(mask_BL)
        )
        return self._watch(output.logits.float())

    def positions(self, mask_BL: Tensor) -> dict[str, Tensor]:
        """Positions counted from the first real token, for bases that take them: rows are padded on the left."""
        return {"position_ids": (mask_BL.cumsum(-1) - 1).clamp(min=0)} if self._takes_positions else {}

    def embed(self, ids: Tensor) -> Tensor:
        """The frozen input embeddings both players share, as the body receives them."""
        return self.lm.get_input_embeddings()(ids)

    def features(self, ids_BL: Tensor, mask_BL: Tensor, embeds_BLH: Tensor | None = None) -> Tensor:
        """The active player's last hidden state at the pooled token, [B, H], float32."""
        inputs: dict[str, Any] = {"input_ids": ids_BL} if embeds_BLH is None else {"inputs_embeds": embeds_BLH}
        hidden_BLH = self.body(
            **inputs, attention_mask=mask_BL, use_cache=False, **self.positions(mask_BL)
        ).last_hidden_state
        pooled = pooled_index(ids_BL, mask_BL, self.base.pad_on_disk)
        return self._watch(hidden_BLH[torch.arange(len(ids_BL), device=ids_BL.device), pooled].float())

    @property
    def score_MH(self) -> Tensor:
        """The heads in the reward's own units; their mean is the score head that is saved for stock clients."""
        return self.heads_MH * self.reward_unit

    def predict(self, ids_BL: Tensor, mask_BL: Tensor, embeds_BLH: Tensor | None = None) -> Tensor:
        """Every head's predicted reward, in the reward's own units, [M, B]."""
        return self.score_MH @ self.features(ids_BL, mask_BL, embeds_BLH).T


class _Graph:
    """Stands for an autograd graph that has not been used yet."""

    __slots__ = ("__weakref__",)


def pooled_index(ids_BL: Tensor, mask_BL: Tensor, pad_on_disk: int | None) -> Tensor:
    """The place that stock sequence classification reads, [B]: the last attended token that is not the pad id.

    Stock transformers looks at ids alone. With pad = end-of-text, the habit for GPT-2, that is the token before the
    end; without a pad id it is the last token of the row.
    """
    readable_BL = mask_BL.bool() if pad_on_disk is None else mask_BL.bool() & (ids_BL != pad_on_disk)
    places = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    return (places * readable_BL).argmax(-1)


def _lora_config(r: int, alpha: int, target_modules: str | tuple[str, ...], transposed: bool) -> LoraConfig:
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=transposed,
        task_type=TaskType.CAUSAL_LM,
    )
