"""`lora-gan train --dry_run`: the plan of a run, its memory, disk, time and calls, and a trial of its reward.

# P = prompts, K = responses per prompt
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import rewards
from ..data import Row
from ..gan import PLAIN_PROMPTS, LoraGAN
from ..model.players import HEADS
from ..rewards.calling import ASYNC_WORKERS, is_async
from ..rewards.combine import Parts
from ..rewards.cost import Meter
from ..run.display import one_line
from ..storage.checkpoint import PLAYERS
from ..wording import counted, duration, size
from . import footprint
from .disk import needed
from .footprint import Lengths, Memory, resident
from .plan import calls_per_step, planned
from .trial import Seconds, Trial, shape_of_trial


@dataclass(frozen=True)
class Tried:
    """The result of a trial of the true reward.

    Attributes:
        text: the report for the user.
        calls: number of calls, for responses and targets.
        seconds: seconds of one round of `parallel` calls.
        parallel: calls that run in parallel.
    """

    text: str
    calls: int = 0
    seconds: float = 0.0
    parallel: int = 1

    def seconds_for(self, calls: float) -> float:
        """Seconds of `calls` calls that are made together."""
        return self.seconds * (np.ceil(calls / self.parallel) if self.parallel > 1 else calls)


class Preview:
    """Describes a run before its next step. Make it after the base is loaded and before a trial.

    Args:
        gan: the run. Its state does not change.
        rows: the rows of the next step. Their longest prompt stands for all prompts.
        steps: number of steps to run.
        total: number of rows; None for streamed rows.
        held_out: number of rows of the evaluation data; 0 without.
        columns: names of all columns of the data; rewards get None for a column that these rows lack.
    """

    def __init__(
        self,
        gan: LoraGAN,
        rows: list[Row],
        *,
        steps: int,
        total: int | None = None,
        held_out: int = 0,
        columns: Collection[str] = (),
    ) -> None:
        self.gan, self.config, self.players = gan, gan.config, gan.players
        self.opened = resident()
        self.rows, self.steps, self.total, self.held_out = gan.as_meant(rows), steps, total, held_out
        self.longest_prompt = max(map(len, gan.players.encoder.prompts(self.rows)))
        left = gan.budget.left()
        audits = 0 if left is None else (gan.budget.left(audit=True) or 0) - left
        self.plan = planned(gan.config, first=gan.global_step, steps=steps, held_out=held_out, left=left, audits=audits)
        self.disk = needed(gan, steps=steps, prompt_tokens=self.longest_prompt, calls=self.plan.training)
        # Calls that reward_budget and reward_budget_total allow to a dry run; None: no limit.
        self.allowed = min((n for n in (left, gan.budget.left("dry_run")) if n is not None), default=None)
        self.ask_options: dict[str, Any] = dict(columns=columns, max_steps=gan.global_step + steps, purpose="dry_run")

    # --- before the trial

    def describe(self, *, dry_run: bool = False) -> str:
        """Base, adapters, data, steps, true-reward calls, memory and disk, one line per item.

        Args:
            dry_run: add the calls of the dry run, and leave out memory, which the dry run prints at its end.
        """
        gan, config, base = self.gan, self.config, self.players.base
        sizes = {player: sum(p.numel() for p in self.players.parameters(player)) for player in PLAYERS}
        frozen = sum(p.numel() for p in base.model.parameters() if not p.requires_grad)
        frozen -= sum(p.numel() for p in self.players.parameters("reference"))
        dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
        data = "streamed" if self.total is None else counted(self.total, "row")
        done = f"; {gan.global_step:,} are done" if gan.global_step else ""
        lines = {
            "base": f"{base.name or 'in memory'}, {frozen:,} frozen parameters ({dtype}, {self.players.device})",
            "generator": f"{sizes['generator']:,} parameters in its adapter{self._start()}",
            "discriminator": f"{sizes['discriminator']:,} parameters in its adapter and {HEADS} score heads",
            "data": data + (f", and {counted(self.held_out, 'held-out row')}" if self.held_out else ""),
            "prompts": self._kinds(),
            "steps": f"{self.steps:,}, each of {config.prompts_per_step} prompts × {config.num_generations} responses "
            f"of at most {config.max_completion_length} tokens{done}",
            "true reward": self._calls(dry_run),
        }
        if not dry_run:
            memory = self._memory(Lengths.at_most(self.longest_prompt, config.max_completion_length))
            lines["memory"] = (
                f"{memory}\nwithout memory of the reward, and freed memory that the C library keeps: --dry-run "
                "measures both"
            )
        lines["disk"] = self._disk()
        return "\n".join(_named(name, text) for name, text in lines.items())

    def _start(self) -> str:
        """The saved adapter from which the generator starts; empty without one."""
        if self.gan.init_adapter is None:
            return ""
        reference = "a frozen copy of it" if self.players.has_reference else "the base"
        return f", starts as the adapter {self.gan.init_adapter}; the KL is to {reference}"

    def _kinds(self) -> str:
        """The kinds of the first prompts, and the tokens that end a response to these prompts."""
        encoder, tokenizer = self.players.encoder, self.players.base.tokenizer
        kinds = {"chat messages" if encoder.is_chat(row) else "plain text" for row in self.rows}
        ends = sorted({repr(tokenizer.convert_ids_to_tokens(encoder.closing_id(row))) for row in self.rows})
        lines = f"{' and '.join(sorted(kinds))}; a response ends with {', '.join(ends)}"
        if "plain text" in kinds and encoder.has_template and self.config.apply_chat_template is None:
            lines += f"\n! {PLAIN_PROMPTS}"
        return lines

    def _calls(self, dry_run: bool) -> str:
        """True-reward calls by purpose."""
        config, plan, each = self.config, self.plan, calls_per_step(self.config)
        share = f"asked for {config.asked_share:.0%} of the responses" if each else "not asked in training"
        note = ""
        if plan.training < round(self.steps * each):
            enough = f"enough for about {plan.training / each:.3g} of {counted(self.steps, 'step')}"
            note = f" (the rest of the budget, {enough})"
        text = f"{', '.join(self.gan.reward_names)}: {share}: {plan.in_words(note)}"
        if dry_run:
            text += f", up to {self.tried_calls()} in this dry run"
        if config.reward_retries:
            text += f"; a failed call is retried up to {config.reward_retries} times"
        return text

    def _memory(self, lengths: Lengths, **measured: float) -> str:
        """The peak on the host, and on the GPU if the run uses one, each with its terms."""
        players, config, disk = self.players, self.config, self.disk
        measured |= {"opened": self.opened, "checkpoint": disk.each}
        in_parallel = disk.saved > 1 and not self.gan.callbacks
        host = _in_words(footprint.host(players, config, lengths, saves_in_parallel=in_parallel, **measured))
        if players.device.type == "cpu":
            return host
        return f"on {players.device} {_in_words(footprint.device_memory(players, config, lengths))}\non the host {host}"

    def _disk(self) -> str:
        """The disk space of the run."""
        disk = self.disk
        kept, most = f"{counted(disk.kept, 'checkpoint')} of {size(disk.each)}", ""
        if disk.kept < disk.saved:
            kept = f"the newest {disk.kept:,} of {disk.saved:,} checkpoints of {size(disk.each)} "
            kept += f"(save_total_limit={self.config.save_total_limit})"
            most = f", and {size(disk.total + disk.each)} while a checkpoint replaces another"
        return f"about {size(disk.total)}{most}: {kept}, logs {size(disk.logs)}"

    # --- the trial

    def dry_run(self) -> Iterator[str]:
        """Try the reward and time a step; yields the report as paragraphs, each as soon as it is complete."""
        config, plan = self.config, self.plan
        trial = Trial(self.gan, self.rows, self.allowed or None)
        meter, before = Meter(self.gan.true_reward.funcs), resident()
        if self.allowed == 0:
            tried = Tried("\nThe reward is not tried: reward_budget or reward_budget_total is spent.")
        else:
            tried = self.try_reward(trial)
        measured = {"reward_model": max(0.0, resident() - before)}
        yield tried.text
        if tried.calls:
            yield from meter.lines(tried.calls, plan.total, f"{plan.total:,} calls of this run")
        seconds = trial.seconds()
        yield "\n" + _named("time", "\n".join(self.time(seconds, tried)))
        measured["spare"] = seconds.spare
        memory = self._memory(seconds.lengths, **measured)
        at_most = self._memory(Lengths.at_most(self.longest_prompt, config.max_completion_length), **measured)
        lower, upper = (
            " and ".join(line.partition(":")[0] for line in lines.splitlines()) for lines in (memory, at_most)
        )
        if upper != lower:
            memory += f"\n{upper} when every response has {config.max_completion_length} tokens"
        yield _named("memory", memory)
        yield "\nDry run: nothing was trained or saved. To train, give the same command without --dry-run."

    def tried_calls(self) -> int:
        """Most true-reward calls of a dry run."""
        prompts, responses = shape_of_trial(self.config, len(self.rows), self.allowed)
        asked = prompts * responses
        return asked + 2 * self._pairs(min(prompts, sum(bool(row.target) for row in self.rows)), asked)

    def _pairs(self, targets: int, asked: int) -> int:
        """Number of rows on which the reward is tried with targets as responses, two calls per row; 0 or at least 2."""
        pairs = targets if self.allowed is None else min(targets, (self.allowed - asked) // 2)
        return pairs if pairs > 1 else 0

    def try_reward(self, trial: Trial) -> Tried:
        """Ask the true reward for the trial's responses and for targets, and report the differences."""
        gan, rows, responses, parallel = self.gan, trial.rows, trial.sampled.texts, self._parallel_calls()
        group = len(responses) // len(rows)
        paired = [row for row in rows if row.target]
        paired = paired[: self._pairs(len(paired), len(responses))]
        calls = len(responses) + 2 * len(paired)
        people = [func for func in gan.true_reward.funcs if getattr(func, "interactive", False)]
        retries, cached = gan.budget.counts["retries"], gan.budget.cached
        if people:
            print(f"Now you are asked about up to {calls} responses, to try the reward.", flush=True)
        began = time.perf_counter()
        ids = trial.sampled.responses
        of_group = [row for row in rows for _ in range(group)]
        answers, parts = gan.ask(of_group, responses, completion_ids=ids, **self.ask_options)
        seconds = first = time.perf_counter() - began
        rounds = -(-len(responses) // parallel)  # without targets this is the only timing; it includes loading
        reward_PK = np.array([np.nan if a is None else a for a in answers]).reshape(len(rows), group)
        of_step = "step 1" if gan.global_step == 0 else "the next step"
        lines = [
            f"\nThe reward, tried on {len(responses)} responses that {of_step} will sample:",
            *_answers(rows, reward_PK, responses, parts),
            _verdict_on_spread(reward_PK),
            *self._verdict_on_ends(ids),
        ]
        if paired:
            began = time.perf_counter()
            own, other = (self._mean_reward(paired, targets) for targets in (paired, paired[1:] + paired[:1]))
            seconds, rounds = time.perf_counter() - began, 2 * -(-len(paired) // parallel)
            if not np.isnan(own + other):
                warning = "" if own > other else "   ! the reward does not prefer a row's own target"
                lines.append(f"  a row's own target {own:.3f}, another row's {other:.3f}{warning}")
        each = seconds / rounds
        note = f", {parallel} calls in parallel (reward_workers)" if parallel > 1 else ""
        lines.append(
            f"  {duration(each)} per call{note}; {duration(first)} for the first {len(responses)}, loading included"
        )
        retries, cached = gan.budget.counts["retries"] - retries, gan.budget.cached - cached
        note = f", {counted(retries, 'retry', 'retries')}" if retries else ""
        note += f"; {cached:,} calls were answered from the reward's own cache" if cached else ""
        lines.append(f"  True-reward calls: {calls:,} in this dry run{note}")
        for log in filter(None, (getattr(func, "log", None) for func in people)):
            lines.append(f"  Your answers are in {log}. Training does not ask for them again.")
        return Tried("\n".join(lines), calls, each, parallel)

    def _mean_reward(self, rows: list[Row], targets: list[Row]) -> float:
        """Mean reward of the targets as responses to the rows; NaN without an answer."""
        answers, _ = self.gan.ask(rows, [row.target or "" for row in targets], **self.ask_options)
        return float(np.mean([answer for answer in answers if answer is not None] or [np.nan]))

    def _parallel_calls(self) -> int:
        """Calls that `rewards.calling.Caller` runs in parallel."""
        funcs = self.gan.true_reward.funcs
        if any(hasattr(func, "batch") or rewards.takes_completions(func) for func in funcs):
            return 1  # one call is about several responses
        return self.config.reward_workers or (ASYNC_WORKERS if all(map(is_async, funcs)) else 1)

    def _verdict_on_ends(self, ids: list[list[int]]) -> Iterator[str]:
        """A warning if half of the responses or more were cut, so that the reward judges unfinished texts."""
        limit, ends = self.config.max_completion_length, self.players.base.eos_ids
        cut = sum(len(response) >= limit and response[-1] not in ends for response in ids)
        if cut and 2 * cut >= len(ids):
            yield (
                f"  ! {cut} of {len(ids)} responses were cut at max_completion_length={limit}: the reward judges "
                "unfinished texts"
            )

    def time(self, step: Seconds, tried: Tried) -> list[str]:
        """Lines on the time per step, the time of the run, and the measurement."""
        config, plan, steps, asked = self.config, self.plan, self.steps, calls_per_step(self.config)
        rewarded = tried.seconds_for(asked)
        asking = min(steps, plan.training / asked) if asked else 0.0  # steps that ask the true reward
        learning = asking if config.disc_objective == "regression" else steps
        sampled = config.prompts_per_step * config.num_generations
        rewarding = asking * rewarded + plan.evaluations * tried.seconds_for(plan.rows)
        sampling_held_out = plan.evaluating * (step.sampling + step.predicting) / sampled
        every_step = step.sampling + step.generator + step.predicting
        whole = steps * every_step + learning * step.discriminator + sampling_held_out + rewarding
        evaluations = f" and {counted(plan.evaluations, 'evaluation')}" if plan.evaluations else ""
        return [
            f"about {duration(step.total + rewarded)} per step: sampling {duration(step.sampling)}, updates "
            f"{duration(step.updating)}, true reward {duration(rewarded)}",
            f"about {duration(whole)} for {counted(steps, 'step')}{evaluations}, {duration(rewarding)} of that for the "
            f"{plan.total:,} calls of the true reward; without saving of checkpoints",
            f"measured on {'one step' if step.whole else 'a part of one step'}, with responses of "
            f"{step.lengths.response:.0f} tokens on average",
        ]


def _named(name: str, text: str) -> str:
    """The name and the lines of the text in two columns, wrapped to 80 columns."""
    wrap = textwrap.TextWrapper(width=80 - 15, break_long_words=False, break_on_hyphens=False)
    lines = [wrapped for line in text.splitlines() for wrapped in wrap.wrap(line)]
    return "\n".join(f"{'' if i else name:<15}{line}" for i, line in enumerate(lines))


def _in_words(memory: Memory) -> str:
    """The peak with its terms: all constant terms, and the largest phase of a step."""
    terms = list(memory.always.items())
    if memory.in_turn:
        terms.append(max(memory.in_turn.items(), key=lambda term: term[1]))
    return f"about {size(memory.total)}: " + ", ".join(f"{name} {size(value)}" for name, value in terms)


def _answers(rows: list[Row], reward_PK: np.ndarray, responses: list[str], parts: Parts) -> Iterator[str]:
    """The rewards of each prompt's responses with the best response, and the mean of each single reward."""
    for row, values, texts in zip(rows, reward_PK, np.reshape(responses, reward_PK.shape), strict=True):
        best = int(np.nanargmax(values)) if not np.isnan(values).all() else 0
        numbers = " ".join("–" if np.isnan(reward) else f"{reward:.3f}" for reward in values)
        yield f"  “{one_line(row.prompt, 70)}”\n    {numbers}   best: “{one_line(texts[best], 70)}”"
    for name, rewards_B in parts.items():
        known = [reward for reward in rewards_B if reward is not None]
        mean = f"mean {np.mean(known):.3f}, {len(known)} of {len(rewards_B)} answered" if known else "no answer"
        yield f"  {name}: {mean}"


def _verdict_on_spread(reward_PK: np.ndarray) -> str:
    """A report on the spread of rewards within prompts, the only signal for training."""
    spreads = [np.nanstd(group) for group in reward_PK if (~np.isnan(group)).sum() > 1]
    if not spreads:
        return "  ! no prompt has two answers: there is nothing to compare, and nothing to learn from"
    text = f"  rewards of one prompt's responses differ by {np.mean(spreads):.3f} (standard deviation)"
    flat = spreads.count(0)
    if flat == len(reward_PK):
        return f"{text}\n  ! all responses to each prompt have the same reward: there is nothing to learn from yet"
    return text + (f"; none for {flat} of {len(reward_PK)} prompts, which teach nothing" if flat else "")
