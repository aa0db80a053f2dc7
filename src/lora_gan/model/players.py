"""One frozen base, its two adapters, the reference, and the score heads. The only place that switches adapters.

The reference is what the KL is measured to: the base with all adapters off or, with `init_adapter=`, a third adapter
that never trains. "base" always has all adapters off.

# B = rows, L = tokens of a row (prompt left-padded, response right-padded), V = vocabulary, H = hidden size, M = heads,
# R = some of a batch's tokens

Two rules, each broken silently by stock PEFT:

- Switching never touches `requires_grad`. PEFT's `set_adapter` clears it on the adapter that goes, and autograd then
  drops every gradient of a graph that is still waiting for its backward.
- Nothing is switched between a forward and its backward: blocks wrapped for gradient checkpointing from outside would
  be recomputed with the wrong adapter (peft#2832). `playing` raises when a graph is still open. `set_aside` is the one
  exception: under config's gradient_checkpointing a layer is recomputed as the player that
  first ran it (checkpointing.py).
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import MISSING, fields
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.pytorch_utils import Conv1D

from .. import randomness
from ..config import Config
from . import composite, packing
from .base import Base, load_base
from .checkpointing import Again, recomputing
from .encoding import Encoder
from .fast_lora import quicken
from .kv_cache import cache_inputs, has_other_than_full_attention
from .packing import Batch, batch_of
from .tokens import positions

if TYPE_CHECKING:
    from .initial_adapter import InitAdapter

__all__ = ["Base", "Player", "Players", "load_base", "lora_config"]

Player = Literal["generator", "discriminator", "reference", "base"]
LOGITS = 2**22  # numbers: 16 MB in float32, which stays in a processor's cache


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
        init_adapter: InitAdapter | None = None,
    ) -> None:
        self.base = base
        # Whether the reference is an adapter of its own: the one that the generator starts from.
        self.has_reference = init_adapter is not None and config.kl_reference != "base"
        if config.kl_reference == "init_adapter" and init_adapter is None:
            raise ValueError(
                "kl_reference='init_adapter' needs the adapter that the generator starts from: give init_adapter=FOLDER"
            )
        self.encoder = Encoder(base, config)
        transposed = any(isinstance(module, Conv1D) for module in base.model.modules())  # GPT-2's kind of linear layer
        own = peft_config if init_adapter is None else init_adapter.config
        lora = {
            "generator": lora_config("generator", own, config, transposed, base.model),
            "discriminator": lora_config("discriminator", disc_peft_config, config, transposed, base.model),
        }
        if self.has_reference:
            lora["reference"] = copy.deepcopy(lora["generator"])
        # Which adapters the settings do not describe: a checkpoint says so.
        given = {"generator": own, "discriminator": disc_peft_config}
        self.by_peft_config = [player for player, its in given.items() if its is not None]
        layers = _layers_to_recompute(base.model) if config.gradient_checkpointing else None
        with randomness.seeded_torch(config.seed, "lora"):
            self.peft = _attach(base, lora, "" if init_adapter is None else f" (init_adapter={init_adapter.name})")
        self.peft.eval()  # train mode would switch on the base's own dropout
        self.lm: Any = self.peft.get_base_model()
        quicken(self.lm)
        self.body: nn.Module | None = getattr(self.lm, self.lm.base_model_prefix, None)
        if self.body is None:
            raise ValueError(
                f"{type(self.lm).__name__} cannot be the base: its body, which the scores are read off, does not stand "
                f"under its name {self.lm.base_model_prefix!r}"
            )
        # What comes out of the body, which the score head reads: OPT's may be narrower than its hidden size.
        hidden = getattr(self.lm.get_output_embeddings(), "in_features", self.lm.config.get_text_config().hidden_size)
        device = next(base.model.parameters()).device
        self.heads_MH = nn.Parameter(torch.zeros(config.disc_heads, hidden, device=device, dtype=torch.float32))
        self.reward_unit = 1.0  # the heads count in it, so that their learning rate does not depend on the reward's
        self._layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        self._takes = inspect.signature(self.lm.forward).parameters
        self._playing: Player = "base"
        self._open: dict[int, weakref.ref[_Graph]] = {}
        for parameters in (self.parameters("generator"), self.parameters("discriminator")):
            for parameter in parameters:
                parameter.requires_grad_(True)
        for parameter in self.parameters("reference"):
            parameter.requires_grad_(False)
        if init_adapter is not None:
            init_adapter.put(self)
        self._require_places()
        self._switch("base")
        if layers is not None:
            recomputing(layers, self._as_now)

    @property
    def active(self) -> Player:
        """Whose forwards run now."""
        return self._playing

    @property
    def device(self) -> torch.device:
        return self.heads_MH.device

    def parameters(self, player: Literal["generator", "discriminator", "reference"]) -> list[nn.Parameter]:
        """What this player trains, in a fixed order: its adapter, and for the discriminator its heads, last. Of the
        reference, the adapter that never trains; empty where the reference is the base."""
        mine = re.compile(rf"\.lora_\w+\.{player}(\.|$)")
        adapter = [parameter for name, parameter in self.peft.named_parameters() if mine.search(name)]
        return adapter + ([self.heads_MH] if player == "discriminator" else [])

    def _require_places(self) -> None:
        """Both players can train every adapter they were given; stock clients can open the discriminator, or a warning
        says why they cannot."""
        embeddings = self.lm.get_input_embeddings()
        if isinstance(embeddings, BaseTunerLayer):
            raise ValueError(
                "target_modules name the input embeddings, which both players share: leave them out (all-linear does)"
            )
        # An expert's adapter stands around the layer that PEFT made of it.
        places = [
            name.replace(".base_layer", "")
            for name, module in self.lm.named_modules()
            if _has_adapter(module, "discriminator")
        ]
        outside = [name for name in places if not name.startswith(f"{self.lm.base_model_prefix}.")]
        if outside:
            raise ValueError(
                f"disc_target_modules name {outside[0]!r}, which no score passes through: leave it out "
                "(disc_peft_config= takes exclude_modules)"
            )
        if problem := self._stock_classifier_lacks(places):
            warnings.warn(
                f"stock transformers and PEFT cannot open a discriminator on {type(self.lm).__name__}: {problem}. This "
                "library trains, saves, loads and scores with it all the same.",
                stacklevel=5,
            )

    def _stock_classifier_lacks(self, places: list[str]) -> str | None:
        """What stock sequence classification has not, of what discriminator/ needs of it; None where it has all."""
        config = copy.deepcopy(self.base.composite or self.lm.config)
        kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        if kind is None:
            return f"transformers has no sequence classification for the model type {config.model_type!r}"
        config.num_labels = 1
        config.get_text_config().pad_token_id = None  # one that has no row would stop stock transformers here
        with torch.device("meta"):  # shapes alone, no memory
            stock = kind(config)
        score, width = getattr(stock, "score", None), self.heads_MH.shape[1]
        if not isinstance(score, nn.Linear) or score.in_features != width:
            return f"{kind.__name__} has no score head of width {width}"
        there = dict(stock.named_modules())
        if self.base.composite is not None:
            places = list(map(composite.stock_name, places))
        lacking = [name for name in places if name not in there]
        return f"{kind.__name__} has no {lacking[0]}" if lacking else None

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
        active = self._adapters_of(player)
        for layer in self._layers:
            layer._active_adapter = active
        self._playing = player

    def _adapters_of(self, player: Player) -> list[str]:
        """The adapters, by PEFT's names, that are on while this player plays: one or none."""
        return [] if self._is_base(player) else [player]

    def _is_base(self, player: Player) -> bool:
        """Whether this player is the base with all adapters off."""
        return player == "base" or (player == "reference" and not self.has_reference)

    def _as_now(self) -> Again:
        """Another time as it is now: the same player, and attention that reads the same kind of rows."""
        return partial(self._as, self._playing, self.lm.config._attn_implementation)

    @contextmanager
    def _as(self, player: Player, attention: str) -> Iterator[None]:
        before = self._playing
        with self._attending(attention):
            if player != before:  # once for each layer that is computed again: most often nothing changes
                self._switch(player)
            try:
                yield
            finally:
                if player != before:
                    self._switch(before)

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

    def set_aside(self, output: Tensor) -> Tensor:
        """An output whose backward comes after other forwards, by other players too.

        Only autograd's own rule holds then: the weights must not have changed. What is recomputed in its backward is so
        by whom it was of, and `requires_grad` is never touched, so that it does not matter who plays.
        """
        self._open.clear()
        return output

    # --- forwards

    def keep(self, places: int) -> dict[str, int]:
        """Asks for the logits of the last places alone, of bases that can be asked: the others compute all."""
        return {"logits_to_keep": places} if "logits_to_keep" in self._takes else {}

    def positions(self, mask_BL: Tensor) -> dict[str, Tensor]:
        """Positions counted from the first real token, for bases that take them: rows are padded on the left."""
        return {"position_ids": positions(mask_BL)} if "position_ids" in self._takes else {}

    def cached(self, cache: DynamicCache, mask_BL: Tensor | None = None) -> dict[str, Any]:
        """The cache under the name that this base takes it by, and the mask of a cached step, where it takes one."""
        return cache_inputs(self._takes, cache, mask_BL)

    def embed(self, ids: Tensor) -> Tensor:
        """The frozen input embeddings both players share, as the body receives them."""
        return self.lm.get_input_embeddings()(ids)

    def batch(self, prompts: Sequence[list[int]], responses: Sequence[list[int]], prompt_of: np.ndarray) -> Batch:
        """Responses and the prompts they answer, laid out as this base reads them: without padding where it can."""
        return self._laid_out(prompts, responses, prompt_of, packs=self.packs)

    def _laid_out(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], prompt_of: np.ndarray, *, packs: bool
    ) -> Batch:
        return batch_of(
            prompts, responses, prompt_of, packs=packs, takes_positions="position_ids" in self._takes,
            pad_id=self.base.pad_id, pad_on_disk=self.base.pad_on_disk, device=self.device,
        )  # fmt: skip

    @cached_property
    def packs(self) -> bool:
        """Whether this base reads a packed row as it reads padded ones; found out by trying, once."""
        config = self.lm.config
        if "position_ids" not in self._takes or config.get_text_config() is not config:
            return False
        # A trial of a few tokens does not reach the end of a window, and not every attention is told of its own.
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(windows) or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            return False
        if has_other_than_full_attention(config):  # a recurrent state runs along the row, over all of its texts
            return False
        ids = [1 + i % (self.lm.get_input_embeddings().weight.shape[0] - 1) for i in range(11)]
        trial = [ids[:2], ids[2:5]], [ids[5:8], ids[8:9], ids[9:]], np.array([0, 0, 1])
        with torch.no_grad(), self.playing("base"):
            try:
                packed, padded = (
                    self._states(batch).flatten(0, 1)[batch.response_R]
                    for batch in (self._laid_out(*trial, packs=True), self._laid_out(*trial, packs=False))
                )
            except torch.OutOfMemoryError:
                raise  # it says nothing of the base, and a run that goes on must find what this one found
            except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
                return False  # whatever a base does that is told nothing of rows: it is read as it always was
            return _alike(packed, padded)

    def hidden(self, batch: Batch, places_R: Tensor, embeds_BLH: Tensor | None = None) -> Tensor:
        """The active player's last hidden states at some places of a batch, [R, H].

        Args:
            places_R: among the tokens of `batch.ids`, flattened.
            embeds_BLH: instead of the embeddings of `batch.ids`.
        """
        with ExitStack() as short_cut:
            is_base_below = self._playing == "discriminator" or self._is_base(self._playing)
            if self._shares_below and is_base_below and embeds_BLH is None:
                if "below" not in batch.shared:
                    batch.shared["below"] = self._below(batch)
                short_cut.enter_context(self._from(batch.shared["below"]))
            hidden_BLH = self._states(batch, embeds_BLH)
        return self._watch(hidden_BLH.flatten(0, 1).index_select(0, places_R))

    def _states(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """The body's last hidden states at all places of a batch, [1, N, H] or [B, L, H]."""
        inputs: dict[str, Any] = {"input_ids": batch.ids}
        if embeds_BLH is not None:
            inputs = {"inputs_embeds": embeds_BLH.clone()}  # CTRL scales in place what it is given
        with self._attending(packing.ATTENTION) if batch.packed else nullcontext():
            hidden_BLH: Tensor = self.body(**inputs, **batch.inputs, use_cache=False).last_hidden_state
        return hidden_BLH

    # --- the layers below the discriminator's first adapter: frozen, and the same for the base

    @cached_property
    def _shares_below(self) -> bool:
        """Whether there are such layers, in a base whose forward can begin above them; found out by trying, once."""
        if self._layers_below is None:
            return False
        batch = self._laid_out([[1, 2], [3]], [[1, 3], [2]], np.arange(2), packs=self.packs)
        with torch.no_grad():
            try:
                whole_BLH = self._states(batch)
                with self._from(self._below(batch)):
                    upper_BLH = self._states(batch)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
                return False  # layers that hand on more than hidden states
        return _alike(upper_BLH, whole_BLH)

    @cached_property
    def _layers_below(self) -> tuple[nn.ModuleList, int] | None:
        """The base's layers, and how many of them lie below the discriminator's first adapter; None where none does."""
        named = _layer_list(self.lm)
        if named is None:
            return None
        _, layers = named
        adapted = [any(_has_adapter(m, "discriminator") for m in layer.modules()) for layer in layers]
        inside = sum(_has_adapter(m, "discriminator") for m in layers.modules())
        outside = inside < sum(_has_adapter(m, "discriminator") for m in self.body.modules())
        below = adapted.index(True) if any(adapted) else len(layers)
        return None if outside or not 0 < below < len(layers) else (layers, below)

    @torch.no_grad()
    def _below(self, batch: Batch) -> Tensor:
        """What comes out of these layers, [1, N, H] or [B, L, H]."""
        assert self._layers_below is not None
        layers, below = self._layers_below
        stop = _Stop()
        with _replaced(layers, {i: stop for i in range(below, len(layers))}):
            self._states(batch)
        assert stop.seen is not None
        return stop.seen

    @contextmanager
    def _from(self, hidden_BLH: Tensor) -> Iterator[None]:
        """Inside the block the body begins above these layers."""
        assert self._layers_below is not None
        layers, below = self._layers_below
        with _replaced(layers, dict.fromkeys(range(below), _Begin(hidden_BLH))):
            yield

    @contextmanager
    def _attending(self, attention: str) -> Iterator[None]:
        """Inside the block attention is the one of this name in transformers' attention interface."""
        config = self.lm.config
        before = config._attn_implementation
        config._attn_implementation = attention
        try:
            yield
        finally:
            config._attn_implementation = before

    def head(self, hidden_RH: Tensor, *, reference: bool = False) -> Tensor:
        """Logits of the active player, or of the reference, from its last hidden states, [R, V], float32.

        What a causal LM does behind its body (the head, a cap, a scale) is its own forward's business, which is
        therefore run, with the hidden states in the body's place.
        """
        name, body = self.lm.base_model_prefix, self.body
        active = [(layer, layer._active_adapter) for layer in self._layers] if reference else []
        try:
            one = torch.ones(1, 1, dtype=torch.long, device=hidden_RH.device)
            setattr(self.lm, name, _Given(hidden_RH[None], body))
            for layer, _ in active:  # what stands behind the body may be adapted, too
                layer._active_adapter = self._adapters_of("reference")
            logits_1RV = self.lm(input_ids=one, attention_mask=one, use_cache=False).logits
        finally:
            setattr(self.lm, name, body)
            for layer, adapter in active:
                layer._active_adapter = adapter
        return logits_1RV[0].float()

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose logits are held at one time: all of a response's would be most of the memory of an update."""
        return max(16, LOGITS // self.lm.get_output_embeddings().weight.shape[0])

    def features(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """The active player's last hidden state at the pooled token, [B, H], float32."""
        return self.hidden(batch, batch.pooled_B, embeds_BLH).float()

    @property
    def score_MH(self) -> Tensor:
        """The heads in the reward's own units; their mean is the score head that is saved for stock clients."""
        return self.heads_MH * self.reward_unit

    def predict(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """Every head's predicted reward, in the reward's own units, [M, B]."""
        return self.score_MH @ self.features(batch, embeds_BLH).T


def _alike(one: Tensor, other: Tensor) -> bool:
    """Far above rounding in bfloat16, far below what a layer left out does, or a token that sees one too many.

    Equality to the bit is not to be had: a product's rounding depends on where in memory its operands lie.
    """
    return bool((one - other).norm() <= 0.02 * other.norm())


@contextmanager
def _replaced(layers: nn.ModuleList, by: dict[int, nn.Module]) -> Iterator[None]:
    before = {i: layers[i] for i in by}
    try:
        for i, layer in by.items():
            layers[i] = layer
        yield
    finally:
        for i, layer in before.items():
            layers[i] = layer


class _Stop(nn.Module):
    """Stands in the places of layers that are left out, and keeps what the first of them was given."""

    seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.seen is None:
            self.seen = hidden_states
        return hidden_states


class _Begin(nn.Module):
    """Stands in the places of layers whose outcome is known."""

    def __init__(self, hidden_BLH: Tensor) -> None:
        super().__init__()
        self.hidden_BLH = hidden_BLH

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden_BLH


class _Given(nn.Module):
    """Stands in a body's place, and returns the hidden states that it was given."""

    def __init__(self, hidden_BLH: Tensor, body: nn.Module | None) -> None:
        super().__init__()
        self.output = _Output(last_hidden_state=hidden_BLH)
        self.__dict__["body"] = body  # not a submodule

    def __getattr__(self, name: str) -> Any:
        """Attributes of the real body: Falcon-H1's causal LM asks for a multiplier."""
        return getattr(self.__dict__["body"], name)

    @property
    def decoder(self) -> _Given:
        """OPT's causal LM asks its body's decoder."""
        return self

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPast:
        return self.output


class _Output(BaseModelOutputWithPast):
    """Some bodies say more (cross-attention, a router's logits), none of which the logits are made of."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _has_adapter(module: nn.Module, player: str) -> bool:
    return isinstance(module, BaseTunerLayer) and any(
        player in getattr(module, name, ()) for name in module.adapter_layer_names
    )


class _Graph:
    """Stands for an autograd graph that has not been used yet."""

    __slots__ = ("__weakref__",)


# --- the adapters' settings -------------------------------------------------------------------------------------------

# The fields of peft.LoraConfig that may differ from its defaults. The library sets the last row itself.
ACCEPTED = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
)  # fmt: skip
SET_HERE = (
    "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision", "peft_type", "peft_version",
    "auto_mapping", "runtime_config",
)  # fmt: skip
INITS = (True, False, "gaussian", "orthogonal")
TASKS = {"generator": ("CAUSAL_LM",), "discriminator": ("SEQ_CLS", "CAUSAL_LM")}
WHY_NOT = {
    "lora_dropout": "players run in eval mode, where it would do nothing",
    "bias": "the biases are the base's, which both players share",
    "modules_to_save": "copies of the base's modules would be trained; the score head is the library's own",
    "target_parameters": "PEFT allows it to one adapter only",
    "trainable_token_indices": "the embeddings are the base's, which both players share",
    "layer_replication": "it would give the base another number of layers for both players",
}


def lora_config(
    player: Literal["generator", "discriminator"],
    given: LoraConfig | None,
    config: Config,
    transposed: bool,
    model: PreTrainedModel | None = None,
) -> LoraConfig:
    """The player's adapter as PEFT gets it: from the settings, or a checked copy of the user's own.

    Raises:
        ValueError: a field that does not work on a base that two adapters share, by name; settings that contradict it.
    """
    prefix = "disc_" if player == "discriminator" else ""
    name = f"{prefix}peft_config"
    if given is None:
        targets = getattr(config, f"{prefix}target_modules")
        if player == "discriminator" and config.disc_layers is not None and model is not None:
            targets = _upper_linear(model, config.disc_layers)
        wanted = LoraConfig(
            r=getattr(config, f"{prefix}lora_r"),
            lora_alpha=getattr(config, f"{prefix}lora_alpha"),
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
    else:
        if type(given) is not LoraConfig:
            raise ValueError(f"{name} is a {type(given).__name__}: it must be a peft.LoraConfig")
        described = ["lora_r", "lora_alpha", "target_modules"] + ["layers"] * (player == "discriminator")
        for setting in [prefix + field for field in described]:
            value = getattr(config, setting)
            if value != Config.__dataclass_fields__[setting].default:
                raise ValueError(f"{setting}={value!r} and {name}= both describe the adapter: give one of them")
        _require_shareable(name, given)
        if given.task_type is not None and given.task_type not in TASKS[player]:
            raise ValueError(
                f"{name} has task_type={str(given.task_type)!r}: it must be {' or '.join(TASKS[player])}, or None"
            )
        wanted = copy.deepcopy(given)
    if model is not None:
        _exclude_not_adapted(wanted, model)
    wanted.task_type = TaskType.CAUSAL_LM  # both adapters stand on the causal LM; a checkpoint says SEQ_CLS
    wanted.fan_in_fan_out = transposed
    wanted.base_model_name_or_path, wanted.revision, wanted.inference_mode = None, None, False
    return wanted


# Linear layers that "all-linear" leaves out, by model type. PEFT refuses `out_proj`, whose weight Mamba's kernels read
# past the adapter; transformers reads the weight of `dt_proj` so, and an adapter there would never do anything.
# Qwen4-Exp's `index_qk_proj` only ranks tokens for its sparse attention, which passes no gradient.
NOT_ADAPTED = {
    "falcon_h1": ("out_proj",), "mamba2": ("out_proj",), "nemotron_h": ("out_proj",), "mamba": ("out_proj", "dt_proj"),
    "falcon_mamba": ("out_proj", "dt_proj"), "jamba": ("dt_proj",), "qwen4_exp_text": ("index_qk_proj",),
}  # fmt: skip


def _exclude_not_adapted(wanted: LoraConfig, model: PreTrainedModel) -> None:
    """Let "all-linear" mean all linear layers that can be adapted. Modules that are named one by one stay named."""
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    excluded = wanted.exclude_modules
    if left_out and wanted.target_modules == "all-linear" and not isinstance(excluded, str):  # a pattern is the user's
        wanted.exclude_modules = {*(excluded or ()), *left_out}


def _layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """A causal LM's layers, and the name they stand under; None where it has not one list of them."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return lists[0] if len(lists) == 1 else None


def _layers_to_recompute(model: PreTrainedModel) -> nn.ModuleList:
    named = _layer_list(model)
    if named is None:
        raise ValueError(
            f"gradient_checkpointing cannot tell what the layers of {type(model).__name__} are: leave it out, and set "
            "micro_batch_size to save memory"
        )
    return named[1]


def _upper_linear(model: PreTrainedModel, layers: int) -> list[str]:
    """The linear layers of the model's upper layers, by name: PEFT takes "all-linear" in all layers or none.

    Raises:
        ValueError: the model has fewer layers, or not one list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    if layers > count:
        raise ValueError(f"disc_layers={layers} is not accepted: {type(model).__name__} has {count} layers")
    named = _layer_list(model)
    if named is None:
        raise ValueError(
            f"disc_layers cannot tell which layers of {type(model).__name__} are the upper ones: name the modules in "
            "disc_target_modules"
        )
    (name, found), first = named, count - layers
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    return sorted(
        f"{name}.{first + i}.{inner}"
        for i, layer in enumerate(found[first:])
        for inner, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and inner.rpartition(".")[2] not in left_out
    )


def _attach(base: Base, lora: dict[str, LoraConfig], said: str = "") -> PeftModel:
    """The base with its adapters on it; what PEFT cannot do is one line, `said` among it."""
    on_cpu = base.model.device.type == "cpu"
    if on_cpu and getattr(base.model, "is_loaded_in_8bit", False) and any(c.use_dora for c in lora.values()):
        raise ValueError(
            "use_dora=True does not work on a base in 8 bits on the CPU, where PEFT loses the scales of its weights: "
            "load it in 4 bits, or leave DoRA out"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
        try:
            peft = get_peft_model(base.model, lora["generator"], adapter_name="generator")
            for name in list(lora)[1:]:
                peft.add_adapter(name, lora[name])
        except Exception as error:  # PEFT's own kinds, and those of what quantizes
            reason = " ".join(str(error).split())
            raise ValueError(
                f"PEFT could not put these adapters{said} on the base, a {type(base.model).__name__}: {reason}"
            ) from error
    return peft


def _require_shareable(name: str, given: LoraConfig) -> None:
    for field in fields(LoraConfig):
        value = getattr(given, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in (*ACCEPTED, *SET_HERE) and value != default and value:
            reason = WHY_NOT.get(field.name, "it is not known to work on a base that two adapters share")
            raise ValueError(
                f"{name} has {field.name}={value!r}, which is not accepted: {reason}. What may differ from PEFT's "
                f"defaults: {', '.join(ACCEPTED)}"
            )
    if given.init_lora_weights not in INITS:
        raise ValueError(
            f"{name} has init_lora_weights={given.init_lora_weights!r}, which is not accepted: the base stays as it "
            f"is, and it must be one of {', '.join(map(repr, INITS))}"
        )
