"""`lora-gan train --dry_run`: what a run would train, hold and ask for, and whether its reward can teach anything.

# P = prompts, K = responses a prompt, B = P·K, L = tokens of a row, T = tokens of a response, V = vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .adapters import Players
from .cache import attention_layers, has_state, roomy_cache, state_tensors
from .checkpoint import PLAYERS
from .config import Config
from .data import Row
from .disk import needed
from .display import one_line

if TYPE_CHECKING:
    from .gan import LoraGAN

PROMPTS, RESPONSES = 4, 4  # the reward is tried on so many responses to so many prompts


def describe(gan: LoraGAN, rows: list[Row], *, total: int | None, steps: int) -> str:
    """Base, adapters, data, steps, true-reward calls and memory, a line each.

    Args:
        rows: the first rows of the data: their prompts' length is taken for that of all.
        total: rows there are; None where they are streamed.
        steps: steps that would be run.
    """
    config, players, base = gan.config, gan.players, gan.players.base
    rows = gan.as_meant(rows)
    sizes = {player: sum(p.numel() for p in players.parameters(player)) for player in PLAYERS}
    frozen = sum(p.numel() for p in base.model.parameters() if not p.requires_grad)
    frozen -= sum(p.numel() for p in players.parameters("reference"))
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    lengths = [len(ids) for ids in players.encoder.prompts(rows)]
    lines = {
        "base": f"{base.name or 'in memory'}, {frozen:,} frozen parameters ({dtype}, {players.device})",
        "generator": f"{sizes['generator']:,} parameters in its adapter{_start(gan)}",
        "discriminator": f"{sizes['discriminator']:,} parameters in its adapter and {config.disc_heads} heads",
        "data": f"{'streamed' if total is None else f'{total:,} rows'}",
        "prompts": _kinds(gan, rows),
        "steps": f"{steps:,} of {config.prompts_per_step} prompts × {config.num_generations} responses of at most "
        f"{config.max_completion_length} tokens" + (f", after {gan.global_step:,}" if gan.global_step else ""),
        "true reward": f"{', '.join(gan.reward_names)}: asked for {config.query_rate:.0%} of the responses, "
        f"{calls(config, steps):,} calls",
        "memory": _in_words(memory(players, config, lengths)),
        "disk": _disk(gan, steps, max(lengths)),
    }
    return "\n".join(f"{name:<15}{text}" for name, text in lines.items())


def _start(gan: LoraGAN) -> str:
    """Where the generator starts, if that is a saved adapter."""
    if gan.init_adapter is None:
        return ""
    reference = "a frozen copy of it" if gan.players.has_reference else "the base"
    return f", starts as the adapter {gan.init_adapter}; the KL is to {reference}"


def _kinds(gan: LoraGAN, rows: list[Row]) -> str:
    """How the first prompts reach the model, and which token closes a response to them."""
    encoder, tokenizer = gan.players.encoder, gan.players.base.tokenizer
    chats = [encoder.is_chat(row) for row in rows]
    kind = "chat messages" if all(chats) else "chat messages and plain text" if any(chats) else "plain text"
    closing = ", ".join(sorted({repr(tokenizer.convert_ids_to_tokens(encoder.closing_id(row))) for row in rows}))
    lines = f"{kind}, answered up to {closing}"
    if not all(chats) and encoder.has_template and gan.config.apply_chat_template is None:
        lines += (
            "\n  ! the base has a chat template, and plain prompts bypass it: set apply_chat_template to true to send "
            "each as a user message, or to false to keep them as they are"
        )
    return lines


def calls(config: Config, steps: int) -> int:
    """True rewards that so many steps ask for, at most reward_budget."""
    if config.disc_objective == "real_vs_generated":
        return 0
    wanted = round(steps * config.prompts_per_step * config.num_generations * config.query_rate)
    return wanted if config.reward_budget is None else min(wanted, config.reward_budget)


def memory(players: Players, config: Config, prompt_lengths: list[int]) -> dict[str, float]:
    """Bytes a run needs, by purpose. Weights and optimizers are exact; the rest is an estimate.

    Activations of an update: 17 numbers a token, layer and hidden unit, and 2.5 a pair of tokens, layer and attention
    head (Korthikanti et al. 2022, without dropout's masks); a prompt counts once for its group where the base reads
    packed rows. The generator has 6 float32 arrays as large as the logits that are held at one time, the discriminator
    none, but as many responses of replay beside this step's. So many as meet the peaks that benchmarks/memory.py
    measured at GPT-2's size to a quarter, with micro-batches and without.

    A layer with a recurrent state has no pairs of tokens. The state is counted exactly. What such a layer's scan holds
    during an update was not measured, and is left out.
    """
    model, text = players.base.model, players.base.model.config.get_text_config()
    attending = attention_layers(model.config)
    heads = getattr(text, "num_attention_heads", None) or 1  # Mamba has no attention, and no such setting
    per_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    vocabulary = model.get_output_embeddings().weight.shape[0]
    number = next(model.parameters()).element_size()

    sampled = config.prompts_per_step * config.num_generations
    prompt, response = max(prompt_lengths), config.max_completion_length
    length = prompt + response

    def body(responses: int) -> float:
        """Of so many responses in one forward and backward."""
        prompts = -(-responses // config.num_generations)
        if players.packs:
            tokens = prompts * prompt + responses * response
            pairs = prompts * prompt**2 + responses * response * length
        else:
            tokens, pairs = responses * length, responses * length**2
        layer, attention = 17 * tokens * text.hidden_size, 2.5 * heads * pairs
        if config.gradient_checkpointing:  # of all but one at a time what it was given
            largest = layer + (attention if attending else 0.0)
            return number * (text.num_hidden_layers * tokens * text.hidden_size + largest)
        return number * (text.num_hidden_layers * layer + attending * attention)

    state = _state_bytes(players)
    together = min(config.micro_batch_size or sampled, sampled)
    logits = 6.0 * 4 * min(together * response, players.tokens_at_once) * vocabulary
    judged = round(sampled * config.query_rate) * (2 if config.disc_replay_groups else 1)
    trained = sum(p.numel() * p.element_size() for player in PLAYERS for p in players.parameters(player))
    return {
        "base": float(sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)),
        "adapters, their gradients and AdamW's moments": 4.0 * trained,
        "cache while sampling": sampled * (2.0 * number * length * attending * kv_heads * per_head + state),
        "an update": max(body(together) + logits, body(min(config.micro_batch_size or judged, judged))),
    }


@torch.no_grad()
def _state_bytes(players: Players) -> int:
    """Bytes of one row's convolution and recurrent states, from a forward on one token; 0 without such layers."""
    cache = roomy_cache(players.lm.config, 1)
    if not any(map(has_state, cache.layers)):
        return 0
    one = torch.ones(1, 1, dtype=torch.long, device=players.device)
    with players.playing("base"):
        players.lm(input_ids=one, attention_mask=one, use_cache=True, **players.cached(cache), **players.positions(one))
    return sum(state.nbytes for layer in cache.layers for state in state_tensors(layer))


def _in_words(parts: dict[str, float]) -> str:
    """The sum of what is held at once: sampling and updating take turns."""
    *always, sampling, update = parts.values()
    whole = sum(always) + max(sampling, update)
    return f"about {_size(whole)}: " + ", ".join(f"{name} {_size(value)}" for name, value in parts.items())


def _disk(gan: LoraGAN, steps: int, prompt_tokens: int) -> str:
    """What the run will write."""
    disk = needed(gan, steps=steps, prompt_tokens=prompt_tokens, calls=calls(gan.config, steps))
    limit = gan.config.save_total_limit
    kept = f"{disk.kept:,} checkpoint{'' if disk.kept == 1 else 's'} of {_size(disk.each)}"
    if disk.kept < disk.saved:
        kept += f" ({disk.saved:,} are saved, save_total_limit={limit} keeps the newest; one more while one is saved)"
    elif disk.saved > 3:
        kept += " (save_total_limit keeps fewer)"
    return f"about {_size(disk.total)}: {kept}, logs {_size(disk.logs)}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def try_reward(
    gan: LoraGAN, rows: list[Row], *, calls: int, columns: Collection[str] = (), max_steps: int | None = None
) -> str:
    """Ask the true reward for a few responses of the generator as it stands, and for targets; say what it can teach.

    Args:
        rows: the first rows of the data; PROMPTS of them are used.
        calls: true-reward calls the run would make, for the time they would take.
        columns: names of all columns of the data; rewards get None for those that these rows lack.
        max_steps: steps of the run, for the trainer_state that rewards get.
    """
    options: dict[str, Any] = {"columns": columns, "max_steps": max_steps}
    rows = gan.as_meant(rows[:PROMPTS])
    # Equal prompts are told apart: each gets RESPONSES different draws.
    responses = gan.generate([row for row in rows for _ in range(RESPONSES)], apply_chat_template=False)
    if any(getattr(func, "interactive", False) for func in gan.reward_funcs or ()):
        print(
            f"Now you are asked about up to {len(responses) + 2 * len(rows)} responses, to try the reward.", flush=True
        )
    began = time.perf_counter()
    ids = getattr(responses, "token_ids", None)
    repeated = [row for row in rows for _ in range(RESPONSES)]
    answers, parts = gan.ask(repeated, responses, completion_ids=ids, **options)
    first = time.perf_counter() - began
    reward_PK = np.array([np.nan if a is None else a for a in answers]).reshape(len(rows), RESPONSES)

    lines = [f"\nThe reward, tried on {len(responses)} responses of the generator as it stands:"]
    for row, group, texts in zip(rows, reward_PK, np.reshape(responses, reward_PK.shape), strict=True):
        best = int(np.nanargmax(group)) if not np.isnan(group).all() else 0
        rewards = " ".join(f"{reward:.3f}" for reward in group)
        lines.append(f"  “{one_line(row.prompt, 70)}”\n    {rewards}   best: “{one_line(texts[best], 70)}”")
    for name, part in parts.items():
        values = [value for value in part if value is not None]
        lines.append(f"  {name}: mean {np.mean(values):.3f}, {len(values)} of {len(part)} answered" if values else
                     f"  {name}: no answer")  # fmt: skip
    lines += _verdict_on_spread(reward_PK)

    paired = [row for row in rows if row.target]
    if len(paired) > 1:
        began = time.perf_counter()
        own, _ = gan.ask(paired, [row.target or "" for row in paired], **options)
        others, _ = gan.ask(paired, [row.target or "" for row in paired[1:] + paired[:1]], **options)
        own_mean, other_mean = (float(np.mean([x for x in xs if x is not None] or [np.nan])) for xs in (own, others))
        if not np.isnan(own_mean + other_mean):
            lines.append(
                f"  a row's own target {own_mean:.3f}, another row's {other_mean:.3f}"
                + ("" if own_mean > other_mean else "   ! the reward does not prefer a row's own target")
            )
        again, asked = time.perf_counter() - began, 2 * len(paired)
    else:
        again, asked = first, len(responses)  # nothing asked twice: the first call's start-up is in it
    each = again / asked
    lines.append(
        f"  {1000 * each:.1f} ms a call ({first:.1f} s for the first {len(responses)}, its start included): "
        f"about {_duration(each * calls)} for the {calls:,} calls of this run"
    )
    return "\n".join(lines)


def _verdict_on_spread(reward_PK: np.ndarray) -> list[str]:
    """What is learned from is the difference between responses to one prompt."""
    answered_P = (~np.isnan(reward_PK)).sum(-1)
    spread_P = np.array([np.nanstd(group) if n > 1 else np.nan for group, n in zip(reward_PK, answered_P, strict=True)])
    if np.isnan(spread_P).all():
        return ["  ! no prompt has two answers: there is nothing to compare, and nothing to learn from"]
    flat = int((spread_P == 0).sum())
    said = f"  spread within a prompt's responses {np.nanmean(spread_P):.3f} (standard deviation)"
    if flat == len(spread_P):
        return [f"{said}\n  ! every response is worth the same: there is nothing to learn from yet"]
    return [said + (f"; none for {flat} of {len(spread_P)} prompts, which teach nothing" if flat else "")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
