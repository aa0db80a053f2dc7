"""What a base must hold when it is opened: whole finite weights, a vocabulary that fits, a known context.

Each fault is one line that names what is wrong. Oracles: numbers that overflow by arithmetic; tokenizers made here,
whose tokens are known one by one; checkpoints that load bitwise equal.
"""

import copy
import inspect
import json
import os

import pytest
import torch
from helpers import (
    PROMPTS,
    TARGETS,
    byte_tokenizer,
    differences,
    player_state,
    random_model,
    small_gan,
    word_tokenizer,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_bases import COMMON, GROUPED
from tokenizers import processors
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from lora_gan import tiny
from lora_gan.context import CONTEXT_NAMES, UNLIMITED, context_of
from lora_gan.storage import durable

WORDS = byte_tokenizer("llama", "own")


def small(architecture="llama", vocabulary=None, **changes):
    return random_model(architecture, vocabulary or len(WORDS), WORDS.eos_token_id, WORDS.pad_token_id, **changes)


def refused(words, model, **settings):
    settings.setdefault("processing_class", WORDS)
    with pytest.raises(ValueError, match=words) as caught:
        small_gan(model, **settings)
    assert "\n" not in str(caught.value), "one line"


def on_disk(folder, model=None, tokenizer=WORDS, **config):
    """A base's folder, with entries of its config.json changed."""
    (model or small()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    there = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(there | config))
    return folder


# --- numbers ----------------------------------------------------------------------------------------------------------


def scaled(by, name="mlp.down_proj", dtype=torch.float32):
    model = small()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter.mul_(by)
    return model.to(dtype)


def test_a_llama_that_overflows_in_half_precision_says_so(tmp_path):
    tok = AutoTokenizer.from_pretrained(tiny.PATH)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, pad_token_id=None, eos_token_id=tok.eos_token_id,
    ))  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(3e7)
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    words = "in float16: .* in 2 of its 21 tensors, first in .*0.mlp.down_proj.weight.*'bfloat16' or.*32'"
    refused(words, tmp_path, processing_class=None, dtype="float16")
    refused(words, copy.deepcopy(model).half(), processing_class=tok)
    small_gan(tmp_path, dtype="bfloat16")
    small_gan(tmp_path, dtype="float32")


def test_weights_that_fit_and_products_that_do_not():
    model = scaled(1e4, dtype=torch.float16)
    assert all(parameter.isfinite().all() for parameter in model.parameters()), "the weights themselves fit"
    refused("in float16: its logits are not finite on a few tokens, and its weights are.*dtype='bfloat16' or", model)
    assert small_gan(scaled(1e4), processing_class=WORDS).generate(PROMPTS)


@pytest.mark.parametrize(("dtype", "remedy"), [("bfloat16", "dtype='float32'"), ("float32", "the file is damaged")])
def test_wider_types_overflow_too(dtype, remedy):
    model = scaled(1e30, name="proj", dtype=getattr(torch, dtype))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    refused(f"in {dtype}: its logits are not finite on a few tokens, and its weights are.*{remedy}", model)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_damaged_weight_is_named(dtype, tmp_path):
    model = small().to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    refused("NaN or infinite numbers are in 1 of .*, first in .*layers.1.self_attn.q_proj.weight.*damaged", model)
    model.save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    refused("first in .*q_proj.weight.*damaged", tmp_path, processing_class=None, dtype=dtype)
    if dtype != "float16":
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[0, 0] = -torch.inf
        refused("first in .*q_proj.weight.*damaged", model)


def test_a_base_that_forbids_tokens_is_no_overflow():
    """Its own signature stays, which says what it takes."""
    model = small()
    forward = type(model).forward

    class Forbidding(type(model)):
        def forward(self, *arguments, **options):
            output = forward(self, *arguments, **options)
            output.logits[..., 7] = -torch.inf
            return output

    model.__class__ = Forbidding
    Forbidding.forward.__signature__ = inspect.signature(forward)
    small_gan(model, processing_class=WORDS)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def with_added(*tokens, tokenizer=WORDS, **roles):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    larger.add_special_tokens(roles)
    return larger


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name(tmp_path):
    model = small(vocabulary=280)
    refused(
        r"the tokenizer does not fit LlamaForCausalLM: its ids go up to 299 \(300 in all\), the base's embedding has "
        r"280 rows, and '.+' \(id 280, it is a word of the vocabulary\) has none \(20 such tokens\).*"
        r"resize_token_embeddings\(300\).*tokenizer that belongs to the base",
        model,
    )
    refused(f"of {str(tmp_path)!r}: its ids", on_disk(tmp_path, model), processing_class=None)
    model.resize_token_embeddings(300, mean_resizing=False)
    small_gan(model, processing_class=WORDS).step(PROMPTS)


NEEDED = {
    "an added word": (with_added("tree"), "'tree' \\(id 300, it was added as a word"),
    "the second of two words": (with_added("tree", "house"), "'tree'.*2 such tokens"),
    "the end of texts": (with_added(eos_token="<end>"), "'<end>' \\(id 300, it is the eos_token"),
    "the begin of texts": (with_added(bos_token="<begin>"), "'<begin>' \\(id 300, it is the bos_token"),
    "the unknown word": (with_added(unk_token="<?>"), r"'<\?>' \(id 300, it is the unk_token"),
}


def templated(template, **roles):
    tokenizer = with_added(**roles)
    tokenizer.chat_template = template
    return tokenizer


NEEDED |= {
    "a token of the chat template": (
        templated("{{ '<|user|>' + messages[0]['content'] }}", additional_special_tokens=["<|user|>"]),
        r"'<\|user\|>' \(id 300, the chat template writes it",
    ),
    "a role of the chat template": (
        templated("{{ messages[0]['content'] + sep_token }}", sep_token="<sep>"), "'<sep>' .*chat template writes it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NEEDED)
def test_a_token_that_texts_are_made_of_must_have_a_row(case):
    tokenizer, words = NEEDED[case]
    refused(f"embedding has 300 rows, and {words}", small(), processing_class=tokenizer)


def test_a_token_that_the_tokenizer_writes_around_texts_must_have_a_row():
    tokenizer = with_added(cls_token="<cls>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A", special_tokens=[("<cls>", 300)]
    )
    refused("'<cls>' .*writes it around texts", small(), processing_class=tokenizer)


@pytest.mark.parametrize("eos_id", [300, 5000, -1])
def test_an_end_that_has_no_row_is_never_sampled_and_does_no_harm(eos_id):
    model = small()
    model.generation_config.eos_token_id = [WORDS.eos_token_id, eos_id]
    gan = small_gan(model, processing_class=WORDS)
    assert gan.players.base.eos_ids == (WORDS.eos_token_id,)
    gan.step(PROMPTS[:2])
    alone = copy.deepcopy(WORDS)
    alone.eos_token = None
    model = changed(eos_token_id=[eos_id])
    model.config.eos_token_id = None
    refused(
        rf"no end-of-text token with a row in its embedding \(it names \[{eos_id}\]\)", model, processing_class=alone
    )


@pytest.mark.parametrize(
    "roles",
    [
        {"pad_token": "[PAD]"},
        {"pad_token": "<more>", "mask_token": "<mask>"},
        {"additional_special_tokens": ["<x>", "<y>"]},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_special_tokens_that_no_text_needs_may_lack_a_row(roles, architecture, tmp_path):
    """A pad token that was added to the tokenizer alone, most often; a text that holds its words is text."""
    words = byte_tokenizer(architecture, "none")
    model = random_model(architecture, len(words), words.eos_token_id, None)
    larger = with_added(tokenizer=words, **roles)
    before = larger.backend_tokenizer.to_str()
    gan, plain = (small_gan(copy.deepcopy(model), processing_class=tok) for tok in (larger, words))
    prompts = [*PROMPTS[:2], "a [PAD] and a <mask>, <x>"]
    assert gan._encode(prompts) == plain._encode(prompts), "as if the tokens were not there"
    assert max(map(max, gan._encode(prompts))) < len(words)
    assert differences(gan.step(prompts), plain.step(prompts)) == []
    assert gan.score("a", "[PAD]<x>") == plain.score("a", "[PAD]<x>")
    assert larger.backend_tokenizer.to_str() == before and len(larger) > len(words), "the one given is as it was"
    gan.players.base.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(words) and again(prompts)["input_ids"] == words(prompts)["input_ids"]


def test_a_tokenizer_that_fits_is_used_itself():
    for pad in ("own", "eos", "none"):
        words = byte_tokenizer("llama", pad)
        assert small_gan(small(), processing_class=words).players.base.tokenizer is words


@pytest.mark.parametrize("multiple", [64, 128])
def test_an_embedding_with_more_rows_than_tokens(multiple):
    """Rows are padded to a multiple; sampling may draw one of them, which is no text and no error."""
    rows = -(-len(WORDS) // multiple) * multiple + multiple
    gan = small_gan(small(vocabulary=rows), processing_class=WORDS, num_generations=8, max_completion_length=12)
    out = gan.step(PROMPTS[:2], TARGETS[:2])
    sampled = gan._sample(gan._encode(PROMPTS), gan._uniforms(gan._encode(PROMPTS), 8, "sample"))
    ids = sampled.responses
    assert any(id >= len(WORDS) for row in ids for id in row), "no such row was drawn: this would show nothing"
    for row, text in zip(ids, sampled.texts, strict=True):
        known = [id for id in row if id < len(WORDS)]
        assert text == WORDS.decode(
            [id for id in known if id not in gan.players.base.eos_ids], skip_special_tokens=True
        )
    assert all(isinstance(text, str) for texts in out["responses"] for text in texts)


def test_a_slow_tokenizer_that_fails_on_unknown_ids():
    """ByT5's decoder is Python, and raises on an id that it does not know."""
    words = ByT5Tokenizer(eos_token="</s>")
    with pytest.raises(ValueError):
        words.decode([900])
    gan = small_gan(random_model("llama", 1024, words.eos_token_id, None), processing_class=words, num_generations=8)
    gan.step(PROMPTS[:2])
    assert gan.players.encoder.decode([100, 900, 101]) == "ab"
    assert len(gan.generate(PROMPTS, best_of=2)) == 4


# --- what else is opened ----------------------------------------------------------------------------------------------


def changed(**attributes):
    model = small()
    for name, value in attributes.items():
        setattr(model.generation_config, name, value)
    return model


def half_in_one_type():
    model = small().bfloat16()
    model.lm_head.float()
    return model


def on_meta():
    with torch.device("meta"):
        return LlamaForCausalLM(small().config)


IN_MEMORY = {
    "meta": (on_meta, "has no weights: model.embed_tokens.weight is on the meta device"),
    "float64": (lambda: small().double(), r"is in float64.*model.to\(torch.float32\)"),
    "two dtypes": (half_in_one_type, "its forward fails on a few tokens.*of one dtype"),
    "no head": (lambda: LlamaModel(small().config), "LlamaModel cannot be the base.*AutoModelForCausalLM"),
    "another head": (
        lambda: LlamaForSequenceClassification(small().config), "LlamaForSequenceClassification cannot be.*no head",
    ),
    "adapters": (lambda: get_peft_model(small(), LoraConfig(target_modules=["q_proj"])), "PeftModel.*without adapters"),
    "a prompt that was tuned": (
        lambda: get_peft_model(small(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "PeftModelForCausalLM.*without adapters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IN_MEMORY)
def test_what_a_model_in_memory_lacks_is_named(case):
    make, words = IN_MEMORY[case]
    refused(words, make())


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("gpt2", "is a str: it must be a transformers tokenizer$"), (WORDS.backend_tokenizer, "is a Tokenizer: it must")],
)
def test_what_is_no_tokenizer(tokenizer, words):
    refused(words, small(), processing_class=tokenizer)


def test_a_processor_says_where_its_tokenizer_is():
    class Processor:
        tokenizer = WORDS

    refused("is a Processor.*give its .tokenizer", small(), processing_class=Processor())


ON_DISK = {
    "another vocabulary": (
        {"vocab_size": 200}, r"lm_head.weight is \(300, 32\) in the file and \(200, 32\) by the config \(2 tensors",
    ),
    "another width": ({"hidden_size": 48}, r"do not fit its config.json: .*\(21 tensors differ\)"),
    "a pad id without a row": ({"pad_token_id": 300}, "could not be opened: AssertionError: Padding_idx must"),
    "no such rope": ({"rope_scaling": {"rope_type": "foo"}}, "could not be opened: KeyError: 'foo'"),
    "no context": ({"max_position_embeddings": None}, "could not be opened: .*'max_position_embeddings' expected int"),
    "no such dtype": ({"dtype": "float99"}, "could not be opened: AttributeError: .*float99"),
    "no such layers": ({"layer_types": ["foo", "bar"]}, "could not be opened: .*layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("case", ON_DISK)
def test_a_config_that_does_not_fit_is_one_line(case, tmp_path):
    config, words = ON_DISK[case]
    refused(words, on_disk(tmp_path, **config), processing_class=None)


def test_a_tokenizer_without_its_vocabulary(tmp_path):
    folder = on_disk(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    refused("knows no words.*files of its vocabulary are missing", folder, processing_class=None)


def test_sentence_transformers_folders(tmp_path):
    (tmp_path / "a" / "0_Transformer").mkdir(parents=True)
    (tmp_path / "a" / "modules.json").write_text("[]")
    on_disk(tmp_path / "a" / "0_Transformer")
    refused("is a sentence-transformers model", tmp_path / "a", processing_class=None)
    small_gan(tmp_path / "a" / "0_Transformer")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    folder = on_disk(tmp_path / "b", BertModel(BertConfig(vocab_size=300, **sizes)))
    (folder / "modules.json").write_text("[]")
    refused("does not hold all of a BertLMHeadModel", folder, processing_class=None)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
OPENS = {
    "no end in the generation config": lambda: changed(eos_token_id=None),
    "a pad of its own in the generation config": lambda: changed(pad_token_id=5),
    "yarn": lambda: small(rope_scaling=YARN),
    "yarn as it was written once": lambda: small(rope_scaling={"type": "yarn", "factor": 4.0}),
    "linear": lambda: small(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "no window": lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mistral", **COMMON, **GROUPED, vocab_size=300, eos_token_id=0, sliding_window=None)
    ),
}


@pytest.mark.parametrize("case", OPENS)
def test_odd_bases_that_open_and_train(case, tmp_path):
    torch.manual_seed(0)
    gan = small_gan(OPENS[case](), processing_class=WORDS)
    before = player_state(gan, "generator")
    gan.step(PROMPTS[:2], TARGETS[:2])
    assert differences(before["parameters"], player_state(gan, "generator")["parameters"]) != []


def test_a_head_of_its_own_under_a_config_that_ties_it(tmp_path):
    """Some files hold both matrices beside tie_word_embeddings=True; both are used, and both are exported."""
    folder = on_disk(tmp_path / "base", small(tie_word_embeddings=False), tie_word_embeddings=True)
    gan = small_gan(folder)
    ids = torch.tensor([gan._encode(PROMPTS[:1])[0]])
    gan.export(tmp_path / "out", parts=("generator-merged",))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "generator-merged").eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, base(ids).logits, atol=1e-5)


# --- context ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTEXT_NAMES)
def test_every_name_of_the_context_is_read(name):
    class Settings:
        max_position_embeddings = None

    setattr(Settings, name, 77)
    assert context_of(Settings()) == 77


@pytest.mark.parametrize(
    ("kind", "settings", "context"),
    [
        ("mpt", {"max_seq_len": 48}, 48), ("gpt2", {"n_positions": 48}, 48), ("ctrl", {"n_positions": 48}, 48),
        ("llama", {"max_position_embeddings": 48}, 48), ("dbrx", {"max_seq_len": 48}, 48), ("bloom", {}, UNLIMITED),
        ("bloom", {"seq_length": 48}, 48), ("gpt_neox", {}, 2048),
    ],
)  # fmt: skip
def test_the_context_of_transformers_own_configs(kind, settings, context):
    assert context_of(AutoConfig.for_model(kind, **settings).get_text_config()) == context


def test_values_that_are_no_context_are_passed_over():
    class Settings:
        max_position_embeddings, n_positions, max_seq_len, seq_length = -1, 10**30, True, 512

    assert context_of(Settings()) == 512


ALIBI = {
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False,
        "parallel_attn": False,
    }),
}  # fmt: skip


def alibi_gan(kind, **settings):
    name, sizes = ALIBI[kind]
    config = AutoConfig.for_model(name, **sizes, vocab_size=30, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    config.initializer_range = 0.25
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return small_gan(model, processing_class=word_tokenizer("own"), **settings)


@pytest.mark.parametrize("kind", ALIBI)
def test_a_base_with_another_name_or_none_for_its_context_is_saved_and_loaded(kind, tmp_path):
    through, halves, resumed = (alibi_gan(kind) for _ in range(3))
    assert through.players.base.context == {"mpt": 64, "bloom": UNLIMITED, "falcon": 2048}[kind]
    prompts = ["the cat sat", "a red dog"]
    expected = [through.step(prompts, TARGETS[:2]) for _ in range(2)][1]
    halves.step(prompts, TARGETS[:2])
    halves.save_checkpoint(ckpt_dir=tmp_path)
    resumed.load_checkpoint(ckpt_dir=tmp_path)
    assert differences(expected, resumed.step(prompts, TARGETS[:2])) == []
    for player in ("generator", "discriminator"):
        assert differences(player_state(through, player), player_state(resumed, player)) == []


def test_a_prompt_longer_than_the_context_of_mpt_is_refused():
    gan = alibi_gan("mpt")
    gan.generate("the " * 58)
    with pytest.raises(ValueError, match="do not fit into this base's 64 tokens"):
        gan.generate("the " * 59)


@pytest.mark.parametrize("kind", ["mpt", "bloom"])
def test_a_large_file_of_a_hostile_checkpoint_is_refused_before_it_is_read(kind, tmp_path):
    """A file with holes takes no room on the disk, and would take all memory to read."""
    gan = alibi_gan(kind)
    gan.step(["the cat sat"])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    file = folder / "discriminator" / "state.safetensors"
    os.truncate(file, 2**40)
    manifest = json.loads((folder / durable.MANIFEST).read_text())
    manifest["files"]["discriminator/state.safetensors"]["size"] = 2**40
    (folder / durable.MANIFEST).write_text(json.dumps(manifest))
    before = player_state(gan, "discriminator")
    for load in (lambda: gan.load_checkpoint(gan.global_step, tmp_path), lambda: gan.load_discriminator(folder)):
        with pytest.raises(ValueError, match="state.safetensors has 1,099,511,627,776 bytes, but at most"):
            load()
    assert differences(before, player_state(gan, "discriminator")) == []


def test_a_file_is_read_by_its_own_size(tmp_path):
    """A manifest that promises more than memory holds asks for none of it."""
    (tmp_path / "small").write_bytes(b"abc")
    assert durable.Folder(tmp_path, manifest=False).read("small", limit=2**62) == b"abc"
    folder = small_gan().save_checkpoint(ckpt_dir=tmp_path / "run")
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["generator/optimizer.pt"]["size"] = 2**62
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no complete checkpoint.*manifest says"):
        small_gan().load_checkpoint(ckpt_dir=tmp_path / "run")
