"""Every setting. Names follow TRL and transformers if these have one. The discriminator's names start with `disc_`.

A setting is declared once: type, group, bounds, unit and default in the annotation, help in the text below it. Editors
and `lora-gan train --help` show this text. `settings.py` derives checks and error messages from the annotation. Only
rules about several settings are code. `Config` is frozen; `dataclasses.replace` returns a changed copy.
"""
# No `from __future__ import annotations`: the annotations are read when a Config is made.

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen, Unit

from .settings import Group, Mark, accepted, fits
from .wording import did_you_mean, shown

RewardSignal = Literal["true", "predicted", "corrected", "mixed"]
QueryDesign = Literal["uniform", "groups"]
SchedulerName = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]


#: Settings of earlier versions: their default then, which is accepted from old checkpoints, and what to do now.
REMOVED: dict[str, tuple[Any, str]] = {
    "gate_correlation": (
        0.0,
        "predictions are weighted by their measured worth with reward_signal='corrected' or 'mixed'",
    ),
    "log_completions_steps": (1, "completions.jsonl has every step; log_completions=False writes no responses"),
    "completions_steps": (25, "the display and trackers get samples every 25 steps; completions.jsonl has every step"),
    "num_completions_to_print": (2, "the display shows 2 responses; completions.jsonl has every response"),
    "project": ("lora-gan", "set the environment variable WANDB_PROJECT for wandb; trackio's project is lora-gan"),
    "run_name": (None, "a run has the name of output_dir in trackers; the environment variable WANDB_NAME still works"),
    "greater_is_better": (True, "set metric_for_best_model='-NAME' if a smaller value is better"),
    "reward_backoff": (1.0, "the first retry waits 1 second, and the wait doubles; a reward may wait itself"),
    "max_skipped_updates": (10, "on_nonfinite acts after 10 skipped updates of a player in a row"),
    "top_p": (
        1.0,
        "training samples from the whole distribution; generate(top_p=) and `lora-gan generate --top_p` stay",
    ),
    "target_modules": ("all-linear", "give peft_config={'target_modules': ...}, with r and lora_alpha"),
    "disc_target_modules": ("all-linear", "give disc_peft_config={'target_modules': ...}, with r and lora_alpha"),
    "disc_lora_alpha": (32, "it is twice disc_lora_r; give disc_peft_config={'lora_alpha': ...} for another value"),
    "weights_format": ("bin", "checkpoints have adapter_model.bin; export() and `lora-gan export` write safetensors"),
    "reuse_answers": (
        False,
        "it is an argument, LoraGAN(..., reuse_answers=True), or `lora-gan train --reuse_answers`",
    ),
    "uncertainty_penalty": (
        0.0,
        "predictions are weighted by their measured worth with reward_signal='corrected' or 'mixed'",
    ),
    "query_floor": (0.25, "query_design='groups' draws every group with the same probability"),
    "disc_average": (0.0, "the latest weights predict; a lower disc_learning_rate gives steadier predictions"),
    "disc_anchor_reward": (
        None,
        "targets teach the generator with imitation_weight, and the discriminator with disc_objective="
        "'real_vs_generated'",
    ),
    "straight_through_weight": (
        1.0,
        "gradient_path='straight_through' carries all of the predicted reward, and 'policy_gradient' nothing of it",
    ),
    "entropy_weight": (0.0, "raise temperature or beta for more diverse responses"),
    "imitation_decay_steps": (
        None,
        "imitation_weight stays constant; imitation_warmup_steps with imitation_weight=0 imitates at the start alone",
    ),
    "disc_mean_weight": (0.25, "the group's mean always has the weight 0.25 in the regression"),
    "disc_rank_weight": (0.5, "the ranking loss always has the weight 0.5"),
    "monitor_window": (10, "the monitor always averages over 10 steps"),
    "disc_heads": (4, "there are always 4 heads; a checkpoint with another number of heads loads their mean"),
    "disc_replay_policy": ("fifo", "replay keeps the latest groups, and disc_replay_groups sets their number"),
}


@dataclass(frozen=True)
class Config:
    """The settings of a run."""

    # Mark.FIRST marks the most important settings. They decide the cost of a run (steps, responses per step, length of
    # a response, number of queries), the learning signal, the distance from the base, and the folder of the run.

    seed: Annotated[int, Group.RUN, Ge(0)] = 0
    """Every random draw is a function of (seed, step, purpose, index)."""
    output_dir: Annotated[str, Group.RUN, MinLen(1), Mark.FIRST, Mark.SILENT, Mark.UNLISTED] = "checkpoints"
    """Folder of the run: checkpoints step-N/, metrics.jsonl and completions.jsonl."""
    max_steps: Annotated[int | None, Group.RUN, Ge(1), Unit("steps"), Mark.FIRST, Mark.SILENT] = None
    """Steps of the whole run, counted from its first step. None: num_train_epochs decides."""
    num_train_epochs: Annotated[float, Group.RUN, Gt(0), Unit("epochs"), Mark.SILENT] = 3.0
    """Passes over the data when max_steps is None."""
    save_steps: Annotated[int | None, Group.RUN, Ge(1), Unit("steps"), Mark.SILENT, Mark.UNLISTED] = 100
    """Steps between checkpoints in fit(). None: fit() saves at the end only."""
    save_total_limit: Annotated[int | None, Group.RUN, Ge(1), Unit("checkpoints"), Mark.SILENT, Mark.UNLISTED] = 3
    """Checkpoints of fit() that are kept, the newest ones. None: all. fit() never deletes the checkpoints of
    save_checkpoint()."""
    save_best: Annotated[bool, Group.RUN, Mark.SILENT] = False
    """Whether to save a checkpoint at each new best evaluation by metric_for_best_model, and to keep the best
    checkpoint in addition to the newest ones."""

    logging_steps: Annotated[int, Group.LOGS, Ge(1), Unit("steps"), Mark.SILENT, Mark.UNLISTED] = 1
    """Steps between records in metrics.jsonl and in trackers."""
    eval_steps: Annotated[int | None, Group.LOGS, Ge(1), Unit("steps"), Mark.SILENT] = None
    """Steps between evaluations on fit()'s eval_dataset. None: fit() evaluates at the end only."""
    eval_on_start: Annotated[bool, Group.LOGS, Mark.SILENT] = True
    """Whether fit() also evaluates on its eval_dataset before the first step, logged as step 0. This queries one true
    reward per row."""
    metric_for_best_model: Annotated[str, Group.LOGS, MinLen(1), Mark.SILENT] = "true_reward"
    """Evaluation metric that early stopping and save_best use, by its name in the output of `lora-gan eval`. A leading
    minus means that a smaller value is better: "-perplexity", on the command line --metric_for_best_model=-perplexity.
    """
    log_completions: Annotated[bool, Group.LOGS, Mark.SILENT, Mark.UNLISTED] = True
    """Whether to display sampled responses, and write them to completions.jsonl with true and predicted reward."""
    report_to: Annotated[str | tuple[str, ...], Group.LOGS, MinLen(1), Mark.SILENT, Mark.UNLISTED] = "none"
    """Trackers in addition to metrics.jsonl: "tensorboard", "wandb", "trackio", a list of these, "all" (the installed
    ones), or "none". A run has the name of output_dir. wandb's and trackio's own environment variables work, such as
    WANDB_PROJECT."""

    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Group.BASE, Mark.SILENT] = "auto"
    """Data type of the frozen base. auto: bfloat16 on a GPU that supports it, else float32."""
    device: Annotated[str, Group.BASE, MinLen(1), Mark.SILENT, Mark.UNLISTED] = "auto"
    """"cpu", "cuda" or "cuda:1". auto: the GPU if there is one, else the CPU."""
    micro_batch_size: Annotated[int | None, Group.BASE, Ge(1), Unit("responses"), Mark.SILENT] = None
    """Responses in one forward and backward pass of an update. A smaller size needs less memory and gives the same
    update. None: all. The discriminator computes a group twice if the group is larger than this."""
    gradient_checkpointing: Annotated[bool, Group.BASE, Mark.SILENT] = False
    """Whether the backward pass recomputes each layer instead of keeping all activations: less memory, more time, the
    same update."""
    model_init_kwargs: Annotated[dict[str, Any] | None, Group.BASE, Mark.SILENT, Mark.UNLISTED] = None
    """Keyword arguments for from_pretrained: revision, attn_implementation, ..."""
    trust_remote_code: Annotated[bool, Group.BASE, Mark.SILENT] = False
    """Whether Python code that comes with the base may run on this machine."""

    prompt_column: Annotated[str, Group.DATA, MinLen(1), Mark.SILENT] = "prompt"
    """The column that holds the prompt: a text, or chat messages."""
    target_column: Annotated[str | None, Group.DATA, Mark.SILENT] = None
    """The column that holds the target text. None: target, target_text or completion, whichever exists."""
    chat_template_kwargs: Annotated[dict[str, Any] | None, Group.DATA] = None
    """Options for the chat template of chat prompts, such as {"enable_thinking": false}."""
    apply_chat_template: Annotated[bool | None, Group.DATA] = None
    """True: a plain-text prompt becomes one user message, which the base's chat template renders. False: the prompt
    reaches the model unchanged. None: unchanged in training, with a notice if the base has a template; generate, score
    and eval then treat prompts as the run did."""
    skip_special_tokens: Annotated[bool, Group.DATA] = True
    """Whether to remove special tokens from the text of a response before rewards receive it, for example a special
    <think>. The token that ends the response is always removed."""
    on_long_prompt: Annotated[Literal["raise", "drop", "truncate_left"], Group.DATA] = "raise"
    """If prompt and max_completion_length tokens exceed the base's context: raise an error before the first step
    (raise), drop the row (drop), or cut the prompt's beginning (truncate_left)."""

    prompts_per_step: Annotated[int, Group.SAMPLING, Ge(1), Unit("prompts per step"), Mark.FIRST] = 4
    """Prompts per step of fit()."""
    num_generations: Annotated[int, Group.SAMPLING, Ge(1), Unit("responses per prompt"), Mark.FIRST] = 8
    """Responses sampled for each prompt: the group. At 1 there is no group to compare with, so the baseline is a
    running mean of rewards."""
    max_completion_length: Annotated[int, Group.SAMPLING, Ge(1), Unit("tokens"), Mark.FIRST] = 64
    """Most tokens of a response, with the end-of-text token."""
    temperature: Annotated[float, Group.SAMPLING, Gt(0)] = 1.0
    """Temperature of sampling, and of the policy that learns."""

    learning_rate: Annotated[float, Group.GENERATOR, Gt(0), Unit("per update"), Mark.FIRST] = 2e-4
    """Learning rate of the generator's AdamW. LoRA needs about ten times the rate of full fine-tuning."""
    lr_scheduler_type: Annotated[SchedulerName, Group.GENERATOR] = "constant"
    """Schedule of both learning rates, as in transformers. linear, cosine and polynomial end at max_steps, or where
    num_train_epochs ends fit(). step() alone needs max_steps for them."""
    warmup_steps: Annotated[int, Group.GENERATOR, Ge(0), Unit("steps")] = 0
    """Steps over which both learning rates rise from zero."""
    max_grad_norm: Annotated[float, Group.GENERATOR, Gt(0), Unit("gradient norm")] = 1.0
    """Norm to which each player's gradient is clipped."""
    lora_r: Annotated[int, Group.GENERATOR, Ge(1), Unit("dimensions"), Mark.UNLISTED] = 16
    """Rank of the generator's adapter on all linear layers. peft_config= has more options."""
    lora_alpha: Annotated[int, Group.GENERATOR, Ge(1), Mark.UNLISTED] = 32
    """The adapter is scaled by lora_alpha / lora_r."""
    num_iterations: Annotated[int, Group.GENERATOR, Ge(1), Unit("updates per step")] = 1
    """Updates on the responses of a step. With 2 or more the probability ratio is clipped (PPO's surrogate)."""
    epsilon: Annotated[float, Group.GENERATOR, Gt(0), Unit("probability ratio")] = 0.2
    """If num_iterations is above 1, a token's probability ratio is clipped to 1 ± epsilon."""
    beta: Annotated[float, Group.GENERATOR, Ge(0), Unit("spreads per nat"), Mark.FIRST] = 0.03
    """Weight of the KL to the reference, in units of the true reward's standard deviation within groups. The library
    measures this spread over the first answers and then holds it, so beta means the same for a reward of any scale. The
    KL is summed over a response."""
    kl_reference: Annotated[Literal["base", "init_adapter"] | None, Group.GENERATOR] = None
    """Reference of the KL: the base with all adapters off (base), or the adapter that the generator starts from
    (init_adapter). The run then keeps a copy of this adapter, and saves the copy in each checkpoint. None: init_adapter
    if one is given, else base."""
    kl_target: Annotated[float | None, Group.GENERATOR, Gt(0), Unit("nats per response")] = None
    """Desired KL. After each step beta is raised or lowered by up to 10 % to reach it. None: beta is fixed."""
    reward_weight: Annotated[float, Group.GENERATOR, Ge(0)] = 1.0
    """Weight of the policy gradient. 0: imitation alone."""
    imitation_weight: Annotated[float, Group.GENERATOR, Ge(0), Unit("spreads per nat per token")] = 0.0
    """Weight of the cross-entropy on the target text (SFT), in the unit of beta."""
    imitation_warmup_steps: Annotated[int, Group.GENERATOR, Ge(0), Unit("steps")] = 0
    """Steps at the start in which the generator learns by imitation alone."""

    adversarial: Annotated[bool | None, Group.REWARD] = None
    """True: the generator learns from the predicted reward. False: from the true reward. None: reward_signal
    decides."""
    reward_signal: Annotated[RewardSignal | None, Group.REWARD, Mark.FIRST] = None
    """Reward that the generator learns from: true, predicted, corrected or mixed. corrected is predicted +
    asked/query_rate · (true − predicted). It is unbiased, and at query_rate 1 it is the true reward. mixed is the true
    reward where it is known, else the prediction, both weighted by the trust in predictions. None: mixed if
    reward_budget is set, else corrected."""
    query_rate: Annotated[float | None, Group.REWARD, Gt(0), Le(1), Unit("share of responses"), Mark.FIRST] = None
    """Share of the responses for which the true reward is queried. None: all; if reward_budget is set, one group per
    step."""
    query_design: Annotated[QueryDesign, Group.REWARD] = "groups"
    """How the queried responses are drawn: uniform (a share of each group), or groups (whole groups, so that a prompt's
    responses can be compared). Each design has known probabilities."""
    reward_budget: Annotated[int | None, Group.REWARD, Ge(1), Unit("calls"), Mark.FIRST] = None
    """Most true-reward calls of training in the whole run, one per response. None: no limit."""
    reward_budget_total: Annotated[int | None, Group.REWARD, Ge(1), Unit("calls")] = None
    """Most true-reward calls of the whole run, with evaluations and retries. None: no limit. Training leaves enough
    calls for the final evaluation. Other evaluations are skipped if too few calls remain."""
    after_budget: Annotated[Literal["predicted", "stop"], Group.REWARD] = "predicted"
    """When the budget is spent: continue with the predicted reward alone (predicted), or stop (fit() ends, step()
    raises)."""
    gradient_path: Annotated[Literal["policy_gradient", "straight_through"], Group.REWARD] = "policy_gradient"
    """policy_gradient (RLOO), or straight_through: gradients through the discriminator into the sampled tokens."""
    reward_timeout: Annotated[float | None, Group.REWARD, Gt(0), Unit("seconds"), Mark.SILENT] = None
    """Time limit for one call of a reward. None: no limit."""
    reward_retries: Annotated[int, Group.REWARD, Ge(0), Unit("tries"), Mark.SILENT] = 0
    """Retries after a call of a reward that raised an error or exceeded reward_timeout. The first retry waits 1 second.
    The wait doubles before each further retry, up to 60 seconds."""
    reward_workers: Annotated[int | None, Group.REWARD, Ge(1), Unit("parallel calls"), Mark.SILENT] = None
    """Parallel calls of a reward f(response, target), in threads; an async reward is awaited. The values are the same.
    None: 1, and 16 for an `async def` reward."""
    on_reward_error: Annotated[Literal["raise", "skip"], Group.REWARD] = "raise"
    """When the last retry has failed: save and end the run (raise), or ignore the true reward of this response in this
    step (skip). skip biases the learning if failures depend on the response."""
    multi_objective_aggregation: Annotated[Literal["sum", "normalize_then_sum"], Group.REWARD] = "sum"
    """How several rewards are combined: sum (weighted), or normalize_then_sum (each reward is first divided by its own
    spread)."""

    disc_learning_rate: Annotated[float, Group.DISCRIMINATOR, Gt(0), Unit("per update")] = 5e-4
    """Learning rate of AdamW for the discriminator's adapter and heads."""
    disc_lora_r: Annotated[int, Group.DISCRIMINATOR, Ge(1), Unit("dimensions"), Mark.UNLISTED] = 16
    """Rank of the discriminator's adapter, which is scaled by 2. disc_peft_config= has more options."""
    disc_layers: Annotated[int | None, Group.DISCRIMINATOR, Ge(1), Unit("layers")] = None
    """Number of upper layers that get the discriminator's adapter. None: all. The discriminator's update skips the
    layers below. If the base is the KL's reference, the discriminator shares the outputs of these layers with the
    base."""
    disc_updates: Annotated[int, Group.DISCRIMINATOR, Ge(1), Unit("updates per step")] = 2
    """Optimizer updates of the discriminator per step."""
    disc_replay_groups: Annotated[int, Group.DISCRIMINATOR, Ge(0), Unit("groups")] = 256
    """Groups kept for replay, the latest ones. Half of a batch is fresh, half is replay. 0: no replay."""
    disc_objective: Annotated[Literal["regression", "real_vs_generated"], Group.DISCRIMINATOR] = "regression"
    """regression: learns the true reward. real_vs_generated: learns to distinguish target texts from responses, without
    true rewards."""

    on_exploit: Annotated[Literal["warn", "stop", "rollback"] | None, Group.GUARD] = None
    """When the true reward falls, or responses degenerate: warn, end fit() (stop), or return the generator to the step
    with the best true reward (rollback). With stop and rollback, 5 % of reward_budget are kept for audits of the
    steps on predictions alone, and the number of these steps is limited. None: rollback if reward_budget is set,
    else warn."""
    on_nonfinite: Annotated[Literal["stop", "rollback"], Group.GUARD] = "stop"
    """When 10 consecutive updates of a player were skipped, because a loss or gradient was not finite: stop, or roll
    back. With rollback, fit() returns to the newest checkpoint of a healthy run and continues with both learning rates
    halved; step() raises."""

    def __post_init__(self) -> None:
        self._unify_forms()
        for field in fields(self):
            value = getattr(self, field.name)
            if not fits(field.type, value):
                raise ValueError(f"{field.name}={shown(value, 200)} is not accepted: it must be {accepted(field)}")
        self._require_consistent()

    def _unify_forms(self) -> None:
        """Convert equivalent forms: paths to texts, comma-separated report_to and lists to tuples, 0 and 1 to flags."""
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        if isinstance(self.report_to, str) and "," in self.report_to:
            object.__setattr__(self, "report_to", tuple(name.strip() for name in self.report_to.split(",")))
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list) and fits(field.type, tuple(value)):
                object.__setattr__(self, field.name, tuple(value))
            if isinstance(value, int | float) and value in (0, 1) and fits(field.type, bool(value)):
                object.__setattr__(self, field.name, bool(value))

    def _require_consistent(self) -> None:
        """Check the rules about several settings. `signal` checks those about the reward signal."""
        if self.kl_target is not None and not self.beta:
            raise ValueError("kl_target scales beta, which has no effect at beta=0: set beta above 0")
        signal = self.signal(self.adversarial)
        if self.disc_objective == "real_vs_generated" and signal != "predicted":
            raise ValueError(
                "disc_objective='real_vs_generated' queries no true rewards, so the generator can only learn from "
                "predicted rewards: set adversarial=True"
            )

    @property
    def asked_share(self) -> float:
        """Share of the responses for which the true reward is queried: query_rate, or the choice if it is None."""
        if self.query_rate is not None:
            return self.query_rate
        learns_from_all = self.signal(self.adversarial) == "true"
        return 1.0 if self.reward_budget is None or learns_from_all else 1 / self.prompts_per_step

    @property
    def exploit_action(self) -> Literal["warn", "stop", "rollback"]:
        """The action on an alarm of the monitor: on_exploit, or the choice if it is None."""
        return self.on_exploit or ("warn" if self.reward_budget is None else "rollback")

    @property
    def audit_calls(self) -> int:
        """Calls of reward_budget that are kept for audits of the steps on predictions alone; 0: no audits."""
        asks = self.disc_objective == "regression"
        learns_alone = asks and self.after_budget == "predicted" and self.signal(self.adversarial) != "true"
        if self.reward_budget is None or self.exploit_action == "warn" or not learns_alone:
            return 0
        return self.reward_budget // 20

    def signal(self, adversarial: bool | None) -> RewardSignal:
        """The reward from which the advantage is computed; `adversarial` overrides reward_signal unless None.

        Raises:
            ValueError: the settings contradict each other.
        """
        if adversarial not in (True, False, None):
            raise ValueError(f"adversarial={shown(adversarial)} is not accepted: it must be True, False or None")
        has_probe = self.gradient_path == "policy_gradient" and self.disc_objective == "regression"
        default: RewardSignal = "mixed" if self.reward_budget is not None and has_probe else "corrected"
        signal = {True: "predicted", False: "true", None: self.reward_signal or default}[adversarial]
        if self.reward_signal not in (signal, "corrected", None):
            raise ValueError(
                f"adversarial={adversarial} selects the {signal} reward, but reward_signal={self.reward_signal!r}: "
                "set one of the two settings"
            )
        if signal == "true" and self.query_rate is not None and self.query_rate < 1:
            raise ValueError(
                f"learning from the true reward needs it for every response, but query_rate={self.query_rate}: "
                "set query_rate=1, or reward_signal='corrected'"
            )
        if signal == "mixed" and not has_probe:
            raise ValueError(
                "reward_signal='mixed' needs gradient_path='policy_gradient' and disc_objective='regression': the "
                "probe passes no gradient to the generator, and learns true rewards only"
            )
        if signal == "true" and self.gradient_path == "straight_through":
            raise ValueError(
                "gradient_path='straight_through' passes the discriminator's gradient to the generator, so the reward "
                "signal cannot be 'true': set reward_signal to 'predicted' or 'corrected'"
            )
        return signal

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Make a Config from plain values.

        Raises:
            ValueError: an unknown setting, with the nearest known name, or a value that is not accepted.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are a mapping of names to values, not {shown(values)}")
        known = [field.name for field in fields(cls)]
        values = {name: value for name, value in values.items() if name not in REMOVED or value != REMOVED[name][0]}
        for name in values:
            if name in REMOVED:
                raise ValueError(f"the setting {name} is gone: {REMOVED[name][1]}")
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"there is no setting {shown(name)}{hint}. The settings: {', '.join(known)}")
        return cls(**values)

    def to_file(self) -> dict[str, Any]:
        """`to_dict` without the hub token that model_init_kwargs may hold, for files that other people may read."""
        public = {name: value for name, value in (self.model_init_kwargs or {}).items() if name != "token"}
        return self.to_dict() | {"model_init_kwargs": public or None}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
