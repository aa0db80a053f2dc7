"""Where a step of this library spends its time, and how much work each phase does. The library itself has no hooks.

`measured` times one step by phase. It wraps methods of one LoraGAN during that step. Phases do not overlap, and their
times sum to the step: the time of an inner phase is subtracted from the outer one. The active player
(`players.use_adapter`) and the method determine the phase of a forward pass. Prefill is the first call of the model's
forward in sampling. If sampling does not call it, prefill counts as decode.

`work` computes the floating-point operations of a phase from the shapes. These are the costs:

- Tokens N: P prompts once and B responses if the base reads packed rows, else B prompts and B responses.
- Forward: 2·(body + adapter) per token; 2·head per position with logits.
- Attention, forward: 2·width·L·(L+1) per layer and row of L tokens (QKᵀ and its product with V, only the causal half).
- Backward: 2·body per token (dX only, the weights are frozen); 4·adapter (dX and dW); 2·head per position; twice the
  attention.

These are the phases:

- prefill: forward over each prompt once; logits of one position per prompt.
- decode: forward over one token of B rows, T − 1 times; all logits. Bytes: each time the weights and the adapter once,
  and the keys and values of every row so far.
- prediction, reference: forward over N tokens; the reference also has the logits of response positions.
- generator update: forward and backward over N tokens; logits of response positions.
- discriminator update: forward and backward over fresh and replayed responses, `disc_updates` times; no logits. The
  backward pass ends at the first layer with the discriminator's adapter. The first forward over fresh responses
  counts as prediction.

body = weights of the linear layers, adapter = weights of one player's LoRA on them, head = weights of the vocabulary
head, width = number of heads × their size.

# P = prompts, B = responses, L = prompt and response tokens, T = response tokens
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from arms import LoraGanArm, Wrote
from machine import Rates, linear_layers, synchronize

PHASES = (
    "prefill", "decode", "prediction", "reward", "reference", "generator update", "discriminator update", "rest",
)  # fmt: skip


# --- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by phase. Time counts for the innermost open phase."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.open = ["rest"]
        self.last = self._now()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def stop(self) -> dict[str, float]:
        self._charge()
        return {name: self.seconds[name] for name in PHASES}


def measured(arm: LoraGanArm) -> tuple[Wrote, dict[str, float]]:
    """Run one step of the arm. Returns the lengths of its responses and its seconds by phase."""
    gan, prefilled = arm.gan, False

    def forward_phase(*_: Any, **__: Any) -> str | None:
        nonlocal prefilled
        first, prefilled = clock.open[-1] == "decode" and not prefilled, prefilled or clock.open[-1] == "decode"
        return "prefill" if first else None

    with ExitStack() as hooks:
        for owner, name, phase in (
            (arm, "reward", "reward"),
            (gan, "_sample", "decode"),
            (gan.players.lm, "forward", forward_phase),  # the first call in sampling is the prefill
            (gan.discriminator, "predict", "prediction"),
            (gan.discriminator, "predict_to_learn", "prediction"),
            (gan.players, "use_adapter", lambda player: "reference" if player == "reference" else None),
            (gan.players, "lm_head", lambda *_, reference=False: "reference" if reference else None),
            (gan.generator, "update", "generator update"),
            (gan.discriminator, "update", "discriminator update"),
        ):
            hooks.enter_context(_hooked(owner, name, phase, lambda: clock))
        clock = Clock(arm.workload.device)
        wrote = arm.step()
        return wrote, clock.stop()


@contextmanager
def _hooked(
    owner: Any, name: str, phase: str | Callable[..., str | None], clock: Callable[[], Clock]
) -> Iterator[None]:
    """During the block, calls of the method count for its phase. For a context manager, its block counts."""
    original, was_own = getattr(owner, name), name in vars(owner)

    @contextmanager
    def entering(*arguments: Any, **named: Any) -> Iterator[Any]:
        its = phase(*arguments, **named) if callable(phase) else phase
        with clock().phase(its) if its else ExitStack(), original(*arguments, **named) as value:
            yield value

    @functools.wraps(original)
    def calling(*arguments: Any, **named: Any) -> Any:
        its = phase(*arguments, **named) if callable(phase) else phase
        with clock().phase(its) if its else ExitStack():
            return original(*arguments, **named)

    setattr(owner, name, entering if name == "use_adapter" else calling)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


# --- work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The operations and bytes of one phase of a step."""

    body: float  # FLOPs of the layers, with attention
    head: float  # FLOPs of the vocabulary head
    body_rows: int  # of one matrix product
    head_rows: int
    bytes: float = 0.0  # read from memory; only for phases that are limited by it

    @property
    def flops(self) -> float:
        return self.body + self.head

    def product_seconds(self, rates: Rates) -> float:
        """Seconds of the matrix products alone, at the rates measured on this machine."""
        head = self.head / rates.head[self.head_rows] if self.head else 0.0
        return self.body / rates.body[self.body_rows] + head


def work(arm: LoraGanArm) -> dict[str, Work]:
    """The work of each phase. Phases that do not run are left out."""
    gan, shape = arm.gan, arm.workload.shape
    body, head = linear_layers(gan.players.lm)
    size = sum(layer.weight.numel() for layer in body)
    adapter = {
        player: sum(weights for layer in body for its, weights in layer.adapters if its == player)
        for player in ("generator", "discriminator")
    }
    config = gan.players.lm.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = heads * head_dim
    kv_width = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    layers, element = config.num_hidden_layers, head.weight.element_size()

    lengths = [len(ids) for ids in gan._encode(arm.workload.prompts)]
    prompt = round(sum(lengths) / len(lengths))
    rows, places = shape.responses, shape.tokens
    tokens = prompt + places

    def attention(length: int) -> float:
        return 2 * width * length * (length + 1) * layers

    def forward(count: int, length: int, player: str | None) -> float:
        return 2 * (size + adapter.get(player, 0)) * count * length + count * attention(length)

    def read(prompts: int, responses: int) -> tuple[int, float]:
        """Tokens of a batch, and the operations of its attention."""
        if not gan.players.packs:
            return responses * tokens, responses * attention(tokens)
        seen = prompts * attention(prompt) + responses * (attention(tokens) - attention(prompt))
        return prompts * prompt + responses * places, seen

    def packed_forward(prompts: int, responses: int, player: str | None) -> float:
        count, seen = read(prompts, responses)
        return 2 * (size + adapter.get(player, 0)) * count + seen

    def packed_backward(prompts: int, responses: int, player: str) -> float:
        count, seen = read(prompts, responses)
        first = next(i for i, layer in enumerate(body) if player in dict(layer.adapters))
        below = sum(layer.weight.numel() for layer in body[:first]) / size
        return (2 * size * (1 - below) + 4 * adapter[player]) * count + 2 * (1 - below) * seen

    one_place = 2 * head.weight.numel()
    batch_tokens, at_once = read(shape.prompts, rows)[0], min(rows * places, gan.players.tokens_at_once)
    weights = (size + head.weight.numel()) * element + 4 * adapter["generator"]  # adapters are in float32
    decode_bytes = sum(weights + 2 * kv_width * layers * element * rows * (prompt + done) for done in range(1, places))
    decode = (places - 1) * rows * 2 * (size + adapter["generator"])
    decode += rows * (attention(tokens - 1) - attention(prompt))
    needed = {
        "prefill": Work(
            forward(shape.prompts, prompt, "generator"), shape.prompts * one_place, shape.prompts * prompt,
            shape.prompts,
        ),
        "decode": Work(decode, (places - 1) * rows * one_place, rows, rows, decode_bytes),
        "prediction": Work(packed_forward(shape.prompts, rows, "discriminator"), 0.0, batch_tokens, 0),
        "generator update": Work(
            packed_forward(shape.prompts, rows, "generator") + packed_backward(shape.prompts, rows, "generator"),
            2 * rows * places * one_place, batch_tokens, at_once,
        ),
    }  # fmt: skip
    if gan.config.beta:
        flops = packed_forward(shape.prompts, rows, None)
        needed["reference"] = Work(flops, rows * places * one_place, batch_tokens, at_once)
    if arm.train_disc:
        times = (2 if gan.config.disc_replay_groups else 1) * gan.config.disc_updates
        both = packed_forward(times * shape.prompts, times * rows, "discriminator")
        both += packed_backward(times * shape.prompts, times * rows, "discriminator")
        shared = packed_forward(shape.prompts, rows, "discriminator")
        needed["discriminator update"] = Work(both - shared, 0.0, batch_tokens, 0)
    else:
        needed.pop("prediction")
    return {phase: needed[phase] for phase in PHASES if phase in needed}
