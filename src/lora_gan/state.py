"""The state of a run: the players, both trainers, the monitor, the true reward, and counters.

`LoraGAN` holds one `RunState`. Checkpoints, recovery and callbacks receive the state instead of the `LoraGAN`.
"""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar, cast

from .config import Config, RewardSignal
from .model.players import Players
from .rewards.true_reward import TrueReward
from .training.discriminator import Discriminator
from .training.generator import Generator
from .training.health import Health
from .training.monitor import Monitor
from .wording import counted

T = TypeVar("T")


@dataclass
class RunState:
    """The current state of a run.

    Attributes:
        config: all settings.
        players: base, adapters and heads.
        generator, discriminator: the two trainers, with their optimizers.
        monitor: detects exploitation of the discriminator.
        health: gives notices about problems of the run.
        true_reward: queries the true reward, and holds the budget.
        init_adapter: the folder of the adapter that the generator started from; None: a new adapter.
        global_step: steps taken. Random draws are keyed by this number.
        position: rows that fit() has taken from its dataset, over all epochs.
        prompt_kinds: kinds of the prompts trained on: "messages", "texts".
    """

    config: Config
    players: Players
    generator: Generator
    discriminator: Discriminator
    monitor: Monitor
    health: Health
    true_reward: TrueReward
    init_adapter: str | None = None
    global_step: int = 0
    position: int = 0
    prompt_kinds: set[str] = field(default_factory=set)

    def why_over(self, signal: RewardSignal) -> str | None:
        """Why no further step can or must be taken with this reward signal; None if the run may continue."""
        budget = self.true_reward.budget
        if self.true_reward.is_over(signal):
            return self.true_reward.why_over(signal)
        if budget.left() != 0 or not self.config.audit_calls or signal == "true":
            return None
        if self.monitor.audits.has_failed:
            return "an audit failed, and only further labels can help: resume with a larger reward_budget"
        if self.monitor.audits.is_over:
            alone = self.monitor.audits.alone
            enough = f"good enough for {counted(alone, 'step')}" if alone else "not good enough for steps"
            return f"{budget.spent_setting}, and the predictions are {enough} without labels"
        if budget.left(audit=True) == 0:
            return f"{budget.spent_setting}, with those for audits"
        return None


class Carried(Generic[T]):
    """Delegates an attribute: `x = Carried[int]("state.x")` in a class reads and sets `self.state.x`."""

    def __init__(self, path: str) -> None:
        self.holder, _, self.name = path.rpartition(".")

    def __get__(self, obj: object, owner: type) -> T:
        return cast(T, getattr(attrgetter(self.holder)(obj), self.name))

    def __set__(self, obj: object, value: T) -> None:
        setattr(attrgetter(self.holder)(obj), self.name, value)
