"""Notices: what is wrong with a run and can still be mended, each said once, with the figure and the setting to change.

`LoraGAN` feeds every step's record to `Health.watch`; what it returns is warned of and stands in metrics.jsonl. The
monitor is something else: it looks for exploitation of the discriminator, and can stop a run or take it back.

Every threshold is a constant with its reason. A healthy run of `tiny` sets off none (tests/training/test_health.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any

from ..config import Config, RewardSignal

#: Steps in a row, and responses in these, before anything is said of rewards or responses. Three steps are early enough
#: to stop a run; 16 responses keep small steps from being judged on chance: two equal answers of two happen often.
STEPS, RESPONSES = 3, 16

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

KINDS = ("clipped", "empty", "equal responses", "equal rewards", "kl", "chance")
#: What is kept of the steps, in `Health.series`: the numbers of an entry, and the most entries.
SERIES: dict[str, tuple[tuple[str, ...], int]] = {
    "responses": (("float", "float", "float"), RESPONSES),  # responses of a step, how many were cut, how many are empty
    "per_token": (("float",), 6),  # KL a token
    "first": (("float_or_none", "float"), KL_STEPS),  # of the first steps: reward, KL
    "last": (("float_or_none", "float_or_none", "float"), KL_STEPS),  # later: reward, its deviation in the step, KL
}
#: Steps in a row in which something held, their responses; steps with answers, the sum and the range of their rewards.
STREAK = {"steps": 0, "responses": 0, "answers": 0, "total": 0.0, "low": 0.0, "high": 0.0}


def prediction_counts(config: Config, signal: RewardSignal, *, train_gen: bool) -> bool:
    """Whether anything depends on the predictions. Nothing does where every response gets its true reward. A step that
    trains the discriminator alone always counts."""
    if not train_gen or signal == "predicted" or config.gradient_path == "straight_through":
        return True
    return signal == "corrected" and (config.query_rate < 1 or config.reward_budget is not None)


class Health:
    """The last steps of a run, as far as the rules need them, as plain numbers: a checkpoint holds them as JSON."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.told: list[str] = []  # kinds of notices that were given
        self.labels = 0  # answers that the discriminator has learned from
        self.earlier = [0, 0.0]  # steps with a spread of rewards within groups, and the sum of their mean rewards
        # Fresh rank correlation within groups, of the steps after DISC_LABELS: how many, their sum, and of squares.
        self.correlation = [0, 0.0, 0.0]
        self.streaks = {"reward": dict(STREAK), "groups": dict(STREAK), "step": dict(STREAK)}
        self.series: dict[str, list[list[Any]]] = {name: [] for name in SERIES}

    def watch(self, record: Mapping[str, Any], *, learns_to_predict: bool) -> list[str]:
        """Take in a step; what is to be said of the run now, a line each.

        Args:
            record: what the step returns (`tracking.step_record`).
            learns_to_predict: whether the discriminator learned in this step, and its prediction is used.
        """
        groups = _groups(record.get("responses"))
        if not groups:
            return []
        self._take_responses(record, groups)
        self._take_rewards(record)
        self._take_kl(record)
        self._take_correlation(record, learns_to_predict)
        found: dict[str, str] = {}
        for kind, rule in self._rules().items():
            if kind not in self.told and (words := rule()):
                found[kind] = words
        self.told += found
        return list(found.values())

    def _rules(self) -> dict[str, Callable[[], str | None]]:
        rules = (self._clipped, self._empty, self._equal_responses, self._equal_rewards, self._kl, self._chance)
        return dict(zip(KINDS, rules, strict=True))

    # --- what is kept of a step

    def _take_responses(self, record: Mapping[str, Any], groups: list[list[str]]) -> None:
        texts = [text for group in groups for text in group]
        empty = sum(not text.strip() for text in texts)
        cut = (record.get("completions/clipped_ratio") or 0.0) * len(texts)
        recent = self._append("responses", len(texts), cut, empty)
        while len(recent) > STEPS and sum(step[0] for step in recent[1:]) >= RESPONSES:
            recent.pop(0)
        compared = [group for group in groups if len(group) > 1]
        alike = bool(compared) and all(len(set(group)) == 1 for group in compared)
        self._extend_streak("groups", alike, len(texts), record)
        self._extend_streak("step", len(groups) > 1 and len(set(texts)) == 1, len(texts), record)

    def _take_rewards(self, record: Mapping[str, Any]) -> None:
        answers, mean = _answers(record), _finite(record, "reward_mean")
        if answers <= 0 or mean is None:
            return
        share = record.get("frac_reward_zero_std")
        # Without a group of two answers only equality over the step can show.
        alike = _is_zero(_finite(record, "reward_std"), mean) if share is None else share == 1
        self._extend_streak("reward", alike, answers, record)
        if not alike:
            self.earlier = [self.earlier[0] + 1, self.earlier[1] + mean]

    def _append(self, name: str, *numbers: float | None) -> list[list[Any]]:
        """The series with this entry, the newest ones."""
        self.series[name] = [*self.series[name], list(numbers)][-SERIES[name][1] :]
        return self.series[name]

    def _extend_streak(self, name: str, holds: bool, responses: int, record: Mapping[str, Any]) -> None:
        """The streak goes on with this step, or is over."""
        streak = self.streaks[name] = self.streaks[name] if holds else dict(STREAK)
        if not holds:
            return
        mean, spread = _finite(record, "reward_mean"), _finite(record, "reward_std") or 0.0
        streak["steps"] += 1
        streak["responses"] += responses
        if mean is not None:
            low, high = mean - spread, mean + spread
            streak["low"] = min(streak["low"], low) if streak["answers"] else low
            streak["high"] = max(streak["high"], high) if streak["answers"] else high
            streak["answers"] += 1
            streak["total"] += mean

    def _take_kl(self, record: Mapping[str, Any]) -> None:
        kl, length = record.get("kl"), record.get("completion_length")
        if kl is None or self.config.kl_target is not None:  # kl_target steers it, and the monitor has an alarm
            return
        self._append("per_token", kl / length if length else 0.0)
        reward = _finite(record, "reward_mean")
        if len(self.series["first"]) < KL_STEPS:
            self._append("first", reward, kl)
        else:
            self._append("last", reward, _finite(record, "reward_std"), kl)

    def _take_correlation(self, record: Mapping[str, Any], learns_to_predict: bool) -> None:
        if not learns_to_predict:
            return
        value, equal = record.get("rank_correlation_within"), record.get("frac_reward_zero_std")
        # Where rewards are equal in most groups, little is left to rank: a run that is done looks like that.
        if self.labels >= DISC_LABELS and value is not None and (equal or 0.0) <= 0.5:
            count, total, squares = self.correlation
            self.correlation = [count + 1, total + value, squares + value**2]
        self.labels += _answers(record)

    # --- the rules: words, or None

    def _share(self, column: int) -> tuple[float, int]:
        """The share of the last responses that are cut (1) or empty (2), and over how many steps; 0 where too few."""
        recent = self.series["responses"]
        total = sum(step[0] for step in recent)
        if len(recent) < STEPS or total < RESPONSES:
            return 0.0, 0
        return sum(step[column] for step in recent) / total, len(recent)

    def _clipped(self) -> str | None:
        share, steps = self._share(1)
        if share < SHARE:
            return None
        return (
            f"{share:.0%} of the responses of the last {steps} steps were cut at max_completion_length="
            f"{self.config.max_completion_length}, so their reward is that of unfinished texts: raise "
            "max_completion_length, or ask for shorter answers in the prompts"
        )

    def _empty(self) -> str | None:
        share, steps = self._share(2)
        if share < SHARE:
            return None
        chat = {None: "not set", True: "now True", False: "now False"}[self.config.apply_chat_template]
        return (
            f"{share:.0%} of the responses of the last {steps} steps were empty: check the prompts and "
            f"apply_chat_template ({chat}); if responses became empty in training, {self._hold_back}"
        )

    def _equal_responses(self) -> str | None:
        """Equal over the step, or within groups: there the reward must not have risen, or the run may just be done."""
        streak, where = self.streaks["step"], "all responses of a step were the same text, whatever the prompt,"
        if not _is_long(streak):
            streak, where = self.streaks["groups"], "all responses to a prompt were the same text"
        if not _is_long(streak) or self._share(2)[0] >= SHARE:  # empty ones are equal, too
            return None
        if streak is self.streaks["groups"] and self._has_risen(streak):
            return None
        return (
            f"{where} in the last {streak['steps']} steps, so there is nothing to compare: raise temperature (now "
            f"{self.config.temperature:g}) or entropy_weight (now {self.config.entropy_weight:g}); if responses became "
            f"equal in training, {self._hold_back}"
        )

    def _equal_rewards(self) -> str | None:
        """Neither because responses are equal, nor because the run is done."""
        streak = self.streaks["reward"]
        if not _is_long(streak) or _is_long(self.streaks["groups"]) or self._share(2)[0] >= SHARE:
            return None
        if self._has_risen(streak):
            return None
        steps, responses = streak["steps"], streak["responses"]
        if _is_zero(streak["high"] - streak["low"], streak["high"]):
            said = f"the true reward was {streak['high']:.4g} for all {responses} responses of the last {steps} steps"
            check = "check what the reward returns for different responses; "
        else:
            said = f"the true reward was equal within every group of the last {steps} steps ({responses} responses)"
            check = ""
        return (
            f"{said}, so it teaches nothing: {check}use a reward with finer levels, or raise num_generations "
            f"(now {self.config.num_generations}) or temperature (now {self.config.temperature:g})"
        )

    def _has_risen(self, streak: Mapping[str, Any]) -> bool:
        """Whether the streak's rewards lie above those of the steps that taught something."""
        steps, total = self.earlier
        return bool(steps and streak["answers"]) and streak["total"] / streak["answers"] > total / steps

    def _kl(self) -> str | None:
        per_token = [value for (value,) in self.series["per_token"]]
        before, now = per_token[:3], per_token[3:]
        newest = [*self.series["first"], *self.series["last"]][-3:]
        kl = fmean(step[-1] for step in newest) if newest else 0.0
        if len(now) == 3 and fmean(now) >= KL_PER_TOKEN and fmean(now) > fmean(before) and kl >= KL_LEAST:
            return (
                f"the KL to the reference is {kl:.3g} nats a response ({fmean(now):.2g} a token) and rises: responses "
                f"leave what the reference would write; {self._hold_back_by_kl}"
            )
        first, last = self.series["first"], self.series["last"]
        rewards = [[step[0] for step in steps if step[0] is not None] for steps in (first, last)]
        if len(last) < KL_STEPS or min(map(len, rewards)) < KL_STEPS // 2:
            return None
        kl = fmean(step[-1] for step in last)
        cost = self.config.beta * (kl - fmean(step[-1] for step in first))
        gain = fmean(rewards[1]) - fmean(rewards[0])
        error = math.hypot(*(stdev(known) / math.sqrt(len(known)) for known in rewards))
        spread = fmean(step[1] or 0.0 for step in last)
        if kl < KL_LEAST or cost <= spread or cost <= max(gain, 0.0) + KL_ERRORS * error:
            return None
        return (
            f"the KL to the reference, {kl:.3g} nats a response, costs more than the reward has gained: beta·KL rose "
            f"by {cost:.3g} since the first {KL_STEPS} steps, the reward by {gain:.3g}; {self._hold_back_by_kl}"
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
        return f"raise beta (now {self.config.beta:g}) or lower learning_rate (now {self.config.learning_rate:g})"

    @property
    def _hold_back_by_kl(self) -> str:
        config = self.config
        return f"raise beta (now {config.beta:g}), set kl_target, or lower learning_rate (now {config.learning_rate:g})"

    # --- what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {
            "told": list(self.told),
            "labels": self.labels,
            "earlier": list(self.earlier),
            "correlation": list(self.correlation),
            "streaks": {name: dict(streak) for name, streak in self.streaks.items()},
            "series": {name: [list(step) for step in steps] for name, steps in self.series.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state_dict()."""
        self.told, self.labels = list(state["told"]), state["labels"]
        self.earlier, self.correlation = list(state["earlier"]), list(state["correlation"])
        self.streaks = {name: dict(streak) for name, streak in state["streaks"].items()}
        self.series = {name: [list(step) for step in steps] for name, steps in state["series"].items()}


def _groups(responses: Any) -> list[list[str]]:
    """A record's responses by prompt; one prompt alone has no list around its own."""
    if not responses:
        return []
    if isinstance(responses[0], str):
        return [list(responses)]
    return [list(group) for group in responses if group]


def _answers(record: Mapping[str, Any]) -> int:
    """True rewards that were measured in a step."""
    return max(0, (record.get("asked") or 0) - (record.get("unanswered") or 0))


def _finite(record: Mapping[str, Any], name: str) -> float | None:
    """A number of the record; None where it was not measured or is not finite."""
    value = record.get(name)
    return value if value is not None and math.isfinite(value) else None


def _is_long(streak: Mapping[str, Any]) -> bool:
    return streak["steps"] >= STEPS and streak["responses"] >= RESPONSES


def _is_zero(difference: float | None, size: float) -> bool:
    """Whether values of this size that differ so much are equal but for rounding."""
    return (difference or 0.0) <= 1e-6 * max(1.0, abs(size))


#: The state before the first step; checkpoints of earlier versions have none.
EMPTY: dict[str, Any] = Health(Config()).state_dict()
