"""Counts of true-reward calls by purpose, and their limits. `LoraGAN.budget`.

One call is the true reward of one response, also if the true reward is a sum of several functions. So 4 prompts with
8 responses each are 32 calls, whether a function scores one response or a whole list per call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..wording import counted

if TYPE_CHECKING:
    from .calling import Caller

Purpose = Literal["training", "evaluation", "retries", "dry_run", "other"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
OTHERS: tuple[Purpose, ...] = ("evaluation", "retries", "other")  # in a checkpoint, in addition to training
KEPT = (*OTHERS, "cached")


class BudgetSpent(ValueError):
    """More calls of the true reward were requested than `reward_budget` or `reward_budget_total` allows."""


class Budget:
    """Counts of calls by purpose, and the limits of a run. Thread-safe.

    Purposes:
        training: queried responses of training steps.
        evaluation: responses of evaluations.
        retries: calls that failed and were repeated, and calls of a step that then failed.
        dry_run: calls of `lora-gan train --dry-run`.
        other: direct calls of `LoraGAN.ask()`.

    Args:
        limit: maximum number of training calls (`reward_budget`); None: no limit.
        total_limit: maximum number of calls for all purposes (`reward_budget_total`); None: no limit.
        audits: calls of `limit` that are kept for audits of the steps on predictions alone.

    Attributes:
        cached: how many of these calls a reward answered from its own cache, such as the judge's.
        reserved: calls of total_limit that training leaves for the evaluation at the end.
    """

    def __init__(self, limit: int | None = None, total_limit: int | None = None, audits: int = 0) -> None:
        self.limit, self.total_limit, self.audits = limit, total_limit, audits
        self.counts: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)
        self.cached = self.reserved = 0
        self._lock = threading.Lock()  # retries come from several threads

    @property
    def total(self) -> int:
        """Calls of all purposes."""
        return sum(self.counts.values())

    def left(self, purpose: Purpose = "training", *, audit: bool = False) -> int | None:
        """Number of calls that are left for a purpose; None if there is no limit.

        Args:
            audit: the calls are for an audit, which counts as training.
        """
        left = []
        if purpose == "training" and self.limit is not None:
            left.append(self.limit - (0 if audit else self.audits) - self.counts["training"])
        if self.total_limit is not None:
            left.append(self.total_limit - self.total - (self.reserved if purpose == "training" else 0))
        return max(0, min(left)) if left else None

    @property
    def spent_setting(self) -> str | None:
        """The setting that allows no further training call, with its value; None if a call is left."""
        if self.left() != 0:
            return None
        if self.limit is not None and self.counts["training"] >= self.limit - self.audits:
            if self.left(audit=True):
                labels = self.limit - self.audits
                return f"{labels:,} of the {self.limit:,} calls of reward_budget are spent, and the rest is for audits"
            return f"all {self.limit:,} calls of reward_budget are spent"
        reserved = f", except for {self.reserved:,} that the evaluation at the end needs" if self.reserved else ""
        return f"all {self.total_limit:,} calls of reward_budget_total are spent{reserved}"

    @contextmanager
    def asking(self, purpose: Purpose, responses: int, caller: Caller, funcs: Mapping[str, Any]) -> Iterator[None]:
        """Count the calls that score `responses` responses inside the block.

        If the block raises, only the calls that were made count. In training these calls count as `retries`, because
        the step is repeated. The repeated step reuses the answers in the caller's log, and they do not count twice.

        Args:
            caller: makes the calls.
            funcs: the rewards by name. A reward with an attribute `usage` counts its requests and its cache itself, as
                Judge does.
        """
        before = {name: usage for name, func in funcs.items() if (usage := _usage(func))}
        self._add(purpose, responses)
        try:
            yield
        except BaseException:
            made = {name: caller.asked.get(name, 0) for name in funcs}
            made |= {name: _usage(funcs[name])["requests"] - spent["requests"] for name, spent in before.items()}
            self._add(purpose, -responses)
            if purpose == "training":
                self._add("retries", max(0, *(calls - caller.kept.get(name, 0) for name, calls in made.items())))
            else:
                self._add(purpose, max(made.values()))
            raise
        for name, spent in before.items():
            now = _usage(funcs[name])
            cached = now["cached"] - spent["cached"]
            self.cached += cached
            # Requests beyond one per response: retries by the reward's client, and second questions.
            self._add("retries", max(0, now["requests"] - spent["requests"] - (caller.asked.get(name, 0) - cached)))

    def _add(self, purpose: Purpose, calls: int) -> None:
        with self._lock:
            self.counts[purpose] += calls

    def may_retry(self, calls: int) -> bool:
        """Count this many calls as retries if the limits allow them. Returns whether they do."""
        with self._lock:
            if self.total_limit is not None and self.total_limit - self.total < calls:
                return False
            self.counts["retries"] += calls
            return True

    # --- what is logged and saved

    def metrics(self) -> dict[str, int]:
        """Counts so far under the names in metrics.jsonl: `reward_calls` (training), the other purposes that occurred,
        and `reward_calls/total`."""
        named: dict[str, int] = {"reward_calls": self.counts["training"]}
        named |= {f"reward_calls/{name}": n for name, n in self.counts.items() if name != "training" and n}
        if self.cached:
            named["reward_calls/cached"] = self.cached
        return named | {"reward_calls/total": self.total}

    def in_words(self) -> str:
        """For example: 64 in training, 20 in evaluation, 3 retries."""
        words: dict[Purpose, str] = {
            "training": "in training",
            "evaluation": "in evaluation",
            "dry_run": "in this dry run",
            "other": "by hand",
        }
        counts = [f"{self.counts[name]:,} {where}" for name, where in words.items() if self.counts[name]] or ["none"]
        counts += [counted(self.counts["retries"], "retry", "retries")] if self.counts["retries"] else []
        cached = f"; the reward's own cache answered {self.cached:,}" if self.cached else ""
        return ", ".join(counts) + cached

    def state_dict(self) -> dict[str, int]:
        """The counts except those of training, which a checkpoint keeps as `reward_calls`."""
        return {**{name: self.counts[name] for name in OTHERS}, "cached": self.cached}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the counts of a state_dict()."""
        for name in OTHERS:
            self.counts[name] = state[name]
        self.cached = state["cached"]

    def catch_up(self, metrics: Mapping[str, Any]) -> None:
        """Raise the counts to those of a line of metrics.jsonl: its calls were made after the checkpoint."""
        counts = self.state_dict()
        for name, count in counts.items():
            if isinstance(logged := metrics.get(f"reward_calls/{name}"), int):
                counts[name] = max(count, logged)
        self.load_state_dict(counts)


def _usage(func: Any) -> dict[str, int]:
    """A reward's own counts of its requests and its cache; empty if the reward does not count them."""
    usage, names = getattr(func, "usage", None), ("requests", "cached")
    if not isinstance(usage, Mapping) or not {*names} <= set(usage):
        return {}
    return {name: int(usage[name]) for name in names}
