"""Two adapters on one base: memory, isolation, switching, gradients.

Oracles: the base loaded alone by transformers; a stock single-adapter PEFT model with the same LoRA weights, whose
gradients come from plain autograd over unpadded rows; bitwise copies.
"""

import re

import numpy as np
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    PROMPTS,
    SMALL,
    TARGETS,
    advantages,
    base_folder,
    copies,
    differences,
    logits,
    play,
    player_state,
    random_model,
    small_gan,
    word_tokenizer,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_gan import data
from lora_gan.model.adapter_files import adapter_state
from lora_gan.model.players import HEADS

BOTH = ("generator", "discriminator")


def batch(gan, player="generator"):
    """A forward of a player with its graph open."""
    batch = gan.players.batch([[5, 6], [9, 10]], [[7, 8], [11, 12]], np.arange(2))
    return gan.players.hidden(batch, batch.predicting_R) if player == "generator" else gan.players.predict(batch)


# --- one base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_is_one_base_two_adapters_and_the_heads(architecture):
    base = base_folder(architecture, "own")
    gan = small_gan(base, disc_lora_r=3)
    gan.step(PROMPTS[:2], TARGETS[:2])
    alone = AutoModelForCausalLM.from_pretrained(base)
    expected = sum(parameter.numel() for parameter in alone.parameters())
    for r in (SMALL["lora_r"], 3):
        stock = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=r, target_modules="all-linear"))
        expected += stock.get_nb_trainable_parameters()[0]
    expected += HEADS * 32
    storages = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in [*gan.players.peft.parameters(), gan.players.heads_MH]
    }
    assert sum(storages.values()) == 4 * expected


@pytest.mark.parametrize("settings", [{}, {"gradient_path": "straight_through", "query_rate": 0.5}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_stays_bitwise_as_it_was(architecture, settings):
    base = base_folder(architecture, "own")
    gan = small_gan(base, imitation_weight=0.5, **settings)
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    alone = dict(AutoModelForCausalLM.from_pretrained(base).state_dict())
    now = {name.replace(".base_layer", ""): tensor for name, tensor in gan.players.lm.state_dict().items()}
    now = {name: tensor for name, tensor in now.items() if "lora_" not in name}
    assert differences(alone, now) == []
    assert gan.players.lm.config.pad_token_id == 1 and not gan.players.lm.training


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_is_the_base_loaded_alone(architecture):
    base = base_folder(architecture, "own")
    gan = small_gan(base)
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    ids = torch.tensor([gan._encode([PROMPTS[1]])[0]])
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
        with gan.players.use_adapter("reference"):
            reference = logits(gan, ids)
        with gan.players.use_adapter("generator"):
            generator = logits(gan, ids)
    if architecture == "gpt2":  # its activation is the same formula in one pass
        torch.testing.assert_close(reference, alone, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(reference, alone)
    assert not torch.allclose(generator, alone, atol=1e-2)


def test_before_training_both_players_are_the_reference():
    gan = small_gan()
    ids = torch.tensor([[5, 6, 7]])
    outputs = []
    for player in ("reference", *BOTH):
        with torch.no_grad(), gan.players.use_adapter(player):
            outputs.append(logits(gan, ids))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert gan.score(PROMPTS[0], "text") == [0.0], "heads that know nothing yet"
    assert not any(torch.equal(a, b) for a, b in zip(*map(gan.players.parameters, BOTH), strict=False) if a.any())


# --- switching --------------------------------------------------------------------------------------------------------


def test_switching_never_touches_requires_grad():
    gan = small_gan()

    def state():
        return {name: parameter.requires_grad for name, parameter in gan.players.peft.named_parameters()}

    first = state()
    assert all(wanted == bool(re.search(r"\.(generator|discriminator)\.", name)) for name, wanted in first.items())
    assert any(first.values()) and gan.players.heads_MH.requires_grad
    for player in ("generator", "discriminator", "reference", "generator"):
        with gan.players.use_adapter(player):
            assert state() == first
            with gan.players.use_adapter("reference"):
                assert state() == first
        assert state() == first
    gan.step(PROMPTS[:2], TARGETS[:2])
    assert state() == first and gan.players.heads_MH.requires_grad


@pytest.mark.parametrize("player", BOTH)
def test_a_players_loss_reaches_that_player_alone(player):
    gan = small_gan()
    gan.step(PROMPTS[:2], TARGETS[:2])
    with gan.players.use_adapter(player):
        batch(gan, player).square().sum().backward()
    other = {"generator": "discriminator", "discriminator": "generator"}[player]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in gan.players.parameters(player))
    assert all(parameter.grad is None for parameter in gan.players.parameters(other))


@pytest.mark.parametrize("through", ["policy_gradient", "straight_through"])
def test_the_generators_update_leaves_the_discriminator_bitwise(through):
    """Its optimizer, its replay and its gradients too; straight-through runs a backward through it."""
    gan = small_gan(gradient_path=through, reward_signal="predicted")
    gan.step(PROMPTS[:2], TARGETS[:2])
    before = {player: player_state(gan, player) for player in BOTH}
    experience = play(gan, data.rows_of(PROMPTS[:2], None, {}))
    gan.generator.update(experience.rows, experience, "predicted", 0.0)
    assert differences(before["discriminator"], player_state(gan, "discriminator")) == []
    assert differences(before["generator"], player_state(gan, "generator")) != []
    assert all(parameter.grad is None for parameter in gan.players.parameters("discriminator"))
    after = player_state(gan, "generator")
    gan.discriminator.update(experience)
    assert differences(after, player_state(gan, "generator")) == []
    assert differences(before["discriminator"], player_state(gan, "discriminator")) != []
    assert all(parameter.grad is None for parameter in gan.players.parameters("generator"))


def test_switching_between_forward_and_backward_raises():
    gan = small_gan()
    with pytest.raises(RuntimeError, match="generator → discriminator.*backward"):  # on the way in
        with gan.players.use_adapter("generator"):
            loss = batch(gan).sum()
            with gan.players.use_adapter("discriminator"):
                pytest.fail("entered")
    assert gan.players.active == "base"
    with pytest.raises(RuntimeError, match="discriminator → base.*backward"):  # on the way out
        with gan.players.use_adapter("discriminator"):
            loss = batch(gan, "discriminator").sum()
    del loss
    with gan.players.use_adapter("generator"):
        batch(gan).sum().backward()


def test_a_loss_that_is_held_past_the_end_of_its_block_raises_at_the_exit():
    """The output itself may be gone: what counts is the graph behind the loss."""
    gan = small_gan()
    with pytest.raises(RuntimeError, match="generator → base"):
        with gan.players.use_adapter("generator"):
            loss = batch(gan).exp().sum() * 2
    assert loss.requires_grad


def test_no_graph_no_complaint():
    gan = small_gan()
    with gan.players.use_adapter("generator"):
        with torch.no_grad():
            kept = batch(gan)
        with gan.players.use_adapter("discriminator"), torch.no_grad():
            also_kept = batch(gan, "discriminator")
    assert not kept.requires_grad and not also_kept.requires_grad


def test_a_graph_that_was_dropped_raises_nothing_later():
    gan = small_gan()
    with gan.players.use_adapter("generator"):
        loss = batch(gan).sum()
        del loss
        with gan.players.use_adapter("reference"):
            pass
    gan.step(PROMPTS[0])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_former_player_is_back(error):
    gan = small_gan()
    with torch.no_grad(), gan.players.use_adapter("discriminator"):
        ids = torch.tensor([[5, 6, 7]])
        before = logits(gan, ids)
    with gan.players.use_adapter("discriminator"):
        with pytest.raises(error, match="within"):
            with gan.players.use_adapter("generator"):
                loss = batch(gan).sum()
                raise error("within")
        assert gan.players.active == "discriminator"
        with torch.no_grad():
            assert torch.equal(logits(gan, ids), before)
    assert gan.players.active == "base" and loss.requires_grad
    del loss
    gan.step(PROMPTS[0])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generator_gradients_equal_those_of_a_stock_adapter(architecture, micro_batch_size):
    """Policy gradient and exact KL by the library on padded batches, by autograd on stock PEFT row by row."""
    base = base_folder(architecture, "own")
    gan = small_gan(base, beta=0.3, temperature=0.8, num_generations=4, micro_batch_size=micro_batch_size)
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    experience = play(gan, data.rows_of(PROMPTS[:3], None, {}))
    gan.generator._reinforce(experience, advantages(gan, experience, "true"))
    ours = {name: weight.grad for name, weight in zip(
        adapter_state(gan.players, "generator"), gan.players.parameters("generator"), strict=True
    )}  # fmt: skip

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            r=SMALL["lora_r"], lora_alpha=SMALL["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ).eval()
    weights = {
        name.replace(".weight", ".default.weight"): weight.detach().clone()
        for name, weight in adapter_state(gan.players, "generator").items()
    }
    stock.load_state_dict(weights, strict=False)
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    reward_B = experience.true_B
    losses = []
    for row, group in enumerate(experience.group_B):
        others = [i for i in range(len(reward_B)) if experience.group_B[i] == group and i != row]
        advantage = reward_B[row] - np.mean(reward_B[others])
        prompt = experience.prompts[group]
        response = experience.rollout.responses[row]
        ids = torch.tensor([prompt + response])
        logprobs = (stock(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        with torch.no_grad():
            theirs = (reference(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        kl = (logprobs.exp() * (logprobs - theirs)).sum()
        losses.append(-advantage * logprobs[range(len(response)), response].sum() + 0.3 * kl)
    torch.stack(losses).mean().backward()
    oracle = {
        name.replace(".default.weight", ".weight"): parameter.grad
        for name, parameter in stock.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == oracle.keys()
    for name, gradient in oracle.items():
        assert gradient.abs().max() > 1e-4
        assert (ours[name] - gradient).abs().max() < 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_discriminator_gradients_equal_those_of_a_stock_adapter():
    """One learning batch: the loss written here row by row on a stock adapter, heads and all."""
    base = base_folder()
    gan = small_gan()
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    groups = list(gan.discriminator.replay.groups)
    gan.discriminator._learn([(groups, None)])
    ours = [parameter.grad for parameter in gan.players.parameters("discriminator")]

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM"),
    ).eval()
    weights = {
        name.replace(".weight", ".default.weight"): weight.detach().clone()
        for name, weight in adapter_state(gan.players, "discriminator").items()
    }
    stock.load_state_dict(weights, strict=False)
    head = gan.players.heads_MH.detach().clone().requires_grad_(True)
    unit, losses = gan.players.reward_unit, []
    for group in groups:
        hidden = [
            stock.get_base_model()
            .transformer(input_ids=torch.tensor([group.prompt + response]))
            .last_hidden_state[0, -1]
            for response in group.responses
        ]
        true = torch.tensor(group.rewards) / unit
        for row in (row for row, learns in zip(head, group.heads, strict=True) if learns):
            predicted = torch.stack(hidden) @ row
            error = predicted - true
            for i in range(len(true)):
                lower = [j for j in range(len(true)) if true[j] < true[i]]
                rank = sum((true[i] - true[j]) * torch.log1p(torch.exp(predicted[j] - predicted[i])) for j in lower)
                rank = rank / max(1, len(lower))
                losses.append((error[i] - error.mean()) ** 2 + 0.25 * error.mean() ** 2 + 0.5 * rank)
    torch.stack(losses).mean().backward()
    oracle = [parameter.grad for parameter in stock.parameters() if parameter.requires_grad] + [head.grad]
    for mine, gradient in zip(ours, oracle, strict=True):
        assert gradient.abs().max() > 1e-6
        assert (mine - gradient).abs().max() < 2e-5 * max(1.0, float(gradient.abs().max()))


# --- pooling, pads, bases in memory -----------------------------------------------------------------------------------


def test_a_tokenizers_pad_token_outside_the_embedding_table_is_not_used():
    """A pad token added to a tokenizer, whose model was never resized: common, and no reason to fail."""
    tokenizer = word_tokenizer("none")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|added|>"})
    assert tokenizer.pad_token_id == rows
    gan = small_gan(random_model("llama", rows, tokenizer.eos_token_id, None), processing_class=tokenizer)
    out = gan.step(["the cat", "a dog sat on the mat"])
    assert np.isfinite(out["gen_loss"])


def test_a_base_in_memory_needs_its_tokenizer():
    tokenizer = word_tokenizer("own")
    model = random_model("gpt2", len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    with pytest.raises(ValueError, match="processing_class"):
        small_gan(model)
    gan = small_gan(model, processing_class=tokenizer)
    before = copies(gan.players.parameters("generator"))
    gan.step("the cat")
    assert differences(before, copies(gan.players.parameters("generator"))) != []


def test_a_base_that_is_not_there_raises_value_error(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "nowhere"), "nobody/has-such-a-model"):
        with pytest.raises(ValueError, match="base"):
            small_gan(name)
