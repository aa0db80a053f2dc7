"""Groups of answered responses, and the replay buffer of earlier groups. The discriminator learns from both.

The generator never learns from replay.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from .. import randomness
from ..model.players import HEADS
from .experience import Experience


@dataclass(frozen=True)
class Group:
    """The answered responses of one prompt at one step."""

    prompt: list[int]  # token ids
    responses: list[list[int]]  # token ids as generated, with the end token if one was generated
    rewards: list[float]  # true rewards
    heads: list[bool]  # which heads learn from this group; only heads with different data estimate an uncertainty


class Replay:
    """The latest groups.

    Args:
        capacity: number of groups kept; 0 keeps no groups.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.groups: list[Group] = []

    def extend(self, groups: list[Group]) -> None:
        """Add groups. The oldest groups make room."""
        self.groups = [*self.groups, *groups][-self.capacity :] if self.capacity else []

    def __len__(self) -> int:
        return len(self.groups)

    def draw(self, count: int, *, seed: int, step: int, update: int) -> list[Group]:
        """Draw up to `count` different groups, uniformly."""
        order = randomness.generator(seed, step, "replay", update).permutation(len(self.groups))[:count]
        return [self.groups[int(i)] for i in order]

    def state_dict(self) -> dict[str, Any]:
        """The groups as flat tensors and plain numbers. Loading them executes no code."""
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
        rest = iter(responses)
        groups = [
            Group(prompt, list(islice(rest, size)), rewards_B.tolist(), learns)
            for prompt, size, rewards_B, learns in zip(prompts, sizes, rewards, heads, strict=True)
        ]
        self.groups = []
        self.extend(groups)


def answered_groups(experience: Experience, seed: int) -> list[Group]:
    """Groups of this step's responses with a known true reward, in the order of the prompts.

    Args:
        seed: the run's seed; it decides which heads learn from each group.
    """
    answered_B = ~np.isnan(experience.true_B)
    groups = []
    for j, prompt in enumerate(experience.prompts):
        members = np.flatnonzero((experience.group_B == j) & answered_B)
        if len(members) == 0:
            continue
        draws = randomness.uniforms(HEADS, seed, experience.step, "heads", randomness.fingerprint(prompt))
        heads = (draws < 0.75).tolist()  # each head learns from about 75 % of the groups, so that the heads differ
        if not any(heads):
            heads[int(draws.argmin())] = True
        responses = [experience.rollout.responses[i] for i in members]
        groups.append(Group(prompt, responses, experience.true_B[members].tolist(), heads))
    return groups


def micro_batches(groups: list[Group], size: int | None) -> list[list[Group]]:
    """Split groups into batches of at most `size` responses. A larger group forms a batch of its own: its mean needs
    all of its responses. None: no limit."""
    batches: list[list[Group]] = []
    for group in groups:
        if batches and (size is None or sum(len(g.responses) for g in [*batches[-1], group]) <= size):
            batches[-1].append(group)
        else:
            batches.append([group])
    return batches
