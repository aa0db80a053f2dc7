"""Notices: what is wrong with a run and can still be mended, each said once, with the figure and the setting to change.

`LoraGAN` feeds every step's record to `Health.watch`; what it returns is warned of and stands in metrics.jsonl. The
monitor is something else: it looks for exploitation of the discriminator, and can stop a run or take it back.

Every threshold is a constant with its reason. A healthy run of `tiny` sets off none (tests/training/test_health.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from itertools import takewhile
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, get_args

from ..config import Config
from ..storage.untrusted import WHOLE

#: Steps in a row, and responses in these, before anything is said of rewards or responses. Three steps are early enough
#: to stop a run; 16 responses keep small steps from being judged on chance: two equal answers of two happen often.
STEPS, RESPONSES = 3, 16

#: Steps that are kept. More than a rule looks at, since not every step asks for true rewards.
RECENT = 40

#: Share of responses that are cut, or empty, from which on it is said: then that is what most of a step looks like.
SHARE = 0.5

#: Steps at the beginning, and now, over which reward and KL are compared.
KL_STEPS = 10

#: Standard errors by which the cost of the KL must exceed the gain in reward.
KL_ERRORS = 3.0

#: Nats a response below which the KL is never said to run away: healthy runs of `tiny` reach 2.
KL_LEAST = 5.0

#: Nats a token from which on a KL that rises is said to run away. At 2 the base gives a token a seventh of the
#: probability that the generator gives it. A generator that always writes the base's own most likely text stays below:
#: language models of today leave about 1 nat to a token of such a text.
KL_PER_TOKEN = 2.0

#: Labels that the discriminator learns from before its correlation counts: on a real base 64 labels gave 0.2.
DISC_LABELS = 64

#: Steps whose correlation is averaged, at least.
DISC_LEAST = 10

#: The fresh correlation within groups of a discriminator that is of use: on a real base 128 labels gave 0.35 to 0.45.
#: No better than chance is said only where the mean is within 2 standard errors of 0 and 4 standard errors below this,
#: so that a run with few labels, whose mean says little, is left alone. The mean is looked at in every step: with 4 a
#: discriminator at 0.3 was never called so in 20 runs of 120 steps with 8 answers, with 3 and a window in 3 of them.
DISC_USEFUL = 0.3
DISC_ABOVE_CHANCE, DISC_BELOW_USEFUL = 2.0, 4.0

Kind = Literal["clipped", "empty", "equal responses", "equal rewards", "kl", "chance"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Seen(NamedTuple):
    """What is kept of a step."""

    responses: int
    cut: float  # how many responses were cut
    empty: int
    equal_in_groups: bool  # whether the responses of every group are the same text
    equal_in_step: bool
    answers: int  # true rewards that were measured
    equal_rewards: bool  # whether they are equal in every group
    reward: float | None  # their mean
    spread: float  # their standard deviation over the step
    kl: float | None  # nats a response
    kl_per_token: float


class Health:
    """The last steps of a run, as far as the rules need them, as plain numbers: a checkpoint holds them as JSON."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.told: list[Kind] = []  # kinds of notices that were given
        self.labels = 0  # answers that the discriminator has learned from
        self.earlier = [0, 0.0]  # steps with a spread of rewards within groups, and the sum of their mean rewards
        # Fresh rank correlation within groups, of the steps after DISC_LABELS: how many, their sum, and of squares.
        self.correlation = [0, 0.0, 0.0]
        self.first: deque[Seen] = deque(maxlen=KL_STEPS)  # the first steps with a KL
        self.recent: deque[Seen] = deque(maxlen=RECENT)

    def watch(self, record: Mapping[str, Any], *, learns_to_predict: bool) -> list[str]:
        """Take in a step; what is to be said of the run now, a line each.

        Args:
            record: what the step returns (`tracking.step_record`).
            learns_to_predict: whether the discriminator learned in this step, and its prediction is used.
        """
        groups = _groups(record.get("responses"))
        if not groups:
            return []
        step = _seen(record, groups)
        self.recent.append(step)
        if step.kl is not None and len(self.first) < KL_STEPS:
            self.first.append(step)
        if step.answers and step.reward is not None and not step.equal_rewards:
            self.earlier = [self.earlier[0] + 1, self.earlier[1] + step.reward]
        if learns_to_predict:
            self._take_correlation(record, step)
        rules = (self._clipped, self._empty, self._equal_responses, self._equal_rewards, self._kl, self._chance)
        new = {kind: rule() for kind, rule in zip(KINDS, rules, strict=True) if kind not in self.told}
        found = {kind: words for kind, words in new.items() if words}
        self.told += found
        return list(found.values())

    def _take_correlation(self, record: Mapping[str, Any], step: Seen) -> None:
        value, equal = record.get("rank_correlation_within"), record.get("frac_reward_zero_std")
        # Where rewards are equal in most groups, little is left to rank: a run that is done looks like that.
        if self.labels >= DISC_LABELS and value is not None and (equal or 0.0) <= 0.5:
            count, total, squares = self.correlation
            self.correlation = [count + 1, total + value, squares + value**2]
        self.labels += step.answers

    # --- the rules: words, or None

    def _share(self, of: Callable[[Seen], float]) -> tuple[float, int]:
        """The share of the last responses that are cut or empty, and over how many steps; 0 where too few."""
        steps = list(self.recent)
        last = next((steps[-n:] for n in range(1, len(steps) + 1) if _is_enough(steps[-n:])), [])
        return (sum(map(of, last)) / sum(step.responses for step in last) if last else 0.0), len(last)

    def _streak(self, holds: Callable[[Seen], bool], *, asked: bool = False) -> list[Seen]:
        """The last steps in a row for which something holds; empty where these are too few to say so.

        Args:
            asked: leave out steps without answers, and count answers in place of responses.
        """
        steps = (
            [step._replace(responses=step.answers) for step in self.recent if step.answers] if asked else self.recent
        )
        streak = list(takewhile(holds, reversed(steps)))
        return streak if _is_enough(streak) else []

    def _clipped(self) -> str | None:
        share, steps = self._share(lambda step: step.cut)
        if share < SHARE:
            return None
        return (
            f"{share:.0%} of the responses of the last {steps} steps were cut at max_completion_length="
            f"{self.config.max_completion_length}, so their reward is that of unfinished texts: raise "
            "max_completion_length, or ask for shorter answers in the prompts"
        )

    def _empty(self) -> str | None:
        share, steps = self._share(lambda step: step.empty)
        if share < SHARE:
            return None
        chat = {None: "not set", True: "now True", False: "now False"}[self.config.apply_chat_template]
        return (
            f"{share:.0%} of the responses of the last {steps} steps were empty: check the prompts and "
            f"apply_chat_template ({chat}); if responses became empty in training, {self._hold_back}"
        )

    def _equal_responses(self) -> str | None:
        """Equal over the step, or within groups: there the reward must not have risen, or the run may just be done."""
        streak = self._streak(lambda step: step.equal_in_step)
        where = "all responses of a step were the same text, whatever the prompt,"
        if not streak:
            streak, where = self._equal_in_groups(), "all responses to a prompt were the same text"
            if self._has_risen(streak):
                return None
        if not streak or self._is_mostly_empty():  # empty ones are equal, too
            return None
        return (
            f"{where} in the last {len(streak)} steps, so there is nothing to compare: raise temperature (now "
            f"{self.config.temperature:g}) or entropy_weight (now {self.config.entropy_weight:g}); if responses became "
            f"equal in training, {self._hold_back}"
        )

    def _equal_rewards(self) -> str | None:
        """Neither because responses are equal, nor because the run is done."""
        streak = self._streak(lambda step: step.equal_rewards, asked=True)
        if not streak or self._equal_in_groups() or self._is_mostly_empty() or self._has_risen(streak):
            return None
        steps, responses = len(streak), sum(step.responses for step in streak)
        ends = [(step.reward or 0.0) + sign * step.spread for step in streak for sign in (-1, 1)]
        if _is_zero(max(ends) - min(ends), max(ends)):
            said = f"the true reward was {max(ends):.4g} for all {responses} responses of the last {steps} steps"
            check = "check what the reward returns for different responses; "
        else:
            said = f"the true reward was equal within every group of the last {steps} steps ({responses} responses)"
            check = ""
        return (
            f"{said}, so it teaches nothing: {check}use a reward with finer levels, or raise num_generations "
            f"(now {self.config.num_generations}) or temperature (now {self.config.temperature:g})"
        )

    def _is_mostly_empty(self) -> bool:
        return self._share(lambda step: step.empty)[0] >= SHARE

    def _equal_in_groups(self) -> list[Seen]:
        return self._streak(lambda step: step.equal_in_groups)

    def _has_risen(self, streak: list[Seen]) -> bool:
        """Whether the streak's rewards lie above those of the steps that taught something."""
        rewards = [step.reward for step in streak if step.reward is not None]
        steps, total = self.earlier
        return bool(steps and rewards) and fmean(rewards) > total / steps

    def _kl(self) -> str | None:
        steps = [step for step in self.recent if step.kl is not None]
        if self.config.kl_target is not None or len(steps) < 6:  # kl_target steers it, and the monitor has an alarm
            return None
        kl, before, now = _mean_kl(steps[-3:]), *([step.kl_per_token for step in steps[-n:][:3]] for n in (6, 3))
        if fmean(now) >= KL_PER_TOKEN and fmean(now) > fmean(before) and kl >= KL_LEAST:
            return (
                f"the KL to the reference is {kl:.3g} nats a response ({fmean(now):.2g} a token) and rises: responses "
                f"leave what the reference would write; {self._hold_back}"
            )
        last = steps[-KL_STEPS:]
        rewards = [[step.reward for step in part if step.reward is not None] for part in (self.first, last)]
        if len(steps) < 2 * KL_STEPS or min(map(len, rewards)) < KL_STEPS // 2:
            return None
        kl = _mean_kl(last)
        cost = self.config.beta * (kl - _mean_kl(self.first))
        gain = fmean(rewards[1]) - fmean(rewards[0])
        error = math.hypot(*(stdev(known) / math.sqrt(len(known)) for known in rewards))
        spread = fmean(step.spread for step in last)
        if kl < KL_LEAST or cost <= spread or cost <= max(gain, 0.0) + KL_ERRORS * error:
            return None
        return (
            f"the KL to the reference, {kl:.3g} nats a response, costs more than the reward has gained: beta·KL rose "
            f"by {cost:.3g} since the first {KL_STEPS} steps, the reward by {gain:.3g}; {self._hold_back}"
        )

    def _chance(self) -> str | None:
        count, total, squares = self.correlation
        if count < DISC_LEAST:
            return None
        mean = total / count
        error = math.sqrt(max(0.0, squares / count - mean**2) / (count - 1))
        if mean > DISC_ABOVE_CHANCE * error or mean + DISC_BELOW_USEFUL * error >= DISC_USEFUL:
            return None
        config = self.config
        return (
            f"the discriminator is no better than chance: rank_correlation_within is {mean:.2f} ± {error:.2f} over "
            f"{count} steps, after {self.labels:,} labels, so its predictions only add noise: raise query_rate "
            f"(now {config.query_rate:g}), num_generations (now {config.num_generations}) or disc_updates (now "
            f"{config.disc_updates}), or set gate_correlation (now {config.gate_correlation:g}) to leave such "
            "predictions out"
        )

    @property
    def _hold_back(self) -> str:
        config = self.config
        return f"raise beta (now {config.beta:g}), set kl_target, or lower learning_rate (now {config.learning_rate:g})"

    # --- what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        plain = {name: copy(getattr(self, name)) for name in ("told", "labels", "earlier", "correlation")}
        return plain | {name: [list(step) for step in getattr(self, name)] for name in ("first", "recent")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict()."""
        self.told, self.labels = list(state["told"]), state["labels"]
        self.earlier, self.correlation = list(state["earlier"]), list(state["correlation"])
        self.first = deque(map(Seen._make, state["first"]), maxlen=KL_STEPS)
        self.recent = deque(map(Seen._make, state["recent"]), maxlen=RECENT)


#: What a state_dict() holds, in the form that `untrusted.require` takes.
SHAPE: dict[str, Any] = {
    "told": [Kind],
    "labels": WHOLE,
    "earlier": (float, float),
    "correlation": (float, float, float),
    "first": [Seen],
    "recent": [Seen],
}


def _seen(record: Mapping[str, Any], groups: list[list[str]]) -> Seen:
    texts = [text for group in groups for text in group]
    compared = [group for group in groups if len(group) > 1]
    reward, spread = _finite(record, "reward_mean"), _finite(record, "reward_std") or 0.0
    share, kl, length = (record.get(name) for name in ("frac_reward_zero_std", "kl", "completion_length"))
    return Seen(
        responses=len(texts),
        cut=(record.get("completions/clipped_ratio") or 0.0) * len(texts),
        empty=sum(not text.strip() for text in texts),
        equal_in_groups=bool(compared) and all(len(set(group)) == 1 for group in compared),
        equal_in_step=len(groups) > 1 and len(set(texts)) == 1,
        answers=0 if reward is None else max(0, (record.get("asked") or 0) - (record.get("unanswered") or 0)),
        # Without a group of two answers only equality over the step can show.
        equal_rewards=_is_zero(spread, reward or 0.0) if share is None else share == 1,
        reward=reward,
        spread=spread,
        kl=kl,
        kl_per_token=kl / length if kl and length else 0.0,
    )


def _groups(responses: Any) -> list[list[str]]:
    """A record's responses by prompt; one prompt alone has no list around its own."""
    if not responses:
        return []
    if isinstance(responses[0], str):
        return [list(responses)]
    return [list(group) for group in responses if group]


def _finite(record: Mapping[str, Any], name: str) -> float | None:
    """A number of the record; None where it was not measured or is not finite."""
    value = record.get(name)
    return value if value is not None and math.isfinite(value) else None


def _is_enough(steps: Sequence[Seen]) -> bool:
    return len(steps) >= STEPS and sum(step.responses for step in steps) >= RESPONSES


def _mean_kl(steps: Iterable[Seen]) -> float:
    return fmean(step.kl for step in steps if step.kl is not None)


def _is_zero(difference: float, size: float) -> bool:
    """Whether values of this size that differ so much are equal but for rounding."""
    return difference <= 1e-6 * max(1.0, abs(size))


#: The state before the first step; checkpoints of earlier versions have none.
EMPTY: dict[str, Any] = Health(Config()).state_dict()
