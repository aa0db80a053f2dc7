"""Notices about problems of a run. Each notice is given once, with the measured value and the setting to change.

`LoraGAN` passes every step's record to `Health.watch`, warns with the returned notices and writes them to
metrics.jsonl. The monitor is separate: it detects exploitation of the discriminator, and can stop or roll back a run.

Each threshold is a constant with its reason. A healthy run of `tiny` gets no notice (tests/training/test_health.py).
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from itertools import takewhile
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple, get_args

from ..config import Config
from ..storage.untrusted import WHOLE

#: Consecutive steps, and responses in these steps, before a notice about rewards or responses. Three steps are early
#: enough to stop a run. With fewer than 16 responses, equal answers often happen by chance.
STEPS, RESPONSES = 3, 16

#: Steps that are kept. A rule needs fewer, but some steps query no true rewards.
RECENT = 40

#: Least share of truncated or empty responses for a notice: at 0.5 they are the majority.
SHARE = 0.5

#: Steps at the beginning of the run, and latest steps, between which reward and KL are compared.
KL_STEPS = 10

#: Number of standard errors by which the cost of the KL must exceed the gain in reward.
KL_ERRORS = 3.0

#: Least KL for a notice, in nats per response. Healthy runs of `tiny` reach 2.
KL_LEAST = 5.0

#: Least KL per token, in nats, for a notice about a rising KL. At 2 a token is about seven times as probable under the
#: generator as under the base. A generator that always writes the base's most likely text stays below this limit:
#: with current language models the KL of such a text is about 1 nat per token.
KL_PER_TOKEN = 2.0

#: Labels that the discriminator learns from before its correlation counts. On a real base 64 labels gave 0.2.
DISC_LABELS = 64

#: Least number of steps over which the correlation is averaged.
DISC_LEAST = 10

#: Fresh rank correlation within groups of a useful discriminator. On a real base 128 labels gave 0.35 to 0.45. The
#: notice "no better than chance" needs a mean within 2 standard errors of 0, and 4 standard errors below this value. So
#: a run with few labels and an uncertain mean gets no notice. The rule is checked in every step. In 20 runs of 120
#: steps with 8 answers, a discriminator at 0.3 never got this notice with a limit of 4. With a limit of 3 and a window
#: of steps, 3 runs got the notice.
DISC_USEFUL = 0.3
DISC_ABOVE_CHANCE, DISC_BELOW_USEFUL = 2.0, 4.0

Kind = Literal["clipped", "empty", "equal responses", "equal rewards", "kl", "chance"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class StepSummary(NamedTuple):
    """The figures of one step that the rules use. Checkpoints hold them as lists in this order."""

    responses: int
    cut: float  # truncated responses
    empty: int  # responses without text
    equal_in_groups: bool  # whether all responses to a prompt are the same text, for every prompt
    equal_in_step: bool  # whether all responses of the step are the same text
    answers: int  # known true rewards
    equal_rewards: bool  # whether the true rewards are equal within every group
    reward: float | None  # mean true reward
    spread: float  # standard deviation of the true rewards over the step
    kl: float | None  # nats per response
    kl_per_token: float


class Health:
    """Applies the rules to the last steps of a run. The state is plain numbers, which checkpoints hold as JSON."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.told: list[Kind] = []  # kinds of the notices given so far
        self.unit = 1.0  # of beta in this step, in reward units
        self.labels = 0  # true rewards that the discriminator has learned from
        self.earlier = [0, 0.0]  # number of steps with different rewards within groups, and the sum of their means
        # Fresh rank correlation within groups after DISC_LABELS: number of steps, sum, and sum of squares.
        self.correlation = [0, 0.0, 0.0]
        self.first: deque[StepSummary] = deque(maxlen=KL_STEPS)  # the first steps with a KL
        self.recent: deque[StepSummary] = deque(maxlen=RECENT)

    def watch(self, record: Mapping[str, Any], *, learns_to_predict: bool) -> list[str]:
        """Add one step, and return the new notices.

        Args:
            record: the record of the step (`tracking.step_record`).
            learns_to_predict: whether the discriminator learned in this step, and its predictions matter.
        """
        groups = _groups(record.get("responses"))
        if not groups:
            return []
        step = _summary(record, groups)
        self.unit = _finite(record, "reward_spread") or 1.0
        self.recent.append(step)
        if step.kl is not None and len(self.first) < KL_STEPS:
            self.first.append(step)
        if step.answers and step.reward is not None and not step.equal_rewards:
            self.earlier = [self.earlier[0] + 1, self.earlier[1] + step.reward]
        if learns_to_predict:
            self._add_correlation(record, step)
        rules = (self._clipped, self._empty, self._equal_responses, self._equal_rewards, self._kl, self._chance)
        notices = {kind: rule() for kind, rule in zip(KINDS, rules, strict=True) if kind not in self.told}
        new = {kind: notice for kind, notice in notices.items() if notice}
        self.told += new
        return list(new.values())

    def _add_correlation(self, record: Mapping[str, Any], step: StepSummary) -> None:
        value, equal = record.get("rank_correlation_within"), record.get("frac_reward_zero_std")
        # With equal rewards in most groups, as at the end of a successful run, few responses remain to be ranked.
        if self.labels >= DISC_LABELS and value is not None and (equal or 0.0) <= 0.5:
            count, total, squares = self.correlation
            self.correlation = [count + 1, total + value, squares + value**2]
        self.labels += step.answers

    # --- the rules: each returns a notice, or None

    def _share(self, count: Callable[[StepSummary], float]) -> tuple[float, int]:
        """The share of the last responses that `count` counts, and the number of steps; 0.0 and 0 if too few steps."""
        steps = list(self.recent)
        last = next((steps[-n:] for n in range(1, len(steps) + 1) if _is_enough(steps[-n:])), [])
        return (sum(map(count, last)) / sum(step.responses for step in last) if last else 0.0), len(last)

    def _streak(self, holds: Callable[[StepSummary], bool], *, asked: bool = False) -> list[StepSummary]:
        """The latest consecutive steps for which `holds` is true; empty if these are too few for a notice.

        Args:
            asked: skip steps without true rewards, and count true rewards instead of responses.
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
            f"{self.config.max_completion_length}, so the reward judges unfinished texts: raise "
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
        """Equal responses over the step, or within groups. Within groups the reward must not have risen: equal
        responses with a high reward end a successful run."""
        streak = self._streak(lambda step: step.equal_in_step)
        where = "all responses of a step were the same text, whatever the prompt,"
        if not streak:
            streak, where = self._equal_in_groups(), "all responses to a prompt were the same text"
            if self._has_risen(streak):
                return None
        if not streak or self._is_mostly_empty():  # empty responses are equal, too, and have their own notice
            return None
        return (
            f"{where} in the last {len(streak)} steps, so there is nothing to compare: raise temperature (now "
            f"{self.config.temperature:g}); if responses became equal in training, {self._hold_back}"
        )

    def _equal_rewards(self) -> str | None:
        """Equal rewards of different responses, in a run that has not yet reached a high reward."""
        streak = self._streak(lambda step: step.equal_rewards, asked=True)
        if not streak or self._equal_in_groups() or self._is_mostly_empty() or self._has_risen(streak):
            return None
        steps, responses = len(streak), sum(step.responses for step in streak)
        ends = [(step.reward or 0.0) + sign * step.spread for step in streak for sign in (-1, 1)]
        if _is_zero(max(ends) - min(ends), max(ends)):
            finding = f"the true reward was {max(ends):.4g} for all {responses} responses of the last {steps} steps"
            check = "check what the reward returns for different responses; "
        else:
            finding = f"the true reward was equal within every group of the last {steps} steps ({responses} responses)"
            check = ""
        return (
            f"{finding}, so it teaches nothing: {check}use a reward with finer levels, or raise num_generations "
            f"(now {self.config.num_generations}) or temperature (now {self.config.temperature:g})"
        )

    def _is_mostly_empty(self) -> bool:
        return self._share(lambda step: step.empty)[0] >= SHARE

    def _equal_in_groups(self) -> list[StepSummary]:
        return self._streak(lambda step: step.equal_in_groups)

    def _has_risen(self, streak: list[StepSummary]) -> bool:
        """Whether the streak's mean reward is above the mean of all steps with different rewards within groups."""
        rewards = [step.reward for step in streak if step.reward is not None]
        steps, total = self.earlier
        return bool(steps and rewards) and fmean(rewards) > total / steps

    def _kl(self) -> str | None:
        steps = [step for step in self.recent if step.kl is not None]
        if self.config.kl_target is not None or len(steps) < 6:  # kl_target controls the KL, the monitor watches it
            return None
        kl, before, now = _mean_kl(steps[-3:]), *([step.kl_per_token for step in steps[-n:][:3]] for n in (6, 3))
        if fmean(now) >= KL_PER_TOKEN and fmean(now) > fmean(before) and kl >= KL_LEAST:
            return (
                f"the KL to the reference is {kl:.3g} nats per response ({fmean(now):.2g} per token) and rises: "
                f"responses drift away from the reference's texts; {self._hold_back}"
            )
        last = steps[-KL_STEPS:]
        rewards = [[step.reward for step in period if step.reward is not None] for period in (self.first, last)]
        if len(steps) < 2 * KL_STEPS or min(map(len, rewards)) < KL_STEPS // 2:
            return None
        kl = _mean_kl(last)
        cost = self.config.beta * self.unit * (kl - _mean_kl(self.first))
        gain = fmean(rewards[1]) - fmean(rewards[0])
        error = math.hypot(*(stdev(known) / math.sqrt(len(known)) for known in rewards))
        spread = fmean(step.spread for step in last)
        if kl < KL_LEAST or cost <= spread or cost <= max(gain, 0.0) + KL_ERRORS * error:
            return None
        return (
            f"the KL to the reference, {kl:.3g} nats per response, costs more than the reward has gained: beta·KL rose "
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
            f"{count} steps, after {self.labels:,} labels. Its predictions only add noise: raise query_rate "
            f"(now {config.asked_share:g}), num_generations (now {config.num_generations}) or disc_updates (now "
            f"{config.disc_updates})"
        )

    @property
    def _hold_back(self) -> str:
        config = self.config
        return f"raise beta (now {config.beta:g}), set kl_target, or lower learning_rate (now {config.learning_rate:g})"

    # --- the state in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values for JSON."""
        plain = {name: copy(getattr(self, name)) for name in ("told", "labels", "earlier", "correlation")}
        return plain | {name: [list(step) for step in getattr(self, name)] for name in ("first", "recent")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state_dict`."""
        self.told, self.labels = list(state["told"]), state["labels"]
        self.earlier, self.correlation = list(state["earlier"]), list(state["correlation"])
        self.first = deque(map(StepSummary._make, state["first"]), maxlen=KL_STEPS)
        self.recent = deque(map(StepSummary._make, state["recent"]), maxlen=RECENT)


#: The form of a state_dict(), for `untrusted.require`.
SHAPE: dict[str, Any] = {
    "told": [Kind],
    "labels": WHOLE,
    "earlier": (float, float),
    "correlation": (float, float, float),
    "first": [StepSummary],
    "recent": [StepSummary],
}


def _summary(record: Mapping[str, Any], groups: list[list[str]]) -> StepSummary:
    texts = [text for group in groups for text in group]
    compared = [group for group in groups if len(group) > 1]
    reward, spread = _finite(record, "reward_mean"), _finite(record, "reward_std") or 0.0
    share, kl, length = (record.get(name) for name in ("frac_reward_zero_std", "kl", "completion_length"))
    return StepSummary(
        responses=len(texts),
        cut=(record.get("completions/clipped_ratio") or 0.0) * len(texts),
        empty=sum(not text.strip() for text in texts),
        equal_in_groups=bool(compared) and all(len(set(group)) == 1 for group in compared),
        equal_in_step=len(groups) > 1 and len(set(texts)) == 1,
        answers=0 if reward is None else max(0, (record.get("asked") or 0) - (record.get("unanswered") or 0)),
        # If no group has two true rewards, compare the rewards over the whole step.
        equal_rewards=_is_zero(spread, reward or 0.0) if share is None else share == 1,
        reward=reward,
        spread=spread,
        kl=kl,
        kl_per_token=kl / length if kl and length else 0.0,
    )


def _groups(responses: Any) -> list[list[str]]:
    """A record's responses by prompt. A step on a single prompt records them without the outer list."""
    if not responses:
        return []
    if isinstance(responses[0], str):
        return [list(responses)]
    return [list(group) for group in responses if group]


def _finite(record: Mapping[str, Any], name: str) -> float | None:
    """A number of the record; None if missing or not finite."""
    value = record.get(name)
    return value if value is not None and math.isfinite(value) else None


def _is_enough(steps: Sequence[StepSummary]) -> bool:
    return len(steps) >= STEPS and sum(step.responses for step in steps) >= RESPONSES


def _mean_kl(steps: Iterable[StepSummary]) -> float:
    return fmean(step.kl for step in steps if step.kl is not None)


def _is_zero(difference: float, size: float) -> bool:
    """Whether a difference between values of this size is only rounding."""
    return difference <= 1e-6 * max(1.0, abs(size))


#: The state before the first step, for checkpoints of earlier versions, which lack this state.
EMPTY: dict[str, Any] = Health(Config()).state_dict()
