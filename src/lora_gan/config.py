"""Every setting, with its unit. Names are TRL's and transformers' where those have one; the discriminator's own start
with `disc_`. All validation of settings is here; `Config` is frozen, `dataclasses.replace` makes a changed one.

The text under a field is what editors show and what `lora-gan train --help` prints.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .wording import shown

RewardSignal = Literal["true", "predicted", "corrected"]
GradientPath = Literal["policy_gradient", "straight_through"]
QueryDesign = Literal["uniform", "groups", "uncertain"]
AfterBudget = Literal["predicted", "stop"]
DiscObjective = Literal["regression", "real_vs_generated"]
ReplayPolicy = Literal["fifo", "reservoir"]
OnRewardError = Literal["raise", "skip"]
OnExploit = Literal["warn", "stop", "rollback"]
OnNonfinite = Literal["stop", "rollback"]
OnLongPrompt = Literal["raise", "drop", "truncate_left"]
WeightsFormat = Literal["bin", "safetensors"]
KLReference = Literal["base", "init_adapter"]
Aggregation = Literal["sum", "normalize_then_sum"]  # the latter is TRL's name
SchedulerName = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    # --- the run
    seed: int = 0
    """Every random draw is a function of (seed, step, purpose, index)."""
    output_dir: str = "checkpoints"
    """Folder for the step-N/ folders, metrics.jsonl and completions.jsonl."""
    max_steps: int | None = None
    """Steps of the whole run, counted from the first one; None: as `num_train_epochs` says."""
    num_train_epochs: float = 3.0
    """Passes over the data, where max_steps is None."""
    save_steps: int | None = 100
    """Steps between checkpoints in fit(); None saves at the end only."""
    save_total_limit: int | None = 3
    """Checkpoints of fit() that are kept, the newest ones; None keeps all. save_checkpoint() called by hand deletes
    none, and its checkpoints are never deleted."""
    save_best: bool = False
    """Whether an evaluation that is the best so far, by metric_for_best_model, is saved, and its checkpoint kept beside
    the newest ones."""
    weights_format: WeightsFormat = "bin"
    """Writes adapter_model.bin or adapter_model.safetensors; stock PEFT reads both."""

    # --- what is logged, and where
    logging_steps: int = 1
    """Steps between lines of metrics.jsonl and of the trackers."""
    eval_steps: int | None = None
    """Steps between evaluations on fit()'s eval_dataset; None evaluates at the end only."""
    eval_on_start: bool = True
    """Whether fit() evaluates on its eval_dataset before the first step too, logged as step 0. It asks for one true
    reward per row."""
    metric_for_best_model: str = "true_reward"
    """What early stopping and save_best watch: a metric of the evaluation, as `lora-gan eval` prints them."""
    greater_is_better: bool = True
    """Whether more of it is better."""
    log_completions: bool = True
    """Whether sampled responses are shown, and written to completions.jsonl, with true and predicted reward."""
    log_completions_steps: int = 1
    """Steps between the steps of which completions.jsonl gets every response; 1: all steps. The first and the last step
    of a run are always there. The dry run says how large logs become."""
    completions_steps: int = 25
    """Steps between samples on the display and in trackers. The display shows the first and the last step, too."""
    num_completions_to_print: int = 2
    """Responses that the display shows of a step."""
    report_to: str | tuple[str, ...] = "none"
    """Trackers beside metrics.jsonl: "tensorboard", "wandb", "trackio", several, "all" installed ones, or "none"."""
    run_name: str | None = None
    """The run's name in trackers; None: the name of output_dir."""
    project: str = "lora-gan"
    """The project's name in trackers that have projects."""

    # --- the base
    dtype: str = "auto"
    """Of the frozen base: bfloat16, float16, float32; auto: bfloat16 on a GPU that has it, else float32."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; auto: the GPU where there is one, else the CPU."""
    micro_batch_size: int | None = None
    """Responses in one forward and backward of an update: less memory, the same update; None: all. A group of more than
    this is read twice by the discriminator's update."""
    gradient_checkpointing: bool = False
    """Whether an update computes each layer again in its backward, instead of keeping all it computed: less memory,
    more time, the same update."""
    model_init_kwargs: dict[str, Any] | None = None
    """Passed on to from_pretrained: revision, attn_implementation, ..."""
    trust_remote_code: bool = False
    """Whether a base may bring Python code of its own, which then runs on this machine."""

    # --- the data
    prompt_column: str = "prompt"
    """The column that holds the prompt: a text, or chat messages."""
    target_column: str | None = None
    """The column that holds the target text; None: target, target_text or completion, whichever is there."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passed on to the chat template of chat prompts, such as {"enable_thinking": false}."""
    apply_chat_template: bool | None = None
    """True: a plain-text prompt becomes one user message, which the base's chat template renders. False: it reaches the
    model as it is. None: the same in training, with a notice where the base has a template; generate, score and eval
    then do as the run's prompts were."""
    skip_special_tokens: bool = True
    """Whether special tokens, such as a <think> that the tokenizer counts as special, are removed from the text of a
    response before rewards see it. The token that ends the response is always removed."""
    on_long_prompt: OnLongPrompt = "raise"
    """When a prompt leaves no room for max_completion_length tokens in the base's context: raise an error before the
    first step, drop the row, or cut the prompt's beginning (truncate_left)."""

    # --- sampling
    prompts_per_step: int = 4
    """Prompts that fit() takes a step."""
    num_generations: int = 8
    """Responses sampled for each prompt: the group. With 1 there is no group to compare with: the baseline is then a
    running mean of rewards."""
    max_completion_length: int = 64
    """Most tokens of a response, the end-of-text token included."""
    temperature: float = 1.0
    """Of sampling, and of the policy that learns."""
    top_p: float = 1.0
    """Share of probability kept when sampling, in (0, 1]; below 1 the policy gradient is biased."""

    # --- the generator
    learning_rate: float = 2e-4
    """Of AdamW, a step; LoRA wants about ten times that of full fine-tuning."""
    lr_scheduler_type: SchedulerName = "constant"
    """As in transformers, for both players. linear, cosine and polynomial end at max_steps, or where fit() ends by
    num_train_epochs; step() alone needs max_steps for them."""
    warmup_steps: int = 0
    """Steps over which both learning rates rise from nought."""
    max_grad_norm: float = 1.0
    """Norm to which each player's gradient is clipped."""
    lora_r: int = 16
    """Rank of the adapter; peft_config= says more than this."""
    lora_alpha: int = 32
    """The adapter is scaled by alpha / r."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter, as in peft.LoraConfig: "all-linear", a regular expression, or a list of names."""
    num_iterations: int = 1
    """Updates a roll-out; from 2 on the probability ratio is clipped (PPO's surrogate)."""
    epsilon: float = 0.2
    """Where num_iterations is above 1: how far a token's probability ratio counts, 1 ± epsilon."""
    beta: float = 0.03
    """Weight of the KL to the reference, in reward units a nat; the KL is summed over a response."""
    kl_reference: KLReference | None = None
    """What the KL is measured to: the base with all adapters off (base), or the adapter that the generator starts from
    (init_adapter), a copy of which is then kept and saved in each checkpoint. None: init_adapter where one is given,
    else base."""
    kl_target: float | None = None
    """Nats a response that the KL is steered to, by moving beta from where it starts; None: beta is fixed."""
    entropy_weight: float = 0.0
    """Weight of the policy's entropy, in reward units a nat; summed over a response's places."""
    reward_weight: float = 1.0
    """Weight of the policy gradient; 0 leaves imitation alone."""
    imitation_weight: float = 0.0
    """Weight of the cross-entropy on the target text (SFT), in reward units a nat a token."""
    imitation_warmup_steps: int = 0
    """First steps, in which the generator learns by imitation alone."""
    imitation_decay_steps: int | None = None
    """Steps after the warm-up over which imitation_weight falls to nought, in a straight line; None: it stays."""

    # --- where its reward comes from, and how it reaches the generator
    adversarial: bool | None = None
    """True: the generator learns from the predicted reward; False: from the true one; None: reward_signal says."""
    reward_signal: RewardSignal = "corrected"
    """corrected: predicted + asked/query_rate · (true − predicted), unbiased; at query_rate 1 it is the true reward."""
    query_rate: float = 1.0
    """Share of the responses for which the true reward is asked, in (0, 1]."""
    query_design: QueryDesign = "groups"
    """Which responses are asked for: uniform (a share of each group), groups (whole groups, so that a prompt's
    responses can be compared), uncertain (more where the heads disagree). The probabilities are known in each."""
    query_floor: float = 0.25
    """Of the uncertain design: least probability of being asked, as a share of query_rate; it bounds the correction."""
    reward_budget: int | None = None
    """Most true-reward calls of training in the whole run, one per response; None: no limit."""
    reward_budget_total: int | None = None
    """Most true-reward calls of the whole run, with evaluations and retries; None: no limit. Training leaves enough for
    the evaluation at the end; other evaluations are left out when too few calls are left."""
    after_budget: AfterBudget = "predicted"
    """When the budget is spent: go on by the predicted reward alone, or stop (fit() ends, step() raises)."""
    gradient_path: GradientPath = "policy_gradient"
    """policy_gradient (RLOO), or straight_through: gradients through the discriminator into the sampled tokens."""
    straight_through_weight: float = 1.0
    """Of straight_through: the share of the predicted reward that comes through; the rest comes by policy gradient."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward may take; None: as long as it likes."""
    reward_retries: int = 0
    """Further tries after a call of a reward that raised, or took too long."""
    reward_backoff: float = 1.0
    """Seconds before the first further try; twice as many before each next one, 60 at most."""
    reward_workers: int | None = None
    """Calls of a reward f(response, target) at once, in threads; an async one is awaited. The numbers are the same.
    None: 1, and 16 of an `async def` reward."""
    on_reward_error: OnRewardError = "raise"
    """When the last try has failed: end the run, saved (raise), or leave the response out of what is learned from true
    rewards in this step (skip). This assumes that failures do not depend on the response; else what is learned is
    biased."""
    reuse_answers: bool = False
    """Whether a run that broke off takes answers from answers.jsonl although the reward's source has changed since."""
    multi_objective_aggregation: Aggregation = "sum"
    """Several rewards: sum (weighted, as they are), or normalize_then_sum (each in units of its own spread first)."""

    # --- the discriminator
    disc_learning_rate: float = 5e-4
    """Of AdamW, an update, for its adapter and its heads."""
    disc_lora_r: int = 16
    """Rank of its adapter; disc_peft_config= says more than this."""
    disc_lora_alpha: int = 32
    """Its adapter is scaled by alpha / r."""
    disc_target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get its adapter, as target_modules."""
    disc_layers: int | None = None
    """Upper layers that get its adapter, where disc_target_modules is "all-linear"; None: all. The layers below are
    then computed once for the discriminator and the base, where that is the KL's reference, and the discriminator's
    update stops there."""
    disc_heads: int = 4
    """Score heads; their mean is the prediction, their spread an uncertainty."""
    disc_updates: int = 2
    """Optimizer updates a step."""
    disc_replay_groups: int = 256
    """Groups kept for replay; a batch is half fresh, half replay; 0 keeps none."""
    disc_mean_weight: float = 0.25
    """Weight of the group's mean in the regression, against 1 within the group."""
    disc_rank_weight: float = 0.5
    """Weight of the within-group ranking loss, against 1 for the regression."""
    disc_objective: DiscObjective = "regression"
    """regression: learns the true reward; real_vs_generated: learns to tell target texts from responses, and no true
    reward is asked for."""
    disc_average: float = 0.0
    """Decay an update of the moving average of its weights, which then scores; 0: the weights themselves score."""
    disc_replay_policy: ReplayPolicy = "fifo"
    """Which groups replay keeps: the last ones, or an even sample of all (reservoir)."""
    disc_anchor_reward: float | None = None
    """The true reward of a target text, where it is known (1 for the default reward): the target then stands in its
    prompt's group as one more answer, free of charge. None: it does not."""

    # --- the guard
    uncertainty_penalty: float = 0.0
    """What the generator sees is the heads' mean minus this many of their standard deviations."""
    gate_correlation: float = 0.0
    """Fresh rank correlation within groups from which on predictions count in full; below, in proportion; at nought or
    less, not at all. 0: no gate. It saved some runs from exploitation and stalled others (docs/learning/)."""
    on_exploit: OnExploit = "warn"
    """When predicted and true rewards part, or responses degenerate: warn, end fit() (stop), or take the generator
    back to where the true reward was best (rollback)."""
    monitor_window: int = 10
    """Steps that the monitor averages over, and compares with the best such average so far."""
    max_skipped_updates: int = 10
    """Updates in a row, of either player, that are skipped for a loss or gradient that is not finite, before
    on_nonfinite acts."""
    on_nonfinite: OnNonfinite = "stop"
    """Then: stop; or go back to the newest checkpoint that was taken while all was well, and on with both learning
    rates halved (rollback; fit() only, step() raises)."""

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        for name in (
            "logging_steps", "log_completions_steps", "completions_steps", "prompts_per_step", "num_generations",
            "max_completion_length", "lora_r", "lora_alpha", "disc_lora_r", "disc_lora_alpha", "disc_heads",
            "disc_updates", "num_iterations", "monitor_window", "max_skipped_updates",
        ):  # fmt: skip
            self._require(name, self._is_whole(name, 1), "a whole number from 1")
        for name in (
            "max_steps", "save_steps", "eval_steps", "save_total_limit", "micro_batch_size", "reward_budget",
            "imitation_decay_steps", "disc_layers", "reward_budget_total", "reward_workers",
        ):  # fmt: skip
            ok = getattr(self, name) is None or self._is_whole(name, 1)
            self._require(name, ok, "None, or a whole number from 1")
        for name in (
            "seed",
            "imitation_warmup_steps",
            "warmup_steps",
            "disc_replay_groups",
            "num_completions_to_print",
            "reward_retries",
        ):
            self._require(name, self._is_whole(name, 0), "a whole number, 0 or more")
        for name in (
            "num_train_epochs",
            "learning_rate",
            "disc_learning_rate",
            "temperature",
            "max_grad_norm",
            "epsilon",
        ):
            self._require(name, self._is_number(name) and getattr(self, name) > 0, "a number above 0")
        for name in (
            "beta", "reward_weight", "imitation_weight", "disc_mean_weight", "disc_rank_weight", "entropy_weight",
            "uncertainty_penalty", "reward_backoff",
        ):  # fmt: skip
            self._require(name, self._is_number(name) and getattr(self, name) >= 0, "a number, 0 or more")
        for name in ("query_rate", "top_p", "query_floor", "straight_through_weight"):
            self._require(name, self._is_number(name) and 0 < getattr(self, name) <= 1, "a share above 0, at most 1")
        for name in ("disc_average", "gate_correlation"):
            self._require(name, self._is_number(name) and 0 <= getattr(self, name) < 1, "a number from 0, below 1")
        ok = self.disc_anchor_reward is None or self._is_number("disc_anchor_reward")
        self._require("disc_anchor_reward", ok, "None, or a number")
        ok = self.reward_timeout is None or (self._is_number("reward_timeout") and self.reward_timeout > 0)
        self._require("reward_timeout", ok, "None, or a number above 0")
        ok = self.kl_reference in (None, *get_args(KLReference))
        self._require("kl_reference", ok, "None, or one of " + ", ".join(get_args(KLReference)))
        ok = self.kl_target is None or (self._is_number("kl_target") and self.kl_target > 0)
        self._require("kl_target", ok, "None, or a number above 0")
        for name, accepted in (
            ("query_design", get_args(QueryDesign)),
            ("after_budget", get_args(AfterBudget)),
            ("disc_objective", get_args(DiscObjective)),
            ("disc_replay_policy", get_args(ReplayPolicy)),
            ("on_exploit", get_args(OnExploit)),
            ("on_reward_error", get_args(OnRewardError)),
            ("on_nonfinite", get_args(OnNonfinite)),
            ("on_long_prompt", get_args(OnLongPrompt)),
            ("reward_signal", get_args(RewardSignal)),
            ("gradient_path", get_args(GradientPath)),
            ("weights_format", get_args(WeightsFormat)),
            ("multi_objective_aggregation", get_args(Aggregation)),
            ("lr_scheduler_type", get_args(SchedulerName)),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            self._require(name, getattr(self, name) in accepted, "one of " + ", ".join(accepted))
        if self.disc_layers is not None and self.disc_target_modules != "all-linear":
            raise ValueError("disc_layers and disc_target_modules both say what gets an adapter: give one of them")
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            self._require(name, isinstance(getattr(self, name), dict | None), "a mapping, or None")
        for name in (
            "log_completions", "trust_remote_code", "greater_is_better", "save_best", "gradient_checkpointing",
            "skip_special_tokens", "reuse_answers", "eval_on_start",
        ):  # fmt: skip
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        self._require("apply_chat_template", self.apply_chat_template in (True, False, None), "True, False or None")
        for name in ("output_dir", "prompt_column", "project", "device", "metric_for_best_model"):
            self._require(
                name, isinstance(getattr(self, name), str) and getattr(self, name), "a text that is not empty"
            )
        if isinstance(self.report_to, str) and "," in self.report_to:
            object.__setattr__(self, "report_to", tuple(name.strip() for name in self.report_to.split(",")))
        for name in ("target_modules", "disc_target_modules", "report_to"):  # YAML and JSON give lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            ok = isinstance(value, str) or (isinstance(value, tuple) and all(isinstance(v, str) for v in value))
            self._require(name, ok and bool(value), "a text, or a list of texts")
        for name in ("run_name", "target_column"):
            self._require(name, isinstance(getattr(self, name), str | None), "a text, or None")
        signal = self.signal(self.adversarial)
        if self.kl_target is not None and not self.beta:
            raise ValueError("kl_target moves beta, and beta=0 has nowhere to start from: set beta above 0")
        if self.disc_objective == "real_vs_generated":
            if signal != "predicted":
                raise ValueError(
                    "disc_objective='real_vs_generated' asks for no true reward, so the generator can only learn from "
                    "the predicted one: set adversarial=True"
                )

    def _is_whole(self, name: str, least: int) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)

    def _require(self, name: str, ok: bool, accepted: str) -> None:
        if not ok:
            raise ValueError(f"{name}={shown(getattr(self, name), 200)} is not accepted: it must be {accepted}")

    def signal(self, adversarial: bool | None) -> RewardSignal:
        """What the advantage is made of; raises where the settings contradict each other."""
        if adversarial not in (True, False, None):
            raise ValueError(f"adversarial={shown(adversarial)} is not accepted: it must be True, False or None")
        if adversarial is True and self.reward_signal == "true":
            raise ValueError(
                "adversarial=True learns from the predicted reward, reward_signal='true' from the true one: drop one"
            )
        if adversarial is False and self.reward_signal == "predicted":
            raise ValueError(
                "adversarial=False learns from the true reward, reward_signal='predicted' from the discriminator: "
                "drop one"
            )
        signal = {True: "predicted", False: "true", None: self.reward_signal}[adversarial]
        if signal == "true" and self.query_rate < 1:
            raise ValueError(
                f"learning from the true reward needs it for every response, but query_rate={self.query_rate}: "
                "set query_rate=1, or reward_signal='corrected'"
            )
        if signal == "true" and self.gradient_path == "straight_through":
            raise ValueError(
                "gradient_path='straight_through' leads the discriminator's gradient into the generator: it needs "
                "reward_signal 'predicted' or 'corrected', not the true reward"
            )
        return signal

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """A config from plain values; an unknown key raises, with the nearest name."""
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are a mapping of names to values, not {shown(values)}")
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(shown(name).strip("'"), known, n=1)
                hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
                raise ValueError(f"there is no setting {shown(name)}{hint}. The settings: {', '.join(known)}")
        return cls(**values)

    def to_file(self) -> dict[str, Any]:
        """Plain values for files that others may read: without the hub token that model_init_kwargs may hold."""
        hidden = {name: value for name, value in (self.model_init_kwargs or {}).items() if name != "token"}
        return self.to_dict() | {"model_init_kwargs": hidden or None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
