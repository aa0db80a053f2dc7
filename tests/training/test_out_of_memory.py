"""Out of memory in an update: the micro-batch is halved, and the update done again.

Oracle: a run that was configured with that micro-batch, bitwise; and the whole batch, to rounding. Memory is simulated:
a forward raises above a number of rows.
"""

import pytest
import torch
from helpers import PROMPTS, TARGETS, differences, player_state, reward, small_gan

from lora_gan import LoraGAN

SETTINGS = {"num_generations": 4, "disc_replay_groups": 0}


def fill(monkeypatch, gan, rows, *, players=("generator", "discriminator"), skip=0):
    """Forwards of more than so many rows find no room, after the first `skip` of them that did: the generator's with
    gradients, and all of the discriminator's."""
    left = [skip]

    whole = gan.players.hidden

    def limited(batch, *arguments, **options):
        active = gan.players.active
        needs = active == "discriminator" or torch.is_grad_enabled()
        if len(batch) > rows and needs and active in players:
            if not left[0]:
                raise torch.OutOfMemoryError("simulated")
            left[0] -= 1
        return whole(batch, *arguments, **options)

    monkeypatch.setattr(gan.players, "hidden", limited)


def run(gan, steps=3):
    return [gan.step(PROMPTS[step % 2 :: 2], TARGETS[step % 2 :: 2]) for step in range(steps)]


def comparable(gan, player):
    state = player_state(gan, player)
    state["optimizer"].pop("micro_batch_size")
    return state


PATHS = {
    "policy gradient": {},
    "clipped": {"num_iterations": 2, "imitation_weight": 0.5},
    "straight-through": {"gradient_path": "straight_through"},
}


@pytest.mark.parametrize("path", PATHS)
def test_equal_to_a_run_configured_with_the_smaller_micro_batch(monkeypatch, path):
    settings = SETTINGS | PATHS[path]
    gan = small_gan(**settings)
    fill(monkeypatch, gan, 4)
    with pytest.warns(UserWarning, match="out of memory.*micro_batch_size=4") as told:
        records = run(gan)
    assert sum("out of memory" in str(one.message) for one in told) == 2, "once a player: it is remembered"
    oracle, whole = small_gan(**settings, micro_batch_size=4), small_gan(**settings)
    expected = run(oracle), run(whole)
    for player in ("generator", "discriminator"):
        for one, two in zip(gan.players.parameters(player), whole.players.parameters(player), strict=True):
            assert torch.allclose(one, two, atol=2e-4)
    assert [r["gen_loss"] for r in records] == pytest.approx([r["gen_loss"] for r in expected[1]], abs=1e-4)
    for player in ("generator", "discriminator"):
        assert differences(comparable(gan, player), comparable(oracle, player)) == []


def test_what_was_done_before_memory_ran_out_is_done_again_and_not_twice(monkeypatch):
    """It runs out at the second micro-batch, and in the second update of the same roll-out."""
    settings = SETTINGS | {"num_iterations": 2}
    for skip in (1, 3):
        gan, whole = small_gan(**settings, micro_batch_size=4), small_gan(**settings, micro_batch_size=4)
        with monkeypatch.context() as patched, pytest.warns(UserWarning, match="micro_batch_size=2"):
            fill(patched, gan, 2, players=["generator"], skip=skip)
            record = gan.step(PROMPTS[:2], TARGETS[:2])
        expected = whole.step(PROMPTS[:2], TARGETS[:2])
        assert record["gen_grad_norm"] == pytest.approx(expected["gen_grad_norm"], rel=1e-4)
        for one, two in zip(*(g.players.parameters("generator") for g in (gan, whole)), strict=True):
            assert torch.allclose(one, two, atol=2e-4)


@pytest.mark.parametrize("objective", [{}, {"disc_objective": "real_vs_generated", "adversarial": True}], ids=str)
@pytest.mark.filterwarnings("ignore:out of memory. continuing with micro_batch_size=[24];")
def test_the_discriminator_goes_down_to_one_response_at_a_time(monkeypatch, objective):
    """A group's too, whose loss compares them all; where nothing learns, before the first update, no less."""
    gan, oracle = (small_gan(**SETTINGS, **objective, micro_batch_size=size) for size in (None, 1))
    whole = gan.players.hidden

    def limited(batch, *arguments, **options):
        if len(batch) > 1 and gan.players.active == "discriminator":
            raise torch.OutOfMemoryError("simulated")
        return whole(batch, *arguments, **options)

    monkeypatch.setattr(gan.players, "hidden", limited)
    with pytest.warns(UserWarning, match="micro_batch_size=1"):
        for _ in range(2):
            gan.step(PROMPTS[:2], TARGETS[:2], train_gen=False)
    for _ in range(2):
        oracle.step(PROMPTS[:2], TARGETS[:2], train_gen=False)
    for one, two in zip(*(its.players.parameters("discriminator") for its in (gan, oracle)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("only", ["generator", "discriminator"])
def test_one_response_cannot_be_split(monkeypatch, only):
    gan = small_gan(**SETTINGS)
    gan.step(PROMPTS[:2])
    before = {player: player_state(gan, player)["parameters"] for player in ("generator", "discriminator")}
    fill(monkeypatch, gan, 0, players=[only])
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        gan.step(PROMPTS[:2], train_gen=only == "generator", train_disc=only == "discriminator")
    after = {player: player_state(gan, player)["parameters"] for player in before}
    assert differences(before, after) == []


def test_predictions_are_made_in_smaller_parts_too(monkeypatch):
    gan, oracle = small_gan(), small_gan(micro_batch_size=2)
    whole, count = gan.players.predict, []

    def limited(batch, *arguments):
        count.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("simulated")
        return whole(batch, *arguments)

    monkeypatch.setattr(gan.players, "predict", limited)
    with pytest.warns(UserWarning, match="micro_batch_size=2"):
        assert gan.score(PROMPTS, TARGETS) == oracle.score(PROMPTS, TARGETS)
    assert count == [4, 2, 2]


def test_the_smaller_micro_batch_continues_from_a_checkpoint(monkeypatch, tmp_path):
    gan = small_gan(**SETTINGS, output_dir=str(tmp_path))
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="out of memory"):
        fill(patched, gan, 4)
        run(gan, 2)
    other = LoraGAN.from_checkpoint(gan.save_checkpoint(), reward=reward)
    for one in (gan, other):
        assert one.generator.optimizer.micro_batch_size == one.discriminator.optimizer.micro_batch_size == 4
        one.step(PROMPTS[:2], TARGETS[:2])
    for player in ("generator", "discriminator"):
        assert differences(player_state(gan, player), player_state(other, player)) == []
