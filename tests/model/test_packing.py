"""Packed rows: what a base computes on real tokens alone, with a group's prompt once, is what it computes on padded
rows. Oracles: each row alone through stock transformers; the padded layout in float64, gradients too."""

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, PADS, PROMPTS, TARGETS, base_folder, random_model, small_gan, word_tokenizer
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lora_gan.model import packing

EVEN = [[5, 6, 7], [8, 9, 10, 11, 12]], [[20, 21], [22], [23, 24, 25, 0], [26]], np.array([0, 0, 1, 1])
UNEVEN = [[8, 9, 10, 11, 12], [5]], [[1], [22, 0], [23, 24, 25, 26, 27], [30, 31], [32]], np.array([0, 1, 1, 1, 0])
SINGLE = [[5, 6, 7], [8]], [[1, 1, 1], []], np.array([0, 1])  # nothing but pads; no response at all
LAYOUTS = {"even groups": EVEN, "uneven groups": UNEVEN, "one response each": SINGLE}


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_pooled_against_stock_transformers_rule(pad):
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = [3, *rng.integers(0, 3, size=rng.integers(0, 6)).tolist()]
        readable = [i for i, token in enumerate(ids) if token != pad]
        assert packing.pooled(ids, pad) == readable[-1]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_is_read_as_stock_transformers_reads_it_alone(architecture, pad, layout, packs):
    gan = small_gan(base_folder(architecture, pad))
    assert gan.players.packs
    prompts, responses, prompt_of = LAYOUTS[layout]
    batch = gan.players.batch(prompts, responses, prompt_of, packs=packs)
    stock = AutoModelForCausalLM.from_pretrained(base_folder(architecture, pad)).eval()
    body = getattr(stock, stock.base_model_prefix)
    with torch.no_grad(), gan.players.use_adapter("reference"):
        logits = gan.players.lm_head(gan.players.hidden(batch, batch.predicting_R))
        features = gan.players.pooled_hidden(batch)
    taken = 0
    for row, (response, j) in enumerate(zip(responses, prompt_of, strict=True)):
        ids = torch.tensor([prompts[j] + response])
        with torch.no_grad():
            expected = stock(input_ids=ids).logits[0, len(prompts[j]) - 1 : -1]
            hidden = body(input_ids=ids).last_hidden_state[0]
        of_row = slice(taken, taken := taken + len(response))
        assert batch.response_ids_R[of_row].tolist() == response
        assert batch.row_R[of_row].tolist() == [row] * len(response)
        torch.testing.assert_close(logits[of_row], expected, atol=1e-4, rtol=1e-4)
        place = packing.pooled(ids[0].tolist(), gan.players.base.pad_on_disk)
        torch.testing.assert_close(features[row], hidden[place], atol=1e-5, rtol=1e-4)
    assert taken == len(logits)


@pytest.mark.parametrize("layout", ["even groups", "uneven groups"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_padded_rows(architecture, layout):
    gan = small_gan(base_folder(architecture), learning_rate=1e-2, disc_learning_rate=1e-2)
    for _ in range(3):
        gan.step(PROMPTS[:2], TARGETS[:2])
    gan.players.peft.double()
    found = []
    for packs in (True, False):
        batch = gan.players.batch(*LAYOUTS[layout], packs=packs)
        embeds_BLH = gan.players.embed(batch.ids).detach().requires_grad_(True)
        places_R = torch.cat([batch.predicting_R, batch.pooled_B])
        with gan.players.use_adapter("generator"):
            hidden_RH = gan.players.hidden(batch, places_R, embeds_BLH)
            weight_RH = torch.randn(hidden_RH.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            (hidden_RH * weight_RH).sum().backward()
        parameters = gan.players.parameters("generator")
        found.append([embeds_BLH.grad.flatten(0, 1)[batch.response_R], *(p.grad.clone() for p in parameters)])
        for parameter in parameters:
            parameter.grad = None
    assert gan.players.packs
    for packed, padded in zip(*found, strict=True):
        assert padded.abs().max() > 1e-6
        assert (packed - padded).norm() < 1e-5 * padded.norm()  # Llama turns in float32


def test_a_row_has_no_padding_and_a_prompt_stands_once():
    gan = small_gan()
    prompts, responses, _ = EVEN
    batch = gan.players.batch(*EVEN)
    assert batch.ids.tolist() == [[token for part in (*prompts, *responses) for token in part]]


@pytest.mark.parametrize("kind", ["mistral", "qwen2_moe"])
def test_a_base_with_a_window_is_read_as_padded_rows(kind):
    """Its attention would have to be told how far a token looks, which Qwen2-MoE's is not; the padded rows know."""
    tokenizer = word_tokenizer("own")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 1}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 96, "sliding_window": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "max_window_layers": 0}
    if kind == "mistral":
        config, model = MistralConfig(**sizes, **ids, **more), MistralForCausalLM
    else:
        config, model = Qwen2MoeConfig(**sizes, **ids, **more, **experts, use_sliding_window=True), Qwen2MoeForCausalLM
    torch.manual_seed(0)
    gan = small_gan(model(config), processing_class=tokenizer)
    assert not gan.players.packs
    assert not gan.players.batch(*EVEN).packed
    assert gan.step(PROMPTS[:2], TARGETS[:2])["gen_loss"] is not None


def test_attention_is_put_back_after_an_error(monkeypatch):
    gan = small_gan()
    assert gan.players.packs
    before = gan.players.lm.config._attn_implementation
    batch = gan.players.batch(*EVEN)
    monkeypatch.setattr(gan.players.body, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gan.players.hidden(batch, batch.pooled_B)
    assert gan.players.lm.config._attn_implementation == before


def test_the_head_is_the_bases_own_and_the_body_comes_back(monkeypatch):
    """A cap, a scale, a bias: whatever its forward does behind the body."""
    model = random_model("llama", len(word_tokenizer("own")), 0, 1)
    gan = small_gan(model, processing_class=word_tokenizer("own"))
    body, kind = gan.players.body, type(gan.players.lm)
    forward = kind.forward

    def capped(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    monkeypatch.setattr(kind, "forward", capped)
    with torch.no_grad():
        assert gan.players.lm_head(100 * torch.randn(4, 32)).abs().max() <= 3
        monkeypatch.setattr(gan.players.lm.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gan.players.lm_head(torch.randn(4, 32))
    assert gan.players.body is body and getattr(gan.players.lm, gan.players.lm.base_model_prefix) is body


def test_out_of_memory_in_the_trial_says_nothing_of_the_base(monkeypatch):
    gan = small_gan()
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):

        def full(*_, **__):
            raise torch.OutOfMemoryError("simulated")

        patched.setattr(gan.players.body, "forward", full)
        _ = gan.players.packs
    assert gan.players.packs


def test_the_reference_of_an_adapted_head_has_no_adapter():
    own = {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"]), "lora_r": 16, "lora_alpha": 32}
    gan = small_gan(base_folder("llama"), **own, learning_rate=1e-2)
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    hidden = torch.randn(4, 32)
    with torch.no_grad():
        with gan.players.use_adapter("reference"):
            expected = gan.players.lm_head(hidden)
        with gan.players.use_adapter("generator"):
            assert torch.equal(gan.players.lm_head(hidden, reference=True), expected)
            assert not torch.allclose(gan.players.lm_head(hidden), expected, atol=1e-3)
