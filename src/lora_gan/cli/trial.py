"""A trial of the run's next step, which does not change the run: samples responses of the step and measures its time.

The responses are drawn with the step's own uniform numbers. On the CPU they are equal to the responses of training, so
training can use the ratings of a person or a judge again. The updates run on copies of the weights, with separate
optimizers, replay and baselines, and with made-up rewards. Timing asks no true reward.

# P = prompts, K = responses per prompt, B = P·K responses in group order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from .. import randomness
from ..config import Config
from ..data import Row
from ..gan import LoraGAN
from ..model.sampling import Rollout
from ..storage.checkpoint import PLAYERS
from ..training import estimate
from ..training.discriminator import Discriminator
from ..training.experience import Experience, Probed, RetainedFeatures
from ..training.generator import Generator
from ..training.replay import answered_groups
from .footprint import Growth, Lengths, spare_share
from .plan import calls_per_step

Result = TypeVar("Result")
PROMPTS, RESPONSES = 4, 4  # most prompts, and most responses per prompt, on which the reward is tried
MAX_SECONDS = 10.0  # for timing a whole step; a slower step is timed on one group
REPEAT_BELOW = 2.0  # seconds; faster updates are timed again, because `Growth` returned memory before the first time


@dataclass(frozen=True)
class Seconds:
    """Seconds of one step by phase, without the true reward.

    Attributes:
        sampling: sampling of all responses.
        generator: one step's updates of the generator.
        predicting: the discriminator's predictions for all responses.
        discriminator: one step's updates of the discriminator, in a step that asks the true reward.
        lengths: tokens of the step's prompts, and of the sampled responses.
        whole: whether all phases were timed at full size, and not on some of the responses.
        spare: bytes that the process holds in addition to each byte of an update (`footprint.spare_share`).
    """

    sampling: float
    generator: float
    predicting: float
    discriminator: float
    lengths: Lengths
    whole: bool
    spare: float = 0.0

    @property
    def updating(self) -> float:
        """All phases except sampling."""
        return self.generator + self.predicting + self.discriminator

    @property
    def total(self) -> float:
        """The whole step, without the true reward."""
        return self.sampling + self.updating


class Trial:
    """Some of the responses that the next step will sample.

    Args:
        gan: the run. Its state stays bitwise unchanged.
        rows: the next step's rows, as they are sent to the model.
        limit: most responses; None: PROMPTS × RESPONSES.

    Attributes:
        rows: the chosen rows, one per group.
        sampled: the responses, the same number per row.
        index_B: the index of each response in the step.
    """

    def __init__(self, gan: LoraGAN, rows: list[Row], limit: int | None = None) -> None:
        self.gan, self.step_rows = gan, rows
        self.prompts = gan.players.encoder.prompts(rows)
        # One response per group has no spread, so a second one is drawn.
        self.per_prompt = max(gan.config.num_generations, 2)
        self.uniforms_BT = gan._uniforms(self.prompts, self.per_prompt, "sample")
        chosen, count = shape_of_trial(gan.config, len(rows), limit)
        asked_PK = self._asked().reshape(len(rows), self.per_prompt)
        # Responses that the step will ask about come first, so that training can use the answers again.
        first_P = np.sort(np.argsort(-asked_PK.sum(-1), kind="stable")[:chosen])
        self.index_B = np.concatenate(
            [j * self.per_prompt + np.sort(np.argsort(~asked_PK[j], kind="stable")[:count]) for j in first_P]
            or [np.empty(0)]
        ).astype(int)
        self.rows = [rows[j] for j in first_P]
        prompts = [self.prompts[j] for j in first_P]
        uniforms_BT = self.uniforms_BT[torch.from_numpy(self.index_B)]
        self._sampling, self.sampled = self._timed(lambda: gan._sample(prompts, uniforms_BT))

    def _asked(self) -> np.ndarray:
        """Whether the step will ask the true reward of each response, bool [B].

        A query design that depends on the predictions is computed for equal predictions.
        """
        gan, size = self.gan, len(self.prompts) * self.per_prompt
        if gan.config.disc_objective == "real_vs_generated" or gan.config.num_generations < self.per_prompt:
            return np.ones(size, dtype=bool)
        return estimate.choose_queries(
            np.arange(size) // self.per_prompt,
            gan.config.asked_share,
            seed=gan.config.seed,
            step=gan.global_step,
            design=gan.config.query_design,
            left=gan.budget.left(),
        ).asked_B

    def seconds(self) -> Seconds:
        """Time the step, without a change to the run."""
        gan, config, prompts = self.gan, self.gan.config, self.prompts
        responses = len(prompts) * config.num_generations
        sampled, rows, sampling = self.sampled, self.rows, self._sampling * responses / len(self.sampled)
        if sampling <= MAX_SECONDS:
            uniforms_PKT = self.uniforms_BT.reshape(len(prompts), self.per_prompt, -1)
            uniforms_BT = uniforms_PKT[:, : config.num_generations].flatten(0, 1)
            sampling, sampled = self._timed(lambda: gan._sample(prompts, uniforms_BT))
            rows = self.step_rows
        lengths_P = list(map(len, prompts))
        lengths = Lengths(
            float(np.mean(lengths_P)), max(lengths_P), float(sampled.lengths_B.mean()), int(sampled.lengths_B.max())
        )
        in_step = _tokens(sampled) * responses / len(sampled)

        # One group first, which also does work that is only done once.
        tried = sampled.rows(np.flatnonzero(sampled.group_B == sampled.group_B[0]))
        with Growth() as growth:
            updates = self._timed_updates(tried, rows[:1])
        if sum(updates) * in_step / _tokens(tried) <= MAX_SECONDS:
            tried = sampled
            with Growth() as growth:
                updates = self._timed_updates(tried, rows)
            if sum(updates) <= REPEAT_BELOW:
                updates = self._timed_updates(tried, rows)
        share, groups = _tokens(tried) / in_step, len(np.unique(tried.group_B))
        generator, predicting, discriminator = (seconds / share for seconds in updates)
        if config.disc_objective == "regression":  # uses only responses with a true reward
            discriminator *= calls_per_step(config) / (config.prompts_per_step * config.num_generations)
        whole = share == 1 and len(tried) == responses
        spare = spare_share(gan.players, config, lengths, groups=groups, responses=len(tried), grew=growth.bytes)
        return Seconds(sampling, generator, predicting, discriminator, lengths, whole, spare)

    def _timed(self, work: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds until the device has finished `work()`, and the result of `work()`."""
        began = self._now()
        result = work()
        return self._now() - began, result

    def _now(self) -> float:
        """Seconds on a clock, after the device has finished all its work."""
        if self.gan.players.device.type == "cuda":
            torch.cuda.synchronize(self.gan.players.device)
        return time.perf_counter()

    def _timed_updates(self, sampled: Rollout, rows: list[Row]) -> tuple[float, float, float]:
        """Seconds of the generator's updates, of predictions, and of the discriminator's updates, with a true reward
        for every response."""
        gan, config = self.gan, self.gan.config
        signal = config.signal(config.adversarial)
        through = config.gradient_path == "straight_through"
        sampled = replace(sampled, group_B=np.unique(sampled.group_B, return_inverse=True)[1])
        with undone(gan) as (generator, discriminator):

            def predict() -> tuple[np.ndarray, RetainedFeatures, Probed | None]:
                if through:
                    predicted_MB, features = discriminator.predict(sampled), RetainedFeatures()
                else:
                    predicted_MB, features = discriminator.predict_to_learn(sampled)
                return predicted_MB, features, discriminator.probed(sampled, predicted_MB)

            predicting, (predicted_MB, features, probed) = self._timed(predict)
            experience = Experience(
                step=gan.global_step,
                rows=rows,
                prompts=[gan.players.encoder.prompt(row) for row in rows],
                rollout=sampled,
                predicted_MB=predicted_MB,
                probed=probed,
                asked_B=np.ones(len(sampled), dtype=bool),
                true_B=randomness.uniforms(len(sampled), config.seed, gan.global_step, "trial"),
                inclusion_B=np.ones(len(sampled)),
                features=features,
            )
            # As in a later step, half of a batch is replay, and the heads are not zero.
            if config.disc_objective == "regression":
                discriminator.replay.extend(answered_groups(experience, config.seed))

            def update_generator() -> None:
                generator.update(rows, experience if config.reward_weight else None, signal, config.imitation_weight)

            def update_discriminator() -> None:
                discriminator.update(experience)

            both = (update_generator, update_discriminator) if through else (update_discriminator, update_generator)
            seconds = {update: self._timed(update)[0] for update in both}  # in the order of a step
        return seconds[update_generator], predicting, seconds[update_discriminator]


@contextmanager
def undone(gan: LoraGAN) -> Iterator[tuple[Generator, Discriminator]]:
    """Train both players on copies within the block. Then restore weights, gradients and reward unit bitwise.

    Yields:
        A generator and a discriminator on the same base, with new optimizers, replay and baselines.
    """
    players, config = gan.players, gan.config
    parameters = [parameter for player in PLAYERS for parameter in players.parameters(player)]
    before = [(parameter.data, parameter.grad) for parameter in parameters]
    unit = players.reward_unit
    try:
        for parameter in parameters:
            parameter.data, parameter.grad = parameter.data.clone(), None
        if not players.heads_MH.any():
            players.heads_MH.data.fill_(1 / players.heads_MH.shape[1])
        generator, discriminator = Generator(players, config), Discriminator(players, config)
        for new, old in ((generator, gan.generator), (discriminator, gan.discriminator)):
            new.optimizer.largest_micro_batch = old.optimizer.largest_micro_batch
        yield generator, discriminator
    finally:
        for parameter, (data, gradient) in zip(parameters, before, strict=True):
            parameter.data, parameter.grad = data, gradient
        players.reward_unit = unit


def shape_of_trial(config: Config, prompts: int, limit: int | None = None) -> tuple[int, int]:
    """The number of prompts and of responses per prompt on which the reward is tried; at most `limit` responses.

    Two responses to a prompt can be compared, so the number of prompts is reduced before the number of responses.
    """
    chosen, count = min(PROMPTS, prompts), min(RESPONSES, max(config.num_generations, 2))
    if limit is not None and chosen * count > limit:
        count = max(min(count, limit // chosen), min(2, limit))
        chosen = min(chosen, limit // count) if count else 0
    return chosen, count


def _tokens(sampled: Rollout) -> int:
    """Tokens that an update computes: each group's prompt once, and all responses."""
    return sum(map(len, sampled.prompts)) + sum(map(len, sampled.responses))
