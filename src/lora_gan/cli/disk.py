"""What a run will write, for `lora-gan train --dry_run`.

The size of a checkpoint is measured on one in memory, with the optimizers and the replay as they will be. Logs are an
estimate from the number and the length of responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config
from ..run import snapshot
from ..storage import checkpoint
from .plan import times

if TYPE_CHECKING:
    from ..gan import LoraGAN

LINE = 1500  # bytes of a line of metrics.jsonl
ANSWER = 200  # bytes of a line of answers.jsonl, or of completions.jsonl, beside its texts
CHARACTERS = 4  # of a token


@dataclass(frozen=True)
class Disk:
    """Bytes and checkpoints of a run.

    Attributes:
        saved: checkpoints that fit() writes.
        kept: of these, how many are there at the end.
        each: bytes of one checkpoint.
        logs: bytes of metrics.jsonl, completions.jsonl and answers.jsonl, about.
    """

    saved: int
    kept: int
    each: int
    logs: int

    @property
    def total(self) -> int:
        """Bytes at the end of the run; while a checkpoint is saved, there is one more."""
        return self.kept * self.each + self.logs


def needed(gan: LoraGAN, *, steps: int, prompt_tokens: int, calls: int) -> Disk:
    """What so many further steps write.

    Args:
        gan: whose settings and adapters are meant.
        steps: further steps.
        prompt_tokens: of a typical prompt.
        calls: true rewards that are asked for.
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
        logs += (ANSWER + texts + CHARACTERS * prompt_tokens) * sampled * written(config, gan.global_step, steps)
    return Disk(saved, kept, _checkpoint_bytes(gan, steps, prompt_tokens), logs)


def written(config: Config, first: int, steps: int) -> int:
    """Of so many steps after step `first`, those whose responses completions.jsonl gets."""
    every = config.log_completions_steps
    return times(every, first, steps) + (steps > 1 and (first + 1) % every > 0)


def _checkpoint_bytes(gan: LoraGAN, steps: int, prompt_tokens: int) -> int:
    config, content = gan.config, snapshot.take(gan.state)
    for player in checkpoint.PLAYERS:
        parameters = gan.players.parameters(player)
        moments = {
            i: {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for i, p in enumerate(parameters)
        }
        content[f"{player}/optimizer.pt"]["optimizer"]["state"] = moments
        if player == "generator" and config.on_exploit == "rollback":  # the monitor keeps the best generator
            kept: dict[str, Any] = {"weights": parameters, "optimizer": content["generator/optimizer.pt"]}
            content["generator/monitor"]["kept"] = checkpoint.copied(kept)
    if config.disc_average:  # made with the first update
        average = checkpoint.copied(gan.players.parameters("discriminator"))
        content["discriminator/state"]["average"] = average
    groups = min(config.disc_replay_groups, round(steps * config.prompts_per_step * config.query_rate))
    tokens = groups * (prompt_tokens + config.num_generations * config.max_completion_length)
    replay = 8 * (tokens + groups * (2 + 2 * config.num_generations))  # int64 ids and lengths, float64 rewards
    return replay + checkpoint.size_of(content)
