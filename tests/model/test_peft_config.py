"""peft_config= and disc_peft_config=: what of a LoraConfig works on a base that two adapters share, and what does not.

Oracles: stock PEFT on the saved folders, a run that was never interrupted, bitwise copies of the base, and the scaling
and ranks that PEFT itself gives a single adapter under the same LoraConfig.
"""

import copy
import json

import pytest
import torch
from helpers import (
    PROMPTS,
    SMALL,
    TARGETS,
    base_folder,
    copies,
    differences,
    logits,
    player_state,
    prompt_logits,
    response_ids,
    reward,
    sign,
    small_gan,
)
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, IA3Config, LoraConfig, get_peft_model
from test_bases import base_weights, logits_alone
from transformers import AutoModelForCausalLM

from lora_gan import LoraGAN

REST = {name: value for name, value in SMALL.items() if "lora" not in name}
TOGETHER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
VARIANTS = {
    "rslora": TOGETHER | {"use_rslora": True},
    "dora": TOGETHER | {"use_dora": True},
    "patterns": TOGETHER
    | {"rank_pattern": {r".*\.1\.mlp\..*": 2}, "alpha_pattern": {r".*\.0\.mlp\..*": 5}, "use_rslora": True},
    "part": {"r": 2, "target_modules": r".*\.(c_attn|q_proj|v_proj)"},
    "excluded": TOGETHER | {"exclude_modules": ["c_fc", "up_proj"], "init_lora_weights": "gaussian"},
    "one layer": {"r": 4, "target_modules": ["c_attn", "q_proj"], "layers_to_transform": [1]},
    "orthogonal": TOGETHER | {"init_lora_weights": "orthogonal", "use_dora": True},
}


def gan_of(architecture, *, gen=None, disc=None, **settings):
    return LoraGAN(base_folder(architecture), reward=reward, peft_config=gen, disc_peft_config=disc, **REST | settings)


@pytest.fixture(scope="module", params=[(a, v) for a in ("gpt2", "llama") for v in VARIANTS], ids="-".join)
def trained(request, tmp_path_factory):
    """A LoraGAN with the variant on both players, after three steps; where it was saved; the LoraConfig."""
    architecture, variant = request.param
    config = LoraConfig(**VARIANTS[variant])
    before = copy.deepcopy(config)
    gan = gan_of(architecture, gen=config, disc=config, learning_rate=1e-2)
    at_start = copies(gan.players.parameters("generator") + gan.players.parameters("discriminator"))
    for _ in range(3):
        gan.step(PROMPTS[:2], TARGETS[:2])
    now = gan.players.parameters("generator") + gan.players.parameters("discriminator")
    assert not any(torch.equal(a, b) for a, b in zip(at_start, now, strict=True)), "a weight never moved"
    assert config == before, "the user's own object was changed"
    return gan, gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run")), config


def test_the_adapters_are_those_that_peft_makes_of_it(trained):
    gan, _, config = trained
    alone = get_peft_model(AutoModelForCausalLM.from_pretrained(gan.players.base.path), config)
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in alone.named_modules()
        if hasattr(module, "lora_A")
    }
    for player in ("generator", "discriminator"):
        ours = {
            name: (module.r[player], module.scaling[player])
            for name, module in gan.players.lm.named_modules()
            if hasattr(module, "lora_A")
        }
        assert ours == theirs
        magnitudes = [n for n, _ in gan.players.peft.named_parameters() if f"magnitude_vector.{player}" in n]
        assert len(magnitudes) == len(theirs) * config.use_dora, "DoRA: every adapter has magnitudes of its own"


def test_the_base_and_the_reference_stay_as_they_were(trained):
    gan, _, _ = trained
    alone = AutoModelForCausalLM.from_pretrained(gan.players.base.path).eval()
    assert differences(dict(alone.state_dict()), base_weights(gan)) == []
    ids = torch.tensor([gan._encode([PROMPTS[1]])[0]])
    with torch.no_grad(), gan.players.use_adapter("reference"):
        ours, theirs = logits(gan, ids), alone(ids).logits
    # GPT-2's activation is the same formula in one pass: equal to rounding.
    torch.testing.assert_close(
        ours, theirs, atol=1e-5 * ("transformer" in dict(gan.players.lm.named_children())), rtol=0
    )


def test_stock_clients_open_both(trained):
    gan, folder, _ = trained
    prompts = gan._encode(PROMPTS)
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = prompt_logits(gan, prompts)
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    for row, theirs in enumerate(logits_alone(stock, prompts)):
        assert (ours[row, -len(theirs) :] - theirs).abs().max() < 1e-5
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    answers = [response_ids(gan, target) for target in TARGETS]
    theirs = torch.stack([logits[0] for logits in logits_alone(scorer, map(list.__add__, prompts, answers))])
    scores = torch.tensor(gan.score(PROMPTS, TARGETS))
    assert scores.std() > 1e-2 and (scores - theirs).abs().max() < 1e-5


def test_from_checkpoint_makes_the_same_adapters_without_being_told(trained):
    gan, folder, config = trained
    through = LoraGAN.from_checkpoint(folder, reward=reward)
    assert differences(gan.step(PROMPTS[2:], TARGETS[2:]), through.step(PROMPTS[2:], TARGETS[2:])) == []
    for player in ("generator", "discriminator"):
        assert differences(player_state(gan, player), player_state(through, player)) == []
    gan.load_checkpoint(ckpt_dir=folder.parent)  # as the other tests of this module found it


def test_before_training_both_players_are_the_reference():
    ids = torch.tensor([[5, 6, 7, 8]])
    for init in (True, "gaussian", "orthogonal"):
        config = LoraConfig(**TOGETHER, use_dora=True, init_lora_weights=init)
        gan = gan_of("gpt2", gen=config, disc=config)
        outputs = []
        for player in ("reference", "generator", "discriminator"):
            with torch.no_grad(), gan.players.use_adapter(player):
                outputs.append(logits(gan, ids))
        assert all(torch.allclose(outputs[0], other, atol=1e-5) for other in outputs)


def test_one_player_by_settings_the_other_by_peft_config(tmp_path):
    gan = gan_of("gpt2", disc=LoraConfig(**TOGETHER, use_dora=True, task_type="SEQ_CLS"), lora_r=2)
    gan.step(PROMPTS[:2], TARGETS[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    again = LoraGAN.from_checkpoint(folder, reward=reward)
    assert differences(gan.step(PROMPTS[:2], TARGETS[:2]), again.step(PROMPTS[:2], TARGETS[:2])) == []
    assert again.players.peft.peft_config["generator"].r == 2
    assert again.players.peft.peft_config["discriminator"].use_dora
    with pytest.raises(ValueError, match="disc_lora_r=5 and disc_peft_config="):
        LoraGAN.from_checkpoint(folder, reward=reward, disc_lora_r=5)


def test_in_bfloat16_adapters_learn_in_float32():
    config = LoraConfig(**TOGETHER, use_dora=True)
    gan = gan_of("llama", gen=config, disc=config, dtype="bfloat16")
    before = copies(gan.players.parameters("generator"))
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    assert (
        gan.players.lm.dtype == torch.bfloat16 or gan.players.lm.get_input_embeddings().weight.dtype == torch.bfloat16
    )
    now = gan.players.parameters("generator")
    assert {parameter.dtype for parameter in now} == {torch.float32}
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))


# --- refused ----------------------------------------------------------------------------------------------------------

NOT_ACCEPTED = {
    "lora_dropout": 0.1, "bias": "all", "modules_to_save": ["lm_head"], "target_parameters": ["x"],
    "trainable_token_indices": [1, 2], "lora_bias": True, "use_qalora": True, "layer_replication": [(0, 2)],
    "alora_invocation_tokens": [3], "init_lora_weights": "pissa",
}  # fmt: skip


@pytest.mark.parametrize("field", NOT_ACCEPTED)
@pytest.mark.parametrize("argument", ["peft_config", "disc_peft_config"])
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_a_field_that_cannot_work_on_a_shared_base_is_named(argument, field):
    config = LoraConfig(r=4, target_modules="all-linear", **{field: NOT_ACCEPTED[field]})
    with pytest.raises(ValueError, match=rf"^{argument} has {field}=.*not accepted: .*(rslora|gaussian)"):
        LoraGAN(base_folder(), reward=reward, **{argument: config}, **REST)


@pytest.mark.parametrize("init", ["olora", "pissa_niter_4", "corda", "eva", "loftq", "mica", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(init):
    config = LoraConfig(r=4, target_modules="all-linear")
    config.init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        gan_of("gpt2", gen=config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gen": IA3Config()}, "peft_config is a IA3Config"),
        ({"gen": {"r": 4}}, "peft_config is a dict"),
        ({"gen": LoraConfig(), "lora_r": 4}, "lora_r=4 and peft_config="),
        ({"disc": LoraConfig(), "disc_lora_r": 4}, "disc_lora_r=4 and disc_peft_config="),
        ({"gen": LoraConfig(), "lora_alpha": 4}, "lora_alpha=4 and peft_config="),
        ({"gen": LoraConfig(task_type="SEQ_CLS")}, "task_type='.*SEQ_CLS'.*CAUSAL_LM"),
        ({"disc": LoraConfig(task_type="TOKEN_CLS")}, "task_type='.*TOKEN_CLS'.*SEQ_CLS or CAUSAL_LM"),
        ({"gen": LoraConfig(target_modules=["nowhere"])}, "nowhere"),
        ({"gen": LoraConfig(target_modules=["wte", "c_fc"])}, "input embeddings"),
        ({"disc": LoraConfig(target_modules=["lm_head", "c_fc"])}, "'lm_head', which does not affect the score"),
        ({"gen": LoraConfig(target_modules="all-linear", init_lora_weights="orthogonal", r=3)}, "even"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # for the head, which is no Conv1D
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_else_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        gan_of("gpt2", **arguments)


def test_an_adapter_on_the_head_is_the_generators_own_affair(tmp_path):
    gan = gan_of("llama", gen=LoraConfig(r=4, target_modules=["lm_head", "q_proj"]), learning_rate=1e-2)
    for _ in range(3):
        gan.step(PROMPTS[:2], TARGETS[:2])
    stock = AutoPeftModelForCausalLM.from_pretrained(gan.save_checkpoint(ckpt_dir=tmp_path) / "generator").eval()
    ids = torch.tensor([gan._encode([PROMPTS[3]])[0]])
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = logits(gan, ids)
        assert (ours - stock(ids).logits).abs().max() < 1e-5


# --- checkpoints of other adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "there", "here"),
    [
        ("use_dora", {"use_dora": True}, {}),
        ("use_rslora", {}, {"use_rslora": True}),
        ("rank_pattern", {"rank_pattern": {"c_fc": 2}}, {}),
        ("alpha_pattern", {"alpha_pattern": {"c_fc": 2}}, {"alpha_pattern": {"c_fc": 3}}),
        ("r", {"r": 2}, {}),
        ("lora_alpha", {"lora_alpha": 7}, {}),
    ],
)
def test_another_adapter_is_refused_by_name(field, there, here, tmp_path):
    there, here = LoraConfig(**TOGETHER | there), LoraConfig(**TOGETHER | here)
    folder = gan_of("gpt2", gen=there, disc=there).save_checkpoint(step=1, ckpt_dir=tmp_path)
    gan = gan_of("gpt2", gen=here, disc=here)
    before = player_state(gan, "generator"), player_state(gan, "discriminator")
    values = (repr(getattr(config, field)) for config in (there, here))
    for load in (lambda: gan.load_checkpoint(1, tmp_path), lambda: gan.load_generator(folder)):
        with pytest.raises(ValueError) as caught:
            load()
        assert all(f"{field}={value}" in str(caught.value) or value in str(caught.value) for value in values)
        assert field in str(caught.value)
    with pytest.raises(ValueError, match=field):
        gan.load_discriminator(folder)
    assert differences(before, (player_state(gan, "generator"), player_state(gan, "discriminator"))) == []


def test_what_an_adapter_config_names_is_never_followed(tmp_path):
    """A stranger's adapter_config.json is read as JSON, and of it only what is accepted."""
    config = LoraConfig(**TOGETHER, use_dora=True)
    folder = gan_of("gpt2", gen=config, disc=config).save_checkpoint(step=1, ckpt_dir=tmp_path)
    file = folder / "generator" / "adapter_config.json"
    stored = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            stored
            | {
                "base_model_name_or_path": "stranger/model",
                "auto_mapping": {"base_model_class": "Evil", "parent_library": "os"},
                "lora_dropout": 0.5,
                "modules_to_save": ["lm_head"],
                "unheard_of": 1,
            }
        )
    )
    sign(folder)
    gan = LoraGAN.from_checkpoint(folder, reward=reward)
    assert gan.players.peft.peft_config["generator"].lora_dropout == 0
    assert gan.players.peft.peft_config["generator"].use_dora
    for wrong in ("[]", "{", json.dumps(stored | {"r": "many"})):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="generator|adapters"):
            LoraGAN.from_checkpoint(folder, reward=reward)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    folder = small_gan().save_checkpoint(step=1, ckpt_dir=tmp_path)
    file = folder / "generator" / "adapter_config.json"
    stored = json.loads(file.read_text())
    for change, words in (
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens=\[5\]"),
    ):
        file.write_text(json.dumps(stored | change))
        sign(folder)
        with pytest.raises(ValueError, match=words):
            small_gan().load_generator(folder)
