"""One run of the learning benchmark: trains with one arm's settings, and evaluates on held-out prompts."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from learning_settings import Planned
from learning_tasks import Reward, Task, load

from lora_gan import LoraGAN, data
from lora_gan.model import sampling
from lora_gan.rewards.text import distinct_n
from lora_gan.training import losses

TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
EVERY = 10  # Steps between points of the curve. Fewer for a small budget.
CANDIDATES = 8  # Responses per prompt for best_of.
ROWS = 160  # Responses sampled and judged together.
IDLE = 1000  # Steps without a call after which a run is stopped: it would never spend its budget.


def run(planned: Planned, e2e: dict[str, str] | None = None) -> dict[str, Any]:
    """Make a run. Returns the line of the results file, as plain values."""
    torch.set_num_threads(1)  # with bases this small, more threads wait for each other
    began = time.perf_counter()
    task = load(planned.task, seed=planned.seed, options=planned.options, e2e=e2e)
    with tempfile.TemporaryDirectory() as folder:
        result = (_run_trl if planned.options["kind"].startswith("trl") else _run_lora_gan)(planned, task, folder)
    return {**planned.to_dict(), **result, "wall": round(time.perf_counter() - began, 1)}


def build(planned: Planned, task: Task, reward: Reward, folder: str) -> LoraGAN:
    settings: dict[str, Any] = dict(planned.settings)
    options = planned.options
    if options["kind"] == "sft":
        settings |= {"imitation_weight": settings.get("imitation_weight") or 1.0, "reward_weight": 0.0}
    if options["max_steps"]:
        settings.setdefault("max_steps", options["max_steps"])
    gan = LoraGAN(
        task.model, reward=reward, seed=planned.seed, output_dir=folder, reward_budget=planned.budget, **settings
    )
    if options["kind"] == "null":
        shuffle_labels(gan)
    return gan


def shuffle_labels(gan: LoraGAN) -> None:
    """Shuffle the discriminator's true rewards among the queried responses of each step.

    Any effect of this discriminator does not come from knowing which response is better. The generator still receives
    the unshuffled true rewards, if its reward signal uses them.
    """
    update = gan.discriminator.update

    def shuffled(experience: Any, *arguments: Any, **named: Any) -> Any:
        return update(with_shuffled_labels(experience, gan.config.seed), *arguments, **named)

    gan.discriminator.update = shuffled


def with_shuffled_labels(experience: Any, seed: int) -> Any:
    from lora_gan import randomness

    true_B = experience.true_B.copy()
    answered = np.flatnonzero(~np.isnan(true_B))
    true_B[answered] = true_B[randomness.generator(seed, experience.step, "null").permutation(answered)]
    return dataclasses.replace(experience, true_B=true_B)


# --- progress of a run ------------------------------------------------------------------------------------------------


class Course:
    """The progress of a run: the marks that are due, and the results of the marks so far."""

    def __init__(self, planned: Planned, task: Task, reward: Reward) -> None:
        self.planned, self.task, self.reward = planned, task, reward
        options, budget = planned.options, planned.budget
        # A run that queries no reward is measured by its steps, with marks at the same fractions.
        self.by_steps = options["kind"] == "sft" or planned.settings.get("disc_objective") == "real_vs_generated"
        if self.by_steps and not options["max_steps"]:
            raise ValueError(f"{planned.key} queries no reward, so it needs max_steps")
        calls = [0, budget // 4, budget // 2, budget] if options["marks"] is None else options["marks"]
        self.due = sorted({int(mark) for mark in calls if mark <= budget})
        self.steps_due = sorted(int(mark) for mark in options["step_marks"])
        self.marks: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self.best_of: dict[str, Any] | None = None
        self.every = min(EVERY, max(1, budget // 60))
        self.seconds = 0.0  # of training, on one core, without evaluations
        self.alarms = 0
        self.recent: list[dict[str, Any]] = []
        self.within: deque[float] = deque(maxlen=10)

    def share(self, calls: int, step: int) -> float:
        """The share of the budget that is spent."""
        return step / self.planned.options["max_steps"] if self.by_steps else calls / self.planned.budget

    def over(self, calls: int, step: int, since_spent: int) -> bool:
        options = self.planned.options
        if options["max_steps"] and step >= options["max_steps"]:
            return True
        return self.share(calls, step) >= 1 and (self.by_steps or since_spent >= options["extra_steps"])

    def add(self, record: Mapping[str, Any], seconds: float, calls: int) -> None:
        """Record a finished step."""
        self.seconds += seconds
        alarms = record.get("alarms")
        self.alarms += int(alarms) if isinstance(alarms, (int, float)) else len(alarms or ())
        if record.get("rank_correlation_within") is not None:
            self.within.append(float(record["rank_correlation_within"]))
        self.recent.append(dict(record))
        if len(self.recent) == self.every:
            names = ("reward_mean", "pred_reward_mean", "rank_correlation_within", "kl")
            point = {"step": record["step"], "calls": calls, "seconds": round(self.seconds, 2)}
            self.curve.append(point | {name: mean(line.get(name) for line in self.recent) for name in names})
            self.recent = []

    def at(self, gan: LoraGAN, calls: int, step: int) -> None:
        """Evaluate, if a mark is due at this point."""
        spent = self.share(calls, step) * self.planned.budget
        labels = []
        while self.due and spent >= self.due[0] - 1e-9:
            labels = [str(self.due.pop(0))]  # if several are due together, the last one gives the name
        while self.steps_due and step >= self.steps_due[0]:
            labels.append(f"step {self.steps_due.pop(0)}")
        if labels:
            self.mark(gan, labels[0], calls, step)
        if self.planned.options["best_of"] and self.best_of is None and spent >= self.planned.budget / 2:
            self.best_of = {"calls": calls, "step": step} | best_of(gan, self.task)

    def finish(self, gan: LoraGAN, calls: int, step: int) -> dict[str, Any]:
        if not self.marks or self.marks[-1]["step"] != step:
            self.mark(gan, "end", calls, step)
        if self.planned.options["best_of"] and self.best_of is None:
            self.best_of = {"calls": calls, "step": step} | best_of(gan, self.task)
        result = {
            "calls": calls, "steps": step, "seconds": round(self.seconds, 2), "alarms": self.alarms,
            "marks": self.marks, "curve": self.curve,
        }  # fmt: skip
        if self.planned.options["sweep"]:
            result["sweep"] = [{"temperature": t} | judge(gan, self.task, temperature=t) for t in TEMPERATURES]
        if self.best_of is not None:
            result["best_of"] = self.best_of
        return result | {"samples": samples(gan, self.task)}

    def mark(self, gan: LoraGAN, label: str, calls: int, step: int) -> None:
        entry = {"at": label, "calls": calls, "step": step, "seconds": round(self.seconds, 2), "alarms": self.alarms}
        entry |= judge(gan, self.task, kl=True) | {"rank_correlation_within": mean(self.within)}
        self.marks.append(entry)


def mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    return round(float(np.mean(known)), 4) if known else None


def _run_lora_gan(planned: Planned, task: Task, folder: str) -> dict[str, Any]:
    reward = Reward(planned.reward, task.score, seed=planned.seed, sigma=planned.options["sigma"] or task.sigma)
    gan, course = build(planned, task, reward, folder), Course(planned, task, reward)
    trains_disc = planned.options["train_disc"] and planned.options["kind"] != "sft"
    since_spent = idle = 0
    course.at(gan, 0, 0)
    signal = gan.config.signal(gan.config.adversarial)
    while not course.over(gan.reward_calls, gan.global_step, since_spent) and gan.state.why_over(signal) is None:
        spent, before = gan.reward_calls >= planned.budget, gan.reward_calls
        batch = data.take(task.train, gan.config.prompts_per_step, seed=planned.seed, position=gan.position)
        began = time.process_time()  # of this process only, so other load on the cores does not count
        record = gan._step(batch, True, trains_disc)
        seconds = time.process_time() - began
        gan.position += len(batch)
        since_spent += spent
        idle = 0 if gan.reward_calls > before or spent or course.by_steps else idle + 1
        if idle >= IDLE:
            raise RuntimeError(f"{IDLE} steps without a call of the true reward at {before} of {planned.budget} calls")
        course.add(record, seconds, gan.reward_calls)
        course.at(gan, gan.reward_calls, gan.global_step)
    return course.finish(gan, gan.reward_calls, gan.global_step)


# --- judging ----------------------------------------------------------------------------------------------------------


def respond(gan: LoraGAN, task: Task, count: int, temperature: float | None = None) -> list[sampling.Rollout]:
    """`count` responses to each held-out prompt, in parts.

    The uniform random numbers are equal for all arms and steps, so models do not differ by their draws.
    """
    encoded = gan._encode(row.prompt for row in task.heldout)
    parts = []
    for part in sampling.chunks(len(encoded), max(1, ROWS // count)):
        uniforms = sampling.keyed_uniforms(
            encoded[part], count, gan.config.max_completion_length, seed=gan.config.seed, step=0, purpose="judge"
        )
        parts.append(gan._sample(encoded[part], uniforms, temperature=temperature))
    return parts


def judge(gan: LoraGAN, task: Task, *, temperature: float | None = None, kl: bool = False) -> dict[str, Any]:
    """All metrics of `task.samples` responses to each held-out prompt.

    A list of means per prompt, or one number over all responses.
    """
    parts = respond(gan, task, task.samples, temperature)
    texts = [text for part in parts for text in part.texts]
    rows = [row for row in task.heldout for _ in range(task.samples)]
    targets = [row.target for row in rows]
    columns = {"reward": task.score(texts, targets)}
    columns |= {name: its(texts, targets) for name, its in task.judges.items()}
    if task.base_logprob:
        known = gan.base_logprobs(rows, texts)
        columns["base_logprob"] = [np.nan if value is None else value for value in known]
    columns |= {"length": [len(text.split()) for text in texts]}
    judged: dict[str, Any] = {
        name: rounded(np.nanmean(np.reshape(values, (-1, task.samples)), axis=1)) for name, values in columns.items()
    }
    judged["distinct_2"] = round(distinct_n(texts, 2), 4)
    if kl:
        judged["kl"] = round(float(np.mean([value for part in parts for value in kl_of(gan, part)])), 4)
    return judged


def rounded(values: Any) -> list[float | int]:
    """Values with four digits, whole numbers as int. This keeps the committed file small."""
    short = [round(float(value), 4) for value in values]
    return [int(value) if value.is_integer() else value for value in short]


@torch.no_grad()
def kl_of(gan: LoraGAN, rows: sampling.Rollout) -> list[float]:
    """KL(generator ‖ base) of each response in nats, exact over the vocabulary at each sampled token, temperature 1."""
    batch, logits = rows.batch(), {}
    for player in ("generator", "reference"):
        with gan.players.use_adapter(player):
            logits[player] = gan.players.lm_head(gan.players.hidden(batch, batch.predicting_R))
    _, kl_R = losses.logprobs_and_kl(logits["generator"], batch.response_ids_R, logits["reference"])
    return torch.zeros(len(batch), device=kl_R.device).index_add_(0, batch.row_R, kl_R).tolist()


def best_of(gan: LoraGAN, task: Task, count: int = CANDIDATES) -> dict[str, Any]:
    """True reward per prompt of the first of `count` samples, of the discriminator's pick, and of the oracle's pick."""
    parts = respond(gan, task, count)
    texts = [text for part in parts for text in part.texts]
    true_PK = np.array(task.score(texts, [row.target for row in task.heldout for _ in range(count)]))
    predicted_PK = np.concatenate([gan.discriminator.rank(part) for part in parts])
    true_PK, predicted_PK = true_PK.reshape(-1, count), predicted_PK.reshape(-1, count)
    picked_P = true_PK[np.arange(len(true_PK)), predicted_PK.argmax(-1)]
    named = {"first": true_PK[:, 0], "mean": true_PK.mean(-1), "picked": picked_P, "oracle": true_PK.max(-1)}
    return {name: rounded(values_P) for name, values_P in named.items()}


def samples(gan: LoraGAN, task: Task, count: int = 4) -> list[dict[str, Any]]:
    few = dataclasses.replace(task, heldout=task.heldout[:count])
    texts = [text for part in respond(gan, few, 1) for text in part.texts]
    if task.model != "tiny":  # the data of the other tasks are not ours to publish
        return [{"response": text} for text in texts]
    return [
        {"prompt": row.prompt, "target": row.target, "response": text}
        for row, text in zip(few.heldout, texts, strict=True)
    ]


# --- the peer ---------------------------------------------------------------------------------------------------------


def _run_trl(planned: Planned, task: Task, folder: str) -> dict[str, Any]:
    """TRL's GRPOTrainer on the true reward, with RLOO's batch, group, learning rate and KL weight.

    All other settings are TRL's own. For the kind trl-unscaled, advantages are not divided by a group's standard
    deviation, as in RLOO. A LoraGAN loads the adapter from the files that PEFT saved, and evaluates it like all others.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lora_gan import tiny

    reward = Reward(planned.reward, task.score, seed=planned.seed, sigma=planned.options["sigma"] or task.sigma)
    gan = LoraGAN(task.model, reward=reward, seed=planned.seed, output_dir=folder, **planned.settings)
    config, course = gan.config, Course(planned, task, reward)
    batch = config.prompts_per_step * config.num_generations
    steps = planned.options["max_steps"] or planned.budget // batch  # an incomplete last batch is not spent
    course.at(gan, 0, 0)

    class Judging(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "reward" in logs:
                record = {"step": state.global_step, "reward_mean": logs["reward"], "kl": None}
                course.add(record, time.process_time() - self.began, reward.calls)
                self.took_over(state.global_step)

        def took_over(self, step: int) -> None:
            next_mark = course.due and reward.calls >= course.due[0] or course.steps_due and step >= course.steps_due[0]
            if next_mark:
                read()
                course.at(gan, reward.calls, step)

    def read() -> None:
        trainer.model.save_pretrained(f"{folder}/adapter")
        gan.load_generator(f"{folder}/adapter")

    def true(prompts: list[str], completions: list[str], target: list[str] | None = None, **_: Any) -> list[float]:
        return reward(prompts, completions, target)

    rows = [
        {"prompt": row.prompt} | ({} if row.target is None else {"target": row.target})
        for row in data.take(task.train, steps * config.prompts_per_step, seed=planned.seed, position=0)
    ]
    trainer = GRPOTrainer(
        model=str(tiny.PATH) if task.model == "tiny" else gan.players.base.path,
        reward_funcs=true,
        args=GRPOConfig(
            output_dir=f"{folder}/grpo", max_steps=steps, per_device_train_batch_size=batch, seed=planned.seed,
            num_generations=config.num_generations, max_completion_length=config.max_completion_length,
            learning_rate=config.learning_rate, lr_scheduler_type="constant", beta=config.beta,
            temperature=config.temperature, shuffle_dataset=False,
            scale_rewards="none" if planned.options["kind"] == "trl-unscaled" else "group",
            model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear"),
        callbacks=[Judging()],
    )  # fmt: skip
    trainer.train()
    read()
    if course.due:  # the budget is not a multiple of the batch
        course.due = []
        if course.marks and course.marks[-1]["step"] != steps:
            course.mark(gan, str(planned.budget), reward.calls, steps)
    return course.finish(gan, reward.calls, steps)
