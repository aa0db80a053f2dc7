"""Losses and gradients that are not finite: when too many updates were skipped for them, and fit()'s way back.

One such update is skipped (`PlayerOptimizer.step`). Where every further one is, too, nothing is learned any more: the
run stops, or goes back to the newest checkpoint that was taken while all was well. Every draw is keyed by its step, so
that the same steps would end in the same numbers: after going back both learning rates are halved.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..state import RunState
from ..storage import checkpoint
from . import snapshot


def require_progress(state: RunState, gen: dict[str, Any], disc: dict[str, Any]) -> None:
    """After a step with these results: raise where a player's last `max_skipped_updates` updates were all skipped."""
    for player, skipped, optimizer in (
        ("generator", gen.get("gen_skipped"), state.generator.optimizer),
        ("discriminator", disc.get("disc_skipped"), state.discriminator.optimizer),
    ):
        if skipped and optimizer.skipped >= state.config.max_skipped_updates:
            rate = "learning_rate" if player == "generator" else "disc_learning_rate"
            raise FloatingPointError(
                f"step {state.global_step}: the {player}'s last {optimizer.skipped} updates had a loss or gradient "
                f"that is not finite, and were skipped: try a smaller {rate}, or dtype='float32', from a checkpoint "
                "before"
            )


class Rollback:
    """One call of fit()'s way back.

    Args:
        state: of the run.
        first: the step that the run began at; checkpoints up to there are its own where it went on from one.
        saved: steps of the checkpoints that the run has written, as they come.
    """

    def __init__(self, state: RunState, first: int, saved: Collection[int]) -> None:
        self.state, self.first, self.saved = state, first, saved
        self._failed: dict[int, int] = {}  # the step that failed last, by the step gone back to

    def go_back(self, failure: FloatingPointError, failed: int) -> None:
        """Load the newest good checkpoint from before the step that failed, and halve both learning rates.

        Raises:
            FloatingPointError: there is none, or the run has been there before and came no further since.
        """
        state = self.state
        optimizers = (state.generator.optimizer, state.discriminator.optimizer)
        budget = state.true_reward.budget
        scales = [optimizer.scale for optimizer in optimizers]
        counts, cached = dict(budget.counts), budget.cached
        for step in self._candidates(failed):
            try:
                snapshot.restore(state, checkpoint.find(Path(state.config.output_dir), step))
            except ValueError:  # damaged: an older one may do
                continue
            if not self._is_well():
                continue
            if failed <= self._failed.get(step, -1):
                raise FloatingPointError(
                    f"{failure}. The run went back to step {step} before, and came no further since"
                ) from failure
            self._failed[step] = failed
            budget.counts, budget.cached = counts, cached  # the calls were made
            for optimizer, scale in zip(optimizers, scales, strict=True):
                optimizer.rescale(scale / 2)
            warnings.warn(f"{failure}; back at step {step}, with both learning rates halved", stacklevel=3)
            return
        raise FloatingPointError(
            f"{failure}. There is nothing to go back to: {state.config.output_dir} has no checkpoint of this run that "
            "was taken while no update was being skipped (save_steps)"
        ) from failure

    def _is_well(self) -> bool:
        """Whether no update was being skipped when this state was saved, and its weights are finite."""
        state = self.state
        skipping = state.generator.optimizer.skipped or state.discriminator.optimizer.skipped
        weights = state.players.parameters("generator") + state.players.parameters("discriminator")
        return not skipping and all(bool(weight.isfinite().all()) for weight in weights)

    def _candidates(self, failed: int) -> Iterator[int]:
        """Steps of this run's complete checkpoints from before a step, the newest first."""
        for path in reversed(checkpoint.complete(Path(self.state.config.output_dir))):
            step = checkpoint.step_of(path)
            if step < failed and (step in self.saved or 0 < step <= self.first):
                yield step
