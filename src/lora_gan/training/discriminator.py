"""The discriminator's training: ridge start, replay, updates on what is left within groups; and how far it is trusted.

# B = responses, M = heads, H = hidden size

It regresses on the true reward with each group's mean split off, plus a within-group ranking loss (GAD,
arXiv:2511.10643, found ranking better than classification), half on this step's responses, half on replay. Replay is
the discriminator's alone: it never reaches the generator's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from .. import randomness
from ..config import Config
from ..model.packing import Batch
from ..model.players import Players
from ..model.sampling import Rollout, chunks
from . import distributed, estimate, losses, micro_batch
from .experience import Experience
from .optimizer import PlayerOptimizer


@dataclass(frozen=True)
class Group:
    """The answered responses of one prompt at one step, as they were generated."""

    prompt: list[int]  # token ids
    responses: list[list[int]]  # token ids, the end-of-text token included where it was generated
    rewards: list[float]  # true rewards
    heads: list[bool]  # which heads learn from it: their spread is an uncertainty only if they saw different data


KEPT_FROM = 0.75  # the query rate from which one forward for prediction and update takes less time than two
FORGET = 0.9  # a step, of what fresh answers said of the predictions


class Replay:
    """The last groups, or an even sample of all there have been (reservoir sampling, Vitter 1985)."""

    def __init__(self, capacity: int, *, reservoir: bool = False, seed: int = 0) -> None:
        self.capacity, self.reservoir, self.seed = capacity, reservoir, seed
        self.groups: list[Group] = []
        self.seen = 0  # groups that ever came

    def extend(self, groups: list[Group]) -> None:
        for group in groups:
            if len(self.groups) < self.capacity:
                self.groups.append(group)
            elif self.reservoir and self.capacity:
                place = int(randomness.generator(self.seed, self.seen, "reservoir").integers(self.seen + 1))
                if place < self.capacity:
                    self.groups[place] = group
            elif self.capacity:
                self.groups = [*self.groups[1:], group]
            self.seen += 1

    def __len__(self) -> int:
        return len(self.groups)

    def draw(self, count: int, *, seed: int, step: int, update: int) -> list[Group]:
        """`count` different groups at most, uniformly."""
        count = min(count, len(self.groups))
        order = randomness.generator(seed, step, "replay", update).permutation(len(self.groups))[:count]
        return [self.groups[int(i)] for i in order]

    def state_dict(self) -> dict[str, Any]:
        """Flat tensors and plain numbers only, so that it loads without executing anything."""
        responses = [response for group in self.groups for response in group.responses]
        return {
            "prompt_tokens": torch.tensor([i for group in self.groups for i in group.prompt], dtype=torch.int64),
            "prompt_lengths": torch.tensor([len(group.prompt) for group in self.groups], dtype=torch.int64),
            "group_sizes": torch.tensor([len(group.responses) for group in self.groups], dtype=torch.int64),
            "response_tokens": torch.tensor([i for response in responses for i in response], dtype=torch.int64),
            "response_lengths": torch.tensor([len(response) for response in responses], dtype=torch.int64),
            "rewards": torch.tensor([r for group in self.groups for r in group.rewards], dtype=torch.float64),
            "heads": torch.tensor([group.heads for group in self.groups], dtype=torch.bool),
            "seen": self.seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sizes = state["group_sizes"].tolist()
        prompts = [x.tolist() for x in state["prompt_tokens"].split(state["prompt_lengths"].tolist())]
        responses = [x.tolist() for x in state["response_tokens"].split(state["response_lengths"].tolist())]
        rewards, heads = state["rewards"].split(sizes), state["heads"].tolist()
        self.groups, first = [], 0
        for i, size in enumerate(sizes):
            self.groups.append(Group(prompts[i], responses[first : first + size], rewards[i].tolist(), heads[i]))
            first += size
        self.groups = self.groups[-self.capacity :] if self.capacity else []
        self.seen = state.get("seen", len(self.groups))


def answered_groups(experience: Experience, config: Config) -> dict[int, Group]:
    """This step's responses whose true reward is known, by their prompt's place in the step."""
    answered_B = ~np.isnan(experience.true_B)
    lengths_B, ids_BT = experience.rollout.lengths_B, experience.rollout.response_ids_BT.tolist()
    groups = {}
    for j, prompt in enumerate(experience.prompts):
        members = np.flatnonzero((experience.group_B == j) & answered_B)
        if len(members) == 0:
            continue
        draws = randomness.uniforms(
            config.disc_heads, config.seed, experience.step, "heads", randomness.fingerprint(prompt)
        )
        heads = (draws < 0.75).tolist()  # each head learns from three groups in four: apart enough to disagree
        if not any(heads):
            heads[int(draws.argmin())] = True
        responses = [ids_BT[i][: lengths_B[i]] for i in members]
        groups[j] = Group(prompt, responses, experience.true_B[members].tolist(), heads)
    return groups


def _answered_features(experience: Experience) -> list[Tensor]:
    """Of the features that were kept, which are taken out, those of the responses in `answered_groups`."""
    if not experience.features:
        return []
    features_BH = experience.features.pop()
    answered = np.flatnonzero(~np.isnan(experience.true_B))
    rows = answered[np.argsort(experience.group_B[answered], kind="stable")]
    return [features_BH[torch.from_numpy(rows).to(features_BH.device)]] if len(rows) else []


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
        self.correlation, self.correlated = 0.0, 0.0  # fresh rank correlation within groups: weighted sum, and weight
        self.average: list[Tensor] | None = None
        self.knows_unit = False  # whether the reward's unit has been read off the first rewards

    @property
    def gate(self) -> float:
        """How far the generator trusts predictions, 0 to 1, by the fresh rank correlation within groups so far."""
        if not self.config.gate_correlation or self.config.disc_objective == "real_vs_generated":
            return 1.0  # no true reward is asked for there, that predictions could be judged by
        if not self.correlated:
            # One that has learned here is trusted once it was judged; one that came from elsewhere may never be.
            return 0.0 if self.knows_unit else 1.0
        return min(max(self.correlation / self.correlated / self.config.gate_correlation, 0.0), 1.0)

    @property
    def fresh_correlation(self) -> tuple[float, float] | None:
        """The fresh rank correlation within groups over the last steps, and its standard error were it zero; None where
        it was never measured. Older steps count less, as in `gate`."""
        if self.correlated <= 0:
            return None
        return self.correlation / self.correlated, self.correlated**-0.5

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside the block the players hold the weights that score: the averaged ones, where there is an average."""
        if self.average is None:
            yield
            return
        parameters = self.players.parameters("discriminator")
        raw = [parameter.data for parameter in parameters]
        try:
            for parameter, weight in zip(parameters, self.average, strict=True):
                parameter.data = weight
            yield
        finally:
            for parameter, weight in zip(parameters, raw, strict=True):
                parameter.data = weight

    def predict(self, rollout: Rollout) -> np.ndarray:
        """Every head's predicted reward, float64 [M, B]."""
        total = len(rollout)

        def predicted() -> Tensor:
            with torch.no_grad(), self.scoring(), self.players.playing("discriminator"):
                parts = chunks(total, self.optimizer.micro_batch_size)
                return torch.cat([self.players.predict(rollout.batch(self.players, part)) for part in parts], dim=1)

        return micro_batch.fitting(predicted, self.optimizer, total).double().cpu().numpy()

    def predict_to_learn(self, rollout: Rollout) -> tuple[np.ndarray, list[Tensor]]:
        """`predict`, and the features [B, H] with the graph that the next update begins from.

        None are kept where it would learn from something else: other weights than those that score, other rows, in
        smaller parts than all at once; nor where many responses go unasked, whose share of the graph is for nothing.
        """
        size = self.optimizer.micro_batch_size
        whole = self.config.query_rate >= KEPT_FROM and (size is None or size >= len(rollout))
        scores = self.average is None and not self.config.disc_average
        plain = self.config.disc_objective == "regression" and self.config.disc_anchor_reward is None
        features_BH = None
        if whole and scores and plain:
            with suppress(torch.OutOfMemoryError), self.players.playing("discriminator"):
                # A graph takes more than a prediction does.
                features_BH = self.players.set_aside(self.players.features(rollout.batch(self.players)))
        if features_BH is None:
            return self.predict(rollout), []
        with torch.no_grad():
            predicted_MB = self.players.score_MH @ features_BH.T
        return predicted_MB.double().cpu().numpy(), [features_BH]

    def update(self, experience: Experience) -> dict[str, float | None]:
        """Learn from this step's answered responses and as many of replay; returns the mean loss of the updates.

        The mean is over the updates whose loss was finite; those skipped for want of that are counted.
        With several processes, one whose prompts got no answer takes part with gradients of nought.
        """
        kept = _answered_features(experience)
        relative = self.config.disc_objective == "real_vs_generated"
        fresh = self._real_and_generated(experience) if relative else self._answered(experience)
        answered = torch.tensor([float(len(fresh))], device=self.players.device)
        if not distributed.total(answered):
            return {}
        metrics = self._told_apart(fresh) if relative else self._judge(experience)
        if not relative:
            self._keep_unit(fresh)
            if not self.players.heads_MH.any():
                self._start(fresh)
        elif not self.players.heads_MH.any():
            self._start_at_random()
        losses, norm, learning_rate, skipped = [], None, 0.0, 0
        for update in range(self.config.disc_updates):
            old = self.replay.draw(len(fresh), seed=self.config.seed, step=experience.step, update=update)
            loss = self._learn_within_memory(fresh, old, kept) if fresh or old else 0.0
            kept.clear()  # it was of the weights before this update
            learning_rate = self.optimizer.learning_rate
            taken = self.optimizer.step(loss)
            losses += [loss] if math.isfinite(loss) else []
            if taken is None:
                skipped += 1
            else:
                norm = taken
                self._keep_average()
        self.replay.extend(fresh)
        return {
            "disc_loss": float(np.mean(losses)) if losses else None,
            "disc_learning_rate": learning_rate,
            "disc_grad_norm": norm,
            "disc_skipped": skipped,
            **metrics,
        }

    def _judge(self, experience: Experience) -> dict[str, float]:
        """What this step's answers say of the predictions made before them: how far to trust the next ones."""
        answered_B = ~np.isnan(experience.true_B)
        metrics = fresh_metrics(experience.predicted_MB, experience.true_B, experience.group_B)
        within = metrics["rank_correlation_within"]
        differences = int(answered_B.sum()) - len(np.unique(experience.group_B[answered_B]))
        weight = 0.0 if within is None else float(differences)
        # With several processes the sums are over all of them: one without answers brings noughts, and none waits.
        seen = torch.tensor([weight * (within or 0.0), weight], dtype=torch.float64, device=self.players.device)
        correlation, correlated = distributed.total(seen).tolist()
        if correlated:
            self.correlation = FORGET * self.correlation + correlation
            self.correlated = FORGET * self.correlated + correlated
        return {"gate": experience.gate}

    def _keep_average(self) -> None:
        """The moving average of the weights, begun at the first update."""
        if not self.config.disc_average:
            return
        weights = [parameter.detach() for parameter in self.players.parameters("discriminator")]
        if self.average is None:
            self.average = [weight.clone() for weight in weights]
        for mean, weight in zip(self.average, weights, strict=True):
            mean.lerp_(weight, 1 - self.config.disc_average)

    # --- targets as data

    def _answered(self, experience: Experience) -> list[Group]:
        """The step's answered groups, each with its prompt's target in it where what that is worth is known."""
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
        lengths_B, ids_BT = experience.rollout.lengths_B, experience.rollout.response_ids_BT.tolist()
        groups = []
        for j, (prompt, row) in enumerate(zip(experience.prompts, experience.rows, strict=True)):
            members = np.flatnonzero(experience.group_B == j)
            if row.target is not None:
                target = self.players.encoder.target(row)
                responses = [ids_BT[i][: lengths_B[i]] for i in members]
                rewards = [0.0] * len(members) + [1.0]
                groups.append(Group(prompt, [*responses, target], rewards, [True] * self.config.disc_heads))
        return groups

    def _told_apart(self, groups: list[Group]) -> dict[str, float]:
        """Share of (target, response) pairs that the discriminator orders rightly, before it learns from them."""
        right: list[float] = []
        for group in groups:
            with torch.no_grad(), self.scoring():
                predicted_B = (self.players.score_MH @ self._features([group]).T).mean(0)
            right += (predicted_B[-1] > predicted_B[:-1]).float().tolist()
        return {"disc_accuracy": float(np.mean(right))} if right else {}

    def _start_at_random(self) -> None:
        """Heads that are not all alike: with no rewards there is no closed form to begin from."""
        draws = randomness.generator(self.config.seed, 0, "heads").normal(size=tuple(self.players.heads_MH.shape))
        with torch.no_grad():
            scale = 0.1 / self.players.heads_MH.shape[1] ** 0.5
            self.players.heads_MH.copy_(torch.from_numpy(draws * scale).to(self.players.heads_MH))

    # --- learning

    def _keep_unit(self, fresh: list[Group]) -> None:
        """Read the reward's unit off the first answers, and again when they come to spread twice as far.

        The first answers may happen to be all alike. Predictions stay as they were: the heads are counted anew. With
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
                if self.average is not None:
                    self.average[-1].mul_(before / unit)

    def _start(self, fresh: list[Group]) -> None:
        """Begin the heads, which are nought, in closed form; with several processes, the mean of those with answers."""
        ridge_MH = self._ridge(fresh) if fresh else torch.zeros_like(self.players.heads_MH)
        count = distributed.total(torch.tensor([float(bool(fresh))], device=self.players.device))
        heads_MH = distributed.total(ridge_MH) / count
        if torch.isfinite(heads_MH).all():  # else they stay nought, and the next step begins them
            with torch.no_grad():
                self.players.heads_MH.copy_(heads_MH)

    def _ridge(self, groups: list[Group]) -> Tensor:
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

    def _learn_within_memory(self, fresh: list[Group], old: list[Group], kept: list[Tensor]) -> float:
        """`_learn`, in smaller micro-batches where memory runs out."""
        groups = fresh + old
        rows = sum(len(group.responses) for group in groups)

        def learn() -> float:
            parts: list[tuple[list[Group], Tensor | None]] = [(fresh, kept.pop())] if kept else []  # it serves once
            rest = old if parts else groups
            parts += [(part, None) for part in micro_batches(rest, self.optimizer.micro_batch_size)]
            return self._learn(parts)

        return micro_batch.fitting(learn, self.optimizer, rows)

    def _learn(self, parts: list[tuple[list[Group], Tensor | None]]) -> float:
        """Backward of regression and ranking within groups; returns the loss, a mean over heads and responses.

        `parts` are micro-batches, each with its features where they are known.
        """
        total = sum(sum(group.heads) * len(group.responses) for groups, _ in parts for group in groups)
        loss = 0.0
        for groups, features_BH in parts:
            with self.players.playing("discriminator"):
                if features_BH is not None:
                    share = self._loss(groups, features_BH) / total
                    share.backward()
                else:
                    share = self._learn_in_pieces(groups, total)
            loss += float(share.detach())
        return loss

    def _learn_in_pieces(self, groups: list[Group], total: int) -> Tensor:
        """Backward of some groups' share of the loss. A group of more responses than a micro-batch is read twice.

        The loss compares them all, so first it is asked what it wants of each one's features, which takes no graph of
        the base; then each micro-batch has its forward and backward (GradCache, Gao et al. 2021, arXiv:2101.06983).
        """
        pieces = self._pieces(groups)
        if len(pieces) == 1:
            share = self._loss(groups, self.players.features(pieces[0])) / total
            share.backward()
            return share
        with torch.no_grad():
            leaves = [self.players.features(piece) for piece in pieces]
        share = self._loss(groups, torch.cat([leaf.requires_grad_(True) for leaf in leaves])) / total
        share.backward()
        for piece, leaf in zip(pieces, leaves, strict=True):
            self.players.features(piece).backward(leaf.grad)
        return share

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
            with torch.no_grad(), self.players.playing("discriminator"):
                return torch.cat([self.players.features(piece) for piece in self._pieces(groups)])

        return micro_batch.fitting(features, self.optimizer, sum(len(group.responses) for group in groups))

    def _pieces(self, groups: list[Group]) -> list[Batch]:
        """The groups' responses, laid out in micro-batches; a group that is larger, in parts of much the same size."""
        size, pieces = self.optimizer.micro_batch_size, []
        for part in micro_batches(groups, size):
            rows = sum(len(group.responses) for group in part)
            if size is None or rows <= size:
                pieces.append(self._batch(part))
                continue
            (group,) = part
            count = -(-rows // size)
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
        self._forget()

    def _forget(self) -> None:
        """What came in from elsewhere is the adapter; nothing is known of how it predicts."""
        self.average = None
        self.correlation, self.correlated = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads_MH": self.players.heads_MH.detach(),
            "reward_unit": self.players.reward_unit,
            "knows_unit": self.knows_unit,
            "replay": self.replay.state_dict(),
            "raw": [parameter.detach() for parameter in self.players.parameters("discriminator")[:-1]],
            "average": self.average,
            "correlation": [self.correlation, self.correlated],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.players.reward_unit, self.knows_unit = state["reward_unit"], state["knows_unit"]
        self.replay.load_state_dict(state["replay"])
        with torch.no_grad():
            self.players.heads_MH.copy_(state["heads_MH"])
            for parameter, raw in zip(
                self.players.parameters("discriminator")[:-1], state.get("raw", ()), strict=False
            ):
                parameter.copy_(raw)
        self._forget()  # a checkpoint of an older version has no more than this
        if "raw" in state:
            device = self.players.device
            self.average = state["average"] and [weight.to(device).clone() for weight in state["average"]]
            self.correlation, self.correlated = state["correlation"]


def reward_unit(rewards: list[float]) -> float:
    """The spread of the first rewards; where they are all alike, their size is the best guess at their unit."""
    return next(value for value in (float(np.std(rewards)), abs(float(np.mean(rewards))), 1.0) if value > 1e-6)


def micro_batches(groups: list[Group], size: int | None) -> list[list[Group]]:
    """Whole groups, at most `size` responses together; a group of more stands alone: its mean needs all of it."""
    batches: list[list[Group]] = []
    for group in groups:
        if batches and (size is None or sum(len(g.responses) for g in [*batches[-1], group]) <= size):
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches


def fresh_metrics(predicted_MB: np.ndarray, true_B: np.ndarray, group_B: np.ndarray) -> dict[str, float | None]:
    """How well predictions made before this step's training meet the true rewards that were then asked for.

    rank_correlation is Spearman's over all answered responses; rank_correlation_within over what is left of the ranks
    when each group's mean rank is taken off (ranks are taken within the group): only this reaches the generator.
    Responses whose prediction is not finite do not count. None where there are too few answers, or no spread, to say.
    """
    answered_B = ~np.isnan(true_B) & np.isfinite(predicted_MB).all(0)
    spread_B = predicted_MB.std(0)[answered_B]
    predicted_B, true_B, group_B = predicted_MB.mean(0)[answered_B], true_B[answered_B], group_B[answered_B]
    compared_B = np.array([(group_B == group).sum() > 1 for group in group_B], dtype=bool)
    ranks = [_ranks_within(values_B[compared_B], group_B[compared_B]) for values_B in (predicted_B, true_B)]
    return {
        "rank_correlation": _correlation(rankdata(predicted_B), rankdata(true_B)),
        "rank_correlation_within": _correlation(*ranks),
        "disc_mse": float(np.mean((predicted_B - true_B) ** 2)) if len(true_B) else None,
        "calibration_slope": _slope_within(predicted_B, true_B, group_B),
        "uncertainty_correlation": _correlation(spread_B, np.abs(predicted_B - true_B)),
    }


def _ranks_within(values_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """Each value's rank in its group, less the group's mean rank."""
    ranks_B = np.zeros(len(values_B))
    for group in np.unique(group_B):
        ranks_B[group_B == group] = rankdata(values_B[group_B == group])
    return estimate.within(ranks_B, group_B)


def _slope_within(predicted_B: np.ndarray, true_B: np.ndarray, group_B: np.ndarray) -> float | None:
    """Least-squares slope of true on predicted reward within groups: 1 is calibrated, below 1 overconfident."""
    left_B = estimate.within(predicted_B, group_B)
    square = float(left_B @ left_B)
    return float(left_B @ estimate.within(true_B, group_B)) / square if square > 1e-12 else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
