"""The plan of one step: who learns, and from which signal. `gan` makes it before it samples responses."""

from dataclasses import dataclass

from ..config import Config, RewardSignal


@dataclass(frozen=True)
class StepPlan:
    """The plan of one step.

    Attributes:
        signal: the reward from which the generator's advantage is computed.
        train_gen, train_disc: whether each player learns.
        imitation_weight: weight of the cross-entropy on target texts. 0: no imitation.
        reinforces: whether the generator learns from the reward.
        asks: whether true rewards are queried.
        predicts: whether the discriminator predicts rewards. False for plain RL, which then costs nothing extra.
        straight_through: whether the generator's update differentiates the discriminator.
        learns_to_predict: whether the discriminator learns and its predictions matter. They do not matter if every
            response gets its true reward. They always matter in a step that trains the discriminator alone.
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
        """Whether the generator samples responses. A step that trains neither player also samples and scores them."""
        return self.reinforces or self.train_disc or not self.train_gen

    @property
    def discriminator_is_first(self) -> bool:
        """Whether the discriminator learns before the generator.

        Straight-through needs the discriminator that made the predictions, so there the generator learns first.
        Otherwise the order does not matter, and this order frees the graph of the predictions early.
        """
        return self.train_disc and not self.straight_through

    @property
    def imitates(self) -> bool:
        return self.train_gen and self.imitation_weight > 0


def plan_step(config: Config, step: int, signal: RewardSignal, *, train_gen: bool, train_disc: bool) -> StepPlan:
    """Return the plan of a step.

    Args:
        step: number of steps taken before this one. The warm-up of imitation depends on it.

    Raises:
        ValueError: the settings leave the generator nothing to learn from.
    """
    since_warmup = step - config.imitation_warmup_steps
    weight = config.imitation_weight or float(since_warmup < 0)
    if train_gen and not weight and not config.reward_weight:
        raise ValueError(
            "reward_weight=0 and imitation_weight=0 leave the generator nothing to learn from: set one above 0"
        )
    judges = train_disc or not train_gen
    straight_through = config.gradient_path == "straight_through"
    some_unasked = signal in ("corrected", "mixed") and (config.asked_share < 1 or config.reward_budget is not None)
    return StepPlan(
        signal=signal,
        train_gen=train_gen,
        train_disc=train_disc,
        imitation_weight=weight,
        reinforces=train_gen and since_warmup >= 0 and config.reward_weight > 0,
        asks=(judges or signal != "predicted") and config.disc_objective == "regression",
        predicts=judges or signal != "true",
        straight_through=straight_through,
        learns_to_predict=train_disc and (not train_gen or straight_through or some_unasked or signal == "predicted"),
    )
