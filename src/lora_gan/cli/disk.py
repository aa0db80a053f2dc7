"""What a run will write, for `lora-gan train --dry_run`.

The size of a checkpoint is measured on one in memory, with the optimizers and the replay as they will be. Logs are an
estimate from the number and the length of responses.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..gan import LoraGAN
from ..run import snapshot
from ..storage import checkpoint
from .plan import times

LINE = 1500  # bytes of a line of metrics.jsonl
ANSWER = 200  # bytes of a line of answers.jsonl, or of completions.jsonl, beside its texts
CHARACTERS = 4  # of a token
MOMENTS = 800  # bytes that torch.save writes beside the numbers of AdamW's moments of one tensor


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
    """Of what is there now, and of what updates add: AdamW's two moments, and copies of a player."""
    config, parameters = gan.config, {player: gan.players.parameters(player) for player in checkpoint.PLAYERS}
    weights = {player: sum(p.nbytes for p in tensors) for player, tensors in parameters.items()}
    moments = {player: 2 * weights[player] + MOMENTS * len(tensors) for player, tensors in parameters.items()}
    added = sum(moments.values())
    if config.on_exploit == "rollback":  # the monitor keeps the best generator
        added += weights["generator"] + moments["generator"]
    if config.disc_average:
        added += weights["discriminator"]
    groups = min(config.disc_replay_groups, round(steps * config.prompts_per_step * config.query_rate))
    tokens = groups * (prompt_tokens + config.num_generations * config.max_completion_length)
    replay = 8 * (tokens + groups * (2 + 2 * config.num_generations))  # int64 ids and lengths, float64 rewards
    return checkpoint.size_of(snapshot.take(gan.state)) + added + replay
