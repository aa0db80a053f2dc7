"""Two processes, each with a prompt of its own, learn what one process learns from both.

Oracle: one process stepping on both prompts. The processes talk by gloo on this machine, through a file.
"""

import datetime
import math

import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, copies, differences, reward, small_gan

pytestmark = pytest.mark.slow  # four starts of two processes, some 40 s

STEPS, WORLD = 3, 2


def some_answers(response, target):
    """A reward that never answers for the first prompt's target: one process has nothing to teach its discriminator."""
    return None if target == TARGETS[0] else reward(response)


def spoil(gan):
    """The loss of the generator's second update, and a gradient of the discriminator's, are not finite."""
    backward, learn, updates = gan.generator._backward, gan.discriminator._learn, {"generator": 0, "discriminator": 0}

    def without_loss(*arguments):
        loss, *rest = backward(*arguments)
        updates["generator"] += 1
        return math.nan if updates["generator"] == 2 else loss, *rest

    def without_gradient(groups):
        loss = learn(groups)
        updates["discriminator"] += 1
        if updates["discriminator"] == 2:
            gan.discriminator.optimizer.parameters[0].grad.fill_(math.inf)
        return loss

    gan.generator._backward, gan.discriminator._learn = without_loss, without_gradient


def follow(rank, folder, base, settings, silent, spoiled):
    """One of the processes: its prompt is PROMPTS[rank]; `spoiled` names the one whose numbers break."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=10),
    )  # fmt: skip
    gan = small_gan(base, **settings, reward=some_answers if silent else reward)
    if rank == spoiled:
        spoil(gan)
    records = [gan.step(PROMPTS[rank], TARGETS[rank]) for _ in range(STEPS)]
    result = {
        "generator": copies(gan.players.parameters("generator")),
        "discriminator": copies(gan.players.parameters("discriminator")),
        "score": gan.score(PROMPTS, TARGETS),
        "responses": [record["responses"] for record in records],
        "norms": [record["gen_grad_norm"] for record in records],
        "skipped": [(record["gen_skipped"], record["disc_skipped"]) for record in records],
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(folder, silent=False, spoiled=None, **settings):
    arguments = (str(folder), str(base_folder()), settings, silent, spoiled)
    torch.multiprocessing.spawn(follow, arguments, nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


SETTINGS = {"imitation_weight": 0.2, "max_completion_length": 12, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), **SETTINGS)


def test_two_processes_learn_what_one_does(both):
    gan = small_gan(**SETTINGS)
    before = copies(gan.players.parameters("generator"))
    records = [gan.step(PROMPTS[:2], TARGETS[:2]) for _ in range(STEPS)]
    for rank, other in enumerate(both):
        assert other["responses"] == [record["responses"][rank] for record in records], "randomness is keyed by content"
        # Before clipping, and before Adam, which would hide a factor.
        assert other["norms"] == pytest.approx([record["gen_grad_norm"] for record in records], rel=1e-3)
    for start, one, *two in zip(
        before, gan.players.parameters("generator"), *(other["generator"] for other in both), strict=True
    ):
        assert torch.equal(*two)
        assert (one - two[0]).abs().max() < 1e-4 < (one - start).abs().max()


def test_the_processes_stay_one_model(both):
    """Discriminators too: their weights, and what they say."""
    for player in ("generator", "discriminator"):
        assert differences(both[0][player], both[1][player]) == []
    assert both[0]["score"] == both[1]["score"]


@pytest.mark.parametrize("settings", [{}, {"reward_signal": "mixed"}], ids=["corrected", "mixed"])
def test_a_process_without_answers_does_not_hold_up_the_other(tmp_path, settings):
    """All processes must take part in every reduction, or the others wait for ever, or average what does not match."""
    results = run(tmp_path, silent=True, **SETTINGS, **settings)
    for player in ("generator", "discriminator"):
        assert differences(results[0][player], results[1][player]) == []


def test_what_is_not_finite_in_one_process_is_skipped_by_all(tmp_path):
    """A loss that broke in one process alone would else be learned from by the other."""
    results = run(tmp_path, spoiled=1, **SETTINGS)
    assert results[0]["skipped"] == results[1]["skipped"] == [(0, 1), (1, 0), (0, 0)]
    for player in ("generator", "discriminator"):
        assert differences(results[0][player], results[1][player]) == []
