"""LoraGAN: the public class. `_step` and `_play` read as the algorithm; other files hold the details.

# P = prompts, K = responses per prompt, B = P·K responses in group order
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from . import data, rewards
from .config import Config
from .data import Prompt, Row
from .export import exporting
from .model import initial_adapter, sampling
from .model.adapter_files import load_initial
from .model.base import load_base
from .model.players import HEADS, Player, Players
from .rewards.budget import Budget, BudgetSpent, Purpose
from .rewards.true_reward import TrueReward
from .run import evaluation, recovery, row_checks, snapshot, tracking
from .run.callbacks import Callback, check_callbacks
from .run.display import aside_for
from .run.ending import Ending
from .run.interrupts import Interrupts
from .run.loop import FitLoop
from .state import Carried, RunState
from .storage import checkpoint, lock
from .training import distributed, estimate, scoring
from .training.discriminator import Discriminator
from .training.experience import Experience, RetainedFeatures
from .training.generator import Generator
from .training.health import Health
from .training.monitor import Monitor
from .training.plan import StepPlan, plan_step
from .wording import shown

RewardFunction = Callable[..., float]  # f(response, target) or f(prompt, response, target)
BatchedRewardFunction = Callable[..., Sequence[float | None]]
Dataset = str | os.PathLike[str] | Iterable[Mapping[str, Any] | Row] | Callable[[], Iterable[Mapping[str, Any]]]


#: Warning for plain prompts that are sent without the base's chat template.
PLAIN_PROMPTS = (
    "the base has a chat template, but plain prompts reach the model unchanged. Set apply_chat_template=True to send "
    "each prompt as a user message, or False to keep prompts plain without this notice"
)

#: Warning for num_generations=1.
NO_GROUP = (
    "num_generations=1: a single response per prompt has no group to be compared with. The baseline is a running mean "
    "of rewards, and the discriminator learns no ranking within groups. Set num_generations to 2 or more"
)


class Responses(list[str]):
    """Generated texts as a list. `token_ids` holds the sampled token ids of each text, with the end token."""

    def __init__(self) -> None:
        super().__init__()
        self.token_ids: list[list[int]] = []


class LoraGAN:
    """A generator and a discriminator as two LoRA adapters on one frozen base, trained against any reward.

    Args:
        model: a hub id, a local folder, a GGUF file, "tiny" (the base in this package), "smollm2" (after `lora-gan
            fetch smollm2`), or a loaded model together with `processing_class`.
        config: the settings. They can also be given by name: `LoraGAN("tiny", learning_rate=1e-3)`.
        reward: f(response, target) or f(prompt, response, target) -> float with these argument names; higher is better.
            Also a function in TRL's form, f(prompts, completions, **columns) -> list[float | None]. See
            docs/reference/rewards.md for the arguments of each form. Default: cosine by all-MiniLM-L6-v2.
        reward_funcs: instead of `reward`, several functions of either form. The true reward is their weighted sum.
        reward_weights: one weight per function of `reward_funcs`. Default: 1 each.
        processing_class: the tokenizer, if the base's own tokenizer is not used.
        peft_config: the generator's adapter as a peft.LoraConfig, for options other than lora_r and lora_alpha
            (target_modules, rank patterns, rsLoRA, DoRA).
        disc_peft_config: the discriminator's adapter as a peft.LoraConfig.
        init_adapter: a folder with a saved LoRA adapter, from this library or for example from TRL's SFTTrainer. The
            generator starts from this adapter and takes its LoRA settings. config.kl_reference selects the KL's
            reference.
        quantization_config: quantization of the base at loading, as in transformers.
        callbacks: transformers.TrainerCallback objects or classes, which fit() calls.
        reuse_answers: whether a resumed run reuses the answers in answers.jsonl even if the reward's source code has
            changed.

    Raises:
        ValueError: a base that cannot be opened, an unknown setting, settings that contradict each other, or a reward
            with an unsupported signature.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        config: Config | None = None,
        *,
        reward: RewardFunction | BatchedRewardFunction | None = None,
        reward_funcs: Sequence[RewardFunction | BatchedRewardFunction] | None = None,
        reward_weights: list[float] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        disc_peft_config: LoraConfig | None = None,
        init_adapter: str | os.PathLike[str] | None = None,
        quantization_config: Any = None,
        callbacks: list[Callback] | None = None,
        reuse_answers: bool = False,
        **settings: Any,
    ) -> None:
        _check_rewards(reward, reward_funcs, reward_weights)
        if type(self).compute_reward is not LoraGAN.compute_reward:
            rewards.check_reward(self.compute_reward)
        self.callbacks, self.reuse_answers = check_callbacks(callbacks), reuse_answers
        config = Config.from_dict({**(config.to_dict() if config else {}), **settings})
        start = None
        if init_adapter is not None:
            start = initial_adapter.read(Path(init_adapter), config=config, peft_config=peft_config)
        base = load_base(model, processing_class, config, quantization_config=quantization_config)
        if start is not None:
            start.require_fits(base)
        players = Players(base, config, peft_config=peft_config, disc_peft_config=disc_peft_config, init_adapter=start)
        if start is not None:
            load_initial(start, players)
        self.state = RunState(
            config=config,
            players=players,
            generator=Generator(players, config),
            discriminator=Discriminator(players, config),
            monitor=Monitor(config),
            health=Health(config),
            true_reward=TrueReward(config, self._active_rewards, players.encoder.response),
            init_adapter=None if start is None else start.name,
        )
        self._loop: FitLoop | None = None  # loop of the last fit()
        self._warned_of_no_group = False
        self._interrupts = Interrupts()
        self._cosine = rewards.CosineReward()
        if reward is not None and rewards.takes_completions(reward):
            reward_funcs = [reward]
        elif reward is not None:
            self.__setattr__("compute_reward", reward)  # replaces the method
        self.reward_funcs, self.reward_weights = reward_funcs, reward_weights
        for func in reward_funcs or ([] if reward is None else [reward]):
            if hasattr(func, "bind"):  # a reward that needs the base, such as Perplexity
                func.bind(self)

    # Attributes of the state, also accessible on the LoraGAN.
    config = Carried[Config]("state.config")
    players = Carried[Players]("state.players")
    generator = Carried[Generator]("state.generator")
    discriminator = Carried[Discriminator]("state.discriminator")
    monitor = Carried[Monitor]("state.monitor")
    health = Carried[Health]("state.health")
    init_adapter = Carried[str | None]("state.init_adapter")
    global_step = Carried[int]("state.global_step")
    position = Carried[int]("state.position")
    prompt_kinds = Carried[set[str]]("state.prompt_kinds")
    true_reward = Carried[TrueReward]("state.true_reward")
    budget = Carried[Budget]("state.true_reward.budget")
    reward_scales = Carried[rewards.Scales]("state.true_reward.scales")
    reward_failures = Carried[int]("state.true_reward.failures")
    trainer_state = Carried[TrainerState | None]("state.true_reward.trainer_state")

    @property
    def ending(self) -> Ending | None:
        """How the last fit() ended. None before the first fit(), and while fit() runs."""
        return None if self._loop is None else self._loop.ending

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a reward that is assigned to compute_reward, as the constructor does."""
        if name == "compute_reward" and callable(value):
            rewards.check_reward(value)
        super().__setattr__(name, value)

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(
        self,
        prompt: Prompt | list[Prompt],
        target_text: str | list[str | None] | None = None,
        train_gen: bool = True,
        train_disc: bool = True,
        *,
        adversarial: bool | None = None,
        **columns: Any,
    ) -> dict[str, Any]:
        """One cycle: sample K responses per prompt, predict rewards, query true rewards, update the players.

        Args:
            prompt: one prompt, or a list of P prompts. A prompt is a text, or a list of chat messages.
            target_text: one target per prompt, if the reward or imitation needs targets.
            train_gen: whether the generator learns in this step. If not, its weights stay bitwise equal.
            train_disc: the same for the discriminator.
            adversarial: overrides config.adversarial in this step.
            columns: further values by name (one, or a list of P) for the rewards.

        Returns:
            A dict. Its first keys are prompt, response, true_reward, disc_loss, pred_reward, gen_loss. They describe
            the first response of each prompt: plain values for one prompt, lists of P for P prompts. None: not
            computed. Then responses, true_rewards and pred_rewards hold all K values per prompt, and metrics follow.
            Rewards and metrics are fresh: measured before this step's updates.

        Raises:
            ValueError: a prompt that is empty or too long, a required target that is missing, or settings that
                contradict each other. `rewards.RewardError`: a reward function failed or returned invalid values.
            FloatingPointError: sampling failed, or 10 consecutive updates of a player were skipped, because numbers
                are not finite.
        """
        rows = self.as_meant(data.rows_of(prompt, target_text, columns))
        return self._step(rows, train_gen, train_disc, adversarial, single=data.is_prompt(prompt))

    def _step(
        self,
        rows: list[Row],
        train_gen: bool,
        train_disc: bool,
        adversarial: bool | None = None,
        *,
        single: bool = False,
    ) -> dict[str, Any]:
        """The step on rows, for step() and fit(): play, then update each player that learns."""
        for trainer, learns in ((self.generator, train_gen), (self.discriminator, train_disc)):
            if learns:
                trainer.optimizer.require_end()
        kinds = self._kinds(rows)
        self._notice_plain_prompts(kinds)
        signal = self.config.signal(self.config.adversarial if adversarial is None else adversarial)
        plan = plan_step(self.config, self.global_step, signal, train_gen=train_gen, train_disc=train_disc)
        if plan.imitates:
            data.require_targets(rows, "imitation needs target_text")
        if plan.reinforces and self.config.num_generations == 1 and not self._warned_of_no_group:
            self._warned_of_no_group = True
            warnings.warn(NO_GROUP, stacklevel=3)

        failures = self.true_reward.failures
        experience = self._play(rows, plan) if plan.samples else None
        gen: dict[str, Any] = {}
        disc: dict[str, Any] = {}
        alarms: list[str] = []
        if experience is not None and plan.discriminator_is_first:
            disc = self.discriminator.update(experience)
        if experience is not None and plan.reinforces:
            gen, alarms = self._reinforce(rows, experience, plan)
        elif plan.train_gen:
            gen = self.generator.update(rows, None, plan.signal, plan.imitation_weight)
        if experience is not None and plan.train_disc and not plan.discriminator_is_first:
            disc = self.discriminator.update(experience)
        self.global_step += 1
        self.prompt_kinds |= kinds
        recovery.require_progress(self.state, gen, disc)
        record = tracking.step_record(
            rows,
            experience,
            gen,
            disc,
            step=self.global_step,
            reward_calls=self.reward_calls,
            reward_failures=self.true_reward.failures - failures,
            eos_ids=self.players.base.eos_ids,
            single=single,
            alarms=alarms,
        )
        self._add_notices(record, plan)
        return record

    def _add_notices(self, record: dict[str, Any], plan: StepPlan) -> None:
        """Add this step's notices about problems of the run to the record, and warn about each."""
        record["notices"] += self.health.watch(record, learns_to_predict=plan.learns_to_predict)
        if plan.samples:
            measured = self.discriminator.fresh_correlation
            record["notices"] += self.true_reward.notice_of_spent_budget(plan.signal, measured)
        for notice in record["notices"]:
            warnings.warn(f"step {self.global_step}: {notice}", stacklevel=4)
        record["notices"] += self.true_reward.drain_causes()  # the true reward has warned about these already

    def _reinforce(self, rows: list[Row], experience: Experience, plan: StepPlan) -> tuple[dict[str, Any], list[str]]:
        """Let the generator learn from the reward, unless an audit ends the run. Returns metrics and alarms."""
        failure = self.monitor.audit(experience, self.generator) if experience.is_audit else None
        gen: dict[str, Any] = {}
        if experience.is_audit:
            gen["audit_passed"] = float(failure is None)
        alarms = [] if failure is None else [failure]
        if not experience.is_audit or self.state.why_over(plan.signal) is None:
            learned = self.discriminator.updated(experience) if plan.signal == "mixed" else experience
            gen |= self.generator.update(rows, learned, plan.signal, plan.imitation_weight)
            alarms = self.monitor.watch(experience, gen.get("kl"), self.generator)
            if self.config.audit_calls and self.budget.left() == 0 and self.monitor.audits.limit is None:
                self.monitor.begin_audits(self.discriminator.explained, self.generator)
                self.budget.audits = self.monitor.audits.reserved
        gen["exploit_evidence"] = self.monitor.test.evidence
        for alarm in alarms:  # warn now, because require_progress may raise
            warnings.warn(f"step {self.global_step + 1}: {alarm}", stacklevel=4)
        return gen, alarms

    def _play(self, rows: list[Row], plan: StepPlan) -> Experience:
        """Sample K responses per prompt, predict their rewards, and query true rewards at the query rate."""
        if plan.asks:
            if self.true_reward.is_over(plan.signal):
                raise BudgetSpent(
                    f"{self.budget.spent_setting}: raise it, or continue with predictions alone "
                    "(after_budget='predicted', and a reward_signal other than 'true')"
                )
            if (reason := self.state.why_over(plan.signal)) is not None:
                raise BudgetSpent(f"{reason}; on_exploit='warn' continues with predictions alone, without audits")
            self.true_reward.require_answerable(rows)
            if self.config.multi_objective_aggregation == "normalize_then_sum" and distributed.processes() > 1:
                raise ValueError(
                    "multi_objective_aggregation='normalize_then_sum' supports a single process: set 'sum'"
                )
        prompts = self.players.encoder.prompts(rows)
        sampled = self._sample(prompts, self._uniforms(prompts, self.config.num_generations, "sample"))
        features = RetainedFeatures()
        left = self.budget.left()
        if left != 0:
            self.monitor.end_audits()
        is_audit = plan.asks and plan.reinforces and self.monitor.audits.is_due
        if plan.discriminator_is_first and plan.asks and left != 0:
            predicted_MB, features = self.discriminator.predict_to_learn(sampled)
        elif plan.predicts:
            predicted_MB = self.discriminator.predict(sampled)
        else:
            predicted_MB = np.full((HEADS, len(sampled)), np.nan)
        queries = self._queries(sampled.group_B, plan, is_audit)
        notes = rewards.Notes()
        with self._interrupts.harmless(), aside_for(self.true_reward.funcs):
            answered = self.true_reward.query_step(
                rows,
                sampled.texts,
                lambda: sampled.responses,
                sampled.group_B,
                queries.asked_B,
                notes,
                step=self.global_step,
            )
        return Experience(
            step=self.global_step,
            rows=rows,
            prompts=prompts,
            rollout=sampled,
            predicted_MB=predicted_MB,
            asked_B=queries.asked_B,
            true_B=answered.true_B,
            inclusion_B=estimate.answered_inclusion(queries.inclusion_B, queries.asked_B, answered.failed_B),
            parts=answered.parts,
            probed=self.discriminator.probed(sampled, predicted_MB) if plan.predicts else None,
            trust=self.discriminator.trust,
            failed_B=answered.failed_B,
            features=features,
            notes=notes,
            is_audit=is_audit,
        )

    def _queries(self, group_B: np.ndarray, plan: StepPlan, is_audit: bool) -> estimate.Queries:
        """Draw the responses for which the true reward is queried."""
        rate = 1.0 if plan.signal == "true" else self.config.asked_share
        if is_audit:
            rate = 1 / self.config.num_generations  # an audit measures the level: one response to each prompt
        return estimate.choose_queries(
            group_B,
            rate if plan.asks else 0.0,
            seed=self.config.seed,
            step=self.global_step,
            design="uniform" if is_audit else self.config.query_design,
            left=self.budget.left(audit=is_audit),
        )

    @property
    def reward_calls(self) -> int:
        """Number of responses with a queried true reward in training so far. `budget` counts the other calls."""
        return self.budget.counts["training"]

    # --- the true reward --------------------------------------------------------------------------------------------

    def compute_reward(self, response: str, target: str | None) -> float:
        """The true reward of one response, by default the cosine. Assign a function or override this method to change
        the reward. `reward_funcs`, or a reward in TRL's form, replaces this method."""
        return self._cosine(response, target)

    def ask(
        self,
        rows: list[Row],
        responses: list[str],
        *,
        completion_ids: list[list[int]] | None = None,
        columns: Collection[str] = (),
        max_steps: int | None = None,
        notes: rewards.Notes | None = None,
        purpose: Purpose = "other",
    ) -> tuple[list[float | None], rewards.Parts]:
        """Query the true reward of one response to each row.

        The settings of queries apply as in a step: reward_workers, reward_timeout, reward_retries, on_reward_error.

        Args:
            rows: the row that each response answers.
            responses: texts.
            completion_ids: the responses' token ids as generated, with the end token. None: the texts are tokenized,
                and the end token is appended as in score(). These ids can differ from the generated ones.
            columns: names of columns in addition to those of the rows. Rewards receive None for these columns.
            max_steps: steps of the run for the trainer_state of rewards outside fit(). None: config.max_steps, or 0.
            notes: collects the values that rewards log with log_metric and log_extra.
            purpose: the budget's counter for these calls, see `rewards.budget.Budget`.

        Returns:
            One true reward per response, and the components by name. None: the reward gave no answer, or the call
            failed and on_reward_error is "skip".

        Raises:
            BudgetSpent: reward_budget_total is less than the necessary calls.
        """
        with aside_for(self.true_reward.funcs):
            return self.true_reward.ask(
                rows,
                responses,
                step=self.global_step,
                completion_ids=completion_ids,
                columns=columns,
                max_steps=max_steps,
                notes=notes,
                purpose=purpose,
            )

    @property
    def reward_names(self) -> list[str]:
        """Names of the true reward's components in logs."""
        return self.true_reward.names

    @property
    def reward_sources(self) -> dict[str, str]:
        """{name: digest of the reward's source code}. A resumed run reuses answers only if the digest is equal."""
        return self.true_reward.sources

    def _active_rewards(self) -> tuple[list[Callable[..., Any]], list[float] | None]:
        """The functions of the true reward and their weights. The latest assignment counts."""
        assigned = "compute_reward" in vars(self)
        if self.reward_funcs and not assigned:
            return list(self.reward_funcs), self.reward_weights
        overridden = assigned or type(self).compute_reward is not LoraGAN.compute_reward
        return [self.compute_reward if overridden else self._cosine], None

    # --- many steps -------------------------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Dataset,
        steps: int | None = None,
        *,
        eval_dataset: Dataset | None = None,
        train_gen: bool = True,
        train_disc: bool = True,
        progress: bool = True,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Train on a dataset for `steps` more steps, with `config.prompts_per_step` rows per step, in shuffled epochs.

        fit() writes metrics.jsonl and completions.jsonl to output_dir, and checkpoints step-N every `config.save_steps`
        and at the end. After load_checkpoint() it continues with the next rows. `self.ending` says why the run ended.

        Args:
            dataset: rows in any form of `data.read_rows`, such as mappings, a file, a `datasets.Dataset`.
            steps: number of further steps. None: until `config.max_steps`, or for `config.num_train_epochs`.
            eval_dataset: held-out rows. fit() evaluates before the first step (`config.eval_on_start`), every
                `config.eval_steps`, and at the end.
            train_gen, train_disc: as in `step()`.
            progress: whether to show a live display on a terminal, or plain lines elsewhere.
            on_step: called with the record of each step.

        Returns:
            The records of the steps, at most the last 500.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when the current step is finished and saved.
            SystemExit: with code 143 after SIGTERM, when the current step is finished and saved.
            ValueError: another run writes to output_dir, or an argument is not accepted.
            FloatingPointError: as in `step()`, if the run cannot return to a checkpoint. No failed state is saved.
        """
        signal = self.config.signal(self.config.adversarial)
        plan = plan_step(self.config, self.global_step, signal, train_gen=train_gen, train_disc=train_disc)
        rows = self.check_rows(dataset, train_gen=train_gen, asks=plan.asks, progress=progress)
        held_out = None if eval_dataset is None else self.check_held_out(eval_dataset, rows, progress=progress)
        steps = self.steps_left(rows) if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps={steps} is not accepted: it must be 0 or more")
        if self.config.save_best and held_out is None:
            raise ValueError("save_best=True needs evaluations: give fit() an eval_dataset")
        if steps:
            for trainer in (self.generator, self.discriminator):
                trainer.optimizer.plan(self.config.max_steps or self.global_step + steps)
        self._loop = FitLoop(
            self.state,
            rows,
            held_out,
            steps,
            step=lambda batch: self._step(self.as_meant(batch), train_gen, train_disc),
            evaluate=self.evaluate,
            on_step=on_step,
            callbacks=self.callbacks,
            reuse_answers=self.reuse_answers,
            interrupts=self._interrupts,
            progress=progress,
        )
        return self._loop.run()

    def steps_left(self, rows: list[Row] | data.Stream) -> int:
        """Number of steps that fit() runs on these rows if its `steps` is None.

        Raises:
            ValueError: the rows are a stream, and max_steps is None.
        """
        steps = self.config.max_steps
        if steps is None:
            if isinstance(rows, data.Stream):
                raise ValueError("streamed rows have no length, so num_train_epochs does not apply: set max_steps")
            steps = math.ceil(self.config.num_train_epochs * len(rows) / self.config.prompts_per_step)
        return max(0, steps - self.global_step)

    # --- using the players ------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        best_of: int = 1,
        *,
        temperature: float | None = None,
        top_p: float = 1.0,
        max_completion_length: int | None = None,
        seed: int | None = None,
        player: Player = "generator",
        batch_size: int | None = None,
        apply_chat_template: bool | None = None,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Generate one response per prompt. Equal seed and step give equal responses, independent of the batch.

        Args:
            prompts: one prompt, or a list of prompts. A prompt is a text, or a list of chat messages.
            best_of: responses sampled per prompt. The discriminator picks the one with the highest predicted reward.
            temperature, max_completion_length: None: the config's values. Temperature 0 is greedy decoding.
            top_p: nucleus sampling: share of the probability that is kept.
            seed: seed of the sampling. None: config.seed.
            player: "generator"; "reference", the KL's reference; or "base", with both adapters off.
            batch_size: prompts in one batch. None: all.
            apply_chat_template: True sends a text as a user message, False sends it unchanged. None: as
                config.apply_chat_template; if this is None, too, as in training.
            tools, chat_template_kwargs: options for the chat template of all prompts. They override the config's.

        Returns:
            A list of texts, also for a single prompt. Its `token_ids` holds the sampled ids of each text, with the end
            token.

        Raises:
            ValueError: a prompt that is empty or too long, or an argument that is not accepted.
        """
        rows = self.as_meant(data.as_rows(prompts, tools, chat_template_kwargs), apply_chat_template, follow=True)
        if not isinstance(best_of, int) or best_of < 1:
            raise ValueError(f"best_of={best_of!r} is not accepted: it must be a whole number from 1")
        if not rows:
            return []
        encoded = self._encode(rows, max_completion_length)
        uniforms = self._uniforms(encoded, best_of, "generate", length=max_completion_length, seed=seed)
        responses = Responses()
        for part in sampling.chunks(len(rows), batch_size):
            draws = slice(part.start * best_of, part.stop * best_of)
            sampled = self._sample(encoded[part], uniforms[draws], temperature=temperature, top_p=top_p, player=player)
            predicted_B = self.discriminator.rank(sampled) if best_of > 1 else np.zeros(len(sampled))
            best = predicted_B.reshape(-1, best_of).argmax(-1)
            chosen = [j * best_of + int(i) for j, i in enumerate(best)]
            responses += [sampled.texts[i] for i in chosen]
            responses.token_ids += [sampled.responses[i] for i in chosen]
        return responses

    def score(
        self,
        prompts: Prompt | list[Prompt],
        responses: str | list[str],
        *,
        batch_size: int | None = None,
        apply_chat_template: bool | None = None,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Predict the reward of one response to each prompt with the discriminator.

        Prompt and response are tokenized separately and concatenated, and the end token for this kind of prompt is
        appended. So the prediction equals `pred_reward` of training for a sampled response with the same tokens. Stock
        clients compute it, too. Training and `generate(best_of=)` add the probe, which compares responses to one
        prompt.

        Args:
            prompts: one prompt, or a list of prompts.
            responses: one text per prompt.
            batch_size: pairs in one batch. None: all.
            apply_chat_template, tools, chat_template_kwargs: as in `generate()`.

        Returns:
            A list of predicted rewards, also for a single prompt.

        Raises:
            ValueError: different numbers of prompts and responses, or a pair that exceeds the base's context.
        """
        rows = self.as_meant(data.as_rows(prompts, tools, chat_template_kwargs), apply_chat_template, follow=True)
        responses = [responses] if isinstance(responses, str) else list(responses)
        if len(rows) != len(responses):
            raise ValueError(f"{len(rows)} prompts and {len(responses)} responses: give one response to each prompt")
        for number, response in enumerate(responses, 1):
            if not isinstance(response, str):
                raise ValueError(f"response {number} must be a text, not {shown(response)}")
            data.require_unicode(response, f"response {number}")
        if not rows:
            return []
        predicted: list[float] = []
        for part in sampling.chunks(len(rows), batch_size):
            encoded = self.players.encoder.pairs(rows[part], responses[part])
            pairs = sampling.Rollout(self.players, *encoded, np.arange(len(rows[part])), responses[part])
            predicted += self.discriminator.predict(pairs).mean(0).tolist()
        return predicted

    def base_logprobs(self, rows: list[Row], texts: list[str], *, batch_size: int = 16) -> list[float | None]:
        """Mean log-probability per token of each text under the base, in nats. The reward `Perplexity` calls this.

        See `training.scoring.mean_logprobs`.
        """
        return scoring.mean_logprobs(self.players, rows, texts, batch_size=batch_size)

    @property
    def base_name(self) -> str:
        """Hub id or path of the base."""
        return self.players.base.name

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base's weights. Checkpoints record it."""
        return self.players.base.fingerprint

    def evaluate(self, dataset: Dataset, **options: Any) -> dict[str, Any]:
        """Evaluate on held-out rows: true and predicted reward, other metrics (95 % intervals over prompts), samples.

        Args:
            dataset: rows, in any form of `data.read_rows`.
            options: temperature, player, best_of, seed, batch_size, apply_chat_template; see `evaluation.evaluate`.
        """
        chats = options.pop("apply_chat_template", None)
        checked = self.check_rows(dataset, split="test", train_gen=False, apply_chat_template=chats)
        rows = self.as_meant(list(checked), chats, follow=True)
        return evaluation.evaluate(rows, generate=self.generate, score=self.score, ask=self.ask, **options)

    def check_rows(
        self,
        dataset: Dataset,
        *,
        split: str = "train",
        train_gen: bool = True,
        asks: bool = True,
        progress: bool = True,
        apply_chat_template: bool | None = None,
    ) -> list[Row] | data.Stream:
        """Read a data set and check its rows, as fit() does before its first step. A stream checks rows on reading.

        Args:
            dataset: rows, in any form of `data.read_rows`.
            split: the split to read from a data set with several splits.
            train_gen: whether the generator learns from these rows. Imitation then needs targets.
            asks: whether true rewards are queried. Rewards may need targets and columns.
            progress: whether to show a progress bar if the check takes long.
            apply_chat_template: as in `generate()`.

        Raises:
            ValueError: a prompt that is empty, rejected by the chat template, or too long (see
                `config.on_long_prompt`), or a missing target. The message names the row.
        """
        if isinstance(dataset, row_checks.CheckedRows):
            return dataset
        encoder, held_out = self.players.encoder, split != "train"
        prompts, targets = self.config.prompt_column, self.config.target_column
        rows = data.read_rows(dataset, split=split, prompt_column=prompts, target_column=targets)
        if held_out:
            rows = list(rows)  # an evaluation reads all rows anyway
        imitates = train_gen and bool(self.config.imitation_weight or self.config.imitation_warmup_steps)
        compares = self.config.disc_objective == "real_vs_generated"

        def check(row: Row) -> None:
            (row,) = self.as_meant([row], apply_chat_template, follow=held_out)
            encoder.prompt(row)
            if asks:
                self.true_reward.require_comparable([row])
            if imitates:
                data.require_targets([row], "imitation needs target_text")
            if (imitates or (compares and not held_out)) and row.target is not None:
                encoder.target(row)

        drop_long = self.config.on_long_prompt == "drop"
        rows = row_checks.checked(rows, check, drop_long=drop_long, progress=progress)
        if asks:
            called = "evaluation data" if held_out else "data"
            self.true_reward.require_columns(rows, called, position=self.position)
        return rows

    def check_held_out(
        self, dataset: Dataset, training: list[Row] | data.Stream, *, progress: bool = True
    ) -> list[Row]:
        """Read and check held-out rows. Plain prompts are checked in the form that fit() on `training` will send.

        Raises:
            ValueError: as `check_rows`.
        """
        first = training.take(1, self.position) if isinstance(training, data.Stream) else training
        chats = self._plain_as_messages(self.prompt_kinds | self._kinds(first))
        rows = self.check_rows(dataset, split="test", train_gen=False, progress=progress, apply_chat_template=chats)
        assert isinstance(rows, list), "check_rows returns held-out rows as a list"
        return rows

    def as_meant(self, rows: list[Row], apply_chat_template: bool | None = None, *, follow: bool = False) -> list[Row]:
        """Convert plain prompts to user messages, if apply_chat_template is True.

        Args:
            apply_chat_template: overrides config.apply_chat_template, unless None.
            follow: if both are None, whether to use the form of the prompts that the generator was trained on.
        """
        as_chat = self.config.apply_chat_template if apply_chat_template is None else apply_chat_template
        if as_chat is None and follow:
            as_chat = self._plain_as_messages(self.prompt_kinds)
        return self.players.encoder.as_chat(rows) if as_chat else rows

    def _plain_as_messages(self, kinds: set[str]) -> bool | None:
        """Whether plain prompts are sent as messages, given the kinds of trained prompts. None: the setting decides."""
        if self.config.apply_chat_template is not None:
            return None
        return kinds == {"messages"} and self.players.encoder.has_template

    def _kinds(self, rows: list[Row]) -> set[str]:
        return {"messages" if self.players.encoder.is_chat(row) else "texts" for row in rows}

    def _notice_plain_prompts(self, kinds: set[str]) -> None:
        """Warn about plain prompts that bypass the base's chat template, in the first step that has such prompts."""
        bypasses = self.players.encoder.has_template and self.config.apply_chat_template is None
        if bypasses and "texts" in kinds - self.prompt_kinds:
            warnings.warn(PLAIN_PROMPTS, stacklevel=4)

    def _encode(self, prompts: Iterable[Prompt | Row], length: int | None = None) -> list[list[int]]:
        if length is not None and length < 1:
            raise ValueError(f"max_completion_length={length} is not accepted: it must be a whole number from 1")
        return self.players.encoder.prompts(data.as_rows(list(prompts)), length)

    def _uniforms(
        self, prompts: list[list[int]], count: int, purpose: str, *, length: int | None = None, seed: int | None = None
    ) -> Tensor:
        """Uniform random numbers for `count` responses to each prompt at this step, [B, T]."""
        return sampling.keyed_uniforms(
            prompts,
            count,
            length or self.config.max_completion_length,
            seed=self.config.seed if seed is None else seed,
            step=self.global_step,
            purpose=purpose,
        )

    def _sample(
        self,
        prompts: list[list[int]],
        uniforms_BT: Tensor,
        *,
        temperature: float | None = None,
        top_p: float = 1.0,
        player: Player = "generator",
    ) -> sampling.Rollout:
        temperature = self.config.temperature if temperature is None else temperature
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature}, top_p={top_p} is not accepted: temperature must be 0 or more (0 is "
                "greedy), top_p above 0 and at most 1"
            )
        with self.players.use_adapter(player):
            return sampling.sample(
                self.players,
                prompts,
                uniforms_BT,
                decode=self.players.encoder.decode,
                temperature=temperature,
                top_p=top_p,
            )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int | None = None, ckpt_dir: str | os.PathLike[str] | None = None) -> Path:
        """Save a checkpoint to ckpt_dir/step-N, and return its folder.

        This deletes no earlier checkpoint (save_total_limit is ignored), and fit() never deletes this one.

        Args:
            step: N. None: the number of steps taken.
            ckpt_dir: None: config.output_dir.
        """
        folder = Path(self.config.output_dir if ckpt_dir is None else ckpt_dir)
        with lock.writing_alone(folder, self.state):
            content = snapshot.take(self.state, by_hand=True)
            return checkpoint.write(content, folder, self.global_step if step is None else step)

    def load_checkpoint(self, step: int | None = None, ckpt_dir: str | os.PathLike[str] | None = None) -> None:
        """Load ckpt_dir/step-N, and continue exactly from there.

        Args:
            step: N. None: the newest complete checkpoint.
            ckpt_dir: None: config.output_dir.

        Raises:
            ValueError: there is no complete checkpoint, or it does not match this base or these settings.
        """
        folder = Path(self.config.output_dir if ckpt_dir is None else ckpt_dir)
        snapshot.restore(self.state, checkpoint.find(folder, step))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], model: Any = None, **arguments: Any) -> LoraGAN:
        """Make a LoraGAN from a checkpoint.

        The reward is not saved: give it again. A recorded base is never downloaded: without `model`, it must be on this
        machine already, and its fingerprint must match.

        Args:
            path: the folder of one step, or of a run, of which the newest complete step is loaded.
            model: the base, as in the constructor. None: the base recorded in the checkpoint.
            arguments: constructor arguments and settings. They override the settings of the checkpoint.
        """
        step_folder, arguments = snapshot.arguments_of(Path(path), model, arguments)
        gan = cls(**arguments)
        snapshot.restore(gan.state, step_folder)
        return gan

    def load_generator(self, path: str | os.PathLike[str]) -> None:
        """Replace the generator by a saved one, with its optimizer if saved.

        The discriminator and its optimizer stay bitwise equal. If the checkpoint records the kind of training prompts,
        plain prompts are sent in this form from now on.

        Args:
            path: a step's folder, or its generator/.
        """
        snapshot.load_generator(self.state, Path(path))

    def load_discriminator(self, path: str | os.PathLike[str]) -> None:
        """Replace the discriminator by a saved one, with its optimizer and replay if saved.

        The generator and its optimizer stay bitwise equal.

        Args:
            path: a step's folder, or its discriminator/.
        """
        snapshot.load_discriminator(self.state, Path(path))

    # --- export -----------------------------------------------------------------------------------------------------

    def export(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """Write both players as safetensors for stock PEFT and transformers, adapters and merged models, with model
        cards.

        See `exporting.export` for the options (parts, dtype, evaluation, license, push_to_hub, private).
        """
        return exporting.export(self.state, output_dir, **options)


def _check_rewards(
    reward: RewardFunction | BatchedRewardFunction | None,
    reward_funcs: Sequence[RewardFunction | BatchedRewardFunction] | None,
    reward_weights: Sequence[float] | None,
) -> None:
    """Raise ValueError if the reward arguments contradict each other, or a reward cannot be called."""
    if reward is not None and reward_funcs:
        raise ValueError("reward= and reward_funcs= both set the true reward: give only one")
    if reward_funcs is not None and not isinstance(reward_funcs, (list, tuple)):
        raise ValueError("reward_funcs must be a list of functions; give a single function as reward=")
    if reward_weights is not None and len(reward_weights) != len(reward_funcs or []):
        raise ValueError(
            f"{len(reward_weights)} reward_weights for {len(reward_funcs or [])} reward_funcs: give one weight each"
        )
    for func in reward_funcs or ([] if reward is None else [reward]):
        if not callable(func):
            raise ValueError(f"the reward {func!r} is not a function: give a function, or rewards.from_spec({func!r})")
        rewards.check_reward(func)
