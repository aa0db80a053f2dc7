"""What a run carries from step to step: the players, both trainers, the monitor, the true reward, and counters.

`LoraGAN` holds one `RunState`; checkpoints, saving, recovery and callbacks receive it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar, cast

from .config import Config
from .model.players import Players
from .rewards.true_reward import TrueReward
from .training.discriminator import Discriminator
from .training.generator import Generator
from .training.health import Health
from .training.monitor import Monitor

T = TypeVar("T")


@dataclass
class RunState:
    """A run as it stands.

    Attributes:
        config: every setting.
        players: base, adapters and heads.
        generator, discriminator: what trains them, with their optimizers.
        monitor: watches for a reward that is being exploited.
        health: finds what is wrong with a run and gives notices.
        true_reward: asks the true reward; holds the budget.
        init_adapter: the folder of the adapter that the generator started from.
        global_step: steps taken; every random draw is keyed by it.
        position: rows that fit() has taken of its dataset.
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


class Carried(Generic[T]):
    """Delegates an attribute: `global_step = Carried[int]("state.global_step")` reads and sets that one of `self`."""

    def __init__(self, path: str) -> None:
        self.holder, _, self.name = path.rpartition(".")

    def __get__(self, obj: object, owner: type) -> T:
        return cast(T, getattr(attrgetter(self.holder)(obj), self.name))

    def __set__(self, obj: object, value: T) -> None:
        setattr(attrgetter(self.holder)(obj), self.name, value)
