"""Export on every habit of padding: what stock transformers and PEFT open gives our numbers, to 1e-5.

A pad token decides what a stock classifier reads, and where its id has no row in the embedding stock opens nothing. The
bases are small and random, from folders as a user's would be; adapters and heads are random too, without any training.
Oracle: gan.score, and the generator's logits in memory.
"""

import importlib
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import SENTENCES, copies, random_model, reward, small_gan
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from test_bases import model_of
from test_export import generator_logits, near, stock_scores
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from lora_gan import LoraGAN, tiny
from lora_gan.export.exporting import PARTS, scoring_tokenizer

export_module = importlib.import_module("lora_gan.export.exporting")
BASES = ["llama", "gpt2", "llama-tied", "qwen2", "mistral", "gemma2", "opt", "phi3"]
PROMPTS = ["The cat sat on", "Hello", "A cheap pub by the river"]
ANSWERS = ["the mat", "", "serves French food, and more of it than the others do"]
SPECIAL = {  # what tokenizers have beside words
    "gpt-2": ["<|endoftext|>"],
    "llama-2": ["<unk>", "<s>", "</s>"],
    "llama-3": ["<s>", "</s>", "<|eot|>", "<|reserved_0|>", "<|right_pad_id|>"],
}
# Tokenizer; its pad token; the config's pad token; spare rows; the token that the exported classifier pads with.
CASES = {
    "no pad, a first token": ("llama-2", None, None, 0, "<s>"),
    "no pad, reserved tokens": ("llama-3", None, None, 0, "<|right_pad_id|>"),
    "no pad, one special token": ("gpt-2", None, None, 0, "<|pad|>"),
    "no pad, spare rows": ("llama-2", None, None, 3, "<|pad|>"),
    "pad outside the embedding": ("llama-2", "<pad>", None, 0, "<s>"),
    "pad outside, one special token": ("gpt-2", "[PAD]", None, 0, "<|pad|>"),
    "pad in a spare row": ("llama-2", "<pad>", None, 3, "<pad>"),
    "pad = eos": ("llama-2", "</s>", "</s>", 0, "</s>"),
    "pad = eos in the tokenizer": ("gpt-2", "<|endoftext|>", None, 0, "<|pad|>"),
    "pad = unk": ("llama-2", "<unk>", "<unk>", 0, "<unk>"),
    "pad = unk in the tokenizer": ("llama-2", "<unk>", None, 2, "<|pad|>"),
    "pad = a word in the config": ("llama-2", None, "e", 0, "<s>"),
}
QUICK = {(base, "no pad, a first token") for base in BASES} | {("llama", case) for case in CASES} | {
    ("gemma2", "no pad, one special token"), ("opt", "no pad, one special token"), ("opt", "pad = eos"),
    ("gpt2", "pad outside, one special token"), ("phi3", "no pad, spare rows"), ("qwen2", "pad outside the embedding"),
    ("mistral", "pad = unk"), ("llama-tied", "no pad, one special token"),
}  # fmt: skip


def tokenizer_of(kind: str, pad: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with these special tokens; a pad token that is none of them is added to the tokenizer alone."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL[kind], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    roles = {"eos_token": "<|endoftext|>" if kind == "gpt-2" else "</s>"}
    if kind != "gpt-2":
        roles |= {"bos_token": "<s>"} | ({"unk_token": "<unk>"} if kind == "llama-2" else {})
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def folder_of(folder, base: str, case: str):
    kind, pad, pad_on_disk, spare, _ = CASES[case]
    words = tokenizer_of(kind, None)
    pad_id = None if pad_on_disk is None else words.convert_tokens_to_ids(pad_on_disk)
    model = model_of(base, len(words) + spare, pad_id, eos_token_id=words.eos_token_id)
    model.generation_config.eos_token_id = words.eos_token_id
    model.save_pretrained(folder)
    tokenizer_of(kind, pad).save_pretrained(folder)
    return folder


def stirred(gan: LoraGAN) -> LoraGAN:
    """Adapters and heads with random numbers in them, as training leaves some."""
    with torch.no_grad():
        for player in ("generator", "discriminator"):
            for parameter in gan.players.parameters(player):
                parameter.normal_(std=0.1)
    return gan


def run_card(folder, part: str) -> dict:
    names: dict = {}
    text = (folder / part / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    return names


@pytest.mark.parametrize(
    ("base", "case"),
    [
        pytest.param(base, case, marks=[] if (base, case) in QUICK else pytest.mark.slow, id=f"{base}: {case}")
        for base in BASES
        for case in CASES
    ],
)
def test_stock_clients_open_every_part_and_say_what_we_say(base, case, tmp_path, monkeypatch):
    gan = stirred(small_gan(folder_of(tmp_path / "base", base, case)))
    before = copies(gan.players.lm.state_dict().values())
    words = gan.players.base.tokenizer
    out = gan.export(tmp_path / "out")
    assert all(map(torch.equal, before, gan.players.lm.state_dict().values())), "the base in memory is as it was"

    ours = torch.tensor(gan.score(PROMPTS, ANSWERS))
    assert ours.std() > 1e-2, "a discriminator that says the same of everything shows nothing"
    for part in ("discriminator", "discriminator-merged"):
        client = (
            AutoPeftModelForSequenceClassification if part == "discriminator" else AutoModelForSequenceClassification
        )
        stock, padder = client.from_pretrained(out / part, num_labels=1), AutoTokenizer.from_pretrained(out / part)
        if part == "discriminator":
            stock.config.pad_token_id = padder.pad_token_id
        # The tokenizer class of Qwen2 brings this pad token, which then has the spare row.
        its_own = base == "qwen2" and words.pad_token == "<|endoftext|>" != words.eos_token
        assert padder.pad_token == ("<|endoftext|>" if its_own else CASES[case][-1])
        assert stock.config.pad_token_id == padder.pad_token_id
        for text in (*SENTENCES, *ANSWERS):
            assert padder(text)["input_ids"] == words(text)["input_ids"], "another pad token, but the same words"
        end = gan.players.base.eos_ids[0]
        assert (ours - stock_scores(stock, padder, end, PROMPTS, ANSWERS)).abs().max() < 1e-5
        for score, pair in zip(ours, zip(PROMPTS, ANSWERS, strict=True), strict=True):
            assert abs(score - stock_scores(stock, padder, end, pair[:1], pair[1:])[0]) < 1e-5
    for part in ("generator", "generator-merged"):
        client = AutoPeftModelForCausalLM if part == "generator" else AutoModelForCausalLM
        stock, tokenizer = client.from_pretrained(out / part).eval(), AutoTokenizer.from_pretrained(out / part)
        assert len(tokenizer) <= stock.get_input_embeddings().num_embeddings == gan.players.lm.config.vocab_size
        for prompt, logits in zip(PROMPTS, generator_logits(gan, PROMPTS), strict=True):
            with torch.no_grad():
                assert near(stock(**tokenizer(prompt, return_tensors="pt")).logits[0], logits)

    monkeypatch.chdir(tmp_path / "out")
    for part in PARTS:
        names = run_card(out, part)
        if part.startswith("discriminator"):
            assert (ours - torch.tensor(names["score"](PROMPTS, ANSWERS))).abs().max() < 1e-5


def test_a_llama_without_any_pad_token_is_exported(tmp_path):
    """A model in memory has no base to name for the adapters: the merged parts stand alone."""
    tok = AutoTokenizer.from_pretrained(tiny.PATH)
    tok.pad_token = None
    gan = stirred(LoraGAN(random_model("llama", len(tok), tok.eos_token_id, None), processing_class=tok, reward=reward))
    out = gan.export(tmp_path / "exported")
    stock = AutoModelForSequenceClassification.from_pretrained(out / "discriminator-merged")
    padder = AutoTokenizer.from_pretrained(out / "discriminator-merged")
    ours = torch.tensor(gan.score(PROMPTS, ANSWERS))
    assert ours.std() > 1e-2
    assert (ours - stock_scores(stock, padder, tok.eos_token_id, PROMPTS, ANSWERS)).abs().max() < 1e-5
    assert stock.get_input_embeddings().num_embeddings == len(tok), "<pad> was no pad token, but it has a row"


@pytest.mark.parametrize("pad_id", [-1, 290, 100_000])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_pad_id_in_the_config_that_has_no_row_is_none(base, pad_id, tmp_path):
    """Set by hand when a pad token was added to the tokenizer; -1 is what the first Llamas had."""
    words = tokenizer_of("llama-2", None)
    assert len(words) == 290
    model = model_of(base, len(words), None, eos_token_id=words.eos_token_id)
    model.config.pad_token_id = model.generation_config.pad_token_id = pad_id
    gan = stirred(small_gan(model, processing_class=words))
    gan.step(PROMPTS[:2])
    out = gan.export(tmp_path / "out", parts=("generator-merged", "discriminator-merged"))
    stock = AutoModelForSequenceClassification.from_pretrained(out / "discriminator-merged")
    padder = AutoTokenizer.from_pretrained(out / "discriminator-merged")
    assert padder.pad_token == "<s>"
    ours = torch.tensor(gan.score(PROMPTS, ANSWERS))
    assert (ours - stock_scores(stock, padder, words.eos_token_id, PROMPTS, ANSWERS)).abs().max() < 1e-5
    stock = AutoModelForCausalLM.from_pretrained(out / "generator-merged").eval()
    assert stock.config.pad_token_id is None and stock.generation_config.pad_token_id is None
    for prompt, logits in zip(PROMPTS, generator_logits(gan, PROMPTS), strict=True):
        with torch.no_grad():
            assert near(stock(**words(prompt, return_tensors="pt")).logits[0], logits)
    assert model.config.pad_token_id == pad_id, "the config in memory is as it was"


def test_the_card_says_how_a_base_loaded_by_hand_gets_the_row_of_a_new_pad_token(tmp_path):
    folder = folder_of(tmp_path / "base", "llama", "no pad, one special token")
    gan = stirred(small_gan(folder))
    out = gan.export(tmp_path / "out")
    padder = AutoTokenizer.from_pretrained(out / "discriminator")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert padder.pad_token_id == base.get_input_embeddings().num_embeddings
    assert "base.resize_token_embeddings(len(tokenizer))" in (out / "discriminator" / "README.md").read_text()
    base.resize_token_embeddings(len(padder))
    stock = PeftModel.from_pretrained(base, out / "discriminator")
    stock.config.pad_token_id = padder.pad_token_id
    ours = torch.tensor(gan.score(PROMPTS, ANSWERS))
    assert (ours - stock_scores(stock, padder, gan.players.base.eos_ids[0], PROMPTS, ANSWERS)).abs().max() < 1e-5
    folder = folder_of(tmp_path / "other", "llama", "no pad, a first token")
    out = small_gan(folder).export(tmp_path / "fits", parts=("generator", "discriminator"))
    for part in ("generator", "discriminator"):
        assert "resize_token_embeddings" not in (out / part / "README.md").read_text()


def test_which_special_token_closes_no_text():
    words = tokenizer_of("llama-3", None)
    words.chat_template = "{{ messages }}<|right_pad_id|>"
    base = SimpleNamespace(
        tokenizer=words, model=model_of("llama", len(words), None), pad_on_disk=None, eos_ids=(1, 2)
    )  # fmt: skip
    assert scoring_tokenizer(base).pad_token == "<|right_pad_id|>", "called a pad"
    base.eos_ids = (1, 2, 4)
    assert scoring_tokenizer(base).pad_token == "<|reserved_0|>"
    base.eos_ids = (1, 2, 3, 4)
    assert scoring_tokenizer(base).pad_token == "<s>", "the last choice"
    assert words.pad_token is None


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("error", "kind"), [(OSError("disk full"), OSError), (AssertionError("Padding_idx"), ValueError)]
)
def test_an_export_that_fails_names_the_part_and_leaves_nothing(part, error, kind, tmp_path, monkeypatch):
    written = export_module._write

    def broken(players, name, *rest):
        if name == part:
            raise error
        return written(players, name, *rest)

    monkeypatch.setattr(export_module, "_write", broken)
    with pytest.raises(kind, match=f"the part '{part}' could not be exported: {error}"):
        small_gan().export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_stays_what_it_is_and_names_the_part(tmp_path, monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(export_module, "_classifier", broken)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        small_gan().export(tmp_path / "out")
    assert caught.value.__notes__ == ["while the part 'discriminator-merged' was exported"]
    assert not list(tmp_path.iterdir())
