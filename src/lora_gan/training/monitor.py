"""The monitor: raises an alarm when the generator exploits the discriminator, and can roll the generator back.

# B = responses

- While true rewards are queried: the test in `guard`, which shows that the true reward has fallen.
- After the last label, steps on predictions alone pause for audits: a few calls that `reward_budget` has kept back.
- Without true rewards: repetition, length and KL.

`gan` calls the monitor in each step in which the generator learns from reward.
"""

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import Config
from ..storage.checkpoint import copied
from ..storage.untrusted import WHOLE
from . import distributed
from .experience import Experience
from .generator import Generator
from .guard import WINDOW, LevelTest, Reference

AUDIT_STEPS = 8  # steps on predictions alone between two audits
# An audit is due earlier if the KL is above AUDIT_KL_FACTOR · KL at the last audit + AUDIT_KL_NATS.
AUDIT_KL_FACTOR, AUDIT_KL_NATS = 2.0, 0.5
AUDIT_ERRORS = 1.64  # standard errors below the reference at which an audit fails; 5 % fail by chance at the reference


def repetition(experience: Experience) -> float:
    """Share of repeated token pairs in a response, 0 to 1, mean over responses."""
    shares = []
    for ids in experience.rollout.responses:
        pairs = list(pairwise(ids))
        shares.append(1 - len(set(pairs)) / len(pairs) if pairs else 0.0)
    return float(np.mean(shares))


@dataclass
class Audits:
    """The steps on predictions alone, and their limit.

    Attributes:
        labelled: steps with labels so far.
        limit: most steps on predictions alone. None: the labels are not spent yet.
        reserved: calls that are kept for audits.
        alone, since: steps on predictions alone, all and since the last audit.
        kl, now: KL to the reference at the last audit, and in the latest step; 0 if not measured.
        has_failed: whether the last audit failed. The generator must not continue without further labels.
    """

    labelled: int = 0
    limit: int | None = None
    reserved: int = 0
    alone: int = 0
    since: int = 0
    kl: float = 0.0
    now: float = 0.0
    has_failed: bool = False

    @property
    def is_due(self) -> bool:
        if self.limit is None or not self.since:
            return False
        has_moved = self.now > AUDIT_KL_FACTOR * self.kl + AUDIT_KL_NATS
        return has_moved or self.since >= AUDIT_STEPS or self.alone >= self.limit

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached, and the last step was audited."""
        return self.limit is not None and not self.since and self.alone >= self.limit


#: The form of Audits as a dict, for `untrusted.require`.
AUDITS: dict[str, Any] = {
    "labelled": WHOLE,
    "limit": WHOLE | None,
    "reserved": WHOLE,
    "alone": WHOLE,
    "since": WHOLE,
    "kl": float,
    "now": float,
    "has_failed": bool,
}


def audits_needed(steps: int) -> int:
    """Number of audits of this many steps on predictions alone, of which the last one is audited."""
    return math.ceil(steps / AUDIT_STEPS)


class Monitor:
    """Watches the steps of a run; keeps the generator of the best window, and of the last passed audit."""

    def __init__(self, config: Config) -> None:
        self.config = config
        # Per step: repetition, length, KL; None = not measured.
        self.window: list[list[float | None]] = []
        self.first: list[float] | None = None  # repetition and length of the first window
        self.test, self.audits = LevelTest(), Audits(reserved=config.audit_calls)
        self.kept: dict[str, Any] | None = None  # weights and optimizer of the kept generator
        self.told: list[str] = []  # kinds of active alarms; each is reported when it begins

    @property
    def rolls_back(self) -> bool:
        return self.config.exploit_action == "rollback"

    def watch(self, experience: Experience, kl: float | None, generator: Generator) -> list[str]:
        """Add one step, and return the alarms that begin with this step, as messages.

        If exploit_action is "rollback", an alarm returns the generator and its optimizer to the kept ones.

        Args:
            experience: the step's responses, sampled before its updates.
            kl: KL to the reference in nats per response; None if not measured.
            generator: the generator's trainer.
        """
        measured = _means(experience, generator.players.device)
        if measured is not None and self.test.add(measured.true, measured.predicted, generator.spread.value):
            self._keep(generator)
        length = float(experience.rollout.lengths_B.mean())
        self.window = [*self.window, [repetition(experience), length, kl]][-WINDOW:]
        if self.audits.limit is not None:
            self.audits.alone, self.audits.since = self.audits.alone + 1, self.audits.since + 1
        elif measured is not None:
            self.audits.labelled += 1
        self.audits.now = self.audits.now if kl is None else kl
        alarms = self._alarms()
        new = [message for kind, message in alarms.items() if kind not in self.told]
        self.told = list(alarms)
        if new and self.rolls_back and self.kept is not None:
            self._restore(generator)
            new = [f"{message}; the generator is back where the true reward was best" for message in new]
        return new

    def _alarms(self) -> dict[str, str]:
        """Messages by kind of alarm."""
        alarms = {}
        if self.test.reference is not None and self.test.evidence >= self.test.limit:
            alarms["fell"] = self._fall(self.test.reference)
        if len(self.window) < WINDOW:
            return alarms
        steps = np.array(self.window, dtype=np.float64)  # None becomes NaN
        repeats, length, kl = (float(np.nanmean(c)) if not np.isnan(c).all() else np.nan for c in steps.T)
        self.first = [repeats, length] if self.first is None else self.first
        if repeats > self.first[0] + 0.2:
            alarms["repetition"] = f"responses repeat themselves: {repeats:.0%} of their token pairs"
        if length > 2 * self.first[1] or length < self.first[1] / 3:
            alarms["length"] = f"the mean length of responses went from {self.first[1]:.1f} to {length:.1f} tokens"
        if self.config.kl_target is not None and kl > 3 * self.config.kl_target:
            alarms["kl"] = f"the KL to the reference is {kl:.3g} nats per response, over three times kl_target"
        return alarms

    def _fall(self, reference: Reference) -> str:
        """The alarm of the test, with its evidence."""
        true, predicted = np.mean(self.test.recent[-WINDOW // 2 :], axis=0)
        message = (
            f"the true reward fell from {reference.mean:.3g} to {true:.3g} (evidence {self.test.evidence:.0f}, the "
            f"limit is {self.test.limit:.0f})"
        )
        if predicted > reference.predicted:
            message += (
                f", while the predicted one rose from {reference.predicted:.3g} to {predicted:.3g}: the generator "
                "exploits the discriminator"
            )
        return message

    # --- audits of steps on predictions alone

    def begin_audits(self, explained: float, generator: Generator) -> None:
        """Keep the generator of the last label. From now on the generator learns from predictions alone.

        Calls that the audits will not need are no longer reserved: they become labels, and then the audits begin again.

        Args:
            explained: share of the reward's variance that the predictions explain, 0 to 1. Their part of the steps with
                labels is the limit of steps on predictions alone.
        """
        limit = round(explained * self.audits.labelled)
        needed = audits_needed(limit) * self.config.prompts_per_step
        self.audits = replace(self.audits, limit=limit, reserved=min(self.audits.reserved, needed))
        self._passed(generator)

    def end_audits(self) -> None:
        """There are labels again."""
        kept = self.audits
        self.audits = Audits(labelled=kept.labelled, reserved=kept.reserved, now=kept.now)

    def _passed(self, generator: Generator) -> None:
        self.audits.since, self.audits.kl = 0, self.audits.now
        self._keep(generator)

    def audit(self, experience: Experience, generator: Generator) -> str | None:
        """Judge the current generator by an audit's true rewards. It must not have learned from the step yet.

        Returns:
            None if the audit is passed: the generator is kept. Otherwise a message, and the generator is back at the
            kept one.
        """
        measured = _means(experience, generator.players.device)
        if measured is None:  # no call was answered
            return None
        level, spread = self.test.level, generator.spread.value or 0.0
        size = self.config.num_generations
        error = ((self.test.spread**2 + spread**2 * (1 - 1 / size)) / measured.answers) ** 0.5
        if level is None or measured.true >= level - AUDIT_ERRORS * error:
            self._passed(generator)
            return None
        self.audits.has_failed = True
        message = (
            f"an audit failed: {measured.answers} responses have a mean true reward of {measured.true:.3g}, and it "
            f"must be at least {level:.3g} with a tolerance of {AUDIT_ERRORS * error:.2g}"
        )
        if self.rolls_back and self.kept is not None:
            self._restore(generator)
            message += "; the generator is back at the last audit"
        return message

    # --- the kept generator

    def _keep(self, generator: Generator) -> None:
        if self.rolls_back:
            weights = generator.players.parameters("generator")
            self.kept = copied({"weights": weights, "optimizer": generator.optimizer.state_dict()})

    def _restore(self, generator: Generator) -> None:
        assert self.kept is not None
        with torch.no_grad():
            for parameter, kept in zip(generator.players.parameters("generator"), self.kept["weights"], strict=True):
                parameter.copy_(kept)
        scale = generator.optimizer.scale
        generator.optimizer.restart(copied(self.kept["optimizer"]))
        generator.optimizer.rescale(scale)  # a learning rate that recovery has lowered stays low
        self.window, self.told = [], []
        self.test.restart()

    # --- the state in checkpoints

    def state_dict(self) -> dict[str, Any]:
        plain = {name: copied(getattr(self, name)) for name in ("window", "first", "kept", "told")}
        return plain | {"test": asdict(self.test), "audits": asdict(self.audits)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("window", "first", "kept", "told"):
            setattr(self, name, state[name])
        self.test, self.audits = LevelTest.from_dict(state["test"]), Audits(**state["audits"])


class Measured(NamedTuple):
    """Mean true and predicted reward of a step's answered responses, and their number."""

    true: float
    predicted: float
    answers: int


def _means(experience: Experience, device: torch.device) -> Measured | None:
    """Over all processes; None if nothing was answered. Plain RL predicts nothing: there it is the true reward."""
    answered_B = np.isfinite(experience.true_B)
    true_B = experience.true_B[answered_B]
    predicted_B = experience.compared_MB.mean(0)[answered_B]
    predicted_B = np.where(np.isfinite(predicted_B), predicted_B, true_B)
    sums = torch.tensor([true_B.sum(), predicted_B.sum(), len(true_B)], dtype=torch.float64, device=device)
    true, predicted, count = distributed.total(sums).tolist()
    return Measured(true / count, predicted / count, int(count)) if count else None
