"""Gradients through a base in 4 bits."""

import importlib.util

import pytest
import torch
from helpers import base_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_gan import Config
from lora_gan.model.base import load_base

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_a_forward_without_gradients_leaves_those_of_the_next_one():
    """Oracle: the same base with the weights that the 4 bits stand for."""
    import bitsandbytes

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = load_base(base_folder("llama"), None, Config(device="cpu", dtype="float32"), quantization_config=options)
    plain = AutoModelForCausalLM.from_pretrained(base_folder("llama")).eval()
    layers = dict(plain.named_modules())
    packed = {
        name: layer for name, layer in base.model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }
    for name, layer in packed.items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layers[name].weight.data = weight.float()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        base.model(input_ids=ids)
    gradients = []
    for lm in (base.model, plain):
        embeds = lm.get_input_embeddings()(ids).detach().requires_grad_()
        lm(inputs_embeds=embeds).logits.float().square().sum().backward()
        gradients.append(embeds.grad)
    assert packed and gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))
