"""Gradients through a base in 4 bits, and what bitsandbytes says of itself."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from helpers import base_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_gan import Config
from lora_gan.cli import notices
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


def test_only_what_no_user_can_act_on_is_silenced(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with notices.one_line_each():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no")
        logger.warning("this will lead to slow inference")
        logging.getLogger("bitsandbytes.nn.modules").warning("set bnb_4bit_compute_dtype")
    assert [record.getMessage() for record in caplog.records] == [
        "this will lead to slow inference",
        "set bnb_4bit_compute_dtype",
    ]
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
    assert len(caplog.records) == 3, "after a command all is as before"


@pytest.mark.slow
def test_a_run_says_nothing_on_stderr_but_its_own_lines(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,target\nthe cat,le chat\nthe dog,le chien\n")
    options = ["--model", str(base_folder()), "--data", "pairs.csv", "--reward", "length", "--max_steps", "1"]
    commands = (
        ["train", *options, "--max_completion_length", "6", "--output_dir", "run"],
        ["generate", "--checkpoint", "run", "--prompt", "the cat"],
        ["score", "--checkpoint", "run", "--prompt", "the cat", "--response", "le chat"],
        ["eval", "--checkpoint", "run", "--data", "pairs.csv"],
        ["export", "--checkpoint", "run", "--output_dir", "exported"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "lora_gan", *command], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        strange = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "lora-gan: warning: "))]
        assert strange == [], f"{command[0]} printed {strange}"
