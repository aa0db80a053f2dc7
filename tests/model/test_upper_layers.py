"""disc_layers: the discriminator's adapter on the upper layers alone, and what lies below them computed once.

Oracles: the same adapter described by name; the whole forward; stock PEFT.
"""

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, PROMPTS, TARGETS, base_folder, play, small_gan
from peft import LoraConfig

from lora_gan import LoraGAN, data


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adapter_is_on_the_upper_layers_and_both_players_learn_as_without_the_short_cut(monkeypatch, architecture):
    gan, oracle = (small_gan(base_folder(architecture), disc_layers=1, num_iterations=2) for _ in range(2))
    names = [name for name, _ in gan.players.peft.named_parameters() if ".discriminator" in name]
    assert names and all(".1." in name for name in names), "of two layers"
    gan.step(PROMPTS[:2], TARGETS[:2], train_gen=False, train_disc=False)  # found out on the way, whatever comes first
    oracle.step(PROMPTS[:2], TARGETS[:2], train_gen=False, train_disc=False)
    assert gan.players._shares_frozen_layers
    oracle.players._shares_frozen_layers = False
    ran = []
    layers, below = gan.players._frozen_layers
    assert below == 1
    layers[0].register_forward_hook(lambda *_: ran.append(gan.players.active))
    for _ in range(3):
        one, other = (g.step(PROMPTS[:2], TARGETS[:2]) for g in (gan, oracle))
        assert one["pred_rewards"] == [pytest.approx(p, abs=1e-5) for p in other["pred_rewards"]]
        for name in ("gen_loss", "kl", "disc_loss", "gen_grad_norm", "disc_grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert ran.count("reference") == 0, "the discriminator's reading of the lower layers served it"
    assert ran.count("discriminator") >= 3 and ran.count("generator") > 6


def test_layers_come_back_after_an_error(monkeypatch):
    gan = small_gan(disc_layers=1)
    assert gan.players._shares_frozen_layers
    before = list(gan.players.body.h)
    batch = gan.players.batch([[5, 6]], [[7]], np.array([0]))
    monkeypatch.setattr(gan.players.body.ln_f, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), gan.players.use_adapter("discriminator"):
        gan.players.hidden(batch, batch.pooled_B)
    assert list(gan.players.body.h) == before


def test_straight_through_goes_down_to_the_embeddings():
    gan, oracle = (
        small_gan(disc_layers=1, adversarial=True, gradient_path="straight_through", learning_rate=1e-3)
        for _ in range(2)
    )
    oracle.players._shares_frozen_layers = False
    for _ in range(3):
        one, other = (g.step(PROMPTS[:2], TARGETS[:2]) for g in (gan, oracle))
    assert one["gen_grad_norm"] == pytest.approx(other["gen_grad_norm"], rel=1e-4) and one["gen_grad_norm"] > 1e-4


def test_a_checkpoint_resumes_and_opens(tmp_path):
    gan = small_gan(disc_layers=1)
    gan.step(PROMPTS[:2], TARGETS[:2])
    gan.save_checkpoint(step=1, ckpt_dir=str(tmp_path))
    again = LoraGAN.from_checkpoint(tmp_path / "step-1", reward=gan.compute_reward, model=base_folder())
    assert again.config.disc_layers == 1
    expected, found = (g.step(PROMPTS[:2], TARGETS[:2]) for g in (gan, again))
    assert expected == found
    assert gan.score(PROMPTS, TARGETS) == again.score(PROMPTS, TARGETS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"disc_layers": 0}, "disc_layers=0 is not accepted"),
        ({"disc_layers": 3}, "disc_layers=3 is not accepted: GPT2LMHeadModel has 2 layers"),
        (
            {"disc_layers": 1, "disc_lora_r": 16, "disc_peft_config": LoraConfig()},
            "disc_layers=1 and disc_peft_config=",
        ),
    ],
    ids=str,
)
def test_what_is_not_accepted(settings, words):
    with pytest.raises(ValueError, match=words):
        small_gan(**settings)


def test_all_layers_share_nothing():
    gan = small_gan(disc_layers=2)
    assert not gan.players._shares_frozen_layers
    rows = data.rows_of(PROMPTS[:2], TARGETS[:2], {})
    assert "layers" not in play(gan, rows, learns=True).rollout.batch().frozen_outputs
    assert torch.isfinite(gan.players.heads_MH).all()
