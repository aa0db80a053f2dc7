"""The discriminator's training: heads initialized by ridge regression, updates on fresh groups and replay.

# B = responses, M = heads, H = hidden size

The loss is a regression on the true reward, with each group's mean split off, plus a ranking loss within groups (GAD,
arXiv:2511.10643, found ranking better than classification). Half of each update is this step's responses, half replay.
`gan` uses the discriminator in each step, in score() and best_of.
"""

import math
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import randomness
from ..config import Config
from ..model.packing import Batch
from ..model.players import HEADS, Players
from ..model.sampling import Rollout, chunks
from . import distributed, losses, micro_batch
from .estimate import Calibration, DecayedMean, centered_within_groups, moments_within_groups
from .experience import Experience, Probed, RetainedFeatures
from .fresh_metrics import fresh_metrics
from .optimizer import PlayerOptimizer
from .probe import Probe
from .replay import Group, Replay, answered_groups, micro_batches

MEAN_WEIGHT = 0.25  # of the group's mean in the regression: the generator uses differences within a group, weight 1
RANK_WEIGHT = 0.5  # of the ranking loss, relative to the regression; 0 was not better in benchmarks/learning.py
# At or above this query rate, one forward pass for prediction and update is faster than two.
RETAIN_FROM_QUERY_RATE = 0.75


def _answered_features(experience: Experience) -> RetainedFeatures:
    """Take the experience's features, and keep those of answered responses, in the order of `answered_groups`."""
    features_BH = experience.features.take()
    answered = np.flatnonzero(~np.isnan(experience.true_B))
    if features_BH is None or not len(answered):
        return RetainedFeatures()
    rows = answered[np.argsort(experience.group_B[answered], kind="stable")]
    return RetainedFeatures(features_BH[torch.from_numpy(rows).to(features_BH.device)])


class Discriminator:
    """Trains the discriminator. Holds the optimizer, replay, the reward's unit and the gate from step to step."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(
            players.parameters("discriminator"), config.disc_learning_rate, config, config.disc_updates
        )
        self.replay = Replay(config.disc_replay_groups)
        self.correlation = DecayedMean()  # fresh rank correlation within groups, weighted by the number of differences
        self.probe, self.calibration = Probe(), Calibration(2)
        self.knows_unit = False  # whether the reward's unit is set from rewards

    @property
    def trust(self) -> float:
        """Trust in the predictions, 0 to 1, from the fresh ones so far; see `Calibration`.

        A new discriminator counts nothing until it is measured. A loaded one may never be measured.
        """
        if not self.uses_probe:
            return 1.0
        if not self.calibration.is_measured and not self.knows_unit and self.players.heads_MH.any():
            return 1.0
        return self.calibration.trust

    @property
    def explained(self) -> float:
        """Share of the reward's variance within groups that the probe explains, 0 to 1, by leaving out one group at a
        time; 1 if the probe is not used."""
        return self.probe.explained if self.uses_probe else 1.0

    @property
    def uses_probe(self) -> bool:
        """Whether predictions include the probe's. The straight-through gradient is that of the adapter alone."""
        return self.config.disc_objective == "regression" and self.config.gradient_path == "policy_gradient"

    @property
    def fresh_correlation(self) -> tuple[float, float] | None:
        """The fresh rank correlation within groups, and its standard error under a true correlation of zero.

        Older steps count less, as in `gate`. None: never measured.
        """
        measured = self.correlation
        return (measured.value, measured.weight**-0.5) if measured.weight > 0 else None

    def predict(self, rollout: Rollout) -> np.ndarray:
        """The adapter's predicted reward of every head, float64 [M, B]. Stock clients compute their mean."""
        total = len(rollout)

        def predicted() -> Tensor:
            with torch.no_grad(), self.players.use_adapter("discriminator"):
                slices = chunks(total, self.optimizer.micro_batch_size)
                return torch.cat([self.players.predict(rollout.batch(chunk)) for chunk in slices], dim=1)

        return micro_batch.within_memory(predicted, self.optimizer, total).double().cpu().numpy()

    def predict_to_learn(self, rollout: Rollout) -> tuple[np.ndarray, RetainedFeatures]:
        """`predict`, and the features [B, H] with their graph, from which the next update starts.

        No features are retained if the update uses other rows (targets) or smaller batches, if few responses are
        queried, or if the graph does not fit into memory.
        """
        size = self.optimizer.micro_batch_size
        same_rows = self.config.asked_share >= RETAIN_FROM_QUERY_RATE and (size is None or size >= len(rollout))
        features_BH = None
        if same_rows and self.config.disc_objective == "regression":
            with suppress(torch.OutOfMemoryError), self.players.use_adapter("discriminator"):
                features_BH = self.players.defer_backward(self.players.pooled_hidden(rollout.batch()))
        if features_BH is None:
            return self.predict(rollout), RetainedFeatures()
        with torch.no_grad():
            predicted_MB = self.players.score_MH @ features_BH.T
        return predicted_MB.double().cpu().numpy(), RetainedFeatures(features_BH)

    def rank(self, rollout: Rollout) -> np.ndarray:
        """Predicted rewards, float64 [B], by adapter and probe. Only differences within a group are meant."""
        predicted_MB = self.predict(rollout)
        probed = self.probed(rollout, predicted_MB)
        return (predicted_MB if probed is None else probed.combined_MB).mean(0)

    def probed(self, rollout: Rollout, predicted_MB: np.ndarray) -> Probed | None:
        """The probe's predictions, and the adapter's combined with them. None: the probe is not used."""
        if not self.uses_probe:
            return None
        total = len(rollout)

        def features() -> Tensor:
            slices = chunks(total, self.optimizer.micro_batch_size)
            return torch.cat([self.players.base_features(rollout.batch(chunk)) for chunk in slices])

        features_BH = micro_batch.within_memory(features, self.optimizer, total).cpu().numpy()
        return self._probed(features_BH, predicted_MB, rollout.group_B)

    def _probed(self, features_BH: np.ndarray, predicted_MB: np.ndarray, group_B: np.ndarray) -> Probed:
        """Combine the predictions: a group's mean is the adapter's, differences are weighted sums.

        The weights are those of the regression over earlier steps; both are 1 without one.
        """
        probe_B = self.probe.predict(features_BH)
        if probe_B is None:
            return Probed(features_BH, None, predicted_MB)
        weights = self.calibration.weights if self.calibration.is_measured else np.ones(2)
        adapter_B, differences_B = (centered_within_groups(x_B, group_B) for x_B in (predicted_MB.mean(0), probe_B))
        combined_MB = predicted_MB - adapter_B + weights[0] * adapter_B + weights[1] * differences_B
        return Probed(features_BH, probe_B, combined_MB)

    def updated(self, experience: Experience) -> Experience:
        """The experience with the predictions of the probe that has learned from the step's answers.

        They have the scale of the true reward's differences: a ridge regression shrinks its predictions.
        """
        probed = experience.probed
        predicted_B = None if probed is None else self.probe.predict(probed.features_BH)
        if predicted_B is None:
            return experience
        return replace(experience, updated_B=predicted_B / self.probe.amplitude, updated_trust=self.probe.trust)

    def update(self, experience: Experience) -> dict[str, float | None]:
        """Make the step's `disc_updates` updates, on the answered groups and as many groups from replay.

        With several processes, a process without answers takes part with zero gradients.

        Returns:
            The metrics: the mean loss of the updates with a finite loss, the last update's learning rate and gradient
            norm, the number of skipped updates, and the fresh quality. Empty if no process has answers.
        """
        features = _answered_features(experience)
        relative = self.config.disc_objective == "real_vs_generated"
        fresh = self._real_and_generated(experience) if relative else answered_groups(experience, self.config.seed)
        answered = torch.tensor([float(len(fresh))], device=self.players.device)
        if not distributed.total(answered):
            return {}
        metrics = self._pairwise_accuracy(fresh) if relative else {}
        if not relative:
            self._measure(experience)
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
            update_norm = self.optimizer.step(loss)
            finite += [loss] if math.isfinite(loss) else []
            if update_norm is None:
                skipped += 1
            else:
                norm = update_norm
        self.replay.extend(fresh)
        return {
            "disc_loss": float(np.mean(finite)) if finite else None,
            "disc_learning_rate": learning_rate,
            "disc_grad_norm": norm,
            "disc_skipped": skipped,
            **metrics,
        }

    def _measure(self, experience: Experience) -> None:
        """Compare this step's predictions with its answers."""
        answered_B = ~np.isnan(experience.true_B)
        metrics = fresh_metrics(experience.compared_MB, experience.true_B, experience.group_B)
        within = metrics["rank_correlation_within"]
        differences = int(answered_B.sum()) - len(np.unique(experience.group_B[answered_B]))
        weight = 0.0 if within is None else float(differences)
        # The sums are over all processes. A process without answers must take part, too: it adds zeros.
        sums = torch.tensor([weight * (within or 0.0), weight], dtype=torch.float64, device=self.players.device)
        total, weight = distributed.total(sums).tolist()
        if weight:
            self.correlation.add(total, weight)
        if experience.probed is not None:
            self._calibrate(experience, experience.probed)

    def _calibrate(self, experience: Experience, probed: Probed) -> None:
        """Compare this step's predictions with its answers, then give the answers to the probe."""
        adapter_B = experience.predicted_B
        probe_B = np.zeros_like(adapter_B) if probed.probe_B is None else probed.probe_B
        moments, differences = moments_within_groups(
            np.stack([adapter_B, probe_B]), experience.true_B, experience.group_B
        )
        sums = torch.tensor([*moments.ravel(), differences], dtype=torch.float64, device=self.players.device)
        *flat, differences = distributed.total(sums).tolist()
        has_learned = self.probe.weights_H is not None or self.players.heads_MH.any()
        if differences and has_learned:  # predictions of zero are no evidence
            self.calibration.add(np.reshape(flat, moments.shape), differences)
        self.probe.learn(probed.features_BH, experience.true_B, experience.group_B)

    # --- real against generated

    def _real_and_generated(self, experience: Experience) -> list[Group]:
        """Each prompt's responses with reward 0, and its target with reward 1, for prompts with a target."""
        groups = []
        for j, (prompt, row) in enumerate(zip(experience.prompts, experience.rows, strict=True)):
            if row.target is not None:
                responses = [experience.rollout.responses[i] for i in np.flatnonzero(experience.group_B == j)]
                rewards = [0.0] * len(responses) + [1.0]
                target = self.players.encoder.target(row)
                groups.append(Group(prompt, [*responses, target], rewards, [True] * HEADS))
        return groups

    def _pairwise_accuracy(self, groups: list[Group]) -> dict[str, float]:
        """Fresh share of (target, response) pairs in which the target has the higher prediction."""
        correct: list[float] = []
        for group in groups:
            with torch.no_grad():
                predicted_B = (self.players.score_MH @ self._features([group]).T).mean(0)
            correct += (predicted_B[-1] > predicted_B[:-1]).float().tolist()
        return {"disc_accuracy": float(np.mean(correct))} if correct else {}

    def _init_heads_randomly(self) -> None:
        """Initialize the heads with different small random values: without rewards there is no ridge regression."""
        draws = randomness.generator(self.config.seed, 0, "heads").normal(size=tuple(self.players.heads_MH.shape))
        with torch.no_grad():
            scale = 0.1 / self.players.heads_MH.shape[1] ** 0.5
            self.players.heads_MH.copy_(torch.from_numpy(draws * scale).to(self.players.heads_MH))

    # --- learning

    def _update_reward_unit(self, fresh: list[Group]) -> None:
        """Set the reward's unit from the first answers, and again if the rewards' standard deviation has doubled.

        The second case is needed because the first answers may be equal by chance. The heads are rescaled, so that
        predictions stay the same. With several processes the unit is the mean over processes with answers.
        """
        rewards = [reward for group in (*self.replay.groups, *fresh) for reward in group.rewards]
        spread = float(np.std(rewards)) if rewards else 0.0
        first = reward_unit(rewards) if rewards else 0.0
        sums = torch.tensor([spread, first, float(bool(rewards))], device=self.players.device, dtype=torch.float64)
        spread, first, count = distributed.total(sums).tolist()
        before, unit = self.players.reward_unit, None
        if not self.knows_unit:
            unit = first / count
        elif spread / count > 2 * before:
            unit = spread / count
        if unit is not None:
            self.knows_unit, self.players.reward_unit = True, unit
            with torch.no_grad():
                self.players.heads_MH.mul_(before / unit)

    def _init_heads(self, fresh: list[Group]) -> None:
        """Initialize the heads by ridge regression, with the mean over all processes that have answers."""
        ridge_MH = self._ridge_heads(fresh) if fresh else torch.zeros_like(self.players.heads_MH)
        count = distributed.total(torch.tensor([float(bool(fresh))], device=self.players.device))
        heads_MH = distributed.total(ridge_MH) / count
        if torch.isfinite(heads_MH).all():  # else the heads stay zero, and the next step initializes them
            with torch.no_grad():
                self.players.heads_MH.copy_(heads_MH)

    def _ridge_heads(self, groups: list[Group]) -> Tensor:
        """Heads by ridge regression on the pooled features, [M, H], in the reward's unit.

        There is no intercept, because stock sequence classification ignores a bias. The dual form is used, because
        there are fewer responses than features: w = Fᵀ (F Fᵀ + λ I)⁻¹ r. Each head uses the groups it learns from.
        """
        true_B, _, learns_MB = self._labels(groups)
        features_BH = self._features(groups).double()
        if not torch.isfinite(features_BH).all():  # the solver would raise, and the other processes would wait
            return torch.full_like(self.players.heads_MH, math.nan)
        target_B = true_B.double() / self.players.reward_unit
        gram_BB = features_BH @ features_BH.T
        # A tenth of a feature vector's squared norm, because a few dozen rows determine hundreds of weights.
        ridge = 0.1 * gram_BB.diagonal().mean()
        heads = []
        for learns_B in learns_MB.bool():
            kept_B = learns_B if learns_B.any() else torch.ones_like(learns_B)
            gram = gram_BB[kept_B][:, kept_B]
            dual = torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), target_B[kept_B])
            heads.append(dual @ features_BH[kept_B])
        return torch.stack(heads).float()

    def _learn_within_memory(self, fresh: list[Group], old: list[Group], features: RetainedFeatures) -> float:
        """`_learn`, with smaller micro-batches if memory runs out. `features` are those of `fresh`, or empty."""

        def learn() -> float:
            features_BH, size = features.take(), self.optimizer.micro_batch_size
            if features_BH is None:
                return self._learn([(groups, None) for groups in micro_batches(fresh + old, size)])
            return self._learn([(fresh, features_BH), *((groups, None) for groups in micro_batches(old, size))])

        return micro_batch.within_memory(learn, self.optimizer, _count(fresh + old))

    def _learn(self, batches: list[tuple[list[Group], Tensor | None]]) -> float:
        """Accumulate the gradients of regression and ranking; return the loss, a mean over heads and responses.

        The loss compares all responses of a group, but a group may exceed the micro-batch size. Then a first pass
        without a graph gives the gradient with respect to each response's features. A second pass runs forward and
        backward per micro-batch (GradCache, Gao et al. 2021, arXiv:2101.06983).

        Args:
            batches: whole groups, each list with its features if they are known.
        """
        total = sum(sum(group.heads) * len(group.responses) for groups, _ in batches for group in groups)
        loss = 0.0
        for groups, features_BH in batches:
            with self.players.use_adapter("discriminator"):
                micro = [] if features_BH is not None else self._batches(groups)
                with torch.set_grad_enabled(len(micro) == 1):
                    leaves = [self.players.pooled_hidden(batch) for batch in micro]
                if len(micro) > 1:
                    leaves = [leaf.requires_grad_(True) for leaf in leaves]
                share = self._loss(groups, torch.cat(leaves) if features_BH is None else features_BH) / total
                share.backward()
                if len(micro) > 1:
                    for batch, leaf in zip(micro, leaves, strict=True):
                        self.players.pooled_hidden(batch).backward(leaf.grad)
            loss += float(share.detach())
        return loss

    def _loss(self, groups: list[Group], features_BH: Tensor) -> Tensor:
        """Regression and ranking loss, summed over the responses and over the heads that learn from each response."""
        true_B, group_B, learns_MB = self._labels(groups)
        predicted_MB = self.players.score_MH @ features_BH.T / self.players.reward_unit
        true_B = true_B / self.players.reward_unit
        ranking_MB = losses.ranking_by_group(predicted_MB, true_B, group_B)
        if self.config.disc_objective == "real_vs_generated":
            # With rewards 1 and 0, the ranking loss is the relativistic pairing loss (arXiv:1807.00734).
            loss_MB = ranking_MB
        else:
            regression_MB = losses.regression_by_group(predicted_MB, true_B, group_B, mean_weight=MEAN_WEIGHT)
            loss_MB = regression_MB + RANK_WEIGHT * ranking_MB
        return (loss_MB * learns_MB).sum()

    def _features(self, groups: list[Group]) -> Tensor:
        """Pooled features of the groups' responses, [B, H], without a graph. The heads read these."""

        def features() -> Tensor:
            with torch.no_grad(), self.players.use_adapter("discriminator"):
                return torch.cat([self.players.pooled_hidden(batch) for batch in self._batches(groups)])

        return micro_batch.within_memory(features, self.optimizer, _count(groups))

    def _batches(self, groups: list[Group]) -> list[Batch]:
        """The groups' responses in micro-batches. A group larger than a micro-batch is split evenly."""
        size, batches = self.optimizer.micro_batch_size, []
        for together in micro_batches(groups, size):
            if size is None or _count(together) <= size:
                batches.append(self._batch(together))
                continue
            (group,) = together
            rows, count = len(group.responses), math.ceil(len(group.responses) / size)
            edges = [rows * i // count for i in range(count + 1)]
            batches += [
                self._batch([replace(group, responses=group.responses[first:last])]) for first, last in pairwise(edges)
            ]
        return batches

    def _batch(self, groups: list[Group]) -> Batch:
        """The groups' responses as one batch for a forward pass."""
        return self.players.batch(
            [group.prompt for group in groups],
            [response for group in groups for response in group.responses],
            np.repeat(np.arange(len(groups)), [len(group.responses) for group in groups]),
        )

    def _labels(self, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
        """True rewards [B], group labels [B], and 1.0 for each response that a head learns from, else 0.0, [M, B]."""
        device = self.players.device
        sizes = torch.tensor([len(group.responses) for group in groups], device=device)
        group_B = torch.arange(len(groups), device=device).repeat_interleave(sizes)
        true_B = torch.tensor([r for group in groups for r in group.rewards], device=device, dtype=torch.float32)
        learns_MB = torch.tensor([group.heads for group in groups], device=device, dtype=torch.float32).T[:, group_B]
        return true_B, group_B, learns_MB

    def restart(self, score_1H: Tensor) -> None:
        """Start over with the score layer of a loaded adapter that has no heads or replay. Each head becomes a copy."""
        self.replay.groups.clear()
        self.knows_unit, self.players.reward_unit = False, 1.0
        with torch.no_grad():
            self.players.heads_MH.copy_(score_1H.expand_as(self.players.heads_MH))
        self.correlation, self.calibration = DecayedMean(), Calibration(2)  # predictions are not measured yet
        self.probe.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the adapter's weights and the optimizer, which have files of their own."""
        return {
            "heads_MH": self.players.heads_MH.detach(),
            "reward_unit": self.players.reward_unit,
            "knows_unit": self.knows_unit,
            "replay": self.replay.state_dict(),
            "correlation": [self.correlation.total, self.correlation.weight],
            "calibration": {"moments": self.calibration.moments.tolist(), "differences": self.calibration.differences},
            "probe": self.probe.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.players.reward_unit, self.knows_unit = state["reward_unit"], state["knows_unit"]
        self.replay.load_state_dict(state["replay"])
        with torch.no_grad():
            self.players.heads_MH.copy_(state["heads_MH"])
        self.correlation = DecayedMean(*state["correlation"])
        self.calibration.moments = np.array(state["calibration"]["moments"])
        self.calibration.differences = state["calibration"]["differences"]
        self.probe.load_state_dict(state["probe"])


def _count(groups: list[Group]) -> int:
    return sum(len(group.responses) for group in groups)


def reward_unit(rewards: list[float]) -> float:
    """The rewards' standard deviation; if it is zero, the absolute mean; if that is zero, too, 1."""
    return next(value for value in (float(np.std(rewards)), abs(float(np.mean(rewards))), 1.0) if value > 1e-6)
