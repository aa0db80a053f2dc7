"""The generator's update: policy gradient or straight-through, KL to the reference, imitation.

# B = responses, L = prompt and response places, T = response places, V = vocabulary, H = hidden size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from . import estimate, memory, objectives
from .adapters import Players
from .config import Config, RewardSignal
from .data import Row
from .experience import Experience
from .optimizer import PlayerOptimizer
from .rollout import Rollout, assemble, chunks, encode_prompts, encode_response

Critic = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids, mask, embeddings -> every head's predicted reward [M, B]


class Generator:
    """What the generator carries from step to step beside its weights: optimizer, baseline, the KL's weight."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(players.parameters("generator"), config.learning_rate, config)
        self.baseline = estimate.RunningMean()
        self.beta_scale = 1.0  # moves where there is a kl_target

    @property
    def beta(self) -> float:
        """The weight of the KL as it stands."""
        return self.config.beta * self.beta_scale

    def update(
        self,
        rows: list[Row],
        experience: Experience | None,
        signal: RewardSignal,
        imitation_weight: float,
        critic: Critic | None = None,
    ) -> dict[str, float | None]:
        """The step's updates, the first of them on-policy. Without experience imitation alone teaches.

        `critic` is what straight-through differentiates. Returns the first update's loss and its parts, None where they
        are not finite, and how many updates were skipped for it.
        """
        metrics: dict[str, float | None] = {}
        reward_B = advantage_B = None
        if experience is not None:
            if signal == "predicted":
                experience = replace(experience, left_out_B=None)  # no true reward is missed here
            reward_B = self.rewards(experience, signal)
            advantage_B = estimate.advantages(reward_B, experience.group_B, self.baseline.value)
            kept_B = slice(None) if experience.left_out_B is None else ~experience.left_out_B
        sampled: list[Tensor] = []  # log-probabilities of its tokens that each response was sampled with
        most, skipped = max(len(rows), 0 if experience is None else len(experience.rollout)), 0
        for iteration in range(self.config.num_iterations):

            def backward(known: int = len(sampled)) -> tuple[float, dict[str, float | None]]:
                del sampled[known:]  # what a try that ran out of memory had added
                return self._backward(rows, experience, advantage_B, imitation_weight, critic, sampled)

            loss, parts = memory.fitting(
                backward, self.optimizer, most, splits=lambda: min(self.optimizer.micro_batch_size or most, most) > 1
            )
            if reward_B is not None and signal != "true" and not np.isfinite(reward_B[kept_B]).all():
                loss = math.nan  # predictions that are not finite would pass for rewards that are not known
            rate, norm = self.optimizer.learning_rate, self.optimizer.step(loss)
            skipped += norm is None
            if iteration == 0:
                metrics = {"gen_loss": loss, **parts, "gen_learning_rate": rate, "gen_grad_norm": norm}
                metrics = {
                    name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()
                }
        metrics["gen_skipped"] = skipped
        if skipped == self.config.num_iterations:
            return metrics  # nothing was updated, so nothing that goes with an update moves
        if reward_B is not None and not np.isnan(reward_B).all():
            self.baseline.update(float(np.nanmean(reward_B)))  # last: an update that raised leaves no trace
        if self.config.kl_target is not None and metrics.get("kl") is not None:
            # The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593), a tenth a step at most.
            error = min(max(float(metrics["kl"]) / self.config.kl_target - 1, -1.0), 1.0)
            self.beta_scale *= 1 + 0.1 * error
        return metrics

    def _backward(
        self,
        rows: list[Row],
        experience: Experience | None,
        advantage_B: np.ndarray | None,
        imitation_weight: float,
        critic: Critic | None,
        sampled: list[Tensor],
    ) -> tuple[float, dict[str, float | None]]:
        """Backward of one update's whole loss; returns it and its parts."""
        loss, parts = 0.0, {}
        if experience is not None and advantage_B is not None:
            policy_loss, kl, entropy = self._reinforce(experience, advantage_B, critic, sampled)
            loss += self.config.reward_weight * policy_loss + self.beta * kl - self.config.entropy_weight * entropy
            parts["kl"] = kl if self.beta else None  # not measured where it has no weight
            if self.config.entropy_weight:
                parts["entropy"] = entropy
            if self.config.kl_target is not None:
                parts["beta"] = self.beta
        if imitation_weight:
            parts["imitation_loss"] = self._imitate(rows, imitation_weight)
            loss += imitation_weight * parts["imitation_loss"]
        return loss, parts

    def rewards(self, experience: Experience, signal: RewardSignal) -> np.ndarray:
        """What the advantage is made of, float64 [B]; NaN where nothing is known."""
        predicted_B = estimate.trusted(
            experience.predicted_MB,
            experience.group_B,
            penalty=self.config.uncertainty_penalty,
            gate=experience.gate,
        )
        if signal == "true":
            reward_B = experience.true_B
        elif signal == "predicted":
            reward_B = predicted_B
        else:
            reward_B = estimate.corrected_reward(predicted_B, experience.true_B, experience.inclusion_B)
        if experience.left_out_B is not None and signal != "predicted":
            # The bare prediction is no estimate of what was asked for, and not answered.
            reward_B = np.where(experience.left_out_B, np.nan, reward_B)
        if self.config.gradient_path == "straight_through":
            # What the discriminator's own gradient does not carry.
            reward_B = reward_B - self.config.straight_through_weight * predicted_B
        return reward_B

    def advantages(self, experience: Experience, signal: RewardSignal) -> np.ndarray:
        """What the policy gradient is weighted by, float64 [B]."""
        return estimate.advantages(self.rewards(experience, signal), experience.group_B, self.baseline.value)

    def _reinforce(
        self, experience: Experience, advantage_B: np.ndarray, critic: Critic | None, sampled: list[Tensor]
    ) -> tuple[float, float, float]:
        """Backward of the reward's loss, the KL and the entropy; returns the three, as means over responses.

        `sampled` is empty at the first update of a roll-out and filled by it.
        """
        total = len(experience.rollout)
        weight_B = torch.as_tensor(advantage_B, device=self.players.device, dtype=torch.float32)
        through = self.config.straight_through_weight * experience.gate
        straight = self.config.gradient_path == "straight_through" and through > 0
        table_VH = self._embedding_table() if straight else None
        first = not sampled
        sums = np.zeros(3)
        for chunk in chunks(total, self.optimizer.micro_batch_size):
            rows = experience.rollout.rows(chunk)
            gradient_BTH = None
            if straight:
                if critic is None:
                    raise ValueError("straight_through needs a critic to differentiate")
                gradient_BTH = through * self._critic_gradient(critic, rows)
                if experience.left_out_B is not None:
                    gradient_BTH[torch.as_tensor(experience.left_out_B[chunk], device=gradient_BTH.device)] = 0
            sampled_BT = None
            if not first:  # the chunk's rows may have stood in wider ones when they were noted
                places = rows.response_ids_BT.shape[1]
                sampled_BT = pad_sequence([logprobs_T[:places] for logprobs_T in sampled[chunk]], batch_first=True)
            losses, logprobs_BT = self._losses(
                rows, weight_B[chunk], gradient_BTH, table_VH, sampled_BT, backward_scale=1 / total
            )
            if first:
                sampled += logprobs_BT
            sums += [float(loss_B.sum()) / total for loss_B in losses]
        return float(sums[0]), float(sums[1]), float(sums[2])

    def _losses(
        self,
        rows: Rollout,
        advantage_B: Tensor,
        gradient_BTH: Tensor | None,
        table_VH: Tensor | None,
        sampled_BT: Tensor | None,
        *,
        backward_scale: float,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """One forward and backward over these rows; their policy losses, KLs and entropies, and the log-probabilities
        of their tokens, all detached.

        With a table of embeddings the discriminator's gradient comes straight through.
        """
        with torch.no_grad(), self.players.playing("reference"):
            reference_BTV = self._policy_logits(rows) if self.beta else None

        mask_BT = rows.response_mask_BT
        with self.players.playing("generator"):
            logits_BTV = self._policy_logits(rows)
            logprobs_BT = objectives.token_logprobs(logits_BTV, rows.response_ids_BT)
            if sampled_BT is None:
                policy_B = objectives.policy_gradient(logprobs_BT, mask_BT, advantage_B)
            else:
                policy_B = objectives.clipped_policy_gradient(
                    logprobs_BT, sampled_BT, mask_BT, advantage_B, epsilon=self.config.epsilon
                )
            if table_VH is not None and gradient_BTH is not None:
                policy_B = policy_B + objectives.straight_through(logits_BTV, gradient_BTH, table_VH, mask_BT)
            kl_B = entropy_B = torch.zeros_like(policy_B)
            if reference_BTV is not None:
                kl_B = objectives.kl_to_reference(logits_BTV, reference_BTV, mask_BT)
            if self.config.entropy_weight:
                entropy_B = objectives.entropy(logits_BTV, mask_BT)
            loss_B = self.config.reward_weight * policy_B + self.beta * kl_B
            if self.config.entropy_weight:
                loss_B = loss_B - self.config.entropy_weight * entropy_B
            (loss_B.sum() * backward_scale).backward()
        return (policy_B.detach(), kl_B.detach(), entropy_B.detach()), logprobs_BT.detach()

    def _policy_logits(self, rows: Rollout) -> Tensor:
        """The active player's logits at the places that predict response tokens, [B, T, V], at the policy's
        temperature: the policy that learns is the one that sampled."""
        places = rows.response_ids_BT.shape[1]
        logits = self.players.logits(rows.ids_BL, rows.mask_BL, keep=places + 1)[:, :-1]
        return logits / self.config.temperature

    def _critic_gradient(self, critic: Critic, rows: Rollout) -> Tensor:
        """∂ predicted reward / ∂ embedding of each response token, [B, T, H]; of its lower bound, if so set.

        By autograd.grad with respect to detached embeddings: the discriminator's own gradients stay untouched, and no
        adapter switch falls between a forward and its backward.
        """
        embeds_BLH = self.players.embed(rows.ids_BL).detach().requires_grad_(True)
        with self.players.playing("discriminator"):
            predicted_MB = critic(rows.ids_BL, rows.mask_BL, embeds_BLH)
            bound_B = predicted_MB.mean(0)
            if self.config.uncertainty_penalty and len(predicted_MB) > 1:
                bound_B = bound_B - self.config.uncertainty_penalty * predicted_MB.std(0, correction=0)
            (gradient_BLH,) = torch.autograd.grad(bound_B.sum(), embeds_BLH)
        return gradient_BLH[:, rows.prompt_places :].float()

    def _embedding_table(self) -> Tensor:
        """The embedding of every token the base can write, [V, H]."""
        vocabulary = self.players.lm.get_output_embeddings().weight.shape[0]
        return self.players.embed(torch.arange(vocabulary, device=self.players.device)).float()

    def _imitate(self, rows: list[Row], weight: float) -> float:
        """Backward of the cross-entropy on the target texts, their end included; returns its mean over rows."""
        base = self.players.base
        texts = [row.target or "" for row in rows]  # step() has refused a row without a target
        targets = [encode_response(base, text)[: self.config.max_completion_length] for text in texts]
        prompts = encode_prompts(
            base, [row.prompt for row in rows], self.config.max_completion_length, self.config.chat_template_kwargs
        )
        batch = assemble(base, self.players.device, prompts, targets, texts)
        loss = 0.0
        for chunk in chunks(len(rows), self.optimizer.micro_batch_size):
            part = batch.rows(chunk)
            with self.players.playing("generator"):
                logits_BTV = self.players.logits(part.ids_BL, part.mask_BL, keep=part.response_ids_BT.shape[1] + 1)
                logprobs_BT = objectives.token_logprobs(logits_BTV[:, :-1], part.response_ids_BT)
                share = objectives.imitation(logprobs_BT, part.response_mask_BT).sum() / len(rows)
                (weight * share).backward()
            loss += float(share.detach())
        return loss
