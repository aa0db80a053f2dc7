"""The generator's update: policy gradient or straight-through, KL to the reference, imitation.

# B = responses, L = prompt and response places, T = response places, V = vocabulary, H = hidden size
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import estimate, objectives
from .adapters import Players
from .config import Config, RewardSignal
from .data import Row
from .experience import Experience
from .optimizer import PlayerOptimizer
from .rollout import Rollout, assemble, chunks, encode_prompts, encode_response


class Generator:
    """What the generator carries from step to step beside its weights: its optimizer and its baseline."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(players.parameters("generator"), config.learning_rate, config)
        self.baseline = estimate.RunningMean()

    def update(
        self, rows: list[Row], experience: Experience | None, signal: RewardSignal, imitation_weight: float
    ) -> dict[str, float | None]:
        """One on-policy update. Without experience imitation alone teaches. Returns the loss and its parts."""
        loss, metrics = 0.0, {}
        if experience is not None:
            policy_loss, kl = self._reinforce(experience, signal)
            loss += self.config.reward_weight * policy_loss + self.config.beta * kl
            metrics["kl"] = kl if self.config.beta else None  # not measured where it has no weight
        if imitation_weight:
            metrics["imitation_loss"] = self._imitate(rows, imitation_weight)
            loss += imitation_weight * metrics["imitation_loss"]
        rate = self.optimizer.learning_rate
        return {"gen_loss": loss, **metrics, "gen_learning_rate": rate, "gen_grad_norm": self.optimizer.step()}

    def advantages(self, experience: Experience, signal: RewardSignal) -> np.ndarray:
        """What the policy gradient is weighted by, float64 [B]; moves the baseline that groups of one use."""
        if signal == "true":
            reward_B = experience.true_B
        elif signal == "predicted":
            reward_B = experience.predicted_B
        else:
            reward_B = estimate.corrected_reward(experience.predicted_B, experience.true_B, experience.query_rate)
        if self.config.gradient_path == "straight_through":
            reward_B = reward_B - experience.predicted_B  # what the discriminator's own gradient does not carry
        advantage_B = estimate.advantages(reward_B, experience.group_B, self.baseline.value)
        if not np.isnan(reward_B).all():
            self.baseline.update(float(np.nanmean(reward_B)))
        return advantage_B

    def _reinforce(self, experience: Experience, signal: RewardSignal) -> tuple[float, float]:
        """Backward of the reward's loss and the KL; returns both, as means over responses."""
        total = len(experience.rollout)
        advantage_B = torch.as_tensor(
            self.advantages(experience, signal), device=self.players.device, dtype=torch.float32
        )
        table_VH = self._embedding_table() if self.config.gradient_path == "straight_through" else None
        policy_loss, kl = 0.0, 0.0
        for chunk in chunks(total, self.config.micro_batch_size):
            policy_B, kl_B = self._losses(
                experience.rollout.rows(chunk), advantage_B[chunk], table_VH, backward_scale=1 / total
            )
            policy_loss += float(policy_B.sum()) / total
            kl += float(kl_B.sum()) / total
        return policy_loss, kl

    def _losses(
        self, rows: Rollout, advantage_B: Tensor, table_VH: Tensor | None, *, backward_scale: float
    ) -> tuple[Tensor, Tensor]:
        """One forward and backward over these rows; their policy losses and KLs, detached.

        With a table of embeddings the discriminator's gradient comes straight through.
        """
        gradient_BTH = None if table_VH is None else self._discriminator_gradient(rows)
        with torch.no_grad(), self.players.playing("reference"):
            reference_BTV = self._policy_logits(rows) if self.config.beta else None

        mask_BT = rows.response_mask_BT
        with self.players.playing("generator"):
            logits_BTV = self._policy_logits(rows)
            logprobs_BT = objectives.token_logprobs(logits_BTV, rows.response_ids_BT)
            policy_B = objectives.policy_gradient(logprobs_BT, mask_BT, advantage_B)
            if table_VH is not None and gradient_BTH is not None:
                policy_B = policy_B + objectives.straight_through(logits_BTV, gradient_BTH, table_VH, mask_BT)
            if reference_BTV is not None:
                kl_B = objectives.kl_to_reference(logits_BTV, reference_BTV, mask_BT)
            else:
                kl_B = torch.zeros_like(policy_B)
            loss_B = self.config.reward_weight * policy_B + self.config.beta * kl_B
            (loss_B.sum() * backward_scale).backward()
        return policy_B.detach(), kl_B.detach()

    def _policy_logits(self, rows: Rollout) -> Tensor:
        """The active player's logits at the places that predict response tokens, [B, T, V], at the policy's
        temperature: the policy that learns is the one that sampled."""
        places = rows.response_ids_BT.shape[1]
        logits = self.players.logits(rows.ids_BL, rows.mask_BL, keep=places + 1)[:, :-1]
        return logits / self.config.temperature

    def _discriminator_gradient(self, rows: Rollout) -> Tensor:
        """∂ predicted reward / ∂ embedding of each response token, [B, T, H].

        By autograd.grad with respect to detached embeddings: the discriminator's own gradients stay untouched, and no
        adapter switch falls between a forward and its backward.
        """
        with self.players.playing("discriminator"):
            embeds_BLH = self.players.embed(rows.ids_BL).detach().requires_grad_(True)
            predicted_B = self.players.predict(rows.ids_BL, rows.mask_BL, embeds_BLH).mean(0)
            (gradient_BLH,) = torch.autograd.grad(predicted_B.sum(), embeds_BLH)
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
        for chunk in chunks(len(rows), self.config.micro_batch_size):
            part = batch.rows(chunk)
            with self.players.playing("generator"):
                logits_BTV = self.players.logits(part.ids_BL, part.mask_BL, keep=part.response_ids_BT.shape[1] + 1)
                logprobs_BT = objectives.token_logprobs(logits_BTV[:, :-1], part.response_ids_BT)
                share = objectives.imitation(logprobs_BT, part.response_mask_BT).sum() / len(rows)
                (weight * share).backward()
            loss += float(share.detach())
        return loss
