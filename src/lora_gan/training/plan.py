"""What one step does, decided before anything is sampled. Used by `gan`."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config, RewardSignal


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        signal: what the generator's advantage is computed from.
        train_gen, train_disc: which players learn.
        imitation_weight: weight of the cross-entropy on target texts; 0 = none.
        reinforces: whether the reward teaches the generator.
        asks: whether true rewards are asked.
        predicts: whether rewards are predicted. Plain RL does not, so it costs what plain RL costs.
        straight_through: whether the generator's update differentiates the discriminator.
        learns_to_predict: whether the discriminator learns, and anything depends on its predictions. Nothing does where
            every response gets its true reward. A step that trains the discriminator alone always counts.
    """

    signal: RewardSignal
    train_gen: bool
    train_disc: bool
    imitation_weight: float
    reinforces: bool
    asks: bool
    predicts: bool
    straight_through: bool
    learns_to_predict: bool

    @property
    def samples(self) -> bool:
        """Whether the generator writes responses. A step that trains neither player writes and judges them, too."""
        return self.reinforces or self.train_disc or not self.train_gen

    @property
    def discriminator_is_first(self) -> bool:
        """Whether the discriminator learns before the generator. Straight-through differentiates it as it was when it
        predicted. Elsewhere the order makes no difference, and the predictions' graph, from which the
        discriminator learns, is then freed early."""
        return self.train_disc and not self.straight_through

    @property
    def imitates(self) -> bool:
        return self.train_gen and self.imitation_weight > 0


def plan_step(config: Config, step: int, signal: RewardSignal, *, train_gen: bool, train_disc: bool) -> StepPlan:
    """The plan of a step.

    Args:
        step: steps taken before this one; imitation warms up and decays by it.

    Raises:
        ValueError: the settings leave the generator nothing to learn from.
    """
    since = step - config.imitation_warmup_steps
    weight = config.imitation_weight or float(since < 0)
    if config.imitation_decay_steps is not None and since > 0:
        weight *= max(0.0, 1 - since / config.imitation_decay_steps)
    if train_gen and not weight and not (config.reward_weight or config.imitation_decay_steps):
        raise ValueError("reward_weight=0 and imitation_weight=0 leave the generator nothing to learn from")
    judges = train_disc or not train_gen
    straight_through = config.gradient_path == "straight_through"
    some_unasked = signal == "corrected" and (config.query_rate < 1 or config.reward_budget is not None)
    return StepPlan(
        signal=signal,
        train_gen=train_gen,
        train_disc=train_disc,
        imitation_weight=weight,
        reinforces=train_gen and since >= 0 and config.reward_weight > 0,
        asks=(judges or signal != "predicted") and config.disc_objective == "regression",
        predicts=judges or signal != "true",
        straight_through=straight_through,
        learns_to_predict=train_disc and (not train_gen or straight_through or some_unasked or signal == "predicted"),
    )
