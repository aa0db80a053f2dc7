"""Estimates the memory of a run, for `lora-gan train`: on the host, and on a GPU if the run uses one.

# S = prompt tokens, T = response tokens, P = prompts, K = responses per prompt, B = responses, V = vocabulary

Each term is measured where a measurement is cheap, and else computed. Of phases that do not overlap in time, only the
largest counts.
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

LOGITS_HELD = 6  # float32 arrays of the size of the logits: see `_head_bytes`
# Prompt and response tokens of the texts on which a graph is measured.
PROBES = ((2, 2), (6, 2), (2, 6), (6, 6))
LONG_PROBES = ((64, 64), (192, 64), (64, 192), (192, 192))  # recurrent layers pad texts to chunks


@dataclass(frozen=True)
class Memory:
    """Bytes of one kind of memory.

    Attributes:
        always: purpose -> bytes that are held during the whole run.
        in_turn: purpose -> bytes that are held in one phase of a step.
        least: peak of this process so far, in bytes: a lower bound.
    """

    always: dict[str, float]
    in_turn: dict[str, float] = field(default_factory=dict)
    least: float = 0.0

    @property
    def total(self) -> float:
        """The peak, in bytes."""
        return max(sum(self.always.values()) + max(self.in_turn.values(), default=0.0), self.least)


class Lengths(NamedTuple):
    """Tokens of a step's prompts and responses: the means and the maxima."""

    prompt: float
    longest_prompt: int
    response: float
    longest_response: int

    @classmethod
    def at_most(cls, prompt: int, response: int) -> Lengths:
        """Lengths of texts that all have the maximum length."""
        return cls(prompt, prompt, response, response)


class Graph(NamedTuple):
    """Bytes that autograd keeps for a forward pass through the body; coefficients fitted to measurements.

    Attributes:
        per_token: bytes per computed token; a packed prompt counts once per group.
        per_position: bytes per position of keys and values; each response has its own copy of the prompt.
        per_pair: bytes per pair of tokens in attention.
        constant: bytes that do not depend on the number of tokens.
    """

    per_token: float
    per_position: float
    per_pair: float
    constant: float

    def bytes(self, prompts: int, responses: int, lengths: Lengths, *, packs: bool) -> float:
        """Bytes for `responses` responses to `prompts` prompts."""
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
    saves_in_parallel: bool = False,
) -> Memory:
    """Memory of the process on the host.

    Args:
        players: the players of the run.
        config: the settings of the run.
        lengths: tokens of a step's texts.
        opened: bytes that the process held after base and adapters were loaded; 0: unknown.
        reward_model: bytes by which the first reward calls increased the process.
        spare: bytes that the process holds in addition to each byte of an update (`spare_share`).
        checkpoint: bytes of one checkpoint on the disk.
        saves_in_parallel: whether checkpoints are written in parallel with steps.
    """
    base, trained = _base_bytes(players), _trained_bytes(players)
    on_host = players.device.type == "cpu"
    held = base + trained if on_host else 0.0
    always = {"Python and its libraries": max(0.0, opened - held)}
    if reward_model > 1e6:  # a smaller value is noise
        always["the reward"] = reward_model
    in_turn: dict[str, float] = {}
    if on_host:
        device = device_memory(players, config, lengths)
        always |= device.always
        in_turn |= device.in_turn
        if spare:
            always["freed memory that the C library keeps"] = spare * max(in_turn.values())
    # A copy of all tensors, and the bytes of all files, which are written together (checkpoint.py).
    (always if saves_in_parallel else in_turn)["saving a checkpoint"] = 2.0 * checkpoint
    # The base of a GPU passed through the host's memory when it was loaded.
    return Memory(always, in_turn, least=0.0 if on_host else resident(peak=True))


def spare_share(
    players: Players, config: Config, lengths: Lengths, *, groups: int, responses: int, grew: float
) -> float:
    """Bytes that a process holds in addition to each used byte of an update.

    The C library's allocator keeps freed blocks and cannot fill every gap between used blocks: a glibc process holds up
    to 50 % more. With MALLOC_MMAP_THRESHOLD_=131072 in the environment, blocks return to the system immediately; then
    the terms of `device_memory` alone give the peak to 5 % (docs/performance.md).

    Args:
        players: the players of the run.
        config: the settings of the run.
        lengths: tokens of the texts of an update that was tried.
        groups, responses: the size of this update; every response had a true reward.
        grew: bytes by which the process grew during this update on copies of the weights (`trial`).
    """
    if not grew or players.device.type != "cpu":
        return 0.0
    tried = replace(config, prompts_per_step=groups, num_generations=responses // groups, query_rate=1.0)
    in_use = max(value for name, value in device_memory(players, tried, lengths).in_turn.items() if "update" in name)
    # Copies of both adapters, and gradient and moments of one adapter; both adapters have about the same size.
    copies = 2.5 * _trained_bytes(players)
    return max(0.0, (grew - copies) / in_use - 1)


def device_memory(players: Players, config: Config, lengths: Lengths) -> Memory:
    """Memory of the base, the adapters, sampling and updates on their device.

    Weights and optimizers are exact: the adapter, its gradient and AdamW's two moments have the same size. The graphs
    of the updates are measured (`graph_of`). A backward pass holds the graph and one layer's gradients. The
    discriminator's update has this step's answered responses and the same number from replay in one graph, or a
    micro-batch of these.
    """
    sampled = config.prompts_per_step * config.num_generations
    size = config.micro_batch_size
    asked = round(sampled * (config.asked_share if config.disc_objective == "regression" else 1.0))
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
    """Bytes that this process holds in memory now, or with `peak` at its peak; 0 if the system is not Linux."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else 0.0


class Growth:
    """Measures the bytes by which the process grows within a block; a context manager.

    First freed memory returns to the system (glibc's malloc_trim), because the block could use it without a growth of
    the process. The system's record of the peak starts again with the block.

    Attributes:
        bytes: the growth at its peak; 0 if the system does not report memory.
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
    """Measure the bytes that autograd keeps for a player's forward pass on four short texts; cached per player.

    The bytes grow with tokens, with positions of keys and values, and with pairs of tokens if attention keeps its
    weights. Four measurements give these three factors and a constant. Weights are not counted. The measurement is made
    without gradient checkpointing.
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
    # Without packing tokens and positions are equal, and least squares divides the factor between both.
    factors = np.linalg.lstsq(np.array(features), np.array(measured), rcond=None)[0]
    return Graph(*map(float, factors))


def _features(prompts: int, responses: int, lengths: Lengths, *, packs: bool) -> list[float]:
    """Tokens, positions of keys and values, pairs of tokens, and 1. Positions and pairs include padding."""
    prompt, response = lengths.longest_prompt, lengths.longest_response
    positions = responses * (prompt + response)
    if not packs:
        return [positions, positions, responses * (prompt + response) ** 2, 1.0]
    tokens = prompts * lengths.prompt + responses * lengths.response
    return [tokens, positions, prompts * prompt**2 + responses * response * (prompt + response), 1.0]


@contextmanager
def _counting(players: Players) -> Iterator[dict[int, int]]:
    """Within the block, collect address -> bytes of the storages that autograd keeps, without weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*players.lm.parameters(), *players.lm.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that keeps its own output would be a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _text(players: Players, tokens: int) -> list[int]:
    rows = base_checks.embedding_rows(players.lm)
    return [1 + i % (rows - 1) for i in range(tokens)]


def _base_bytes(players: Players) -> float:
    return float(sum(p.numel() * p.element_size() for p in players.base.model.parameters() if not p.requires_grad))


def _trained_bytes(players: Players) -> float:
    return float(sum(p.numel() * p.element_size() for player in PLAYERS for p in players.parameters(player)))


def _update_bytes(players: Players, config: Config, graph: Graph, micro_batch: int, lengths: Lengths) -> float:
    """Bytes of the graph of a micro-batch of responses, and of one layer's gradients during the backward pass."""
    prompts = -(-micro_batch // config.num_generations)
    text = players.lm.config.get_text_config()
    whole, layers = graph.bytes(prompts, micro_batch, lengths, packs=players.packs), text.num_hidden_layers
    if config.gradient_checkpointing:  # every layer's input, and the whole graph of one layer
        tokens = _features(prompts, micro_batch, lengths, packs=players.packs)[0]
        inputs = layers * tokens * text.hidden_size * next(players.lm.parameters()).element_size()
        return inputs + 2 * whole / layers
    return whole + whole / layers


def _head_bytes(players: Players, micro_batch: int, lengths: Lengths) -> float:
    """Peak bytes of the vocabulary head: float32 logits of player and reference for `tokens_at_once` tokens,
    log-probabilities and gradients. Six arrays of this size match the peaks of benchmarks/memory.py."""
    vocabulary = players.lm.get_output_embeddings().weight.shape[0]
    return LOGITS_HELD * 4.0 * min(micro_batch * lengths.response, players.tokens_at_once) * vocabulary


def _sampling_bytes(players: Players, sampled: int, positions: int) -> float:
    """Bytes of sampling, a sum of three terms.

    - caches of all responses for `positions` positions;
    - logits, probabilities and distribution function of the next token: two arrays in float32, two in float64;
    - merged weights while a small base decodes.
    """
    vocabulary = players.lm.get_output_embeddings().weight.shape[0]
    return sampled * (cache_bytes(players, positions) + 24.0 * vocabulary) + merged_bytes(players.lm)


def cache_bytes(players: Players, positions: int) -> float:
    """Bytes of one response's keys and values at `positions` positions, and of its recurrent states."""
    text = players.lm.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1  # Mamba has no attention, and no such setting
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    number_bytes = next(players.lm.parameters()).element_size()
    keys_and_values = 2.0 * number_bytes * positions * attention_layers(players.lm.config) * kv_heads * head_dim
    return keys_and_values + _state_bytes(players)


@torch.no_grad()
def _state_bytes(players: Players) -> int:
    """Bytes of one row's convolution and recurrent states, from a forward pass on one token; 0 without such layers."""
    cache = DynamicCache(config=players.lm.config)
    if not any(map(has_state, cache.layers)):
        return 0
    one = torch.ones(1, 1, dtype=torch.long, device=players.device)
    with players.use_adapter("base"):
        players.lm(input_ids=one, attention_mask=one, use_cache=True, **players.cached(cache), **players.positions(one))
    return sum(state.nbytes for layer in cache.layers for state in state_tensors(layer))
