"""The discriminator's training: heads begun by ridge regression, updates on fresh groups and replay, the gate.

# B = responses, M = heads, H = hidden size

It regresses on the true reward with each group's mean split off, plus a within-group ranking loss (GAD,
arXiv:2511.10643, found ranking better than classification), half on this step's responses, half on replay. The gate
says how far the generator trusts its predictions. `LoraGAN` calls it in every step, and for score() and best_of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import randomness
from ..config import Config
from ..model.packing import Batch
from ..model.players import Players
from ..model.sampling import Rollout, chunks
from . import distributed, losses, micro_batch
from .estimate import DecayedMean
from .experience import Experience, RetainedFeatures
from .fresh_metrics import fresh_metrics
from .optimizer import PlayerOptimizer
from .replay import Group, Replay, answered_groups, micro_batches

# The query rate from which one forward for prediction and update takes less time than two.
RETAIN_FROM_QUERY_RATE = 0.75


def _answered_features(experience: Experience) -> RetainedFeatures:
    """Of the experience's features, which are taken, those of the responses in `answered_groups`."""
    features_BH = experience.features.take()
    answered = np.flatnonzero(~np.isnan(experience.true_B))
    if features_BH is None or not len(answered):
        return RetainedFeatures()
    rows = answered[np.argsort(experience.group_B[answered], kind="stable")]
    return RetainedFeatures(features_BH[torch.from_numpy(rows).to(features_BH.device)])


class Discriminator:
    """What the discriminator carries from step to step beside its weights: optimizer, replay, the reward's scale."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(
            players.parameters("discriminator"), config.disc_learning_rate, config, config.disc_updates
        )
        self.replay = Replay(
            config.disc_replay_groups, reservoir=config.disc_replay_policy == "reservoir", seed=config.seed
        )
        self.correlation = DecayedMean()  # fresh rank correlation within groups, by the differences it was measured on
        self.ema_weights: list[Tensor] | None = None
        self.knows_unit = False  # whether the reward's unit has been read off the first rewards

    @property
    def gate(self) -> float:
        """How far the generator trusts predictions, 0 to 1, by the fresh rank correlation within groups so far."""
        if not self.config.gate_correlation or self.config.disc_objective == "real_vs_generated":
            return 1.0  # this objective has no true reward to measure predictions by
        if not self.correlation.weight:
            # One that learned in this run has no weight before it is measured. A loaded one may never be measured.
            return 0.0 if self.knows_unit else 1.0
        return min(max(self.correlation.value / self.config.gate_correlation, 0.0), 1.0)

    @property
    def fresh_correlation(self) -> tuple[float, float] | None:
        """The fresh rank correlation within groups over the last steps, and its standard error were it zero; None where
        it was never measured. Older steps count less, as in `gate`."""
        measured = self.correlation
        return (measured.value, measured.weight**-0.5) if measured.weight > 0 else None

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Inside the block the players hold the weights that score: the averaged ones, where there is an average."""
        if self.ema_weights is None:
            yield
            return
        parameters = self.players.parameters("discriminator")
        raw = [parameter.data for parameter in parameters]
        try:
            for parameter, weight in zip(parameters, self.ema_weights, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(parameters, raw, strict=True):
                parameter.data = weight

    def predict(self, rollout: Rollout) -> np.ndarray:
        """Every head's predicted reward, float64 [M, B]."""
        total = len(rollout)

        def predicted() -> Tensor:
            with torch.no_grad(), self.ema_scope(), self.players.use_adapter("discriminator"):
                parts = chunks(total, self.optimizer.micro_batch_size)
                return torch.cat([self.players.predict(rollout.batch(part)) for part in parts], dim=1)

        return micro_batch.within_memory(predicted, self.optimizer, total).double().cpu().numpy()

    def predict_to_learn(self, rollout: Rollout) -> tuple[np.ndarray, RetainedFeatures]:
        """`predict`, and the features [B, H] with the graph that the next update begins from.

        None are retained if the update uses other weights (a moving average), other rows (targets) or smaller batches,
        or if few responses are asked about.
        """
        size = self.optimizer.micro_batch_size
        whole = self.config.query_rate >= RETAIN_FROM_QUERY_RATE and (size is None or size >= len(rollout))
        scores = self.ema_weights is None and not self.config.disc_average
        plain = self.config.disc_objective == "regression" and self.config.disc_anchor_reward is None
        features_BH = None
        if whole and scores and plain:
            with suppress(torch.OutOfMemoryError), self.players.use_adapter("discriminator"):
                # A graph takes more than a prediction does.
                features_BH = self.players.defer_backward(self.players.pooled_hidden(rollout.batch()))
        if features_BH is None:
            return self.predict(rollout), RetainedFeatures()
        with torch.no_grad():
            predicted_MB = self.players.score_MH @ features_BH.T
        return predicted_MB.double().cpu().numpy(), RetainedFeatures(features_BH)

    def update(self, experience: Experience) -> dict[str, float | None]:
        """Learn from this step's answered responses and as many of replay; returns the mean loss of the updates.

        The mean is over the updates whose loss was finite; those skipped for want of that are counted.
        With several processes, one whose prompts got no answer takes part with zero gradients.
        """
        features = _answered_features(experience)
        relative = self.config.disc_objective == "real_vs_generated"
        fresh = self._real_and_generated(experience) if relative else self._answered(experience)
        answered = torch.tensor([float(len(fresh))], device=self.players.device)
        if not distributed.total(answered):
            return {}
        metrics = self._pairwise_accuracy(fresh) if relative else self._update_gate(experience)
        if not relative:
            self._update_reward_unit(fresh)
            if not self.players.heads_MH.any():
                self._init_heads(fresh)
        elif not self.players.heads_MH.any():
            self._init_heads_randomly()
        finite, norm, learning_rate, skipped = [], None, 0.0, 0
        for update in range(self.config.disc_updates):
            old = self.replay.draw(len(fresh), seed=self.config.seed, step=experience.step, update=update)
            loss = self._learn_within_memory(fresh, old, features) if fresh or old else 0.0
            learning_rate = self.optimizer.learning_rate
            taken = self.optimizer.step(loss)
            finite += [loss] if math.isfinite(loss) else []
            if taken is None:
                skipped += 1
            else:
                norm = taken
                self._update_average()
        self.replay.extend(fresh)
        return {
            "disc_loss": float(np.mean(finite)) if finite else None,
            "disc_learning_rate": learning_rate,
            "disc_grad_norm": norm,
            "disc_skipped": skipped,
            **metrics,
        }

    def _update_gate(self, experience: Experience) -> dict[str, float]:
        """What this step's answers say of the predictions made before them: how far to trust the next ones."""
        answered_B = ~np.isnan(experience.true_B)
        metrics = fresh_metrics(experience.predicted_MB, experience.true_B, experience.group_B)
        within = metrics["rank_correlation_within"]
        differences = int(answered_B.sum()) - len(np.unique(experience.group_B[answered_B]))
        weight = 0.0 if within is None else float(differences)
        # With several processes the sums are over all of them: one without answers brings zeros, and none waits.
        seen = torch.tensor([weight * (within or 0.0), weight], dtype=torch.float64, device=self.players.device)
        total, weight = distributed.total(seen).tolist()
        if weight:
            self.correlation.add(total, weight)
        return {"gate": experience.gate}

    def _update_average(self) -> None:
        """The moving average of the weights, begun at the first update."""
        if not self.config.disc_average:
            return
        weights = [parameter.detach() for parameter in self.players.parameters("discriminator")]
        if self.ema_weights is None:
            self.ema_weights = [weight.clone() for weight in weights]
        for mean, weight in zip(self.ema_weights, weights, strict=True):
            mean.lerp_(weight, 1 - self.config.disc_average)

    # --- targets as data

    def _answered(self, experience: Experience) -> list[Group]:
        """The step's answered groups, each with its prompt's target in it if disc_anchor_reward is set."""
        groups = answered_groups(experience, self.config)
        if self.config.disc_anchor_reward is not None:
            for j, group in groups.items():
                row = experience.rows[j]
                if row.target is not None:
                    rewards = [*group.rewards, float(self.config.disc_anchor_reward)]
                    groups[j] = replace(
                        group, responses=[*group.responses, self.players.encoder.target(row)], rewards=rewards
                    )
        return list(groups.values())

    def _real_and_generated(self, experience: Experience) -> list[Group]:
        """Every group with its target: 1 for what is real, 0 for what was generated."""
        groups = []
        for j, (prompt, row) in enumerate(zip(experience.prompts, experience.rows, strict=True)):
            if row.target is not None:
                responses = [experience.rollout.responses[i] for i in np.flatnonzero(experience.group_B == j)]
                rewards = [0.0] * len(responses) + [1.0]
                target = self.players.encoder.target(row)
                groups.append(Group(prompt, [*responses, target], rewards, [True] * self.config.disc_heads))
        return groups

    def _pairwise_accuracy(self, groups: list[Group]) -> dict[str, float]:
        """Share of (target, response) pairs that the discriminator orders rightly, before it learns from them."""
        right: list[float] = []
        for group in groups:
            with torch.no_grad(), self.ema_scope():
                predicted_B = (self.players.score_MH @ self._features([group]).T).mean(0)
            right += (predicted_B[-1] > predicted_B[:-1]).float().tolist()
        return {"disc_accuracy": float(np.mean(right))} if right else {}

    def _init_heads_randomly(self) -> None:
        """Heads that are not all alike: with no rewards there is no closed form to begin from."""
        draws = randomness.generator(self.config.seed, 0, "heads").normal(size=tuple(self.players.heads_MH.shape))
        with torch.no_grad():
            scale = 0.1 / self.players.heads_MH.shape[1] ** 0.5
            self.players.heads_MH.copy_(torch.from_numpy(draws * scale).to(self.players.heads_MH))

    # --- learning

    def _update_reward_unit(self, fresh: list[Group]) -> None:
        """Set the reward's unit from the first answers, and again when their standard deviation has doubled.

        The first answers may happen to be all alike. Predictions stay as they were: the heads are rescaled. With
        several processes the unit is the mean over those with answers.
        """
        rewards = [reward for group in (*self.replay.groups, *fresh) for reward in group.rewards]
        spread = float(np.std(rewards)) if rewards else 0.0
        first = reward_unit(rewards) if rewards else 0.0
        seen = torch.tensor([spread, first, float(bool(rewards))], device=self.players.device, dtype=torch.float64)
        spread, first, count = distributed.total(seen).tolist()
        before, unit = self.players.reward_unit, None
        if not self.knows_unit:
            unit = first / count
        elif spread / count > 2 * before:
            unit = spread / count
        if unit is not None:
            self.knows_unit, self.players.reward_unit = True, unit
            with torch.no_grad():
                self.players.heads_MH.mul_(before / unit)
                if self.ema_weights is not None:
                    self.ema_weights[-1].mul_(before / unit)

    def _init_heads(self, fresh: list[Group]) -> None:
        """Begin the heads, which are zero, in closed form; with several processes, the mean of those with answers."""
        ridge_MH = self._ridge_heads(fresh) if fresh else torch.zeros_like(self.players.heads_MH)
        count = distributed.total(torch.tensor([float(bool(fresh))], device=self.players.device))
        heads_MH = distributed.total(ridge_MH) / count
        if torch.isfinite(heads_MH).all():  # else they stay zero, and the next step begins them
            with torch.no_grad():
                self.players.heads_MH.copy_(heads_MH)

    def _ridge_heads(self, groups: list[Group]) -> Tensor:
        """Heads by ridge regression on the pooled features, [M, H], in the reward's unit.

        Without intercept (stock sequence classification ignores a bias), in its dual form, since responses are fewer
        than features: w = Fᵀ (F Fᵀ + λ I)⁻¹ r, each head on the groups it learns from.
        """
        true_B, _, seen_MB = self._labels(groups)
        features_BH = self._features(groups).double()
        if not torch.isfinite(features_BH).all():  # there is nothing to solve, and no process may raise alone
            return torch.full_like(self.players.heads_MH, math.nan)
        target_B = true_B.double() / self.players.reward_unit
        gram_BB = features_BH @ features_BH.T
        # A tenth of a feature vector's size: a few dozen rows, hundreds of weights.
        ridge = 0.1 * gram_BB.diagonal().mean()
        heads = []
        for seen_B in seen_MB.bool():
            kept_B = seen_B if seen_B.any() else torch.ones_like(seen_B)
            gram = gram_BB[kept_B][:, kept_B]
            dual = torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), target_B[kept_B])
            heads.append(dual @ features_BH[kept_B])
        return torch.stack(heads).float()

    def _learn_within_memory(self, fresh: list[Group], old: list[Group], features: RetainedFeatures) -> float:
        """`_learn`, in smaller micro-batches where memory runs out. `features` are those of `fresh`, or none."""

        def learn() -> float:
            features_BH, size = features.take(), self.optimizer.micro_batch_size
            if features_BH is None:
                return self._learn([(part, None) for part in micro_batches(fresh + old, size)])
            return self._learn([(fresh, features_BH), *((part, None) for part in micro_batches(old, size))])

        return micro_batch.within_memory(learn, self.optimizer, _count(fresh + old))

    def _learn(self, parts: list[tuple[list[Group], Tensor | None]]) -> float:
        """Backward of regression and ranking within groups; returns the loss, a mean over heads and responses.

        The loss compares all responses of a group. Where a group has more than a micro-batch, the gradient with respect
        to each one's features comes first, without a graph of the base; then each micro-batch has its forward and
        backward (GradCache, Gao et al. 2021, arXiv:2101.06983).

        Args:
            parts: micro-batches, each with its features where they are known.
        """
        total = sum(sum(group.heads) * len(group.responses) for groups, _ in parts for group in groups)
        loss = 0.0
        for groups, features_BH in parts:
            with self.players.use_adapter("discriminator"):
                pieces = [] if features_BH is not None else self._batches(groups)
                with torch.set_grad_enabled(len(pieces) == 1):
                    leaves = [self.players.pooled_hidden(piece) for piece in pieces]
                if len(pieces) > 1:
                    leaves = [leaf.requires_grad_(True) for leaf in leaves]
                share = self._loss(groups, torch.cat(leaves) if features_BH is None else features_BH) / total
                share.backward()
                if len(pieces) > 1:
                    for piece, leaf in zip(pieces, leaves, strict=True):
                        self.players.pooled_hidden(piece).backward(leaf.grad)
            loss += float(share.detach())
        return loss

    def _loss(self, groups: list[Group], features_BH: Tensor) -> Tensor:
        """Regression and ranking within groups, summed over their responses and the heads that learn from them."""
        true_B, group_B, seen_MB = self._labels(groups)
        predicted_MB = self.players.score_MH @ features_BH.T / self.players.reward_unit
        true_B = true_B / self.players.reward_unit
        ranking_MB = losses.ranking_by_group(predicted_MB, true_B, group_B)
        if self.config.disc_objective == "real_vs_generated":
            # Targets hold 1, responses 0: ranking is the relativistic pairing loss (arXiv:1807.00734).
            loss_MB = ranking_MB
        else:
            regression_MB = losses.regression_by_group(
                predicted_MB, true_B, group_B, mean_weight=self.config.disc_mean_weight
            )
            loss_MB = regression_MB + self.config.disc_rank_weight * ranking_MB
        return (loss_MB * seen_MB).sum()

    def _features(self, groups: list[Group]) -> Tensor:
        """What the heads read of the groups' responses, [B, H], without a graph."""

        def features() -> Tensor:
            with torch.no_grad(), self.players.use_adapter("discriminator"):
                return torch.cat([self.players.pooled_hidden(piece) for piece in self._batches(groups)])

        return micro_batch.within_memory(features, self.optimizer, _count(groups))

    def _batches(self, groups: list[Group]) -> list[Batch]:
        """The groups' responses, laid out in micro-batches; a group that is larger, in parts of much the same size."""
        size, pieces = self.optimizer.micro_batch_size, []
        for part in micro_batches(groups, size):
            if size is None or _count(part) <= size:
                pieces.append(self._batch(part))
                continue
            (group,) = part
            rows, count = len(group.responses), math.ceil(len(group.responses) / size)
            edges = [rows * i // count for i in range(count + 1)]
            pieces += [
                self._batch([replace(group, responses=group.responses[first:last])]) for first, last in pairwise(edges)
            ]
        return pieces

    def _batch(self, groups: list[Group]) -> Batch:
        """The groups' responses, laid out for a forward."""
        return self.players.batch(
            [group.prompt for group in groups],
            [response for group in groups for response in group.responses],
            np.repeat(np.arange(len(groups)), [len(group.responses) for group in groups]),
        )

    def _labels(self, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """The responses' true rewards [B], group labels [B], and which head learns from which of them [M, B]."""
        device = self.players.device
        sizes = torch.tensor([len(group.responses) for group in groups], device=device)
        group_B = torch.arange(len(groups), device=device).repeat_interleave(sizes)
        true_B = torch.tensor([r for group in groups for r in group.rewards], device=device, dtype=torch.float32)
        seen_MB = torch.tensor([group.heads for group in groups], device=device, dtype=torch.float32).T[:, group_B]
        return true_B, group_B, seen_MB

    def restart(self, score_1H: Tensor) -> None:
        """Take over the score of a discriminator that came without heads and replay: every head begins with it."""
        self.replay.groups.clear()
        self.knows_unit, self.players.reward_unit = False, 1.0
        with torch.no_grad():
            self.players.heads_MH.copy_(score_1H.expand_as(self.players.heads_MH))
        # The predictions of a loaded adapter were never measured.
        self.ema_weights = None
        self.correlation = DecayedMean()

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads_MH": self.players.heads_MH.detach(),
            "reward_unit": self.players.reward_unit,
            "knows_unit": self.knows_unit,
            "replay": self.replay.state_dict(),
            "raw": [parameter.detach() for parameter in self.players.parameters("discriminator")[:-1]],
            "average": self.ema_weights,
            "correlation": [self.correlation.total, self.correlation.weight],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.players.reward_unit, self.knows_unit = state["reward_unit"], state["knows_unit"]
        self.replay.load_state_dict(state["replay"])
        with torch.no_grad():  # the heads are the last parameter
            saved = [*state["raw"], state["heads_MH"]]
            for parameter, weight in zip(self.players.parameters("discriminator"), saved, strict=True):
                parameter.copy_(weight)
        device = self.players.device
        self.ema_weights = state["average"] and [weight.to(device).clone() for weight in state["average"]]
        self.correlation = DecayedMean(*state["correlation"])


def _count(groups: list[Group]) -> int:
    return sum(len(group.responses) for group in groups)


def reward_unit(rewards: list[float]) -> float:
    """The spread of the first rewards; where they are all alike, their size is the best guess at their unit."""
    return next(value for value in (float(np.std(rewards)), abs(float(np.mean(rewards))), 1.0) if value > 1e-6)
