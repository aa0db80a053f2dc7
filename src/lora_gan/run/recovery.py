"""Recovery from losses and gradients that are not finite.

`PlayerOptimizer.step` skips an update with such a loss or gradient. If all further updates are skipped, too, the player
no longer learns. The run then stops, or returns to the newest checkpoint that was saved while no update was skipped.
Every random draw is keyed by its step, so the repeated steps would give the same numbers. Both learning rates are
therefore halved after the return.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..state import RunState
from ..storage import checkpoint
from . import snapshot

#: Consecutive skipped updates of a player after which the run stops or goes back. One bad batch causes one or a few.
#: Ten in a row mean that the weights are at fault: they do not change while updates are skipped.
MOST_SKIPPED = 10


def require_progress(state: RunState, gen: dict[str, Any], disc: dict[str, Any]) -> None:
    """Check that both players still learn, after a step with these results.

    Raises:
        FloatingPointError: a player's last `MOST_SKIPPED` updates were all skipped.
    """
    for player, skipped, optimizer in (
        ("generator", gen.get("gen_skipped"), state.generator.optimizer),
        ("discriminator", disc.get("disc_skipped"), state.discriminator.optimizer),
    ):
        if skipped and optimizer.skipped >= MOST_SKIPPED:
            rate = "learning_rate" if player == "generator" else "disc_learning_rate"
            raise FloatingPointError(
                f"step {state.global_step}: the {player}'s last {optimizer.skipped} updates had a loss or gradient "
                f"that is not finite, and were skipped: try a smaller {rate}, or dtype='float32', from an earlier "
                "checkpoint"
            )


class Rollback:
    """Returns one call of fit() to an earlier checkpoint.

    Args:
        state: the state of the run.
        first: the step at which this call of fit() began. Checkpoints up to this step belong to the run if it resumed
            from one.
        saved: steps of the checkpoints that this call has written; the caller adds to it.
    """

    def __init__(self, state: RunState, first: int, saved: Collection[int]) -> None:
        self.state, self.first, self.saved = state, first, saved
        self._failed: dict[int, int] = {}  # step of a checkpoint -> the step that failed after the last return to it

    def go_back(self, failure: FloatingPointError, failed: int) -> None:
        """Load the newest good checkpoint from before the step that failed, and halve both learning rates.

        Raises:
            FloatingPointError: there is no such checkpoint, or the run returned to it before and failed at the same
                step or earlier.
        """
        state = self.state
        optimizers = (state.generator.optimizer, state.discriminator.optimizer)
        budget = state.true_reward.budget
        scales = [optimizer.scale for optimizer in optimizers]
        counts, cached = dict(budget.counts), budget.cached
        for step in self._candidates(failed):
            try:
                snapshot.restore(state, checkpoint.find(Path(state.config.output_dir), step))
            except ValueError:  # damaged: try an older one
                continue
            if not self._is_healthy():
                continue
            if failed <= self._failed.get(step, -1):
                raise FloatingPointError(
                    f"{failure}. The run went back to step {step} before, and came no further since"
                ) from failure
            self._failed[step] = failed
            budget.counts, budget.cached = counts, cached  # the calls after the checkpoint were made
            for optimizer, scale in zip(optimizers, scales, strict=True):
                optimizer.rescale(scale / 2)
            warnings.warn(f"{failure}; back at step {step}, with both learning rates halved", stacklevel=3)
            return
        raise FloatingPointError(
            f"{failure}. There is nothing to go back to: {state.config.output_dir} has no checkpoint of this run that "
            "was saved while no update was skipped. A smaller save_steps saves more often"
        ) from failure

    def _is_healthy(self) -> bool:
        """Whether no update was skipped just before this state was saved, and its weights are finite."""
        state = self.state
        skipping = state.generator.optimizer.skipped or state.discriminator.optimizer.skipped
        weights = state.players.parameters("generator") + state.players.parameters("discriminator")
        return not skipping and all(bool(weight.isfinite().all()) for weight in weights)

    def _candidates(self, failed: int) -> Iterator[int]:
        """Steps of this run's complete checkpoints from before the step `failed`, newest first."""
        for path in reversed(checkpoint.complete(Path(self.state.config.output_dir))):
            step = checkpoint.step_of(path)
            if step < failed and (step in self.saved or 0 < step <= self.first):
                yield step
