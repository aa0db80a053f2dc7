"""Hybrid and recurrent bases: the matrix of test_bases.py, and what is special about them.

Oracles: those of test_bases.py; stock generate(); stock PEFT on exported folders; the bytes of transformers' own cache;
the multimodal model for its text model.
"""

import functools
import re
import warnings

import numpy as np
import pytest
import test_sampling
import torch
import transformers
from helpers import TARGETS, differences, logits, player_state, rollout_of, small_gan, word_tokenizer
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from test_bases import (  # noqa: F401, collected here with the bases of this file
    COMMON,
    GROUPED,
    HYBRIDS,
    HYBRIDS_WITHOUT_CLASSIFIER,
    folder_of,
    gan_of,
    logits_alone,
    test_both_players_learn_and_the_base_stays_bitwise,
    test_layers_computed_again_in_the_backward_teach_the_same,
    test_resuming_equals_never_having_stopped,
    test_sampling_equals_an_uncached_unbatched_decode,
    test_stock_peft_opens_the_discriminator,
    test_stock_peft_opens_the_generator,
    test_straight_through_reads_the_embeddings_that_the_ids_have,
)
from test_sampling import MANY
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    DynamicCache,
)

from lora_gan import Config, LoraGAN
from lora_gan.cli import footprint, preview
from lora_gan.data import Row
from lora_gan.model import base_trial, kv_cache

# transformers has no sequence classifier of these families: each LoraGAN says so.
pytestmark = pytest.mark.filterwarnings("ignore:stock transformers and PEFT cannot open")

QUICK = ("qwen3_5", "qwen3_5-composite", "lfm2", "falcon_h1", "mamba2")  # one of each kind of cache
SLOW = [name for name in HYBRIDS if name not in QUICK]
some = functools.partial(pytest.mark.parametrize, "name")


@pytest.fixture(scope="module", params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def trained(request, tmp_path_factory):
    """A LoraGAN after three steps, where it was saved, and its base's name."""
    gan = quiet(request.param, learning_rate=1e-2, disc_learning_rate=1e-2)
    for _ in range(3):
        gan.step(MANY[:2])
    return gan, gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run")), request.param


def quiet(name, **settings) -> LoraGAN:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gan_of(name, **settings)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_response_does_not_depend_on_what_else_is_in_the_batch(trained):
    test_sampling.test_a_response_does_not_depend_on_what_else_is_in_the_batch(trained[:2])


def test_greedy_equals_stock_generate(trained):
    gan, folder, _ = trained
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    test_sampling.test_greedy_equals_generate((gan, stock))


def test_rows_that_ended_leave_without_a_trace(trained):
    gan = trained[0]
    together = rollout_of(gan, MANY[:3], 8, step=7, length=32, temperature=2.0)
    lengths = together.lengths_B
    assert len(set(lengths)) > 3 and (lengths < 30).sum() > len(lengths) // 2, "the batch is halved"
    for row, prompt in enumerate(MANY[:3]):
        alone = rollout_of(gan, [prompt], 8, step=7, length=32, temperature=2.0)
        assert alone.texts == together.texts[8 * row : 8 * row + 8]


@some(["qwen3_5", "lfm2", "falcon_h1", "mamba2", pytest.param("kimi_linear", marks=pytest.mark.slow)])
def test_all_tensors_of_the_cache_follow_their_rows(name):
    model = AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    ids = torch.tensor([[5, 9, 7, 12], [11, 6, 20, 8]])

    def tensors(layer):
        own = [getattr(layer, part) for part in ("keys", "values") if torch.is_tensor(getattr(layer, part, None))]
        return own + kv_cache.state_tensors(layer)

    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **kv_cache.cache_inputs(("cache_params",) if name == "mamba2" else
                                                                  ("past_key_values",), kept))  # fmt: skip
    before = [[tensor.clone() for tensor in tensors(layer)] for layer in kept.layers]
    assert all(before) and any(len(layer) > 1 for layer in before)
    kept.reorder_cache(torch.arange(2).repeat_interleave(3))
    kept.reorder_cache(torch.tensor([4, 1]))
    for layer, expected in zip(kept.layers, before, strict=True):
        assert differences([tensor[[1, 0]] for tensor in expected], tensors(layer)) == []


# --- layers and adapters ----------------------------------------------------------------------------------------------


def adapted(gan, player):
    names = {name for name, _ in gan.players.peft.named_parameters() if f".{player}." in name}
    return {re.search(r"(\w+)\.lora_", name)[1] for name in names}


@some(["falcon_h1", "mamba2", pytest.param("mamba", marks=pytest.mark.slow)])
def test_all_linear_leaves_out_what_peft_refuses(name):
    defaults = {"lora_r": Config.lora_r, "lora_alpha": Config.lora_alpha}
    own = {"peft_config": LoraConfig(target_modules="all-linear"), **defaults}
    for settings in ({}, {"disc_layers": 1}, own):
        gan = quiet(name, **settings)
        for player in ("generator", "discriminator"):
            assert "in_proj" in adapted(gan, player) and "out_proj" not in adapted(gan, player)
        gan.step(MANY[:2])
    with pytest.raises(ValueError, match=r"out_proj.* incompatible"):
        quiet(name, peft_config=LoraConfig(target_modules=["in_proj", "out_proj"]), **defaults)


def test_all_linear_leaves_out_a_layer_whose_weight_is_read_past_the_adapter():
    assert {"in_proj", "x_proj", "out_proj"} <= adapted(quiet("jamba"), "generator")
    assert "dt_proj" not in adapted(quiet("jamba"), "generator")


@some(["qwen3_5", "lfm2", "mamba2", "falcon_h1"])
def test_upper_layers_learn_as_without_the_short_cut(name):
    gan, oracle = (quiet(name, disc_layers=1, num_iterations=2) for _ in range(2))
    gan.step(MANY[:2], TARGETS[:2], train_gen=False, train_disc=False)
    oracle.step(MANY[:2], TARGETS[:2], train_gen=False, train_disc=False)
    assert gan.players._shares_frozen_layers is (name != "falcon_h1"), "its body reads attributes of each layer"
    oracle.players._shares_frozen_layers = False
    for _ in range(2):
        one, other = (g.step(MANY[:3], TARGETS[:3]) for g in (gan, oracle))
        for number in ("gen_loss", "kl", "disc_loss", "gen_grad_norm", "disc_grad_norm"):
            assert one[number] == pytest.approx(other[number], rel=1e-3, abs=1e-5), number


@some(QUICK)
def test_such_a_base_is_not_packed(name):
    gan = quiet(name)
    assert gan.players.packs is False
    assert gan.players.batch([[5, 6]], [[7], [8, 9]], torch.tensor([0, 0]).numpy()).ids.shape == (2, 4)


# --- memory -----------------------------------------------------------------------------------------------------------


@some(["qwen3_5", "lfm2", "falcon_h1", "mamba2"])
def test_the_caches_memory_is_what_transformers_cache_holds(name):
    gan = quiet(name)
    found = 8 * footprint.cache_bytes(gan.players, 16)
    model = AutoModelForCausalLM.from_pretrained(folder_of(name)).eval()
    kept, key = DynamicCache(config=model.config), "cache_params" if name == "mamba2" else "past_key_values"
    with torch.no_grad():  # 2 prompts × 4 responses of 10 + 6 tokens
        model(input_ids=torch.full((8, 16), 5), use_cache=True, **{key: kept})
    held = [vars(layer).get(part) for layer in kept.layers for part in ("keys", "values")]
    held += [state for layer in kept.layers for state in kv_cache.state_tensors(layer)]
    assert found == sum(tensor.nbytes for tensor in held if tensor is not None)
    said = preview.Preview(gan, [Row("the cat")], total=1, steps=1).describe()
    assert re.search(r"^memory +about \d+", said, re.MULTILINE)


@some(["lfm2", "mamba2"])
def test_what_a_recurrent_layer_keeps_for_its_backward_is_counted(name):
    gan = quiet(name)
    batch = gan.players.batch([[1] * 60, [2] * 60], [[3] * 70] * 6, np.repeat([0, 1], 3))
    with footprint._counting(gan.players) as kept, gan.players.use_adapter("generator"):
        gan.players.hidden(batch, batch.predicting_R).sum().backward()
    graph = footprint.graph_of(gan.players, "generator")
    assert graph.bytes(2, 6, footprint.Lengths.at_most(60, 70), packs=False) == pytest.approx(
        sum(kept.values()), rel=0.1
    )


# --- what is refused --------------------------------------------------------------------------------------------------

SIZES = {key: COMMON[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
REFUSED = {  # class, configuration, what the error says
    "no cache that is known": ("RwkvForCausalLM", {"attention_hidden_size": 32}, "no key-value cache"),
    "pads leave a trace": (
        "RecurrentGemmaForCausalLM",
        {
            "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 7, "initializer_range": 0.25,
            "block_types": ["recurrent", "attention"],
        },
        "padding on the left",
    ),
    "pads leave a trace, two": ("xLSTMForCausalLM", {"num_heads": 4, "embedding_dim": 32}, "padding on the left"),
    "a cache of its own": (
        "MiniMaxForCausalLM",
        GROUPED | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
        "cache of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_fails_the_trial_is_refused_by_name(kind, tmp_path):
    name, settings, words = REFUSED[kind]
    architecture = getattr(transformers, name)
    ids = {"vocab_size": 30, "eos_token_id": 0, "pad_token_id": 1}
    model = architecture(architecture.config_class(**SIZES | ids | settings)).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer("own").save_pretrained(tmp_path)
    for given in (tmp_path, model):
        with pytest.raises(ValueError, match=f"{name}.* cannot be the base.*{words}") as caught:
            small_gan(given, processing_class=word_tokenizer("own"))
        assert "\n" not in str(caught.value)


@some(["lfm2", "falcon_h1", "mamba2", "qwen3_5"])
def test_a_cache_whose_states_do_not_follow_their_rows_is_refused(name, monkeypatch):
    class States(DynamicCache):
        def reorder_cache(self, indices):
            super().reorder_cache(indices)
            for layer in self.layers:
                for state in kv_cache.state_tensors(layer):
                    state.copy_(state.roll(1, 0))

    monkeypatch.setattr(base_trial, "DynamicCache", States)
    with pytest.raises(ValueError, match="cannot be the base: decoding a text token by token with its cache"):
        quiet(name)


def test_a_base_that_swallows_the_cache_is_refused(monkeypatch):
    monkeypatch.setattr(base_trial, "cache_inputs", lambda takes, kept, mask=None: {"past_key_values": kept})
    with pytest.raises(ValueError, match="cannot be the base: decoding a text token by token with its cache"):
        quiet("mamba2")


@some([n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HYBRIDS])
def test_a_discriminator_that_stock_clients_cannot_open_is_announced(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gan_of(name)
    said = [str(warning.message) for warning in caught if "stock transformers and PEFT cannot" in str(warning.message)]
    assert len(said) == (name in HYBRIDS_WITHOUT_CLASSIFIER)
    assert not said or HYBRIDS_WITHOUT_CLASSIFIER[name] in said[0]


# --- the text model of a multimodal base ------------------------------------------------------------------------------


def test_a_composite_says_what_its_text_model_says():
    folder = folder_of("qwen3_5-composite")
    assert AutoConfig.from_pretrained(folder).get_text_config() is not AutoConfig.from_pretrained(folder)
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    gan = quiet("qwen3_5-composite")
    assert not any("visual" in name for name, _ in gan.players.peft.named_parameters())
    rows = [[5, 9, 7, 12], [11, 6]]
    with gan.players.use_adapter("reference"):
        for ours, theirs in zip(logits_alone(gan.players.lm, rows), logits_alone(whole, rows), strict=True):
            assert torch.equal(ours, theirs) and theirs.std() > 0.1


def test_a_composites_checkpoint_goes_on_on_the_text_model_alone_and_back(tmp_path):
    gan = quiet("qwen3_5-composite")
    gan.step(MANY[:2], TARGETS[:2])
    saved = gan.save_checkpoint(ckpt_dir=tmp_path / "run")
    text = tmp_path / "text"
    AutoModelForCausalLM.from_pretrained(folder_of("qwen3_5-composite")).save_pretrained(text)
    other = LoraGAN.from_checkpoint(saved, model=text, processing_class=word_tokenizer("own"))
    there = other.save_checkpoint(ckpt_dir=tmp_path / "other")
    back = LoraGAN.from_checkpoint(there, model=folder_of("qwen3_5-composite"), processing_class=word_tokenizer("own"))
    for player in ("generator", "discriminator"):
        assert differences(player_state(gan, player), player_state(other, player)) == []
        assert differences(player_state(gan, player), player_state(back, player)) == []


def test_a_multimodal_model_in_memory_and_one_that_was_not_shown_are_refused(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder_of("qwen3_5-composite"))
    with pytest.raises(ValueError, match="Qwen3_5ForConditionalGeneration cannot be the base.*multimodal"):
        small_gan(model, processing_class=word_tokenizer("own"))
    AutoConfig.for_model("llama4", text_config=COMMON | GROUPED | {"vocab_size": 30}).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Llama4ForCausalLM cannot be the base.*multimodal"):
        small_gan(tmp_path, processing_class=word_tokenizer("own"))


# --- export -----------------------------------------------------------------------------------------------------------


@some(["qwen3_5", "qwen3_5-composite", "lfm2", "falcon_h1", pytest.param("mamba2", marks=pytest.mark.slow),
       pytest.param("qwen3_next", marks=pytest.mark.slow), pytest.param("jamba", marks=pytest.mark.slow)])  # fmt: skip
def test_what_is_exported_says_in_stock_clients_what_the_players_say(name, tmp_path):
    gan = quiet(name, learning_rate=1e-2, disc_learning_rate=1e-2)
    for _ in range(3):
        gan.step(MANY[:2])
    parts = ["generator", "generator-merged", "discriminator", "discriminator-merged"]
    judged = name not in HYBRIDS_WITHOUT_CLASSIFIER
    folder = gan.export(tmp_path / "export", parts=parts if judged else parts[:2])
    rows = [ids[:6] for ids in gan._encode(MANY)]
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = [logits(gan, torch.tensor([row]))[0] for row in rows]
    adapter = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "generator-merged").eval()
    # Weights that are one rounding apart move the logits of these small bases by up to 8e-5: short vectors are divided
    # by their length.
    for stock, limit in ((adapter, 1e-5), (merged, 5e-5)):
        for one, other in zip(ours, logits_alone(stock, rows), strict=True):
            assert (one - other).abs().max() < limit * one.abs().max()
    if judged:
        prompts, answers = gan.players.encoder.pairs(list(map(Row, MANY)), ["the cat"] * len(MANY))
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        scores = torch.tensor(gan.score(MANY, ["the cat"] * len(MANY)))
        assert scores.std() > 1e-3
        adapter = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
        merged = AutoModelForSequenceClassification.from_pretrained(folder / "discriminator-merged").eval()
        for stock, limit in ((adapter, 1e-5), (merged, 5e-5)):
            theirs = torch.stack([logits[0] for logits in logits_alone(stock, texts)])
            assert (scores - theirs).abs().max() < limit
