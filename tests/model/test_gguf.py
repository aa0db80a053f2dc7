"""GGUF files as bases, on small random models that the package `gguf` writes in float32.

Oracles: the model that was written; stock PEFT and transformers on the saved folders; a run that was never interrupted.
"""

import importlib.util
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import yaml
from helpers import PROMPTS, SENTENCES, TARGETS, copies, differences, logits, player_state, reward, small_gan
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from test_bases import base_weights, logits_alone
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.data import Row
from lora_gan.model import gguf_files
from lora_gan.storage import user_cache

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
from mini_gguf import small_model, write_gguf  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "small.gguf", *small_model("llama"))


def refused(words, *arguments, **settings):
    with pytest.raises(ValueError, match=words) as caught:
        small_gan(*arguments, **settings)
    assert "\n" not in str(caught.value), "one line"


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock") if cache.exists() else []


def same_logits(model, other, texts=SENTENCES):
    tokenizer = small_model("llama")[1]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    pairs = zip(logits_alone(model, rows), logits_alone(other, rows), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# --- what opens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_is_the_model_that_was_written(architecture, tied, tmp_path, cache):
    model, tokenizer = small_model(architecture, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "small.gguf", model, tokenizer, pre="qwen2" if architecture != "llama" else "gpt-2")
    base = small_gan(path).players.base
    assert base.name == str(path) and base.path == str(cache / left_in(cache)[0])
    assert base.model.dtype == torch.float32 and same_logits(base.model, model) < 1e-5
    assert base.eos_ids == (tokenizer.eos_token_id,) and base.pad_on_disk == tokenizer.pad_token_id
    for text in SENTENCES:
        ids = base.tokenizer(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"] and base.tokenizer.decode(ids) == text
    stock = AutoModelForCausalLM.from_pretrained(base.path)
    assert same_logits(stock, model) < 1e-5
    assert not hasattr(stock.config, "quantization_config")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_it_trains_resumes_and_stock_peft_opens_the_players(architecture, tmp_path):
    path = write_gguf(tmp_path / "small.gguf", *small_model(architecture))
    gan = small_gan(path, output_dir=str(tmp_path / "run"))
    before = {player: copies(gan.players.parameters(player)) for player in ("generator", "discriminator")}
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    for player, weights in before.items():
        pairs = zip(weights, gan.players.parameters(player), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs), f"{player}: a weight never moved"
    written = AutoModelForCausalLM.from_pretrained(gan.players.base.path)
    assert differences(dict(written.state_dict()), base_weights(gan)) == []
    folder = gan.save_checkpoint()

    prompts, answers = gan.players.encoder.pairs(list(map(Row, PROMPTS)), TARGETS)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    theirs = torch.stack([logits[0] for logits in logits_alone(scorer, rows)])
    ours = torch.tensor(gan.score(PROMPTS, TARGETS))
    assert ours.std() > 1e-4 and (ours - theirs).abs().max() < 1e-5
    writer = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    for ids, theirs in zip(prompts, logits_alone(writer, prompts), strict=True):
        row = torch.tensor([ids])
        with torch.no_grad(), gan.players.use_adapter("generator"):
            ours = logits(gan, row)[0]
        assert (ours - theirs).abs().max() < 1e-5
    assert same_logits(writer, written) > 1e-3, "training moved nothing: this would show nothing"

    expected = gan.step(PROMPTS[:2], TARGETS[:2])
    resumed = LoraGAN.from_checkpoint(tmp_path / "run", reward=reward)
    assert differences(expected, resumed.step(PROMPTS[:2], TARGETS[:2])) == []
    for player in before:
        assert differences(player_state(gan, player), player_state(resumed, player)) == []


def test_a_folder_with_one_file_opens(file, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.move(file, tmp_path / "folder" / "small.gguf")
    base = small_gan(tmp_path / "folder").players.base
    assert base.name == str(tmp_path / "folder") and same_logits(base.model, small_model("llama")[0]) < 1e-5


def test_safetensors_beside_it_are_the_base(tmp_path, cache):
    other, tokenizer = small_model("llama", seed=1)
    other.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "folder" / "small.gguf", *small_model("llama"))
    write_gguf(tmp_path / "folder" / "small2.gguf", *small_model("llama"))
    base = small_gan(tmp_path / "folder").players.base
    assert base.path == str(tmp_path / "folder") and same_logits(base.model, other) == 0
    assert left_in(cache) == []


def test_it_is_converted_once_for_its_content(file, tmp_path, cache, monkeypatch, capfd):
    first = small_gan(file).players.base.path
    assert str(file) in capfd.readouterr().err
    real = gguf_files.convert
    monkeypatch.setattr(gguf_files, "convert", lambda *_: pytest.fail("it is converted already"))
    shutil.copy(file, tmp_path / "renamed.gguf")
    assert small_gan(file).players.base.path == small_gan(tmp_path / "renamed.gguf").players.base.path == first
    assert "Converting" not in capfd.readouterr().err
    monkeypatch.setattr(gguf_files, "convert", real)
    other, tokenizer = small_model("llama", seed=1)
    write_gguf(file, other, tokenizer)
    changed = small_gan(file).players.base
    assert changed.path != first and same_logits(changed.model, other) < 1e-5
    assert len(left_in(cache)) == 2


def test_a_tokenizer_that_is_given_replaces_the_files(file):
    tokenizer = small_model("llama")[1]
    assert small_gan(file, processing_class=tokenizer).players.base.tokenizer is tokenizer


def test_without_a_tokenizer_it_opens_with_one_that_is_given(tmp_path):
    model, tokenizer = small_model("llama")
    path = write_gguf(tmp_path / "bare.gguf", model, None)
    with pytest.warns(UserWarning, match="cannot read the tokenizer of .*bare.gguf.*processing_class"):
        refused("no tokenizer.*processing_class=", path)
    assert same_logits(small_gan(path, processing_class=tokenizer).players.base.model, model) < 1e-5


# --- what transformers leaves unread ----------------------------------------------------------------------------------


def test_a_token_that_ends_a_turn_ends_a_text_too(tmp_path):
    path = write_gguf(tmp_path / "small.gguf", *small_model("llama"), tokenizer__ggml__eot_token_id=3)
    assert small_gan(path).players.base.eos_ids == (0, 3)


def test_factors_of_rotary_frequencies_are_read(tmp_path):
    model, tokenizer = small_model("llama", rope_parameters=LLAMA3)
    plain = 10_000.0 ** -(np.arange(0, 8, 2) / 8)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 2 and factors.min() == 1
    path = write_gguf(tmp_path / "small.gguf", model, tokenizer, extra={"rope_freqs.weight": factors})
    gan = small_gan(path, output_dir=str(tmp_path))
    text = [" ".join(SENTENCES)]
    assert same_logits(gan.players.base.model, model, text) < 1e-5
    without = write_gguf(tmp_path / "without.gguf", model, tokenizer)
    assert same_logits(small_gan(without).players.base.model, model, text) > 1e-2, "the factors are felt"
    gan.step(PROMPTS[:2], TARGETS[:2])
    stock = AutoPeftModelForCausalLM.from_pretrained(gan.save_checkpoint() / "generator")
    with stock.disable_adapter():
        assert same_logits(stock, model, text) < 1e-5


@pytest.mark.parametrize(
    ("pre", "expected", "words"),
    [("smollm", ["ĊĊ", "1"], None), ("gpt-2", ["Ċ", "Ċ", "1"], None), ("unheard", ["Ċ", "Ċ", "1"], "'unheard'")],
)
def test_text_is_split_as_the_file_says_or_a_warning_tells(pre, expected, words, tmp_path):
    model, tokenizer = small_model("llama")
    grown = _with_merge(tokenizer, "Ċ", "Ċ")
    model.resize_token_embeddings(len(grown))
    path = write_gguf(tmp_path / "small.gguf", model, grown, pre=pre)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = small_gan(path).players.base
    said = [str(warning.message) for warning in caught if "splits text" in str(warning.message)]
    assert len(said) == (words is not None) and all(words in line and str(path) in line for line in said)
    assert base.tokenizer.tokenize("\n\n1") == expected
    assert AutoTokenizer.from_pretrained(base.path).tokenize("\n\n1") == expected


def _with_merge(tokenizer, first, second):
    """The tokenizer with one more merge, and so with one more token."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][first + second] = len(tokenizer)
    content["model"]["merges"].append([first, second])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )  # fmt: skip


def test_another_scaling_of_positions_is_told(tmp_path):
    path = write_gguf(tmp_path / "small.gguf", *small_model("qwen2"), qwen2__rope__scaling__type="yarn")
    with pytest.warns(UserWarning, match="small.gguf' scales its rotary positions .yarn."):
        small_gan(path)


# --- what does not open -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model", b"\x00" * 100])
def test_a_file_of_another_kind_is_named(content, tmp_path, cache):
    (tmp_path / "model.gguf").write_bytes(content)
    refused("model.gguf' cannot be the base: it is not a GGUF file", tmp_path / "model.gguf")
    assert left_in(cache) == []


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(share, file, cache):
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(len(content) * share))])
    refused("small.gguf' is damaged or cut off", file)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"architecture": "nosuch"}, "cannot read the GGUF file .*small.gguf.*nosuch"),
        ({"without": "blk.1.ffn_up.weight"}, r"small.gguf' does not hold all of a LlamaForCausalLM.*1\.mlp\.up_proj"),
        ({"without": "token_embd.weight"}, "small.gguf' does not hold all of a LlamaForCausalLM"),
        ({"general__type": "adapter"}, "small.gguf' cannot be the base: it is an adapter"),
        ({"split__count": 3}, "small.gguf' is one of 3 files.*--merge"),
    ],
)
def test_a_file_that_cannot_be_a_base_is_named_with_the_reason(how, words, tmp_path, cache):
    path = write_gguf(tmp_path / "small.gguf", *small_model("llama"), **how)
    refused(words, path)
    assert left_in(cache) == []


def test_a_folder_with_several_files_lists_them(file, tmp_path):
    shutil.copy(file, tmp_path / "other.gguf")
    refused("has 2 GGUF files: give one of other.gguf, small.gguf", tmp_path)


def test_a_file_called_like_a_hub_id_does_not_stand_in_its_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").write_text("notes")
    refused("'gpt2' is neither a folder here nor in the hub's cache", "gpt2")
    write_gguf(tmp_path / "gpt2", *small_model("llama"))
    assert small_gan("gpt2").players.base.model.config.model_type == "llama"


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("'nowhere.gguf' cannot be opened: there is no such GGUF file", "nowhere.gguf")


def test_without_the_package_the_error_names_the_command(file, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    refused(r"pip install 'lora-gan\[gguf\]'", file)


def test_what_breaks_off_leaves_nothing(file, cache, monkeypatch):
    def broken(self, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(small_model("llama")[0]), "save_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        small_gan(file)
    assert left_in(cache) == []


# --- checkpoints and the command line ---------------------------------------------------------------------------------


def test_where_the_cache_was_emptied_a_checkpoint_asks_for_the_file(file, tmp_path, cache):
    gan = small_gan(file, output_dir=str(tmp_path / "run"))
    gan.step(PROMPTS[:2], TARGETS[:2])
    gan.save_checkpoint()
    again = LoraGAN.from_checkpoint(tmp_path / "run", reward=reward)
    assert again.players.base.name == str(file), "later checkpoints name the file too"
    again.save_checkpoint(step=2)
    shutil.rmtree(cache)
    with pytest.raises(ValueError, match=r"small.gguf.*model='FILE.gguf'") as caught:
        LoraGAN.from_checkpoint(tmp_path / "run", reward=reward)
    assert "\n" not in str(caught.value)
    given = LoraGAN.from_checkpoint(tmp_path / "run" / "step-1", model=file, reward=reward)
    assert differences(gan.step(PROMPTS[:2], TARGETS[:2]), given.step(PROMPTS[:2], TARGETS[:2])) == []


def test_the_command_line_takes_a_file(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,target\n" + "".join(f"number {i},{i}\n" for i in range(6)))
    small = ["--num_generations", "2", "--max_completion_length", "4", "--max_steps", "2", "--prompts_per_step", "2"]
    line = [
        "train",
        "--model",
        "small.gguf",
        "--data",
        "pairs.csv",
        "--reward",
        "length",
        "--output_dir",
        "run",
        *small,
    ]
    assert cli.main(line) == 0
    assert yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())["model"] == str(file)
    capsys.readouterr()
    assert cli.main(["generate", "--checkpoint", "run", "--prompt", "number 3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out
    (tmp_path / "bad.gguf").write_text("x")
    assert cli.main(["train", "--model", "bad.gguf", *line[3 : -len(small)], "--output_dir", "other"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("lora-gan: ") and "bad.gguf" in said and "not a GGUF file" in said
