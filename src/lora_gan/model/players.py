"""One frozen base, its two adapters, the reference, and the score heads. The only place that switches adapters.

The reference is what the KL is measured to: the base with all adapters off or, with `init_adapter=`, a third adapter
that never trains. "base" always has all adapters off.

# B = rows, L = tokens of a row (prompt left-padded, response right-padded), V = vocabulary, H = hidden size, M = heads,
# R = some of a batch's tokens

Two rules, each broken silently by stock PEFT:

- Switching never touches `requires_grad`. PEFT's `set_adapter` clears it on the adapter that goes, and autograd then
  drops every gradient of a graph that is still waiting for its backward.
- Nothing is switched between a forward and its backward: blocks wrapped for gradient checkpointing from outside would
  be recomputed with the wrong adapter (peft#2832). `playing` raises when a graph is still open. `defer_backward` is
  the one exception: under gradient_checkpointing each layer is recomputed as the player that first ran it
  (checkpointing.py).
"""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache

from .. import randomness
from ..config import Config
from . import packing
from .base import Base
from .base_checks import embedding_rows
from .checkpointing import RecomputeContext, checkpoint_layers
from .encoding import Encoder
from .fast_lora import use_fast_forwards
from .initial_adapter import InitAdapter
from .kv_cache import cache_inputs, has_other_than_full_attention
from .layers import (
    FixedBody,
    FixedOutput,
    InputRecorder,
    body_of,
    has_adapter,
    layer_list,
    replaced,
    require_layer_list,
)
from .packing import Batch, Rows, build_batch
from .peft_config import attach, lora_config, require_trainable, warn_of_stock_clients
from .tokens import positions

__all__ = ["Base", "Player", "Players"]

Player = Literal["generator", "discriminator", "reference", "base"]
LOGITS_AT_ONCE = 2**22  # numbers: 16 MB in float32, which stays in a processor's cache


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
        own = peft_config if init_adapter is None else init_adapter.config
        lora = {
            "generator": lora_config("generator", own, config, base.model),
            "discriminator": lora_config("discriminator", disc_peft_config, config, base.model),
        }
        if self.has_reference:
            lora["reference"] = copy.deepcopy(lora["generator"])
        # Which adapters the settings do not describe: a checkpoint says so.
        given = {"generator": own, "discriminator": disc_peft_config}
        self.by_peft_config = [player for player, its in given.items() if its is not None]
        layers = None
        if config.gradient_checkpointing:
            _, layers = require_layer_list(base.model, "gradient_checkpointing", "set micro_batch_size")
        with randomness.seeded_torch(config.seed, "lora"):
            self.peft = attach(base, lora, "" if init_adapter is None else f" (init_adapter={init_adapter.name})")
        self.peft.eval()  # train mode would switch on the base's own dropout
        self.lm = base.model  # PEFT puts its layers into it
        use_fast_forwards(self.lm)
        self.body = body_of(self.lm)
        # What comes out of the body, which the score head reads: OPT's may be narrower than its hidden size.
        hidden = getattr(self.lm.get_output_embeddings(), "in_features", self.lm.config.get_text_config().hidden_size)
        device = next(base.model.parameters()).device
        self.heads_MH = nn.Parameter(torch.zeros(config.disc_heads, hidden, device=device, dtype=torch.float32))
        self.reward_unit = 1.0  # the heads count in it, so that their learning rate does not depend on the reward's
        self._layers = [module for module in self.peft.modules() if isinstance(module, BaseTunerLayer)]
        self._takes = inspect.signature(self.lm.forward).parameters
        self.active: Player = "base"  # whose forwards run now
        self._open: dict[int, weakref.ref[_PendingGraph]] = {}
        for parameter in self.parameters("generator") + self.parameters("discriminator"):
            parameter.requires_grad_(True)
        for parameter in self.parameters("reference"):
            parameter.requires_grad_(False)
        places = require_trainable(self.lm)
        warn_of_stock_clients(base, self.lm, places, self.heads_MH.shape[1])
        self._switch("base")
        if layers is not None:
            checkpoint_layers(layers, self._recompute_context)

    @property
    def device(self) -> torch.device:
        return self.heads_MH.device

    def parameters(self, player: Literal["generator", "discriminator", "reference"]) -> list[nn.Parameter]:
        """What this player trains, in a fixed order: its adapter, and for the discriminator its heads, last. Of the
        reference, the adapter that never trains; empty where the reference is the base."""
        mine = re.compile(rf"\.lora_\w+\.{player}(\.|$)")
        adapter = [parameter for name, parameter in self.peft.named_parameters() if mine.search(name)]
        return adapter + ([self.heads_MH] if player == "discriminator" else [])

    # --- switching

    @contextmanager
    def use_adapter(self, player: Player) -> Iterator[None]:
        """Forwards inside the block run as this player; the one before comes back at its end, on exceptions too."""
        if player not in get_args(Player):
            raise ValueError(f"player={player!r} is not accepted: it must be one of {', '.join(get_args(Player))}")
        before = self.active
        self._require_no_open_graph(f"{before} → {player}")
        self._switch(player)
        try:
            yield
        except BaseException:
            self._open.clear()  # the graph is lost anyway; the cause must not be covered by a second error
            self._switch(before)
            raise
        try:
            self._require_no_open_graph(f"{player} → {before}")
        finally:
            self._switch(before)

    def _switch(self, player: Player) -> None:
        # PEFT's public set_adapter would also rewrite requires_grad, which is the trap described above.
        active = self._adapters_of(player)
        for layer in self._layers:
            layer._active_adapter = active
        self.active = player

    def _adapters_of(self, player: Player) -> list[str]:
        """The adapters, by PEFT's names, that are on while this player plays: one or none."""
        return [] if self._is_base(player) else [player]

    def _is_base(self, player: Player) -> bool:
        """Whether this player is the base with all adapters off."""
        return player == "base" or (player == "reference" and not self.has_reference)

    def _recompute_context(self) -> RecomputeContext:
        """For a recomputation: the player of now, and attention that reads the same kind of rows."""
        return partial(self._as_player, self.active, self.lm.config._attn_implementation)

    @contextmanager
    def _as_player(self, player: Player, attention: str) -> Iterator[None]:
        before = self.active
        with self._attention(attention):
            if player != before:  # this runs per recomputed layer; mostly nothing changes
                self._switch(player)
            try:
                yield
            finally:
                if player != before:
                    self._switch(before)

    def _require_no_open_graph(self, switch: str) -> None:
        if any(graph() is not None for graph in self._open.values()):
            raise RuntimeError(
                f"adapter switched ({switch}) between a forward and its backward: its gradients could land on the "
                "wrong adapter. Call backward inside the same `playing` block, or run the forward under no_grad()."
            )
        self._open.clear()

    def _track_graph(self, output: Tensor) -> Tensor:
        """Remember a differentiable output until its backward has run, or its graph is gone."""
        if output.grad_fn is not None:
            graph = _PendingGraph()
            key = id(graph)
            # Lives as long as the graph does. torch's stub takes the property for a method.
            output.grad_fn.metadata["lora_gan"] = graph  # type: ignore[index]
            self._open[key] = weakref.ref(graph)
            output.register_hook(lambda _: self._open.pop(key, None) and None)
        return output

    def defer_backward(self, output: Tensor) -> Tensor:
        """Allow the backward of this output to come after other forwards, by other players too.

        The weights must not change before it. Any player may be active then: layers are recomputed as the player that
        first ran them, and `requires_grad` is never touched.
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

    def batch(self, prompts: Rows, responses: Rows, prompt_of: np.ndarray, *, packs: bool | None = None) -> Batch:
        """Responses and the prompts they answer, laid out as this base reads them: without padding where it can, or as
        `packs` says."""
        batch = build_batch(
            prompts, responses, prompt_of, packs=self.packs if packs is None else packs,
            pad_id=self.base.pad_id, pad_on_disk=self.base.pad_on_disk, device=self.device,
        )  # fmt: skip
        if "position_ids" not in self._takes:
            del batch.inputs["position_ids"]
        return batch

    @cached_property
    def packs(self) -> bool:
        """Whether this base reads a packed row as it reads padded ones; found out by trying, once."""
        config = self.lm.config
        if "position_ids" not in self._takes or config.get_text_config() is not config:
            return False
        # A trial of a few tokens cannot show a sliding window. A recurrent state runs along the row, over its texts.
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        if any(windows) or has_other_than_full_attention(config):
            return False
        ids = [1 + i % (embedding_rows(self.lm) - 1) for i in range(11)]
        trial = [ids[:2], ids[2:5]], [ids[5:8], ids[8:9], ids[9:]], np.array([0, 0, 1])

        def states(packs: bool) -> Tensor:
            batch = self.batch(*trial, packs=packs)
            return self._states(batch).flatten(0, 1)[batch.response_R]

        with self.use_adapter("base"):
            return _agree(lambda: states(packs=True), lambda: states(packs=False))

    def hidden(self, batch: Batch, places_R: Tensor, embeds_BLH: Tensor | None = None) -> Tensor:
        """The active player's last hidden states at some places of a batch, [R, H].

        Args:
            places_R: among the tokens of `batch.ids`, flattened.
            embeds_BLH: instead of the embeddings of `batch.ids`.
        """
        is_base_below = self.active == "discriminator" or self._is_base(self.active)
        if self._shares_frozen_layers and is_base_below and embeds_BLH is None:
            if "layers" not in batch.frozen_outputs:
                batch.frozen_outputs["layers"] = self._frozen_output(batch)
            hidden_BLH = self._states_above(batch, batch.frozen_outputs["layers"])
        else:
            hidden_BLH = self._states(batch, embeds_BLH)
        return self._track_graph(hidden_BLH.flatten(0, 1).index_select(0, places_R))

    def _states(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """The body's last hidden states at all places of a batch, [1, N, H] or [B, L, H]."""
        inputs: dict[str, Any] = {"input_ids": batch.ids}
        if embeds_BLH is not None:
            inputs = {"inputs_embeds": embeds_BLH.clone()}  # CTRL scales in place what it is given
        with self._attention(packing.ATTENTION) if batch.packed else nullcontext():
            hidden_BLH: Tensor = self.body(**inputs, **batch.inputs, use_cache=False).last_hidden_state
        return hidden_BLH

    # --- the frozen layers: those below the discriminator's first adapter, which compute the same for the base

    @cached_property
    def _shares_frozen_layers(self) -> bool:
        """Whether the output of the frozen lower layers can be shared; tried once."""
        if self._frozen_layers is None:
            return False
        batch = self.batch([[1, 2], [3]], [[1, 3], [2]], np.arange(2))
        # Layers may hand on more than hidden states.
        return _agree(lambda: self._states_above(batch, self._frozen_output(batch)), lambda: self._states(batch))

    @cached_property
    def _frozen_layers(self) -> tuple[nn.ModuleList, int] | None:
        """The base's layers, and how many of them lie below the discriminator's first adapter; None where none does."""
        named = layer_list(self.lm)
        if named is None:
            return None
        _, layers = named
        adapted = [any(has_adapter(m, "discriminator") for m in layer.modules()) for layer in layers]
        inside = sum(has_adapter(m, "discriminator") for m in layers.modules())
        outside = inside < sum(has_adapter(m, "discriminator") for m in self.body.modules())
        below = adapted.index(True) if any(adapted) else len(layers)
        return None if outside or not 0 < below < len(layers) else (layers, below)

    @torch.no_grad()
    def _frozen_output(self, batch: Batch) -> Tensor:
        """What comes out of these layers, [1, N, H] or [B, L, H]."""
        assert self._frozen_layers is not None
        layers, below = self._frozen_layers
        recorder = InputRecorder()
        with replaced(layers, {i: recorder for i in range(below, len(layers))}):
            self._states(batch)
        assert recorder.input is not None
        return recorder.input

    def _states_above(self, batch: Batch, hidden_BLH: Tensor) -> Tensor:
        """`_states`, begun above these layers, from what comes out of them."""
        assert self._frozen_layers is not None
        layers, below = self._frozen_layers
        with replaced(layers, dict.fromkeys(range(below), FixedOutput(hidden_BLH))):
            return self._states(batch)

    @contextmanager
    def _attention(self, attention: str) -> Iterator[None]:
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
        name, one = self.lm.base_model_prefix, torch.ones(1, 1, dtype=torch.long, device=hidden_RH.device)
        player: Player = "reference" if reference else self.active  # what stands behind the body may be adapted, too
        setattr(self.lm, name, FixedBody(hidden_RH[None], self.body))
        try:
            with self._as_player(player, self.lm.config._attn_implementation):
                logits_1RV = self.lm(input_ids=one, attention_mask=one, use_cache=False).logits
        finally:
            setattr(self.lm, name, self.body)
        return logits_1RV[0].float()

    @property
    def vocabulary(self) -> int:
        """Tokens that the base can write."""
        return len(cast(Tensor, self.lm.get_output_embeddings().weight))

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose logits are held at one time: all of a response's would be most of the memory of an update."""
        return max(16, LOGITS_AT_ONCE // self.vocabulary)

    def pooled_hidden(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """The active player's last hidden state at the pooled token, [B, H], float32."""
        return self.hidden(batch, batch.pooled_B, embeds_BLH).float()

    @property
    def score_MH(self) -> Tensor:
        """The heads in the reward's own units; their mean is the score head that is saved for stock clients."""
        return self.heads_MH * self.reward_unit

    def predict(self, batch: Batch, embeds_BLH: Tensor | None = None) -> Tensor:
        """Every head's predicted reward, in the reward's own units, [M, B]."""
        return self.score_MH @ self.pooled_hidden(batch, embeds_BLH).T


@torch.no_grad()
def _agree(way: Callable[[], Tensor], usual: Callable[[], Tensor]) -> bool:
    """Whether a base can be read in this way, and gives what the usual way gives.

    The tolerance is far above rounding in bfloat16, far below what a layer left out does, or a token that sees one too
    many. Bitwise equality cannot be asked: a product's rounding depends on where in memory its operands lie.
    """
    try:
        one, other = way(), usual()
    except torch.OutOfMemoryError:
        raise  # it does not show that this way fails, and a resumed run must find the same
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
        return False
    return bool((one - other).norm() <= 0.02 * other.norm())


class _PendingGraph:
    """Stands for an autograd graph that has not been used yet."""

    __slots__ = ("__weakref__",)
