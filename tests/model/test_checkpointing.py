"""gradient_checkpointing: the same updates with less kept. Oracle: a run that keeps everything."""

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, PROMPTS, TARGETS, base_folder, byte_tokenizer, random_model, small_gan

from lora_gan import LoraGAN
from lora_gan.model import layers as base_layers

NUMBERS = ("gen_loss", "kl", "disc_loss", "gen_grad_norm", "disc_grad_norm", "imitation_loss")
MODES = {
    "the defaults, a graph kept over other players' forwards": {},
    "padded rows": {"packs": False},
    "predicted alone": {"adversarial": True, "query_rate": 0.5},
    "straight-through": {"adversarial": True, "gradient_path": "straight_through"},
    "clipped, micro-batches": {"num_iterations": 2, "micro_batch_size": 3},
    "imitation": {"imitation_weight": 0.5},
    "upper layers": {"disc_layers": 1},
    "ranks of their own": {"lora_r": 2, "disc_lora_r": 6},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_updates_are_those_of_a_run_that_keeps_everything(architecture, mode):
    settings = dict(MODES[mode])
    packs = settings.pop("packs", True)
    gan, oracle = (
        small_gan(base_folder(architecture), gradient_checkpointing=on, learning_rate=1e-3, **settings)
        for on in (True, False)
    )
    for its in (gan, oracle):
        its.players.packs = packs
    again = []
    layers = gan.players.body.h if architecture == "gpt2" else gan.players.body.layers
    next(layers[-1].children()).register_forward_hook(
        lambda *_: again.append((gan.players.active, torch.is_grad_enabled()))
    )
    for step in range(3):
        one, other = (its.step(PROMPTS[:2], TARGETS[:2]) for its in (gan, oracle))
        for name in NUMBERS:
            values = [np.nan if its.get(name) is None else its[name] for its in (one, other)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6, nan_ok=True), (step, name)
    for player in ("generator", "discriminator"):
        for ours, theirs in zip(gan.players.parameters(player), oracle.players.parameters(player), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for player in ("generator", "discriminator"):
        count = again.count((player, True))
        assert count and not count % 2, f"{player}: each forward of an update comes twice"


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_a_graph_defer_backward_is_computed_again_by_whom_it_was_of(packs):
    gan, oracle = (small_gan(gradient_checkpointing=on) for on in (True, False))
    for its in (gan, oracle):
        its.players.packs = packs
        its.step(PROMPTS[:2], TARGETS[:2])  # adapters that say something
        players = its.players
        batch, other = players.batch([[5, 6]], [[7, 8]], np.array([0])), players.batch([[9]], [[3]], np.array([0]))
        with players.use_adapter("discriminator"):
            features_BH = players.defer_backward(players.pooled_hidden(batch))
        with players.use_adapter("generator"):
            with torch.no_grad():
                players.pooled_hidden(other)
            attention = players.lm.config._attn_implementation
            features_BH.square().sum().backward(retain_graph=True)
            features_BH.sum().backward()
            assert players.active == "generator" and players.lm.config._attn_implementation == attention
        assert all(p.grad is None for p in players.parameters("generator"))
    grads = [[p.grad for p in its.players.parameters("discriminator")[:-1]] for its in (gan, oracle)]
    assert any(grad.any() for grad in grads[0])
    torch.testing.assert_close(*grads)


def test_a_layer_keeps_what_it_was_given_and_nothing_else():
    kept = {}
    for on in (True, False):
        players = small_gan(gradient_checkpointing=on).players
        batch = players.batch([[5, 6, 7, 8]], [[7, 8, 9]] * 4, np.array([0] * 4))
        weights = {parameter.data_ptr() for parameter in players.peft.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor, weights=weights, sizes=sizes):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with players.use_adapter("generator"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            players.hidden(batch, batch.predicting_R).sum().backward()
        kept[on] = sum(sizes.values())
    assert kept[True] < kept[False] / 5


def test_a_run_resumes_with_it_to_the_bit(tmp_path):
    gan = small_gan(gradient_checkpointing=True)
    gan.step(PROMPTS[:2], TARGETS[:2])
    gan.save_checkpoint(step=1, ckpt_dir=str(tmp_path))
    again = LoraGAN.from_checkpoint(tmp_path / "step-1", reward=gan.compute_reward, model=base_folder())
    assert again.config.gradient_checkpointing
    expected, found = (its.step(PROMPTS[2:], TARGETS[2:]) for its in (gan, again))
    assert expected == found


def test_a_base_whose_layers_are_not_known_is_told_so(monkeypatch):
    monkeypatch.setattr(base_layers, "layer_list", lambda _: None)
    settings = {"gradient_checkpointing": True}
    with pytest.raises(ValueError, match=r"gradient_checkpointing cannot be used, GPT2LMHeadModel .*micro_batch_size"):
        small_gan(model := random_model("gpt2", 300, 0, 1), processing_class=byte_tokenizer("gpt2", "own"), **settings)
    small_gan(model, processing_class=byte_tokenizer("gpt2", "own"))  # what it says can be done with it
