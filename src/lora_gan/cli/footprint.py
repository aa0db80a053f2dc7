"""How much memory a run takes, for `lora-gan train`: on the host, and on the device where that is another one.

# S = prompt tokens, T = response tokens, P = prompts, K = responses per prompt, B = responses, V = vocabulary

Each term is measured where that is cheap, and else computed. `estimate` names the source of each. What two things that
take turns need is not added up: the larger one counts.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import Config
from ..model import base_checks
from ..model.checkpointing import without_checkpointing
from ..model.fast_lora import merged_bytes
from ..model.kv_cache import attention_layers, has_state, state_tensors
from ..model.players import Player, Players
from ..storage.checkpoint import PLAYERS

LOGITS_HELD = 6  # float32 arrays as large as the logits at hand: see `_head_bytes`
# Prompt and response tokens of the texts that a graph is measured on.
PROBES = ((2, 2), (6, 2), (2, 6), (6, 6))
LONG_PROBES = ((64, 64), (192, 64), (64, 192), (192, 192))  # recurrent layers pad texts to chunks


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind of memory.

    Attributes:
        always: by purpose, what is held during the whole run.
        in_turn: by purpose, what is held at different times.
        least: bytes that this process has taken already at its peak; the run takes as much.
    """

    always: dict[str, float]
    in_turn: dict[str, float] = field(default_factory=dict)
    least: float = 0.0

    @property
    def total(self) -> float:
        """The peak."""
        return max(sum(self.always.values()) + max(self.in_turn.values(), default=0.0), self.least)


class Lengths(NamedTuple):
    """Tokens of a step's prompts and responses: their means, and the longest of each."""

    prompt: float
    longest_prompt: int
    response: float
    longest_response: int

    @classmethod
    def at_most(cls, prompt: int, response: int) -> Lengths:
        """Every text is as long as it may be."""
        return cls(prompt, prompt, response, response)


class Graph(NamedTuple):
    """Bytes that autograd keeps of a forward through the body: fitted to measured ones.

    Attributes:
        per_token: for each token that is computed; a packed prompt counts once per group.
        per_place: for each place of keys and values, where each response has its own copy of the prompt.
        per_pair: for each pair of tokens that attention compares.
        constant: whatever the number of tokens.
    """

    per_token: float
    per_place: float
    per_pair: float
    constant: float

    def bytes(self, prompts: int, responses: int, lengths: Lengths, *, packs: bool) -> float:
        """Bytes for so many responses to so many prompts."""
        return float(np.dot(_features(prompts, responses, lengths, packs=packs), self))


def host(
    players: Players,
    config: Config,
    lengths: Lengths,
    *,
    opened: float = 0.0,
    reward_model: float = 0.0,
    spare: float = 0.0,
    checkpoint: float = 0.0,
    saves_beside: bool = False,
) -> Memory:
    """Memory of the process on the host.

    Args:
        players: of the run.
        config: its settings.
        lengths: tokens of a step's texts.
        opened: bytes that the process held when the base and the adapters were there; 0: not known.
        reward_model: bytes that the reward took when it was asked first.
        spare: bytes that the process holds beside each byte of an update (`spare_share`).
        checkpoint: bytes of one checkpoint on the disk.
        saves_beside: whether checkpoints are written while steps are taken.
    """
    base, trained = _base_bytes(players), _trained_bytes(players)
    on_host = players.device.type == "cpu"
    held = base + trained if on_host else 0.0
    always = {"Python and its libraries": max(0.0, opened - held)}
    if reward_model > 1e6:  # less is noise
        always["the reward"] = reward_model
    in_turn: dict[str, float] = {}
    if on_host:
        device = device_memory(players, config, lengths)
        always |= device.always
        in_turn |= device.in_turn
        if spare:
            always["freed memory that the C library keeps"] = spare * max(in_turn.values())
    # A snapshot of all tensors, and the bytes of all its files, which are written together (checkpoint.py).
    (always if saves_beside else in_turn)["saving a checkpoint"] = 2.0 * checkpoint
    # The base of another device passed through the host when it was opened.
    return Memory(always, in_turn, least=0.0 if on_host else resident(peak=True))


def spare_share(
    players: Players, config: Config, lengths: Lengths, *, groups: int, responses: int, grew: float
) -> float:
    """Bytes that a process holds beside each byte of an update that is in use.

    The C library's allocator keeps blocks that were freed, and cannot fill every gap between those in use: on glibc a
    process holds up to half as much again. With MALLOC_MMAP_THRESHOLD_=131072 in the environment, where blocks go back
    to the system at once, the terms of `device_memory` alone meet the peak to 5 % (docs/performance.md).

    Args:
        lengths: tokens of the texts of an update that was tried.
        groups, responses: its size; the true reward of all responses was known.
        grew: bytes by which the process grew during this update, which was made on copies of the weights (`trial`).
    """
    if not grew or players.device.type != "cpu":
        return 0.0
    tried = replace(config, prompts_per_step=groups, num_generations=responses // groups, query_rate=1.0)
    in_use = max(value for name, value in device_memory(players, tried, lengths).in_turn.items() if "update" in name)
    # The copies of both adapters, and one's gradient and moments; the adapters are of about one size.
    copies = 2.5 * _trained_bytes(players)
    return max(0.0, (grew - copies) / in_use - 1)


def device_memory(players: Players, config: Config, lengths: Lengths) -> Memory:
    """Memory of the base, the adapters, sampling and updates, wherever they are.

    Weights and optimizers are exact: the adapter, its gradient and AdamW's two moments are of one size. The graphs of
    the updates are measured (`graph_of`). A backward holds one layer's gradients beside the graph. The discriminator's
    update reads this step's answered responses and as many of replay in one graph, or a micro-batch of them.
    """
    sampled = config.prompts_per_step * config.num_generations
    size = config.micro_batch_size
    asked = round(sampled * (config.query_rate if config.disc_objective == "regression" else 1.0))
    judged = asked * (2 if config.disc_replay_groups else 1)
    generating, judging = min(size or sampled, sampled), min(size or judged, max(judged, 1))
    graphs = {player: graph_of(players, player) for player in PLAYERS}
    always = {
        "base": _base_bytes(players),
        "adapters, their gradients and AdamW's moments": 4.0 * _trained_bytes(players),
    }
    in_turn = {
        "sampling": _sampling_bytes(players, sampled, lengths.longest_prompt + config.max_completion_length),
        "the generator's update": _update_bytes(players, config, graphs["generator"], generating, lengths)
        + _head_bytes(players, generating, lengths),
        "the discriminator's update": _update_bytes(players, config, graphs["discriminator"], judging, lengths),
    }
    if config.gradient_path == "straight_through":  # the discriminator's graph comes first, then a table [V, H]
        table = base_checks.embedding_weight(players.lm).numel() * 4.0
        critic = _update_bytes(players, config, graphs["discriminator"], generating, lengths)
        in_turn["the generator's update"] = table + max(critic, in_turn["the generator's update"])
    on_gpu = players.device.type == "cuda"
    return Memory(always, in_turn, least=float(torch.cuda.max_memory_allocated(players.device)) if on_gpu else 0.0)


def resident(peak: bool = False) -> float:
    """Bytes that this process holds in memory now, or held at its peak; 0 where the system is not Linux."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else 0.0


class Growth:
    """How many bytes the process grows by within a block; a context manager.

    Memory that was freed before goes back to the system first (glibc's malloc_trim), or the block would grow into it
    unseen. The system's record of the peak starts again with the block.

    Attributes:
        bytes: the growth at its peak; 0 where the system does not say.
    """

    bytes = 0.0

    def __enter__(self) -> Growth:
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
        self._before = math.inf
        with suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0.0, resident(peak=True) - self._before)


@lru_cache(maxsize=2)
def graph_of(players: Players, player: Player) -> Graph:
    """Measure what autograd keeps of a player's forward, on four short texts; once per object and player.

    What it keeps grows with tokens, with places of keys and values, and with pairs of tokens where attention keeps its
    weights; four measured sizes give these three factors and a constant. Weights are not counted. Under
    gradient_checkpointing layers are measured as if it were off.
    """
    measured, features = [], []
    with without_checkpointing(players.lm):
        for prompt, response in LONG_PROBES if _state_bytes(players) else PROBES:
            prompts, responses = [_text(players, prompt)], [_text(players, response)] * 2
            batch = players.batch(prompts, responses, np.zeros(2, dtype=int))
            with _counting(players) as kept, players.use_adapter(player):
                hidden = players.hidden(batch, batch.predicting_R)
                measured.append(float(sum(kept.values())))
                hidden.detach_()
            del hidden
            features.append(_features(1, 2, Lengths.at_most(prompt, response), packs=players.packs))
    # Without packing a token and a place are the same: least squares shares the factor between them.
    factors = np.linalg.lstsq(np.array(features), np.array(measured), rcond=None)[0]
    return Graph(*map(float, factors))


def _features(prompts: int, responses: int, lengths: Lengths, *, packs: bool) -> list[float]:
    """Tokens, places of keys and values, pairs of tokens, and 1. Places and pairs are padded to the longest text."""
    prompt, response = lengths.longest_prompt, lengths.longest_response
    places = responses * (prompt + response)
    if not packs:
        return [places, places, responses * (prompt + response) ** 2, 1.0]
    tokens = prompts * lengths.prompt + responses * lengths.response
    return [tokens, places, prompts * prompt**2 + responses * response * (prompt + response), 1.0]


@contextmanager
def _counting(players: Players) -> Iterator[dict[int, int]]:
    """The bytes of the storages that autograd keeps, by their address, without those of weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*players.lm.parameters(), *players.lm.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that keeps its own output would keep itself, and nothing would be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _text(players: Players, tokens: int) -> list[int]:
    rows = base_checks.embedding_rows(players.lm)
    return [1 + i % (rows - 1) for i in range(tokens)]


def _base_bytes(players: Players) -> float:
    return float(sum(p.numel() * p.element_size() for p in players.base.model.parameters() if not p.requires_grad))


def _trained_bytes(players: Players) -> float:
    return float(sum(p.numel() * p.element_size() for player in PLAYERS for p in players.parameters(player)))


def _update_bytes(players: Players, config: Config, graph: Graph, together: int, lengths: Lengths) -> float:
    """Graph of a forward of so many responses, and the gradients of one layer, which a backward holds beside it."""
    prompts = -(-together // config.num_generations)
    text = players.lm.config.get_text_config()
    whole, layers = graph.bytes(prompts, together, lengths, packs=players.packs), text.num_hidden_layers
    if config.gradient_checkpointing:  # of each layer its input, and one layer at a time whole
        tokens = _features(prompts, together, lengths, packs=players.packs)[0]
        inputs = layers * tokens * text.hidden_size * next(players.lm.parameters()).element_size()
        return inputs + 2 * whole / layers
    return whole + whole / layers


def _head_bytes(players: Players, together: int, lengths: Lengths) -> float:
    """What the head holds at one time: logits in float32 for `tokens_at_once` tokens, those of the reference,
    log-probabilities and gradients. Six arrays of this size met the peaks of benchmarks/memory.py."""
    vocabulary = players.lm.get_output_embeddings().weight.shape[0]
    return LOGITS_HELD * 4.0 * min(together * lengths.response, players.tokens_at_once) * vocabulary


def _sampling_bytes(players: Players, sampled: int, places: int) -> float:
    """Caches of all responses, for as many places as they may have; the logits, probabilities and distribution function
    of their next token (two arrays in float32, two in float64); and the weights that are merged while a small base
    decodes."""
    vocabulary = players.lm.get_output_embeddings().weight.shape[0]
    return sampled * (cache_bytes(players, places) + 24.0 * vocabulary) + merged_bytes(players.lm)


def cache_bytes(players: Players, places: int) -> float:
    """One response's keys and values at so many places, and its recurrent states."""
    text = players.lm.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1  # Mamba has no attention, and no such setting
    per_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    number = next(players.lm.parameters()).element_size()
    keys = 2.0 * number * places * attention_layers(players.lm.config) * kv_heads * per_head
    return keys + _state_bytes(players)


@torch.no_grad()
def _state_bytes(players: Players) -> int:
    """Bytes of one row's convolution and recurrent states, from a forward on one token; 0 without such layers."""
    cache = DynamicCache(config=players.lm.config)
    if not any(map(has_state, cache.layers)):
        return 0
    one = torch.ones(1, 1, dtype=torch.long, device=players.device)
    with players.use_adapter("base"):
        players.lm(input_ids=one, attention_mask=one, use_cache=True, **players.cached(cache), **players.positions(one))
    return sum(state.nbytes for layer in cache.layers for state in state_tensors(layer))
