"""Opening a base: by name, from the hub, from a folder, quantized; and one clear line where that fails.

The hub is a small server of the tests' own (mini_hub.py), asked in a new process.
"""

import importlib.util
import re
import shutil

import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, copies, differences, player_state, python, read_json, sign, small_gan
from peft import LoraConfig, get_peft_model
from test_bases import base_weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_gan import LoraGAN


def refused(words, *arguments, **settings):
    with pytest.raises(ValueError, match=words) as caught:
        small_gan(*arguments, **settings)
    assert "\n" not in str(caught.value), "one line"


# --- names and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nobody/has-such-a-model", "./nowhere", "/nowhere/at/all", "a/b/c", "two words", "double--dash", "~/base"]
)
def test_a_base_that_is_not_there_is_named(name):
    refused(re.escape(name), name)


@pytest.mark.parametrize(
    ("value", "words"), [("", "no name"), (3, "int"), (object(), "object"), (None.__class__, "type")]
)
def test_what_is_no_base_at_all(value, words):
    refused(words, value)


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ("config.json", "no config.json"),
        ("*.safetensors", "no weights"),
        ("tokenizer*", "no tokenizer.*processing_class"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(lacks, words, tmp_path):
    shutil.copytree(base_folder(), tmp_path / "base")
    for file in (tmp_path / "base").glob(lacks):
        file.unlink()
    refused(words, tmp_path / "base")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_spoiled_part_is_one_line(file, tmp_path):
    shutil.copytree(base_folder(), tmp_path / "base")
    (tmp_path / "base" / file).write_text("{")
    refused("could not be opened", tmp_path / "base")


def test_a_base_without_a_tokenizer_opens_with_one_that_is_given(tmp_path):
    shutil.copytree(base_folder(), tmp_path / "base")
    tokenizer = small_gan().players.base.tokenizer
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    gan = small_gan(tmp_path / "base", processing_class=tokenizer)
    assert gan.generate(PROMPTS) == small_gan().generate(PROMPTS)


def test_checkpoints_and_adapters_are_no_bases(tmp_path):
    folder = small_gan().save_checkpoint(step=1, ckpt_dir=tmp_path)
    for path in (tmp_path, folder):
        refused("a checkpoint, not a base.*from_checkpoint", path)
    refused("an adapter, not a base.*load_generator", folder / "generator")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_models_in_memory():
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    tokenizer = small_gan().players.base.tokenizer
    refused("quantization_config.*is loaded", model, processing_class=tokenizer, quantization_config={"bits": 4})
    refused("model_init_kwargs.*is loaded", model, processing_class=tokenizer, model_init_kwargs={"revision": "x"})
    refused("dtype='bfloat16'.*float32", model, processing_class=tokenizer, dtype="bfloat16")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_fc"]))
    refused("PeftModel", wrapped, processing_class=tokenizer)
    refused("adapters already", model, processing_class=tokenizer)


# --- settings that concern the base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:99", "mps", "gpu"])
def test_a_device_that_is_not_there(device):
    if device in ("cuda", "cuda:0") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    refused(f"device='{device}'.*cpu", device=device)


@pytest.mark.parametrize(
    ("key", "instead"),
    [("dtype", "dtype="), ("device_map", "device="), ("quantization_config", "quantization_config="),
     ("trust_remote_code", "trust_remote_code="), ("local_files_only", "HF_HUB_OFFLINE")],
)  # fmt: skip
def test_model_init_kwargs_that_another_setting_decides(key, instead):
    refused(f"model_init_kwargs has '{key}'.*{instead}", model_init_kwargs={key: "x"})


def test_model_init_kwargs_and_dtype_reach_from_pretrained(tmp_path):
    gan = small_gan(model_init_kwargs={"attn_implementation": "eager"}, dtype="bfloat16", output_dir=str(tmp_path))
    assert gan.players.lm.config._attn_implementation == "eager"
    assert gan.players.lm.get_input_embeddings().weight.dtype == torch.bfloat16
    gan.save_checkpoint(step=1)
    again = LoraGAN.from_checkpoint(tmp_path, reward=gan.compute_reward)
    assert again.players.lm.config._attn_implementation == "eager"
    refused("nonsense", model_init_kwargs={"attn_implementation": "nonsense"})
    refused("bogus", model_init_kwargs={"bogus": 1})


def test_a_checkpoint_cannot_make_its_base_run_code(tmp_path, monkeypatch):
    """A stranger's checkpoint may name a base on this machine; whether that one's own code runs is for the user."""
    folder = small_gan(base_folder("llama")).save_checkpoint(step=1, ckpt_dir=tmp_path / "run")
    shutil.copytree(base_folder("llama"), tmp_path / "base")
    marker = tmp_path / "executed"
    (tmp_path / "base" / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass M: pass\n")
    config = (tmp_path / "base" / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    auto_map = '{"auto_map": {"AutoConfig": "code.M", "AutoModelForCausalLM": "code.M"},'
    (tmp_path / "base" / "config.json").write_text(config.replace("{", auto_map, 1))
    state = (folder / "trainer_state.json").read_text()
    state = state.replace(str(base_folder("llama")), str(tmp_path / "base"))
    state = state.replace('"trust_remote_code": false', '"trust_remote_code": true')
    (folder / "trainer_state.json").write_text(state)
    sign(folder)
    assert read_json(folder / "trainer_state.json")["config"]["trust_remote_code"] is True
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        LoraGAN.from_checkpoint(folder, reward=len)
    assert not marker.exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


ON_THE_HUB = """
import sys, time, mini_hub
server = mini_hub.start(*sys.argv[1:])
from lora_gan.model.base import load_base
from lora_gan.config import Config

def attempt(name, **settings):
    started, result = time.monotonic(), "opened"
    try:
        assert load_base(name, None, Config(**settings)).path == name
    except ValueError as error:
        result = str(error)
    print(f"{name}|{time.monotonic() - started:.1f}|{result}")

attempt("missing/model")
attempt("gated/model")
attempt("old/model", model_init_kwargs={"revision": "v2"})
attempt("empty/model")
attempt("slow/model")
attempt("cached/model")
server.shutdown()
server.server_close()
attempt("cached/model")
attempt("other/model")
"""


@pytest.mark.slow
def test_bases_on_the_hub(tmp_path):
    output = python(ON_THE_HUB, str(base_folder()), str(tmp_path))
    lines = [line.split("|") for line in output.splitlines() if line.count("|") == 2]
    expected = [
        ("missing/model", "Repository Not Found"),
        ("gated/model", "gated repo"),
        ("old/model", "Revision Not Found"),
        ("empty/model", "Entry Not Found"),
        ("slow/model", "opened"),
        ("cached/model", "opened"),
        ("cached/model", "opened"),  # the server is gone
        ("other/model", "cannot be reached"),
    ]
    assert len(lines) == len(expected), output
    for (name, seconds, result), (wanted, words) in zip(lines, expected, strict=True):
        assert name == wanted and words in result, output
        assert float(seconds) < 12, f"{name} took {seconds} s; the hub's own client would retry for 45"


# --- quantized --------------------------------------------------------------------------------------------------------

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_without_the_package_that_quantizes_the_error_names_it():
    refused("bitsandbytes", quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_on_a_quantized_base(options, dora, tmp_path):
    quantized = {"quantization_config": BitsAndBytesConfig(**options)}
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    run = {"lora_r": 16, "lora_alpha": 32, "disc_lora_r": 16, "output_dir": str(tmp_path)}
    if dora and "load_in_8bit" in options and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="use_dora=True does not work on an 8-bit base"):
            small_gan(base_folder("llama"), **quantized, **run, peft_config=config)
        return
    gan = small_gan(base_folder("llama"), **quantized, **run, peft_config=config, disc_peft_config=config)
    assert gan.players.lm.is_quantized
    before, base = copies(gan.players.parameters("generator")), {k: v.clone() for k, v in base_weights(gan).items()}
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    assert not any(torch.equal(a, b) for a, b in zip(before, gan.players.parameters("generator"), strict=True))
    assert differences(base, base_weights(gan)) == []
    gan.save_checkpoint()
    again = LoraGAN.from_checkpoint(tmp_path, reward=gan.compute_reward, **quantized)
    assert differences(gan.step(PROMPTS[:2], TARGETS[:2]), again.step(PROMPTS[:2], TARGETS[:2])) == []
    assert differences(player_state(gan, "generator"), player_state(again, "generator")) == []
    with pytest.raises(ValueError, match="quantization"):
        LoraGAN.from_checkpoint(tmp_path, reward=gan.compute_reward)


# --- a checkpoint of something else -----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_base_names_both(tmp_path):
    small_gan(base_folder("llama")).save_checkpoint(step=1, ckpt_dir=tmp_path)
    with pytest.raises(ValueError, match=r"llama.*\(LlamaForCausalLM\).*gpt2.*\(GPT2LMHeadModel\)"):
        small_gan().load_checkpoint(1, tmp_path)
    small_gan(base_folder(seed=1)).save_checkpoint(step=2, ckpt_dir=tmp_path)
    with pytest.raises(ValueError, match=r"gpt2-own-bytes-1-1.*gpt2-own-bytes-1-0"):
        small_gan().load_checkpoint(2, tmp_path)
    with pytest.raises(ValueError, match="steps there: 1, 2"):
        small_gan().load_checkpoint(3, tmp_path)


def test_one_player_of_another_architecture_is_refused(tmp_path):
    folder = small_gan(base_folder("llama")).save_checkpoint(step=1, ckpt_dir=tmp_path)
    gan = small_gan()
    for load in (gan.load_generator, gan.load_discriminator):
        with pytest.raises(ValueError, match="absent.*base and the LoRA settings"):
            load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"base": {}, "config": {}, "global_step": 1}'])
def test_a_state_that_is_cut_off_is_named(text, tmp_path):
    folder = small_gan().save_checkpoint(step=1, ckpt_dir=tmp_path)
    (folder / "trainer_state.json").write_text(text)
    sign(folder)
    for load in (lambda: small_gan().load_checkpoint(1, tmp_path), lambda: LoraGAN.from_checkpoint(folder, reward=len)):
        with pytest.raises(ValueError, match="trainer_state.json"):
            load()


def test_a_tokenizer_given_to_from_checkpoint_is_used(tmp_path):
    gan = small_gan(base_folder("qwen2"), output_dir=str(tmp_path))
    gan.save_checkpoint(step=1)
    other = small_gan(base_folder("gpt2", "eos")).players.base.tokenizer
    assert LoraGAN.from_checkpoint(tmp_path, reward=len, processing_class=other).players.base.tokenizer is other
