"""Any base: the same promises on every architecture, over tiny random models made here.

Oracles: stock PEFT and transformers on the saved folders; an uncached, unbatched decode (test_sampling.py);
a run that was never interrupted for resuming; bitwise copies for the base.
"""

import functools
import warnings

import pytest
import torch
import transformers
from helpers import (
    EOS,
    OTHER_EOS,
    PAD,
    TARGETS,
    byte_tokenizer,
    copies,
    differences,
    logits,
    player_state,
    prompt_logits,
    response_ids,
    reward,
    small_gan,
    word_tokenizer,
)
from helpers import _folders as folders
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from test_sampling import MANY, draw, reference_decode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lora_gan import LoraGAN
from lora_gan.data import Row
from lora_gan.model import sampling

WINDOW = 7  # tokens; shorter than most of MANY's prompts, and than every prompt with its response

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "bos_token_id": None, "initializer_range": 0.25,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
OPT = {"ffn_dim": 48, "init_std": 0.25}
FALCON = {"ffn_hidden_size": 48}

# Name: transformers' model type, and what differs from COMMON.
BASES = {
    "gpt2": ("gpt2", {}),  # learned positions, Conv1D, fused qkv, tied
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-window": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", GROUPED | GEMMA),
    "gemma3": ("gemma3_text", GROUPED | GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", GROUPED | {"sliding_window": WINDOW}),  # fused qkv, fused gate and up
    "opt": ("opt", OPT),  # learned positions, tied
    "opt-projected": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", {}),  # parallel attention, fused qkv, untied, part of each head rotated
    "falcon": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon-new": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("falcon", FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),  # alibi, fused qkv, a norm after the embeddings
}

OTHERS = {  # not asked for by name, but at hand: experts, whose adapters PEFT makes of fused weights; other attention
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
        },
    ),
    "gpt_oss": ("gpt_oss", GROUPED | {"num_local_experts": 4, "sliding_window": WINDOW, "head_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 96}),
    "granite": ("granite", GROUPED),
    "ctrl": ("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "dff": 48}),
}  # fmt: skip

DELTA = {  # Qwen's gated delta rule beside attention
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
VISION_35 = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "patch_size": 14,
    "num_position_embeddings": 16,
}  # fmt: skip

HYBRIDS = {  # with a recurrent or convolution state; their matrix is test_hybrid_bases.py
    "qwen3_5": ("qwen3_5_text", GROUPED | DELTA),
    "qwen3_5-composite": ("qwen3_5", GROUPED | DELTA),  # its text model is the base, its vision tower is not opened
    "qwen3_next": ("qwen3_next", GROUPED | DELTA | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen4_exp": (
        "qwen4_exp_text",
        GROUPED | DELTA | EXPERTS | {
            "shared_expert_intermediate_size": 16, "hc_lowrank": 8, "ple_layer_ids": [1], "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 2, "heads_per_ngram": 2, "split_ngram_parts": 1,
            "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 12,
            "indexer_compress_ratio": 4,
        },
    ),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "falcon_h1": ("falcon_h1", GROUPED | SSM | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),  # both in each layer
    "granite-hybrid": (
        "granitemoehybrid",
        GROUPED | SSM | {
            "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "olmo_hybrid": ("olmo_hybrid", GROUPED | DELTA | {"linear_num_value_heads": 2}),
    "jamba": (
        "jamba",
        GROUPED | {
            "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4
        },
    ),
    "bamba": ("bamba", GROUPED | SSM | {"attn_layer_indices": [1]}),
    "lfm2_moe": ("lfm2_moe", GROUPED | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba": ("mamba", {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "qwen3_5_moe-composite": ("qwen3_5_moe", GROUPED | DELTA | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "kimi_linear": (
        "kimi_linear",
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "num_key_value_heads": 4,
            "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_local_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"],
        },
    ),
}  # fmt: skip

# What stock transformers lacks; the library says so at construction (tested below).
WITHOUT_CLASSIFIER = {
    "granite": "transformers has no sequence classification for the model type 'granite'",
    "ctrl": "CTRLForSequenceClassification has no score head of width 32",
}
HYBRIDS_WITHOUT_CLASSIFIER = {
    name: f"transformers has no sequence classification for the model type {HYBRIDS[name][0]!r}"
    for name in ("lfm2", "falcon_h1", "granite-hybrid", "mamba2", "olmo_hybrid", "bamba", "lfm2_moe", "mamba",
                 "falcon_mamba", "kimi_linear", "qwen3_5_moe-composite", "qwen4_exp")
}  # fmt: skip


def model_of(name: str, vocabulary: int, pad_id: int | None, seed: int = 0, **changes):
    """A random causal LM; biases and norms are moved too, where one that is lost would not show."""
    kind, own = (BASES | OTHERS | HYBRIDS)[name]
    settings = COMMON | {"vocab_size": vocabulary, "eos_token_id": 0, "pad_token_id": pad_id} | own | changes
    composite = kind in ("qwen3_5", "qwen3_5_moe")
    if composite:
        tied = {"tie_word_embeddings": settings.get("tie_word_embeddings", False)}
        config = AutoConfig.for_model(kind, text_config=settings, vision_config=VISION_35, **tied)
    else:
        config = AutoConfig.for_model(kind, **settings)
    opened = AutoModelForImageTextToText if composite else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = opened.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@functools.cache
def folder_of(name: str, pad: str = "own", kind: str = "words", **changes):
    """A base's folder, as a user's would be. Two ids end a text."""
    tokenizer = word_tokenizer(pad) if kind == "words" else byte_tokenizer(name, pad)
    pad_id = {"own": tokenizer.convert_tokens_to_ids(PAD), "eos": tokenizer.eos_token_id, "none": None}[pad]
    model = model_of(name, len(tokenizer), pad_id, **changes)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([EOS, OTHER_EOS])
    folder = folders() / "-".join(["any", name, pad, kind, *map(str, changes.values())])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gan_of(name: str, pad: str = "own", changes=None, **settings) -> LoraGAN:
    # The tokenizer as it was made: for some folders transformers takes a class of its own, which knows no words.
    tokenizer = settings.pop("processing_class", None) or word_tokenizer(pad)
    return small_gan(folder_of(name, pad, **changes or {}), processing_class=tokenizer, **settings)


def base_weights(gan):
    state = {name.replace(".base_layer", ""): tensor for name, tensor in gan.players.lm.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if "lora_" not in name}


@pytest.fixture(scope="module", params=[*BASES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def trained(request, tmp_path_factory):
    """A LoraGAN after three steps, where it was saved, and its base's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan = gan_of(request.param, learning_rate=1e-2, disc_learning_rate=1e-2)
    for _ in range(3):
        gan.step(MANY[:2])
    return gan, gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run")), request.param


def logits_alone(model, rows):
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


def right_padded(rows, pad_id):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_both_players_learn_and_the_base_stays_bitwise(trained):
    gan, _, name = trained
    alone = dict(AutoModelForCausalLM.from_pretrained(folder_of(name)).state_dict())
    assert differences(alone, base_weights(gan)) == []
    fresh = gan_of(name)
    for player in ("generator", "discriminator"):
        for before, after in zip(fresh.players.parameters(player), gan.players.parameters(player), strict=True):
            assert not torch.equal(before, after), f"{player}: a weight never moved"


def test_resuming_equals_never_having_stopped(trained, tmp_path):
    name = trained[2]
    through, halves = gan_of(name), gan_of(name)
    expected = [through.step(MANY[:2], TARGETS[:2]) for _ in range(2)][1]
    halves.step(MANY[:2], TARGETS[:2])
    halves.save_checkpoint(ckpt_dir=tmp_path)
    resumed = LoraGAN.from_checkpoint(tmp_path, reward=reward, processing_class=word_tokenizer("own"))
    assert differences(expected, resumed.step(MANY[:2], TARGETS[:2])) == []
    for player in ("generator", "discriminator"):
        assert differences(player_state(through, player), player_state(resumed, player)) == []


def test_layers_computed_again_in_the_backward_teach_the_same(trained):
    name = trained[2]
    gan, oracle = (gan_of(name, gradient_checkpointing=on, learning_rate=1e-3) for on in (True, False))
    for _ in range(2):
        found, expected = (its.step(MANY[:2], TARGETS[:2]) for its in (gan, oracle))
        for number in ("gen_grad_norm", "disc_grad_norm", "disc_loss", "kl"):
            assert found[number] == pytest.approx(expected[number], rel=1e-3, abs=1e-6), number
    assert expected["gen_grad_norm"] > 1e-3 and expected["disc_grad_norm"] > 1e-3


def test_stock_peft_opens_the_generator(trained):
    gan, folder, name = trained
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    prompts = gan._encode(MANY)
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = prompt_logits(gan, prompts)
    untrained = logits_alone(AutoModelForCausalLM.from_pretrained(folder_of(name)).eval(), prompts)
    with torch.no_grad():
        batched = stock(**right_padded(prompts, gan.players.base.pad_on_disk)).logits
    for row, (ids, theirs) in enumerate(zip(prompts, logits_alone(stock, prompts), strict=True)):
        # Padding moves a recurrence's chunks, and dividing by the length of a short vector magnifies its rounding.
        limit = 1e-5 * (float(theirs.abs().max()) if name in HYBRIDS else 1)
        assert (ours[row, -len(ids) :] - theirs).abs().max() < limit
        assert (ours[row, -len(ids) :] - batched[row, : len(ids)]).abs().max() < limit
        with torch.no_grad(), gan.players.use_adapter("generator"):
            alone = logits(gan, torch.tensor([ids]))
        assert (alone[0] - theirs).abs().max() < 1e-5
        assert (theirs - untrained[row]).abs().max() > 1e-2, "training moved nothing: this would show nothing"


def test_stock_peft_opens_the_discriminator(trained):
    gan, folder, name = trained
    without = WITHOUT_CLASSIFIER | HYBRIDS_WITHOUT_CLASSIFIER
    if name in without:
        pytest.skip(f"{name}: {without[name]}")
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    responses = ["the cat", "ran", "a big red dog", "it", "mat", "under the old tree by a new house"]
    ours = torch.tensor(gan.score(MANY, responses))
    assert ours.std() > 1e-2, "a discriminator that says the same of everything shows nothing"
    prompts, answers = gan.players.encoder.pairs(list(map(Row, MANY)), responses)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    single = torch.stack([logits[0] for logits in logits_alone(stock, rows)])
    with torch.no_grad():
        batched = stock(**right_padded(rows, gan.players.base.pad_on_disk)).logits[:, 0]
    assert (ours - single).abs().max() < 1e-5
    assert (ours - batched).abs().max() < 1e-5


def test_sampling_equals_an_uncached_unbatched_decode(trained):
    gan, folder, _ = trained
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    prompts, count, length = gan._encode(MANY), 2, 14
    uniforms = sampling.keyed_uniforms(prompts, count, length, seed=0, step=5, purpose="sample")
    ours, ties = draw(gan, MANY, count, length).responses, 0
    for row, response in enumerate(ours):
        prompt = prompts[row // count]
        expected, tie = reference_decode(stock, prompt, uniforms[row].numpy(), gan.players.base.eos_ids)
        assert (response[: len(expected)] if tie else response) == expected, f"row {row}"
        ties += tie
    lengths = list(map(len, ours))
    ends = {response[-1] for response in ours if len(response) < length}
    assert ends and ends <= set(gan.players.base.eos_ids) == {0, 3}, "either of two ids ends a text"
    assert ties <= 1 and len(set(lengths)) > 2, "rows that leave the batch at different times"
    assert max(map(len, prompts)) > WINDOW and length > WINDOW


def test_straight_through_reads_the_embeddings_that_the_ids_have(trained):
    gan, _, name = trained
    rows = draw(gan, MANY, 2)
    with torch.no_grad(), gan.players.use_adapter("discriminator"):
        batch = rows.batch()
        by_ids = gan.players.predict(batch)
        by_embeds = gan.players.predict(batch, gan.players.embed(batch.ids))
    assert by_ids.std() > 1e-2 and (by_ids - by_embeds).abs().max() < 1e-5
    through = gan_of(name, gradient_path="straight_through", reward_signal="predicted", beta=0.0)
    for _ in range(2):  # the first step moves the discriminator's heads away from zero, the second one lora_B
        through.step(MANY[:2])
    before = copies(through.players.parameters("generator"))
    through.step(MANY[:2], train_disc=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, through.players.parameters("generator"), strict=True))


# --- tied and untied heads, pad tokens, padding sides -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["eos", "none"])
@pytest.mark.parametrize("name", BASES)
def test_without_a_pad_token_of_its_own_and_with_the_head_tied_the_other_way(name, pad, tmp_path):
    tied = model_of(name, 30, 1).config.get_text_config().tie_word_embeddings
    if name == "opt-projected":
        tied = False  # a head as wide as the hidden size would not fit what comes out
    gan = gan_of(name, pad, {"tie_word_embeddings": not tied}, learning_rate=1e-2, disc_learning_rate=1e-2)
    head, table = gan.players.lm.get_output_embeddings().weight, gan.players.lm.get_input_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) is not tied
    for _ in range(3):
        gan.step(MANY[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    prompts = gan._encode(MANY)
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = prompt_logits(gan, prompts)
    for row, theirs in enumerate(logits_alone(stock, prompts)):
        assert (ours[row, -len(theirs) :] - theirs).abs().max() < 1e-5
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    answers = [response_ids(gan, "the red mat") for _ in MANY]
    theirs = torch.stack([logits[0] for logits in logits_alone(scorer, map(list.__add__, prompts, answers))])
    assert (torch.tensor(gan.score(MANY, ["the red mat"] * len(MANY))) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bloom"])
def test_the_tokenizers_padding_and_truncation_sides_change_nothing(name):
    records = []
    for side in ("left", "right"):
        tokenizer = word_tokenizer("own")
        tokenizer.padding_side = tokenizer.truncation_side = side
        gan = gan_of(name, processing_class=tokenizer)
        gan.step(MANY[:2], TARGETS[:2])
        records.append([gan.step(MANY[2:4], TARGETS[2:4]), player_state(gan, "generator"), gan.score(MANY, MANY)])
    assert differences(*records) == []


@pytest.mark.parametrize("name", BASES)
def test_with_the_tokenizer_that_transformers_opens_from_the_folder(name):
    gan = small_gan(folder_of(name, "own", "bytes"))
    before = copies(gan.players.parameters("generator"))
    out = gan.step(TARGETS[:2])
    assert len(set(out["responses"][0] + out["responses"][1])) > 4
    assert differences(before, copies(gan.players.parameters("generator"))) != []
    assert (
        gan.players.base.tokenizer("Bonjour le monde")["input_ids"]
        == byte_tokenizer(name, "own")("Bonjour le monde")["input_ids"]
    )


# --- what cannot be a base, and what stock clients cannot open --------------------------------------------------------

SMALL_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {key: COMMON[key] for key in SMALL_BERT} | GROUPED | {"vocab_size": 30, "pad_token_id": 1, "eos_token_id": 0}
VISION = SMALL_BERT | {"image_size": 28, "patch_size": 14}
CANNOT = {  # class, configuration, what the error says beside the class's name
    "encoder-decoder": ("T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "num_layers": 1}, "encoder-decoder"),
    "encoder": ("BertLMHeadModel", SMALL_BERT | {"initializer_range": 0.25}, "depend on later tokens"),
    "no cache": ("OpenAIGPTLMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 4}, "no key-value cache"),
    "positions by place": ("BartForCausalLM", {"d_model": 32, "decoder_layers": 1, "init_std": 0.25}, "padding"),
    "multimodal": ("Gemma3ForConditionalGeneration", {"text_config": TEXT, "vision_config": VISION}, "multimodal"),
    "vision": ("ViTModel", VISION, "no causal language model of its type"),
    "no head": ("LlamaModel", TEXT, "lm_head.weight is missing"),
    "another head": ("Qwen2ForSequenceClassification", TEXT | {"num_labels": 1}, "lm_head.weight is missing"),
}


@pytest.mark.parametrize("kind", CANNOT)
def test_what_cannot_be_a_base_is_refused_by_name(kind, tmp_path):
    name, settings, words = CANNOT[kind]
    architecture = getattr(transformers, name)
    model = architecture(architecture.config_class(**{"vocab_size": 30} | settings))
    model.save_pretrained(tmp_path)
    word_tokenizer("own").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){name}.*{words}|{words}.*{name}") as caught:
        small_gan(tmp_path)
    assert "\n" not in str(caught.value)
    if kind not in ("vision", "no head", "another head"):  # those are no language models in memory either
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            small_gan(model, processing_class=word_tokenizer("own"))


@pytest.mark.parametrize("name", [*WITHOUT_CLASSIFIER, "llama", "mixtral"])
def test_a_discriminator_that_stock_clients_cannot_open_is_announced(name, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gan = gan_of(name)
    said = [str(warning.message) for warning in caught if "stock transformers and PEFT cannot" in str(warning.message)]
    assert len(said) == (name in WITHOUT_CLASSIFIER)
    if said:
        assert WITHOUT_CLASSIFIER[name] in said[0] and type(gan.players.lm).__name__ in said[0]
        folder = gan.save_checkpoint(ckpt_dir=tmp_path) / "discriminator"
        with pytest.raises((ValueError, KeyError)):
            AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.parametrize("name", ["qwen2-window", "mistral", "gemma2", "gemma3", "phi3"])
def test_the_windows_of_these_bases_are_felt(name):
    """Where a window is as wide as the text the base says something else: the matrix above does go beyond it."""
    wide = {"sliding_window": 64}
    narrow, other = model_of(name, 30, 1), model_of(name, 30, 1, **wide)
    ids = torch.tensor([[5 + i % 20 for i in range(2 * WINDOW)]])
    with torch.no_grad():
        difference = (narrow(ids).logits - other(ids).logits)[0].abs().amax(-1)
    assert difference[: WINDOW - 1].max() < 1e-5 < 1e-2 < difference[-1]
