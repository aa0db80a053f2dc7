"""The discriminator's training: ridge start, replay, and updates on what is left within groups.

# B = responses, M = heads, H = hidden size

It regresses on the true reward with each group's mean split off, plus a within-group ranking loss (GAD,
arXiv:2511.10643, found ranking better than classification), half on this step's responses, half on replay. Replay is
the discriminator's alone: it never reaches the generator's gradient.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from . import distributed, objectives, randomness
from .adapters import Players
from .config import Config
from .experience import Experience
from .optimizer import PlayerOptimizer
from .rollout import Rollout, assemble, chunks


@dataclass(frozen=True)
class Group:
    """The answered responses of one prompt at one step, as they were generated."""

    prompt: list[int]  # token ids
    responses: list[list[int]]  # token ids, the end-of-text token included where it was generated
    rewards: list[float]  # true rewards
    heads: list[bool]  # which heads learn from it: their spread is an uncertainty only if they saw different data


class Replay:
    """The last groups, first in first out."""

    def __init__(self, capacity: int) -> None:
        self.groups: deque[Group] = deque(maxlen=capacity)

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sizes = state["group_sizes"].tolist()
        prompts = [x.tolist() for x in state["prompt_tokens"].split(state["prompt_lengths"].tolist())]
        responses = [x.tolist() for x in state["response_tokens"].split(state["response_lengths"].tolist())]
        rewards, heads = state["rewards"].split(sizes), state["heads"].tolist()
        groups, first = [], 0
        for i, size in enumerate(sizes):
            groups.append(Group(prompts[i], responses[first : first + size], rewards[i].tolist(), heads[i]))
            first += size
        self.groups = deque(groups, maxlen=self.groups.maxlen)


def answered_groups(experience: Experience, config: Config) -> list[Group]:
    """This step's responses whose true reward is known, group by group."""
    answered_B = ~np.isnan(experience.true_B)
    lengths_B, ids_BT = experience.rollout.lengths_B, experience.rollout.response_ids_BT.tolist()
    groups = []
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
        groups.append(Group(prompt, responses, experience.true_B[members].tolist(), heads))
    return groups


class Discriminator:
    """What the discriminator carries from step to step beside its weights: optimizer, replay, the reward's scale."""

    def __init__(self, players: Players, config: Config) -> None:
        self.players, self.config = players, config
        self.optimizer = PlayerOptimizer(
            players.parameters("discriminator"), config.disc_learning_rate, config, config.disc_updates
        )
        self.replay = Replay(config.disc_replay_groups)
        self.knows_unit = False  # whether the reward's unit has been read off the first rewards

    def predict(self, rollout: Rollout) -> np.ndarray:
        """Every head's predicted reward, float64 [M, B]."""
        with torch.no_grad(), self.players.playing("discriminator"):
            parts = [
                self.players.predict(part.ids_BL, part.mask_BL)
                for part in map(rollout.rows, chunks(len(rollout), self.config.micro_batch_size))
            ]
        return torch.cat(parts, dim=1).double().cpu().numpy()

    def update(self, experience: Experience) -> dict[str, float]:
        """Learn from this step's answered responses and as many of replay; returns the mean loss of the updates.

        With several processes, one whose prompts got no answer takes part with gradients of nought.
        """
        fresh = answered_groups(experience, self.config)
        answered = torch.tensor([float(len(fresh))], device=self.players.device)
        if not distributed.total(answered):
            return {}
        self._keep_unit(fresh)
        if not self.players.heads_MH.any():
            self._start(fresh)
        losses, norm, learning_rate = [], 0.0, 0.0
        for update in range(self.config.disc_updates):
            batch = fresh + self.replay.draw(len(fresh), seed=self.config.seed, step=experience.step, update=update)
            losses.append(self._learn(batch) if batch else 0.0)
            learning_rate = self.optimizer.learning_rate
            norm = self.optimizer.step()
        self.replay.groups.extend(fresh)
        return {"disc_loss": float(np.mean(losses)), "disc_learning_rate": learning_rate, "disc_grad_norm": norm}

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

    def _start(self, fresh: list[Group]) -> None:
        """Begin the heads, which are nought, in closed form; with several processes, the mean of those with answers."""
        ridge_MH = self._ridge(fresh) if fresh else torch.zeros_like(self.players.heads_MH)
        count = distributed.total(torch.tensor([float(bool(fresh))], device=self.players.device))
        with torch.no_grad():
            self.players.heads_MH.copy_(distributed.total(ridge_MH) / count)

    def _ridge(self, groups: list[Group]) -> Tensor:
        """Heads by ridge regression on the pooled features, [M, H], in the reward's unit.

        Without intercept (stock sequence classification ignores a bias), in its dual form, since responses are fewer
        than features: w = Fᵀ (F Fᵀ + λ I)⁻¹ r, each head on the groups it learns from.
        """
        ids, mask, true_B, _, seen_MB = self._batch(groups)
        with torch.no_grad(), self.players.playing("discriminator"):
            features_BH = self.players.features(ids, mask).double()
        target_B = true_B.double() / self.players.reward_unit
        gram_BB = features_BH @ features_BH.T
        ridge = (
            0.1 * gram_BB.diagonal().mean()
        )  # a tenth of a feature vector's size: a few dozen rows, hundreds of weights
        heads = []
        for seen_B in seen_MB.bool():
            kept_B = seen_B if seen_B.any() else torch.ones_like(seen_B)
            gram = gram_BB[kept_B][:, kept_B]
            dual = torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), target_B[kept_B])
            heads.append(dual @ features_BH[kept_B])
        return torch.stack(heads).float()

    def _learn(self, groups: list[Group]) -> float:
        """Backward of regression and ranking within groups; returns the loss, a mean over heads and responses."""
        total = sum(sum(group.heads) * len(group.responses) for group in groups)
        loss = 0.0
        for part in micro_batches(groups, self.config.micro_batch_size):
            ids, mask, true_B, group_B, seen_MB = self._batch(part)
            with self.players.playing("discriminator"):
                predicted_MB = self.players.predict(ids, mask) / self.players.reward_unit
                true_B = true_B / self.players.reward_unit
                regression_MB = objectives.regression_by_group(
                    predicted_MB, true_B, group_B, mean_weight=self.config.disc_mean_weight
                )
                ranking_MB = objectives.ranking_by_group(predicted_MB, true_B, group_B)
                loss_MB = regression_MB + self.config.disc_rank_weight * ranking_MB
                share = (loss_MB * seen_MB).sum() / total
                share.backward()
            loss += float(share.detach())
        return loss

    def _batch(self, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids and mask [B, L], true rewards [B], group labels [B], which head learns from which row [M, B]."""
        sizes = [len(group.responses) for group in groups]
        device = self.players.device
        rows = assemble(
            self.players.base,
            device,
            [group.prompt for group in groups for _ in group.responses],
            [response for group in groups for response in group.responses],
            texts=[""] * sum(sizes),  # tokens are read here, not texts
        )
        repeats = torch.tensor(sizes, device=device)
        group_B = torch.arange(len(groups), device=device).repeat_interleave(repeats)
        true_B = torch.tensor([r for group in groups for r in group.rewards], device=device, dtype=torch.float32)
        seen_MB = torch.tensor([group.heads for group in groups], device=device, dtype=torch.float32).T[:, group_B]
        return rows.ids_BL, rows.mask_BL, true_B, group_B, seen_MB

    def restart(self, score_1H: Tensor) -> None:
        """Take over the score of a discriminator that came without heads and replay: every head begins with it."""
        self.replay.groups.clear()
        self.knows_unit, self.players.reward_unit = False, 1.0
        with torch.no_grad():
            self.players.heads_MH.copy_(score_1H.expand_as(self.players.heads_MH))

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads_MH": self.players.heads_MH.detach(),
            "reward_unit": self.players.reward_unit,
            "knows_unit": self.knows_unit,
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.players.reward_unit, self.knows_unit = state["reward_unit"], state["knows_unit"]
        self.replay.load_state_dict(state["replay"])
        with torch.no_grad():
            self.players.heads_MH.copy_(state["heads_MH"])


def reward_unit(rewards: list[float]) -> float:
    """The spread of the first rewards; where they are all alike, their size is the best guess at their unit."""
    return next(value for value in (float(np.std(rewards)), abs(float(np.mean(rewards))), 1.0) if value > 1e-6)


def micro_batches(groups: list[Group], size: int | None) -> list[list[Group]]:
    """Whole groups, at most `size` responses together where that is possible: a group's mean needs all of it."""
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
    None where there are too few answers, or no spread, to say.
    """
    answered_B = ~np.isnan(true_B)
    predicted_B, true_B, group_B = predicted_MB.mean(0)[answered_B], true_B[answered_B], group_B[answered_B]
    left: list[tuple[np.ndarray, np.ndarray]] = []
    for group in np.unique(group_B):
        members = group_B == group
        if members.sum() > 1:
            left.append(tuple(rankdata(x[members]) - (members.sum() + 1) / 2 for x in (predicted_B, true_B)))
    within = [np.concatenate(parts) for parts in zip(*left, strict=True)] if left else [np.zeros(0), np.zeros(0)]
    return {
        "rank_correlation": _correlation(rankdata(predicted_B), rankdata(true_B)),
        "rank_correlation_within": _correlation(*within),
        "disc_mse": float(np.mean((predicted_B - true_B) ** 2)) if len(true_B) else None,
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
