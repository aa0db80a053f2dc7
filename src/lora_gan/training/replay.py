"""Groups of answered responses, and the replay of earlier ones. The discriminator learns from both.

Replay is the discriminator's alone: it never reaches the generator's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import randomness
from ..config import Config
from .experience import Experience


@dataclass(frozen=True)
class Group:
    """The answered responses of one prompt at one step, as they were generated."""

    prompt: list[int]  # token ids
    responses: list[list[int]]  # token ids, the end-of-text token included where it was generated
    rewards: list[float]  # true rewards
    heads: list[bool]  # which heads learn from it: their spread is an uncertainty only if they saw different data


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
        self.seen = state["seen"]


def answered_groups(experience: Experience, config: Config) -> dict[int, Group]:
    """This step's responses whose true reward is known, by their prompt's place in the step."""
    answered_B = ~np.isnan(experience.true_B)
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
        responses = [experience.rollout.responses[i] for i in members]
        groups[j] = Group(prompt, responses, experience.true_B[members].tolist(), heads)
    return groups


def micro_batches(groups: list[Group], size: int | None) -> list[list[Group]]:
    """Whole groups, at most `size` responses together; a group of more stands alone: its mean needs all of it."""
    batches: list[list[Group]] = []
    for group in groups:
        if batches and (size is None or sum(len(g.responses) for g in [*batches[-1], group]) <= size):
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches
