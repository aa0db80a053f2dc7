"""The state of a run: the players, both trainers, the monitor, the true reward, and counters.

`LoraGAN` holds one `RunState`. Checkpoints, recovery and callbacks receive the state instead of the `LoraGAN`.
"""

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


class Carried(Generic[T]):
    """Delegates an attribute: `x = Carried[int]("state.x")` in a class reads and sets `self.state.x`."""

    def __init__(self, path: str) -> None:
        self.holder, _, self.name = path.rpartition(".")

    def __get__(self, obj: object, owner: type) -> T:
        return cast(T, getattr(attrgetter(self.holder)(obj), self.name))

    def __set__(self, obj: object, value: T) -> None:
        setattr(attrgetter(self.holder)(obj), self.name, value)
