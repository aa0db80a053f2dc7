"""Every setting, with its unit. Names are TRL's and transformers' where those have one; the discriminator's own start
with `disc_`. All validation of settings is here; `Config` is frozen, `dataclasses.replace` makes a changed one.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

RewardSignal = Literal["true", "predicted", "corrected"]
GradientPath = Literal["policy_gradient", "straight_through"]
WeightsFormat = Literal["bin", "safetensors"]
SchedulerName = Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"]


@dataclass(frozen=True)
class Config:
    # --- the run
    seed: int = 0  # every random draw is a function of (seed, step, purpose, index)
    output_dir: str = "checkpoints"  # folder of step-N/ folders and of metrics.jsonl
    max_steps: int | None = None  # steps that `lr_scheduler_type` counts on; fit(steps=) says how many are run
    save_steps: int | None = None  # steps between checkpoints in fit(); None saves at the end only
    save_total_limit: int | None = None  # checkpoints kept, the newest ones; None keeps all
    logging_steps: int = 1  # steps between lines of metrics.jsonl
    weights_format: WeightsFormat = "bin"  # adapter_model.bin or adapter_model.safetensors
    dtype: str = "auto"  # of the frozen base: auto = bfloat16 on a GPU that has it, else float32
    device: str = "auto"  # auto = the GPU where there is one, else the CPU
    micro_batch_size: int | None = None  # responses in one forward and backward of an update; None = all

    # --- sampling
    prompts_per_step: int = 4  # prompts fit() takes a step
    num_generations: int = 8  # responses sampled for one prompt: the group
    max_completion_length: int = 64  # tokens, the end-of-text token included
    temperature: float = 1.0  # of sampling, and of the policy that learns
    top_p: float = 1.0  # share of probability kept when sampling, in (0, 1]; below 1 the policy gradient is biased

    # --- the generator
    learning_rate: float = 2e-4  # AdamW; LoRA wants about ten times that of full fine-tuning
    lr_scheduler_type: SchedulerName = "constant"  # as in transformers; linear, cosine, polynomial need max_steps
    warmup_steps: int = 0  # steps over which both learning rates rise from nought
    max_grad_norm: float = 1.0  # each player's gradients are clipped to this norm
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # the adapter is scaled by alpha / r
    target_modules: str | tuple[str, ...] = "all-linear"  # layers that get an adapter, as in peft.LoraConfig
    beta: float = 0.03  # weight of the KL to the reference, reward units a nat, summed over the response
    reward_weight: float = 1.0  # weight of the policy gradient; 0 leaves imitation alone
    imitation_weight: float = 0.0  # weight of the cross-entropy on target_text, reward units a nat a token
    imitation_warmup_steps: int = 0  # first steps in which the generator learns by imitation alone

    # --- where its reward comes from, and how it reaches the generator
    adversarial: bool | None = None  # True: the predicted reward; False: the true one; None: reward_signal says
    reward_signal: RewardSignal = "corrected"
    query_rate: float = 1.0  # share of responses for which the true reward is asked, in (0, 1]
    gradient_path: GradientPath = "policy_gradient"

    # --- the discriminator
    disc_learning_rate: float = 5e-4  # AdamW, adapter and heads
    disc_lora_r: int = 16
    disc_lora_alpha: int = 32
    disc_target_modules: str | tuple[str, ...] = "all-linear"
    disc_heads: int = 4  # score heads; their mean is the prediction, their spread an uncertainty
    disc_updates: int = 2  # optimizer updates a step
    disc_replay_groups: int = 256  # groups kept for replay; a batch is half fresh, half replay; 0 keeps none
    disc_mean_weight: float = 0.25  # weight of the group's mean in the regression, against 1 within the group
    disc_rank_weight: float = 0.5  # weight of the within-group ranking loss, against 1 for the regression

    def __post_init__(self) -> None:
        for name in (
            "logging_steps", "prompts_per_step", "num_generations", "max_completion_length",
            "lora_r", "lora_alpha", "disc_lora_r", "disc_lora_alpha", "disc_heads", "disc_updates",
        ):  # fmt: skip
            self._require(name, self._is_whole(name, 1), "a whole number from 1")
        for name in ("max_steps", "save_steps", "save_total_limit", "micro_batch_size"):
            ok = getattr(self, name) is None or self._is_whole(name, 1)
            self._require(name, ok, "None, or a whole number from 1")
        for name in ("seed", "imitation_warmup_steps", "warmup_steps", "disc_replay_groups"):
            self._require(name, self._is_whole(name, 0), "a whole number, 0 or more")
        for name in ("learning_rate", "disc_learning_rate", "temperature", "max_grad_norm"):
            self._require(name, self._is_number(name) and getattr(self, name) > 0, "a number above 0")
        for name in ("beta", "reward_weight", "imitation_weight", "disc_mean_weight", "disc_rank_weight"):
            self._require(name, self._is_number(name) and getattr(self, name) >= 0, "a number, 0 or more")
        for name in ("query_rate", "top_p"):
            self._require(name, self._is_number(name) and 0 < getattr(self, name) <= 1, "a share above 0, at most 1")
        for name, accepted in (
            ("reward_signal", get_args(RewardSignal)),
            ("gradient_path", get_args(GradientPath)),
            ("weights_format", get_args(WeightsFormat)),
            ("lr_scheduler_type", get_args(SchedulerName)),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            self._require(name, getattr(self, name) in accepted, "one of " + ", ".join(accepted))
        if self.lr_scheduler_type in ("linear", "cosine", "polynomial") and self.max_steps is None:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r} needs max_steps: say where it ends")
        for name in ("target_modules", "disc_target_modules"):  # YAML and JSON give lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.signal(self.adversarial)

    def _is_whole(self, name: str, least: int) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def _require(self, name: str, ok: bool, accepted: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} is not accepted: it must be {accepted}")

    def signal(self, adversarial: bool | None) -> RewardSignal:
        """What the advantage is made of; raises where the settings contradict each other."""
        if adversarial not in (True, False, None):
            raise ValueError(f"adversarial={adversarial!r} is not accepted: it must be True, False or None")
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
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """A config from plain values; an unknown key raises, with the nearest name."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
                raise ValueError(f"there is no setting {name!r}{hint}. The settings: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
