"""The generator's update: policy gradient or straight-through, KL to the reference, imitation.

# B = responses, R = tokens of all responses, L = positions of a row, V = vocabulary, H = hidden size, M = heads

Differences from REINFORCE leave-one-out (Ahmadian et al. 2024):

- The reward may be a prediction, corrected by the queried true rewards.
- The KL is exact over the vocabulary at each sampled position, and part of the loss instead of the reward.
- The reward's term is divided by the reward's standard deviation within groups, measured over the run's first answers.
- The discriminator's gradient may flow into the generator through the sampled tokens (straight-through).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import Config, RewardSignal
from ..data import Row
from ..model.packing import Batch
from ..model.players import Players
from ..model.sampling import chunks
from . import distributed, estimate, losses, micro_batch
from .experience import Experience
from .optimizer import PlayerOptimizer

Number = TypeVar("Number", float, Tensor)

# Least weight of a known reward in the mixed reward; the rest is its prediction. On SmolLM2 with 128 calls, 0.5 instead
# of 0 raised the share of facts named from 0.74 to 0.86 at an equal reward (docs/learning).
LEAST_KNOWN = 0.5


@dataclass(frozen=True)
class PolicyLosses:
    """The loss terms as means over responses, and all response tokens' log-probabilities before the update, [R]."""

    policy: float
    kl: float
    logprobs_R: Tensor


class Generator:
    """Trains the generator. Holds the optimizer, the baseline, the reward's spread and the KL's weight."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(
            players.parameters("generator"), config.learning_rate, config, config.num_iterations
        )
        self.baseline = estimate.DecayedMean()
        self.spread = estimate.GroupSpread()  # of the true reward, within groups
        self.beta_scale = 1.0  # changes only if kl_target is set

    @property
    def beta(self) -> float:
        """The current weight of the KL, in units of the reward's spread per nat."""
        return self.config.beta * self.beta_scale

    def update(
        self,
        rows: list[Row],
        experience: Experience | None,
        signal: RewardSignal,
        imitation_weight: float,
    ) -> dict[str, float | None]:
        """Make the step's `num_iterations` updates. The first update is on-policy.

        Args:
            rows: the step's prompts and targets, for imitation.
            experience: the step's responses and rewards; None: the generator learns by imitation alone.
            signal: the reward from which the advantage is computed.
            imitation_weight: weight of the cross-entropy on the target texts.

        Returns:
            The first update's loss and loss terms (None if not finite), and the number of skipped updates.
        """
        metrics: dict[str, float | None] = {}
        reward_B = advantage_B = None
        unit = 1.0
        if experience is not None:
            if experience.is_audit:
                experience = replace(experience, true_B=np.full_like(experience.true_B, np.nan), failed_B=None)
            if signal in ("predicted", "mixed"):
                experience = replace(experience, failed_B=None)  # failed queries do not matter for this signal
            experience = replace(experience, trust=_trust(experience, signal))
            reward_B = self.rewards(experience, signal)
            advantage_B = estimate.advantages(reward_B, experience.group_B, self.baseline.value)
            unit = self.reward_unit(experience, signal, reward_B)
            kept_B = ~experience.dropped_B
        old_logprobs_R: Tensor | None = None  # log-probabilities of all response tokens under the sampling policy
        most_rows, skipped = max(len(rows), 0 if experience is None else len(experience.rollout)), 0
        for iteration in range(self.config.num_iterations):
            backward = partial(self._backward, rows, experience, advantage_B, imitation_weight, old_logprobs_R, unit)
            loss, terms, logprobs_R = micro_batch.within_memory(backward, self.optimizer, most_rows)
            old_logprobs_R = logprobs_R if old_logprobs_R is None else old_logprobs_R
            if reward_B is not None and signal != "true" and not np.isfinite(reward_B[kept_B]).all():
                loss = math.nan  # a NaN in reward_B would count as unknown, so a NaN prediction must skip the update
            rate, norm = self.optimizer.learning_rate, self.optimizer.step(loss)
            skipped += norm is None
            if iteration == 0:
                metrics = {"gen_loss": loss, **terms, "gen_learning_rate": rate, "gen_grad_norm": norm}
                metrics = {
                    name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()
                }
        if experience is not None:
            metrics["reward_spread"] = unit
            if signal in ("corrected", "mixed"):
                metrics["trust"] = experience.updated_trust if signal == "mixed" else experience.trust
        metrics["gen_skipped"] = skipped
        if skipped < self.config.num_iterations:  # without an update, baseline, spread and beta stay, too
            self._follow(experience, reward_B, metrics.get("kl"))
        return metrics

    def _follow(self, experience: Experience | None, reward_B: np.ndarray | None, kl: float | None) -> None:
        """Update the baseline, the spread and beta, after the updates, because an update may raise an error."""
        if reward_B is not None and not np.isnan(reward_B).all():
            self.baseline.add((1 - estimate.DECAY) * float(np.nanmean(reward_B)), 1 - estimate.DECAY)
        if experience is not None:
            self.spread.add(*self._squared_differences(experience.true_B, experience.group_B))
        if self.config.kl_target is not None and kl is not None:
            # The proportional controller of Ziegler et al. 2019 (arXiv:1909.08593): at most 10 % per step.
            error = min(max(kl / self.config.kl_target - 1, -1.0), 1.0)
            self.beta_scale *= 1 + 0.1 * error

    def _backward(
        self,
        rows: list[Row],
        experience: Experience | None,
        advantage_B: np.ndarray | None,
        imitation_weight: float,
        old_logprobs_R: Tensor | None,
        unit: float,
    ) -> tuple[float, dict[str, float | None], Tensor | None]:
        """Accumulate the gradients of one update; return the loss, its terms and the tokens' log-probabilities, [R]."""
        loss, logprobs_R = 0.0, None
        terms: dict[str, float | None] = {}
        if experience is not None and advantage_B is not None:
            policy = self._reinforce(experience, advantage_B, old_logprobs_R, unit)
            loss = self._weighted(policy.policy, policy.kl)
            logprobs_R = policy.logprobs_R
            terms["kl"] = policy.kl if self.beta else None  # not measured at beta 0
            if self.config.kl_target is not None:
                terms["beta"] = self.beta
        if imitation_weight:
            imitation = self._imitate(rows, imitation_weight)
            terms["imitation_loss"] = imitation
            loss += imitation_weight * imitation
        return loss, terms, logprobs_R

    def rewards(self, experience: Experience, signal: RewardSignal) -> np.ndarray:
        """The rewards from which the advantage is computed, float64 [B]; NaN = unknown."""
        if signal == "mixed":
            return _mixed(experience)
        predicted_B = estimate.scaled_by_trust(
            experience.compared_MB.mean(0), experience.group_B, trust=_trust(experience, signal)
        )
        if signal == "true":
            reward_B = experience.true_B
        elif signal == "predicted":
            reward_B = predicted_B
        else:
            reward_B = estimate.corrected_reward(predicted_B, experience.true_B, experience.inclusion_B)
        if signal in ("true", "corrected"):
            reward_B = np.where(experience.dropped_B, np.nan, reward_B)
        if self.config.gradient_path == "straight_through":
            reward_B = reward_B - predicted_B  # the discriminator's gradient carries the predicted reward
        return reward_B

    def reward_unit(self, experience: Experience, signal: RewardSignal, reward_B: np.ndarray) -> float:
        """The unit of the reward's term of the loss, in reward units.

        It is the spread of the true reward within groups over earlier steps. This step's rewards are not used, because
        the gradient would be biased. There is one exception: until a spread is known, as in the first step, it is the
        spread of this step's rewards. A first update of AdamW does not depend on the unit.

        In the mixed reward, responses without a known reward count by their trust. The unit is smaller by the share of
        responses that count. At trust 0 the loss is then that of RLOO on the known rewards.
        """
        if self.config.disc_objective == "real_vs_generated":
            return 1.0  # there are no true rewards, and predictions grow as the discriminator learns
        unit = self.spread.value
        for values_B in (experience.true_B, reward_B):
            if unit is None:
                squares, differences = self._squared_differences(values_B, experience.group_B)
                unit = (squares / differences) ** 0.5 if squares > 0 else None
        unit = 1.0 if unit is None else unit
        if signal == "mixed":
            counts_B = np.where(np.isnan(experience.true_B), experience.updated_trust, 1.0)
            unit *= float(counts_B.mean()) or 1.0
        return unit

    def _squared_differences(self, reward_B: np.ndarray, group_B: np.ndarray) -> list[float]:
        """`estimate.squared_differences` over all processes."""
        sums = estimate.squared_differences(reward_B, group_B)
        return distributed.total(torch.tensor(sums, dtype=torch.float64, device=self.players.device)).tolist()

    def _reinforce(
        self,
        experience: Experience,
        advantage_B: np.ndarray,
        old_logprobs_R: Tensor | None = None,
        unit: float = 1.0,
    ) -> PolicyLosses:
        """Accumulate the gradients of the reward's loss and the KL.

        Args:
            advantage_B: in reward units.
            old_logprobs_R: log-probabilities under the policy that sampled the responses. None: the current policy
                sampled them, as in the first update.
            unit: the reward's spread, by which the reward's term is divided.
        """
        total = len(experience.rollout)
        advantages_B = torch.as_tensor(advantage_B / unit, device=self.players.device, dtype=torch.float32)
        through = experience.trust / unit
        is_straight = self.config.gradient_path == "straight_through" and through > 0
        embeddings_VH = self._embedding_table() if is_straight else None
        sums, logprobs, tokens = np.zeros(2), [], 0
        for chunk in chunks(total, self.optimizer.micro_batch_size):
            batch = experience.rollout.batch(chunk)
            straight_through = None
            if embeddings_VH is not None:
                gradient_RH = through * self._predicted_reward_gradient(batch)
                dropped_B = torch.as_tensor(experience.dropped_B[chunk], device=gradient_RH.device)
                gradient_RH[dropped_B[batch.row_R]] = 0
                straight_through = gradient_RH, embeddings_VH
            last = tokens + len(batch.row_R)
            before_R = None if old_logprobs_R is None else old_logprobs_R[tokens:last]
            chunk_sums, logprobs_R = self._losses(
                batch, advantages_B[chunk], straight_through, before_R, scale=1 / total
            )
            tokens = last
            logprobs.append(logprobs_R)
            sums += chunk_sums / total
        policy, kl = sums.tolist()
        return PolicyLosses(policy, kl, torch.cat(logprobs))

    def _losses(
        self,
        batch: Batch,
        advantage_B: Tensor,
        through: tuple[Tensor, Tensor] | None,
        old_logprobs_R: Tensor | None,
        *,
        scale: float,
    ) -> tuple[np.ndarray, Tensor]:
        """Forward pass on a batch, and backward of its responses' summed losses times `scale`.

        Args:
            through: the gradient of the predicted reward with respect to each response token's embedding, [R, H], and
                the embedding of every token, [V, H]. None: policy gradient alone.

        Returns:
            The summed policy loss and KL, [2], and the tokens' log-probabilities, [R].
        """
        reference_RH, advantage_R = self._reference_hidden(batch), advantage_B[batch.row_R]
        sums, logprobs = np.zeros(2), []
        with self.players.use_adapter("generator"):
            for logits_RV, chunk in self._logits_in_chunks(batch):
                logits_RV = self._tempered(logits_RV)  # the temperature of sampling: the same policy learns
                ids_R = batch.response_ids_R[chunk]
                if reference_RH is None:
                    logprobs_R = losses.token_logprobs(logits_RV, ids_R)
                    kl_R = torch.zeros_like(logprobs_R)
                else:
                    with torch.no_grad():
                        reference_RV = self._tempered(self.players.lm_head(reference_RH[chunk], reference=True))
                    logprobs_R, kl_R = losses.logprobs_and_kl(logits_RV, ids_R, reference_RV)
                if old_logprobs_R is None:
                    policy_R = losses.policy_gradient(logprobs_R, advantage_R[chunk])
                else:
                    policy_R = losses.clipped_policy_gradient(
                        logprobs_R, old_logprobs_R[chunk], advantage_R[chunk], epsilon=self.config.epsilon
                    )
                if through is not None:
                    gradient_RH, embeddings_VH = through
                    policy_R = policy_R + losses.straight_through(logits_RV, gradient_RH[chunk], embeddings_VH)
                (self._weighted(policy_R, kl_R).sum() * scale).backward()
                sums += [float(value_R.detach().sum()) for value_R in (policy_R, kl_R)]
                logprobs.append(logprobs_R.detach())
        return sums, torch.cat(logprobs)

    def _weighted(self, policy: Number, kl: Number) -> Number:
        """The weighted sum of the loss terms, per token or as means."""
        return self.config.reward_weight * policy + self.beta * kl

    def _reference_hidden(self, batch: Batch) -> Tensor | None:
        """The reference's hidden states that predict the response tokens, [R, H]; None at beta 0."""
        if self.beta and "reference" not in batch.frozen_outputs:
            with torch.no_grad(), self.players.use_adapter("reference"):
                batch.frozen_outputs["reference"] = self.players.hidden(batch, batch.predicting_R)
        return batch.frozen_outputs["reference"] if self.beta else None

    def _tempered(self, logits: Tensor) -> Tensor:
        return logits if self.config.temperature == 1 else logits / self.config.temperature

    def _logits_in_chunks(self, batch: Batch) -> Iterator[tuple[Tensor, slice]]:
        """Yield the generator's logits [R, V] for chunks of response tokens, each with its slice of the batch's tokens.

        The layers run once, and the vocabulary head once per chunk, so that only one chunk's logits are in memory. The
        last chunk is followed by the backward pass through the layers. The caller holds `use_adapter("generator")`, and
        calls backward on a loss of each chunk before it takes the next one.
        """
        hidden_RH = self.players.hidden(batch, batch.predicting_R)
        leaf_RH = hidden_RH.detach().requires_grad_(True)
        for chunk in chunks(len(leaf_RH), self.players.tokens_at_once):
            yield self.players.lm_head(leaf_RH[chunk]), chunk
        hidden_RH.backward(leaf_RH.grad)

    def _predicted_reward_gradient(self, batch: Batch) -> Tensor:
        """∂ predicted reward / ∂ embedding of each response token, [R, H].

        `autograd.grad` on detached embeddings leaves the discriminator's own gradients unchanged, and runs before the
        next adapter switch.
        """
        embeds_BLH = self.players.embed(batch.ids).detach().requires_grad_(True)
        with self.players.use_adapter("discriminator"):
            predicted_B = self.players.predict(batch, embeds_BLH).mean(0)
            (gradient_BLH,) = torch.autograd.grad(predicted_B.sum(), embeds_BLH)
        return gradient_BLH.flatten(0, 1)[batch.response_R].float()

    def _embedding_table(self) -> Tensor:
        """The embedding of every token in the base's vocabulary, [V, H]."""
        return self.players.embed(torch.arange(self.players.vocabulary, device=self.players.device)).float()

    def _imitate(self, rows: list[Row], weight: float) -> float:
        """Accumulate the gradients of the cross-entropy on targets and end tokens; return the mean loss over rows."""
        targets = [self.players.encoder.target(row) for row in rows]  # step() has checked that each row has a target
        prompts = self.players.encoder.prompts(rows)
        total = 0.0
        for chunk in chunks(len(rows), self.optimizer.micro_batch_size):
            batch = self.players.batch(prompts[chunk], targets[chunk], np.arange(len(targets[chunk])))
            length_B = torch.bincount(batch.row_R, minlength=len(batch))
            with self.players.use_adapter("generator"):
                for logits_RV, tokens in self._logits_in_chunks(batch):
                    logprobs_R = losses.token_logprobs(logits_RV, batch.response_ids_R[tokens])
                    share = -(logprobs_R / length_B[batch.row_R[tokens]]).sum() / len(rows)
                    (weight * share).backward()
                    total += float(share.detach())
        return total


def _trust(experience: Experience, signal: RewardSignal) -> float:
    """Factor of the predictions' differences in the reward. The predicted reward alone is used in full."""
    return experience.trust if signal == "corrected" else 1.0


def _mixed(experience: Experience) -> np.ndarray:
    """The mixed reward, float64 [B]: true rewards and predictions, weighted by the trust in predictions.

    An unknown reward is the prediction times the trust. A known reward is averaged with the prediction of the probe,
    which has learned from it and so smooths it. The known reward has at least the weight LEAST_KNOWN, because a linear
    probe never learns a part of the reward. At trust 0, known rewards count alone, and other groups have no
    differences. A known reward without others in its group is used as it is.
    """
    trust, group_B = experience.updated_trust, experience.group_B
    known_B = np.isfinite(experience.true_B)
    predicted_B = np.zeros(len(group_B))
    if experience.updated_B is not None and trust:
        predicted_B = estimate.centered_within_groups(experience.updated_B, group_B)
    reward_B = trust * predicted_B
    if known_B.any():
        weight = max(1 - trust, LEAST_KNOWN)
        true_B = estimate.centered_within_groups(experience.true_B[known_B], group_B[known_B])
        reward_B[known_B] = weight * true_B + (1 - weight) * predicted_B[known_B]
    alone_B = known_B & (np.bincount(group_B)[group_B] == 1)
    reward_B[alone_B] = experience.true_B[alone_B]
    return reward_B
