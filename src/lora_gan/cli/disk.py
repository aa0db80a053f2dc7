"""Estimates the disk space of a run, for `lora-gan train --dry_run`.

The size of a checkpoint is measured on a checkpoint in memory, plus the computed sizes of the moments and the replay
that later steps add. The size of the logs is estimated from the number and the length of responses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..gan import LoraGAN
from ..run import snapshot
from ..storage import checkpoint
from .plan import times

LINE = 1500  # bytes of a line of metrics.jsonl
ANSWER = 200  # bytes of a line of answers.jsonl or completions.jsonl, without its texts
CHARACTERS = 4  # per token
MOMENTS = 800  # bytes of torch.save's overhead for AdamW's moments of one tensor


@dataclass(frozen=True)
class Disk:
    """Bytes and checkpoints of a run.

    Attributes:
        saved: number of checkpoints that fit() writes.
        kept: number of these checkpoints at the end of the run.
        each: bytes of one checkpoint.
        logs: estimated bytes of metrics.jsonl, completions.jsonl and answers.jsonl.
    """

    saved: int
    kept: int
    each: int
    logs: int

    @property
    def total(self) -> int:
        """Bytes at the end of the run. During a save there is one more checkpoint."""
        return self.kept * self.each + self.logs


def needed(gan: LoraGAN, *, steps: int, prompt_tokens: int, calls: int) -> Disk:
    """The disk space of `steps` further steps.

    Args:
        gan: the run, with its settings and adapters.
        steps: number of further steps.
        prompt_tokens: tokens of a typical prompt.
        calls: number of true-reward calls.
    """
    config = gan.config
    saved = times(config.save_steps, gan.global_step, steps)
    kept = saved
    if config.save_total_limit is not None:
        kept = min(saved, config.save_total_limit + (1 if config.save_best else 0))
    texts = CHARACTERS * config.max_completion_length
    sampled = config.prompts_per_step * config.num_generations
    logs = LINE * (steps // config.logging_steps) + (ANSWER + texts) * calls
    if config.log_completions:
        logs += (ANSWER + texts + CHARACTERS * prompt_tokens) * sampled * steps
    return Disk(saved, kept, _checkpoint_bytes(gan, steps, prompt_tokens), logs)


def _checkpoint_bytes(gan: LoraGAN, steps: int, prompt_tokens: int) -> int:
    """Bytes of the current state, of AdamW's two moments, and of the copies of a player that updates add."""
    config, parameters = gan.config, {player: gan.players.parameters(player) for player in checkpoint.PLAYERS}
    weights = {player: sum(p.nbytes for p in tensors) for player, tensors in parameters.items()}
    moments = {player: 2 * weights[player] + MOMENTS * len(tensors) for player, tensors in parameters.items()}
    added = sum(moments.values())
    if config.exploit_action == "rollback":  # the monitor keeps the best generator
        added += weights["generator"] + moments["generator"]
    groups = min(config.disc_replay_groups, round(steps * config.prompts_per_step * config.asked_share))
    tokens = groups * (prompt_tokens + config.num_generations * config.max_completion_length)
    replay = 8 * (tokens + groups * (2 + 2 * config.num_generations))  # int64 ids and lengths, float64 rewards
    return checkpoint.size_of(snapshot.take(gan.state)) + added + replay
