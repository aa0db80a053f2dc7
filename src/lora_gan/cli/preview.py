"""`lora-gan train --dry_run`: what a run would train, hold and ask for, and whether its reward can teach anything.

# P = prompts, K = responses a prompt, B = P·K, L = tokens of a row, T = tokens of a response, V = vocabulary
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import rewards
from ..config import Config
from ..data import Row
from ..rewards.calling import ASYNC_WORKERS, is_async
from ..rewards.combine import Parts
from ..rewards.cost import Meter
from ..run.display import one_line
from ..storage.checkpoint import PLAYERS
from ..wording import counted, duration, size
from . import footprint
from .disk import needed
from .footprint import Lengths, Memory, resident
from .plan import Plan, calls, calls_per_step, planned
from .trial import Seconds, Trial, shape_of_trial

if TYPE_CHECKING:
    from ..gan import LoraGAN


def describe(
    gan: LoraGAN,
    rows: list[Row],
    *,
    total: int | None,
    steps: int,
    held_out: int = 0,
    opened: float = 0.0,
    dry_run: bool = False,
) -> str:
    """Base, adapters, data, steps, true-reward calls, memory and disk, a line each.

    Args:
        rows: the rows of the next step: their prompts' length is taken for that of all.
        total: rows there are; None where they are streamed.
        steps: steps that would be run.
        held_out: rows of the evaluation data; 0 without.
        opened: bytes that the process held when `gan` was there (`footprint.resident()`); 0: not known.
        dry_run: say how many calls the dry run makes, and leave memory to its end, when more is known.
    """
    config, players, base = gan.config, gan.players, gan.players.base
    rows = gan.as_meant(rows)
    sizes = {player: sum(p.numel() for p in players.parameters(player)) for player in PLAYERS}
    frozen = sum(p.numel() for p in base.model.parameters() if not p.requires_grad)
    frozen -= sum(p.numel() for p in players.parameters("reference"))
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    lengths = [len(ids) for ids in players.encoder.prompts(rows)]
    lines = {
        "base": f"{base.name or 'in memory'}, {frozen:,} frozen parameters ({dtype}, {players.device})",
        "generator": f"{sizes['generator']:,} parameters in its adapter{_start(gan)}",
        "discriminator": f"{sizes['discriminator']:,} parameters in its adapter and {config.disc_heads} score heads",
        "data": ("streamed" if total is None else counted(total, "row"))
        + (f", and {counted(held_out, 'held-out row')}" if held_out else ""),
        "prompts": _kinds(gan, rows),
        "steps": f"{steps:,}, each of {config.prompts_per_step} prompts × {config.num_generations} responses of at "
        f"most {config.max_completion_length} tokens" + (f"; {gan.global_step:,} are done" if gan.global_step else ""),
        "true reward": _calls(gan, rows, steps, held_out, dry_run),
        "memory": "",
        "disk": _disk(gan, steps, max(lengths)),
    }
    if dry_run:
        del lines["memory"]
    else:
        at_most = Lengths.at_most(max(lengths), config.max_completion_length)
        of_memory = _memory(gan, at_most, steps, max(lengths), opened=opened)
        known = "without what the reward loads and what the C library keeps of freed memory, which --dry-run measures"
        lines["memory"] = "\n".join([*of_memory, known])
    return "\n".join(_named(name, text) for name, text in lines.items())


def _named(name: str, text: str) -> str:
    """The name, and beside it the lines of the text, wrapped to 80 columns."""
    wrap = textwrap.TextWrapper(width=80 - 15, break_long_words=False, break_on_hyphens=False)
    lines = [part for line in text.splitlines() for part in wrap.wrap(line)]
    return "\n".join(f"{'' if i else name:<15}{line}" for i, line in enumerate(lines))


def _calls(gan: LoraGAN, rows: list[Row], steps: int, held_out: int, dry_run: bool) -> str:
    """True-reward calls by purpose."""
    config = gan.config
    plan = _plan(gan, steps, held_out)
    share = f"asked for {config.query_rate:.0%} of the responses"
    if config.disc_objective == "real_vs_generated":
        share = "not asked in training (disc_objective='real_vs_generated')"
    of_plan = plan.in_words()
    if plan.training < round(steps * calls_per_step(config)):
        enough = plan.training / calls_per_step(config)
        ends = f"all that the budget leaves: enough for about {enough:.3g} of {counted(steps, 'step')}"
        of_plan = of_plan.replace("calls in training", f"calls in training ({ends})", 1)
    said = f"{', '.join(gan.reward_names)}: {share}: {of_plan}"
    if dry_run:
        said += f", up to {dry_run_calls(config, rows, _allowed(gan))} in this dry run"
    if config.reward_retries:
        said += f"; a call that fails is made up to {config.reward_retries} more times"
    return said


def _start(gan: LoraGAN) -> str:
    """Where the generator starts, if that is a saved adapter."""
    if gan.init_adapter is None:
        return ""
    reference = "a frozen copy of it" if gan.players.has_reference else "the base"
    return f", starts as the adapter {gan.init_adapter}; the KL is to {reference}"


def _kinds(gan: LoraGAN, rows: list[Row]) -> str:
    """How the first prompts reach the model, and which token closes a response to them."""
    encoder, tokenizer = gan.players.encoder, gan.players.base.tokenizer
    chats = [encoder.is_chat(row) for row in rows]
    kind = "chat messages" if all(chats) else "chat messages and plain text" if any(chats) else "plain text"
    closing = ", ".join(sorted({repr(tokenizer.convert_ids_to_tokens(encoder.closing_id(row))) for row in rows}))
    lines = f"{kind}; a response ends with {closing}"
    if not all(chats) and encoder.has_template and gan.config.apply_chat_template is None:
        lines += (
            "\n! the base has a chat template, and plain prompts bypass it: set apply_chat_template to true to send "
            "each as a user message, or to false to keep them as they are"
        )
    return lines


def _memory(gan: LoraGAN, lengths: Lengths, steps: int, prompt_tokens: int, **host: float) -> list[str]:
    """The peak on the host and, where that is another one, on the device, each with its parts."""
    config, players = gan.config, gan.players
    disk = needed(gan, steps=steps, prompt_tokens=prompt_tokens, calls=0)
    beside = disk.saved > 1 and not gan.callbacks
    on_cpu = players.device.type == "cpu"
    if not on_cpu:  # the base passed through the host when it was opened
        host["least"] = resident(peak=True)
    of_host = footprint.host(players, config, lengths, checkpoint=disk.each, saves_beside=beside, **host)
    if on_cpu:
        return [_in_words(of_host)]
    least = float(torch.cuda.max_memory_allocated(players.device))
    of_device = footprint.device_memory(players, config, lengths, least=least)
    return [f"on {players.device} {_in_words(of_device)}", f"on the host {_in_words(of_host)}"]


def _in_words(memory: Memory) -> str:
    """The peak and its parts; of what takes turns, the largest."""
    parts = list(memory.always.items())
    if memory.in_turn:
        parts.append(max(memory.in_turn.items(), key=lambda part: part[1]))
    return f"about {size(memory.total)}: " + ", ".join(f"{name} {size(value)}" for name, value in parts)


def _disk(gan: LoraGAN, steps: int, prompt_tokens: int) -> str:
    """What the run will write."""
    disk = needed(gan, steps=steps, prompt_tokens=prompt_tokens, calls=calls(gan.config, steps))
    limit = gan.config.save_total_limit
    kept = f"{counted(disk.kept, 'checkpoint')} of {size(disk.each)}"
    if disk.kept < disk.saved:
        kept = f"the newest {disk.kept:,} of {disk.saved:,} checkpoints of {size(disk.each)} (save_total_limit={limit})"
    elif disk.saved > 3:
        kept += " (save_total_limit keeps fewer)"
    most = f", and {size(disk.total + disk.each)} while a checkpoint replaces another" if disk.kept < disk.saved else ""
    return f"about {size(disk.total)}{most}: {kept}, logs {size(disk.logs)}"


@dataclass(frozen=True)
class Tried:
    """What was found when the true reward was tried.

    Attributes:
        text: for a person.
        calls: responses and targets that it was asked about.
        seconds: of one call; where calls run at once, of as many as run at once; None: nothing was asked.
        at_once: calls that run at once.
    """

    text: str
    calls: int = 0
    seconds: float | None = None
    at_once: int = 1

    def seconds_for(self, calls: float) -> float:
        """Seconds that so many calls take which are made together."""
        return (self.seconds or 0.0) * (np.ceil(calls / self.at_once) if self.at_once > 1 else calls)


def dry_run(
    gan: LoraGAN,
    rows: list[Row],
    *,
    steps: int,
    held_out: int = 0,
    opened: float = 0.0,
    columns: Collection[str] = (),
    max_steps: int | None = None,
) -> Iterator[str]:
    """Try the reward and time a step, and say what was found: paragraphs, each as soon as it is known.

    Args:
        rows: the rows of the next step.
        steps: steps of the run.
        held_out, opened: as in `describe`.
        columns: names of all columns of the data; rewards get None for those that these rows lack.
        max_steps: the run's last step, for the trainer_state that rewards get.
    """
    rows = gan.as_meant(rows)
    plan = _plan(gan, steps, held_out)
    allowed = _allowed(gan)
    trial = Trial(gan, rows, allowed or None)
    meter = Meter(gan.true_reward.funcs)
    before = resident()
    if allowed == 0:
        tried = Tried("\nThe reward is not tried: reward_budget or reward_budget_total is spent.")
    else:
        tried = try_reward(gan, trial, columns=columns, max_steps=max_steps)
    reward_model = max(0.0, resident() - before)
    yield tried.text
    costs = meter.lines(tried.calls, plan.total, f"{plan.total:,} calls of this run") if tried.calls else []
    if costs:
        yield "\n".join(costs)
    seconds = trial.seconds()
    yield "\n" + _named("time", "\n".join(_time(gan, seconds, tried, plan, steps)))
    prompts = list(map(len, trial.prompts))
    now = Lengths(float(np.mean(prompts)), max(prompts), seconds.tokens, seconds.longest)
    spare = footprint.spare_share(
        gan.players, gan.config, now, groups=seconds.groups, responses=seconds.responses, grew=seconds.grew
    )
    known = {"opened": opened, "reward_model": reward_model, "spare": spare}
    of_memory = _memory(gan, now, steps, max(prompts), **known)
    longest = Lengths.at_most(max(prompts), gan.config.max_completion_length)
    at_most = _memory(gan, longest, steps, max(prompts), **known)
    upper, lower = (" and ".join(words.partition(":")[0] for words in lines) for lines in (at_most, of_memory))
    if upper != lower:
        of_memory.append(f"{upper} when every response has {gan.config.max_completion_length} tokens")
    yield _named("memory", "\n".join(of_memory))
    yield "\nDry run: nothing was trained or saved. To train, give the same command without --dry-run."


def dry_run_calls(config: Config, rows: list[Row], left: int | None = None) -> int:
    """Most true-reward calls that a dry run makes.

    Args:
        rows: the rows of the next step.
        left: calls that reward_budget allows; None: no limit.
    """
    if left == 0:
        return 0
    prompts, responses = shape_of_trial(config, len(rows), left)
    asked = prompts * responses
    return asked + 2 * _pairs(min(prompts, sum(bool(row.target) for row in rows)), asked, left)


def _pairs(targets: int, asked: int, left: int | None) -> int:
    """Rows that the reward is tried on with targets in the responses' place: two calls each; from 2, or 0."""
    pairs = targets if left is None else min(targets, (left - asked) // 2)
    return pairs if pairs > 1 else 0


def try_reward(gan: LoraGAN, trial: Trial, *, columns: Collection[str] = (), max_steps: int | None = None) -> Tried:
    """Ask the true reward for a few responses of the generator as it stands, and for targets; say what it can teach.

    Args:
        trial: the responses.
        columns, max_steps: as in `dry_run`.
    """
    rows, responses = trial.rows, trial.sampled.texts
    at_once, allowed = _at_once(gan), _allowed(gan)
    options: dict[str, Any] = {"columns": columns, "max_steps": max_steps, "purpose": "dry_run"}
    group = len(responses) // len(rows)
    paired = [row for row in rows if row.target]
    paired = paired[: _pairs(len(paired), len(responses), allowed)]
    people = [func for func in gan.true_reward.funcs if getattr(func, "interactive", False)]
    retries, cached = gan.budget.counts["retries"], gan.budget.cached
    if people:
        print(f"Now you are asked about up to {len(responses) + 2 * len(paired)} responses, to try the reward.",
              flush=True)  # fmt: skip
    began = time.perf_counter()
    _, ids, _ = trial.sampled.parts()
    answers, parts = gan.ask([row for row in rows for _ in range(group)], responses, completion_ids=ids, **options)
    first = time.perf_counter() - began
    reward_PK = np.array([np.nan if a is None else a for a in answers]).reshape(len(rows), group)

    of_step = " that step 1 will sample" if gan.global_step == 0 else " that the next step will sample"
    lines = [
        f"\nThe reward, tried on {len(responses)} responses{of_step}:",
        *_answers(rows, reward_PK, responses, parts),
    ]
    lines += _verdict_on_spread(reward_PK)
    lines += _verdict_on_ends(ids, gan)

    if paired:
        began = time.perf_counter()
        own, _ = gan.ask(paired, [row.target or "" for row in paired], **options)
        others, _ = gan.ask(paired, [row.target or "" for row in paired[1:] + paired[:1]], **options)
        own_mean, other_mean = (float(np.mean([x for x in xs if x is not None] or [np.nan])) for xs in (own, others))
        if not np.isnan(own_mean + other_mean):
            lines.append(
                f"  a row's own target {own_mean:.3f}, another row's {other_mean:.3f}"
                + ("" if own_mean > other_mean else "   ! the reward does not prefer a row's own target")
            )
        seconds, rounds = time.perf_counter() - began, 2 * -(-len(paired) // at_once)
    else:
        seconds, rounds = first, -(-len(responses) // at_once)  # nothing is asked twice: the start-up is included
    calls = len(responses) + 2 * len(paired)
    each = seconds / rounds
    together = f", {at_once} calls at once (reward_workers)" if at_once > 1 else ""
    lines.append(
        f"  {duration(each)} per call{together}; {duration(first)} for the first {len(responses)}, loading included"
    )
    retries, cached = gan.budget.counts["retries"] - retries, gan.budget.cached - cached
    made = f"  True-reward calls: {calls:,} in this dry run" + (
        f", {counted(retries, 'retry', 'retries')}" if retries else ""
    )
    lines.append(made + (f"; {cached:,} of them came from the reward's own cache" if cached else ""))
    for log in filter(None, (getattr(func, "log", None) for func in people)):
        lines.append(f"  Your answers are in {log}. Training does not ask for them again.")
    return Tried("\n".join(lines), calls, each, at_once)


def _answers(rows: list[Row], reward_PK: np.ndarray, responses: list[str], parts: Parts) -> Iterator[str]:
    """The rewards of each prompt's responses with the best response, and the mean of each part of the reward."""
    for row, values, texts in zip(rows, reward_PK, np.reshape(responses, reward_PK.shape), strict=True):
        best = int(np.nanargmax(values)) if not np.isnan(values).all() else 0
        said = " ".join("–" if np.isnan(reward) else f"{reward:.3f}" for reward in values)
        yield f"  “{one_line(row.prompt, 70)}”\n    {said}   best: “{one_line(texts[best], 70)}”"
    for name, part in parts.items():
        known = [value for value in part if value is not None]
        mean = f"mean {np.mean(known):.3f}, {len(known)} of {len(part)} answered" if known else "no answer"
        yield f"  {name}: {mean}"


def _at_once(gan: LoraGAN) -> int:
    """Calls that run at once, as `rewards.calling.Caller` makes them."""
    funcs = gan.true_reward.funcs
    if any(map(_in_batches, funcs)):
        return 1
    asynchronous = all(is_async(func) for func in funcs)
    return gan.config.reward_workers or (ASYNC_WORKERS if asynchronous else 1)


def _allowed(gan: LoraGAN) -> int | None:
    """Calls that a dry run may make: no more than reward_budget and reward_budget_total allow; None: no limit."""
    left = [calls for calls in (gan.budget.left("training"), gan.budget.left("dry_run")) if calls is not None]
    return min(left, default=None)


def _plan(gan: LoraGAN, steps: int, held_out: int) -> Plan:
    return planned(gan.config, first=gan.global_step, steps=steps, held_out=held_out, left=gan.budget.left())


def _in_batches(func: Callable[..., Any]) -> bool:
    """Whether one call of a reward is about several responses; reward_workers makes no difference then."""
    return hasattr(func, "batch") or rewards.takes_completions(func)


def _time(gan: LoraGAN, step: Seconds, tried: Tried, plan: Plan, steps: int) -> list[str]:
    """Seconds per step and for the whole run, and what they include."""
    config = gan.config
    asked = calls_per_step(config)
    rewarded = tried.seconds_for(asked)
    asking = min(steps, plan.training / asked) if asked else 0.0  # steps in which the true reward is asked
    if config.disc_objective == "real_vs_generated":
        learning = float(steps)
    else:
        learning = asking
    sampled = config.prompts_per_step * config.num_generations
    rewarding = asking * rewarded + plan.evaluations * tried.seconds_for(plan.rows)
    sampling_held_out = plan.evaluating * (step.sampling + step.predicting) / sampled
    updates = step.generator + step.predicting
    whole = steps * (step.sampling + updates) + learning * step.discriminator + sampling_held_out + rewarding
    includes = counted(steps, "step") + (f" and {counted(plan.evaluations, 'evaluation')}" if plan.evaluations else "")
    what = "one step" if step.whole else "a part of one step"
    how = f"measured on {what}, with responses of {step.tokens:.0f} tokens on average"
    return [
        f"about {duration(step.total + rewarded)} per step: sampling {duration(step.sampling)}, updates "
        f"{duration(step.updating)}, true reward {duration(rewarded)}",
        f"about {duration(whole)} for {includes}, {duration(rewarding)} of that for the {plan.total:,} calls of the "
        "true reward; saving checkpoints is not counted",
        how,
    ]


def _verdict_on_spread(reward_PK: np.ndarray) -> list[str]:
    """What is learned from is the difference between responses to one prompt."""
    answered_P = (~np.isnan(reward_PK)).sum(-1)
    spread_P = np.array([np.nanstd(group) if n > 1 else np.nan for group, n in zip(reward_PK, answered_P, strict=True)])
    if np.isnan(spread_P).all():
        return ["  ! no prompt has two answers: there is nothing to compare, and nothing to learn from"]
    flat = int((spread_P == 0).sum())
    said = f"  rewards of one prompt's responses differ by {np.nanmean(spread_P):.3f} (standard deviation)"
    if flat == len(spread_P):
        return [f"{said}\n  ! every response is worth the same: there is nothing to learn from yet"]
    return [said + (f"; none for {flat} of {len(spread_P)} prompts, which teach nothing" if flat else "")]


def _verdict_on_ends(ids: list[list[int]], gan: LoraGAN) -> list[str]:
    """Responses that were cut have no end, and the reward judges an unfinished text."""
    limit, ends = gan.config.max_completion_length, gan.players.base.eos_ids
    cut = sum(len(response) >= limit and response[-1] not in ends for response in ids)
    if 2 * cut < len(ids) or not cut:
        return []
    return [
        f"  ! {cut} of {len(ids)} responses were cut at max_completion_length={limit}: the reward judges unfinished "
        "texts"
    ]
