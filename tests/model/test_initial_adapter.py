"""init_adapter=: a saved LoRA adapter as the start of the generator, and the KL to it or to the base.

Oracles: stock PEFT on the adapter's folder and on the saved generator, stock transformers on the base, the exact KL
summed by hand over what was sampled, and a run that was never interrupted.
"""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from helpers import (
    PROMPTS,
    SMALL,
    base_folder,
    copies,
    differences,
    logits,
    player_state,
    read_json,
    reward,
    rollout_of,
    sign,
    small_gan,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_bases import base_weights, logits_alone
from test_checkpoint import Payload
from transformers import AutoModelForCausalLM

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.model import initial_adapter
from lora_gan.rewards.perplexity import Perplexity
from lora_gan.storage import checkpoint

# Stock PEFT says so when it saves the adapter on the head.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

REST = {name: value for name, value in SMALL.items() if "lora_" not in name or name.startswith("disc_")}
TOGETHER = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"}
VARIANTS = {
    "plain": ("gpt2", TOGETHER),
    "plain-llama": ("llama", TOGETHER),
    "rslora": ("llama", TOGETHER | {"use_rslora": True, "rank_pattern": {r".*\.1\.mlp\..*": 2}}),
    "dora": ("llama", TOGETHER | {"use_dora": True}),
    "head": ("llama", {"r": 3, "target_modules": ["q_proj", "lm_head"]}),
}


def sft(folder, base, *, kind=LoraConfig, **settings):
    """An adapter as stock PEFT saves it, with weights far enough from nothing to be seen."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"task_type": "CAUSAL_LM"} | settings
        peft = get_peft_model(model, kind(**settings | ({"lora_dropout": 0.05} if kind is LoraConfig else {})))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    peft.save_pretrained(folder)
    return folder


def stock(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def adapter(request, tmp_path_factory):
    architecture, settings = VARIANTS[request.param]
    base = base_folder(architecture)
    return sft(tmp_path_factory.mktemp("sft"), base, **settings), base


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return sft(tmp_path_factory.mktemp("sft"), base_folder(), **TOGETHER)


def gan_of(adapter, base=None, **settings):
    return LoraGAN(base or base_folder(), reward=reward, init_adapter=adapter, **REST | settings)


def logits_of(gan, player, rows):
    with torch.no_grad(), gan.players.use_adapter(player):
        return [logits(gan, torch.tensor([row]))[0] for row in rows]


def apart(ours, theirs):
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_the_generator_starts_as_stock_peft_opens_the_adapter(adapter):
    folder, base = adapter
    gan = gan_of(folder, base)
    rows = gan._encode(PROMPTS)
    tuned, untouched = logits_alone(stock(base, folder), rows), logits_alone(stock(base), rows)
    assert apart(tuned, untouched) > 0.1
    assert apart(logits_of(gan, "generator", rows), tuned) < 1e-5
    assert apart(logits_of(gan, "reference", rows), tuned) < 1e-5
    assert apart(logits_of(gan, "base", rows), untouched) < 1e-5
    assert differences(dict(stock(base).state_dict()), base_weights(gan)) == []
    theirs, ours = (
        {n: (m.r[name], m.scaling[name]) for n, m in model.named_modules() if name in getattr(m, "lora_A", {})}
        for model, name in ((stock(base, folder), "default"), (gan.players.peft, "generator"))
    )
    assert ours == theirs


def test_training_moves_the_generator_alone(adapter):
    folder, base = adapter
    gan = gan_of(folder, base)
    before = {player: copies(gan.players.parameters(player)) for player in ("generator", "reference")}
    assert len(before["generator"]) == len(before["reference"]) > 0
    for _ in range(2):
        gan.step(PROMPTS[:2])
    assert not differences(before["reference"], copies(gan.players.parameters("reference")))
    assert all(not p.requires_grad for p in gan.players.parameters("reference"))
    moved = [
        not torch.equal(a, b) for a, b in zip(before["generator"], gan.players.parameters("generator"), strict=True)
    ]
    assert all(moved)
    rows = gan._encode(PROMPTS)
    assert apart(logits_of(gan, "reference", rows), logits_alone(stock(base, folder), rows)) < 1e-5
    assert apart(logits_of(gan, "base", rows), logits_alone(stock(base), rows)) < 1e-5
    assert differences(dict(stock(base).state_dict()), base_weights(gan)) == []


def kl_by_hand(gan, policy, reference, prompts):
    """Mean over the coming step's responses of KL(policy ‖ reference), exact at each sampled prefix, in nats."""
    sampled = rollout_of(gan, prompts, gan.config.num_generations)
    encoded, ids = sampled.prompts, sampled.responses
    total = 0.0
    for i, response in enumerate(ids):
        prompt = encoded[sampled.group_B[i]]
        row = [list(prompt) + list(response)]
        p, q = (logits_alone(m, row)[0].double()[len(prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference))
        total += float((p.exp() * (p - q)).sum())
    return total / len(ids)


@pytest.mark.parametrize(
    "settings", [{}, {"disc_layers": 1}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}]
)
@pytest.mark.parametrize("kl_reference", ["base", None])
def test_the_kl_is_the_exact_one_to_the_reference_that_was_chosen(plain, tmp_path, kl_reference, settings):
    check_kl(plain, base_folder(), tmp_path, kl_reference, settings)


@pytest.mark.parametrize("kl_reference", ["base", "init_adapter"])
def test_the_kl_is_exact_for_every_kind_of_adapter(adapter, tmp_path, kl_reference):
    check_kl(*adapter, tmp_path, kl_reference, {})


def check_kl(folder, base, tmp_path, kl_reference, settings):
    gan = gan_of(folder, base, kl_reference=kl_reference, beta=0.1, learning_rate=2e-2, **settings)
    tuned, untouched = stock(base, folder), stock(base)
    reference = untouched if kl_reference == "base" else tuned
    expected = kl_by_hand(gan, tuned, reference, PROMPTS[:2])
    kl = gan.step(PROMPTS[:2])["kl"]
    if kl_reference == "base":
        assert expected > 0.1
    else:
        assert expected == 0 and abs(kl) < 1e-6
    assert kl == pytest.approx(expected, rel=1e-4, abs=1e-6)
    learned = stock(base, gan.save_checkpoint(ckpt_dir=tmp_path) / "generator")
    expected, other = (
        kl_by_hand(gan, learned, model, PROMPTS[2:])
        for model in (reference, tuned if reference is untouched else untouched)
    )
    kl = gan.step(PROMPTS[2:])["kl"]
    assert kl == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3 and abs(expected - other) > 1e-2, "the two references can be told apart"


def test_lower_layers_are_shared_with_the_base_and_not_with_the_adapter(plain):
    gan = gan_of(plain, disc_layers=1)
    sampled = rollout_of(gan, PROMPTS, 2)
    batch = sampled.batch(slice(0, len(sampled)))
    seen = {}
    for player in ("discriminator", "base", "reference", "generator"):
        with torch.no_grad(), gan.players.use_adapter(player):
            seen[player] = gan.players.hidden(batch, batch.predicting_R)
    assert "layers" in batch.frozen_outputs
    torch.testing.assert_close(seen["reference"], seen["generator"])
    assert (seen["reference"] - seen["base"]).abs().max() > 0.01


def test_gradient_checkpointing_gives_the_same_update(plain):
    one, other = gan_of(plain), gan_of(plain, gradient_checkpointing=True)
    for _ in range(2):
        a, b = one.step(PROMPTS[:2]), other.step(PROMPTS[:2])
        assert a["responses"] == b["responses"] and a["kl"] == pytest.approx(b["kl"], abs=1e-6)
    for mine, theirs in zip(one.players.parameters("generator"), other.players.parameters("generator"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_a_base_reference_costs_no_adapter(plain):
    gan = gan_of(plain, kl_reference="base")
    assert not gan.players.has_reference and set(gan.players.peft.peft_config) == {"generator", "discriminator"}
    rows = gan._encode(PROMPTS)
    assert differences(logits_of(gan, "reference", rows), logits_of(gan, "base", rows)) == []
    assert apart(logits_of(gan, "generator", rows), logits_alone(stock(base_folder(), plain), rows)) < 1e-5


# --- checkpoints


@pytest.mark.parametrize("kl_reference", ["base", "init_adapter"])
def test_a_run_resumes_bitwise_when_the_adapters_folder_is_gone(plain, tmp_path, kl_reference):
    folder = tmp_path / "sft"
    shutil.copytree(plain, folder)
    options = {"kl_reference": kl_reference, "output_dir": str(tmp_path / "run")}
    whole = gan_of(folder, **options)
    steps = [whole.step(PROMPTS[:2]) for _ in range(2)]
    saved = whole.save_checkpoint()
    steps = [whole.step(PROMPTS[:2]) for _ in range(2)]
    shutil.rmtree(folder)
    again = LoraGAN.from_checkpoint(saved, reward=reward)
    assert again.init_adapter == str(folder) and again.players.has_reference == (kl_reference == "init_adapter")
    assert differences(steps, [again.step(PROMPTS[:2]) for _ in range(2)]) == []
    for player in ("generator", "discriminator"):
        assert differences(player_state(whole, player), player_state(again, player)) == []
    names = {path.name for path in (saved / "reference").glob("*")}
    wanted = {"adapter_config.json", "adapter_model.bin"} if kl_reference == "init_adapter" else set()
    assert names == wanted


def test_a_second_generation_keeps_the_reference(plain, tmp_path):
    gan = gan_of(plain)
    gan.step(PROMPTS[:2])
    first = gan.save_checkpoint(ckpt_dir=tmp_path / "a")
    second = LoraGAN.from_checkpoint(first, reward=reward).save_checkpoint(ckpt_dir=tmp_path / "b")
    name = "reference/adapter_model.bin"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    rows = gan._encode(PROMPTS)
    there = logits_alone(stock(base_folder(), second / "reference"), rows)
    assert apart(there, logits_alone(stock(base_folder(), plain), rows)) < 1e-5


def test_load_checkpoint_takes_the_reference_of_the_checkpoint(plain, tmp_path):
    other = sft(tmp_path / "other", base_folder(), **TOGETHER)
    weights = {name: tensor * 1.5 for name, tensor in load_file(other / "adapter_model.safetensors").items()}
    save_file(weights, other / "adapter_model.safetensors")
    gan = gan_of(plain, output_dir=str(tmp_path / "run"))
    gan.step(PROMPTS[:2])
    gan.save_checkpoint()
    again = gan_of(other, output_dir=str(tmp_path / "run"))
    assert differences(copies(gan.players.parameters("reference")), copies(again.players.parameters("reference")))
    again.load_checkpoint()
    assert not differences(copies(gan.players.parameters("reference")), copies(again.players.parameters("reference")))
    assert again.init_adapter == gan.init_adapter != str(other)


def test_a_checkpoint_with_a_reference_is_not_opened_without_one_unasked(plain, tmp_path):
    gan = gan_of(plain, output_dir=str(tmp_path))
    gan.step(PROMPTS[:2])
    gan.save_checkpoint()
    without = {"peft_config": LoraConfig(**TOGETHER), "reward": reward, "output_dir": str(tmp_path), **REST}
    with pytest.raises(ValueError, match=r"measured to an adapter.*kl_reference='base'"):
        LoraGAN(base_folder(), **without).load_checkpoint()
    to_base = LoraGAN(base_folder(), **without, kl_reference="base")
    to_base.load_checkpoint()
    assert not to_base.players.has_reference
    told = LoraGAN.from_checkpoint(tmp_path, reward=reward, kl_reference="base")
    assert not told.players.has_reference
    assert differences(told.step(PROMPTS[:2]), to_base.step(PROMPTS[:2])) == []


def test_the_manifest_covers_the_reference(plain, tmp_path):
    folder = gan_of(plain).save_checkpoint(ckpt_dir=tmp_path)
    assert checkpoint.fault(folder, deep=True) is None
    file = folder / "reference/adapter_model.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    assert "reference" in checkpoint.fault(folder, deep=True)
    with pytest.raises(ValueError, match="reference/adapter_model.bin is not what its manifest says"):
        LoraGAN.from_checkpoint(folder, reward=reward)
    file.unlink()
    sign(folder)
    assert "weights of each player once" in checkpoint.fault(folder)


def test_load_generator_leaves_the_reference(plain, tmp_path):
    gan = gan_of(plain)
    gan.step(PROMPTS[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    before = copies(gan.players.parameters("reference"))
    gan.load_generator(folder)
    gan.load_generator(plain)
    assert not differences(before, copies(gan.players.parameters("reference")))
    assert not differences(before, copies(gan.players.parameters("generator")))


@pytest.mark.parametrize("which", ["run", "run/step-1", "run/step-1/generator", "export", "export/generator"])
def test_a_generator_of_this_library_can_be_the_start(tmp_path, which):
    gan = small_gan(output_dir=str(tmp_path / "run"))
    gan.step(PROMPTS[:2])
    gan.save_checkpoint()
    gan.export(tmp_path / "export", parts=["generator"])
    start = gan_of(tmp_path / which)
    assert not differences(copies(gan.players.parameters("generator")), copies(start.players.parameters("generator")))
    assert start.global_step == 0 and not start.generator.optimizer.adamw.state, "a start, not a resume"


def test_export_and_perplexity_do_not_see_the_reference(plain, tmp_path):
    ask = {"base": base_folder(), "adapter": plain}
    with_it = LoraGAN(ask["base"], reward_funcs=[Perplexity()], init_adapter=plain, **REST)
    without = LoraGAN(ask["base"], reward_funcs=[Perplexity()], **REST)
    rows = without.check_rows([{"prompt": p} for p in PROMPTS], asks=False)
    answers = ["red cat", "a tree", "old", "the dog sat"]
    assert with_it.ask(rows, answers)[0] == without.ask(rows, answers)[0]
    gan = gan_of(plain)
    gan.export(tmp_path / "out")
    encoded = gan._encode(PROMPTS)
    tuned = logits_alone(stock(ask["base"], plain), encoded)
    assert apart(logits_alone(stock(tmp_path / "out/generator-merged"), encoded), tuned) < 1e-4
    assert apart(logits_alone(stock(ask["base"], tmp_path / "out/generator"), encoded), tuned) < 1e-5


def test_the_reference_and_the_base_can_be_asked(plain):
    gan = gan_of(plain)
    same = gan.generate(PROMPTS, temperature=0)
    assert gan.generate(PROMPTS, temperature=0, player="reference") == same
    untouched = small_gan().generate(PROMPTS, temperature=0, player="reference")
    assert gan.generate(PROMPTS, temperature=0, player="base") == untouched != same
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    judged = {player: gan.evaluate(rows, temperature=0, player=player) for player in ("generator", "reference", "base")}
    assert judged["generator"]["metrics"] == judged["reference"]["metrics"] != judged["base"]["metrics"]


# --- what is refused


def changed(plain, folder, **fields):
    shutil.copytree(plain, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "type 'IA3': the generator can only start from LoRA"),
        ({"peft_type": None}, "can only start from LoRA"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*CAUSAL_LM"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*Merge the adapter into its base"),
        ({"bias": "all"}, "bias='all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_later_field": True}, "a_later_field"),
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
        ({"r": 10**9}, "rank 1000000000.*from 1 to"),
        ({"r": "3"}, "rank '3'"),
        ({"rank_pattern": {"c_fc": -1}}, "rank -1"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"r": 2}, "cannot be the generator's start.*rank, target_modules"),
        ({"target_modules": ["c_attn"]}, "cannot be the generator's start"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": 3}, "PEFT could not|does not describe"),
        ({"base_model_name_or_path": "some/other-base"}, None),
    ],
)
def test_what_cannot_be_a_start_is_refused_by_name(plain, tmp_path, fields, says):
    folder = changed(plain, tmp_path / "sft", **fields)
    if says is None:  # a name that cannot be compared with a folder's is told, and not refused
        with pytest.warns(UserWarning, match="names the base some/other-base.*same weights"):
            gan_of(folder)
        return
    with pytest.raises(ValueError, match=says) as error:
        gan_of(folder)
    assert "\n" not in str(error.value)


def test_other_settings_of_the_generators_adapter_contradict_it(plain):
    with pytest.raises(ValueError, match="init_adapter= and peft_config="):
        gan_of(plain, peft_config=LoraConfig(r=3))
    for setting in ({"lora_r": 3}, {"lora_alpha": 7}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}.*leave"):
            gan_of(plain, **setting)
    with pytest.raises(ValueError, match="needs the adapter.*init_adapter=FOLDER"):
        small_gan(kl_reference="init_adapter")
    with pytest.raises(ValueError, match="kl_reference='ref' is not accepted.*base, init_adapter"):
        small_gan(kl_reference="ref")


def test_folders_that_are_no_adapter(plain, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        gan_of(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="hf download user/adapter"):
        gan_of("user/adapter")
    with pytest.raises(ValueError, match="no adapter_config.json.*whole model.*model="):
        gan_of(base_folder("llama"))
    with_manifest = shutil.copytree(base_folder("llama"), tmp_path / "fetched")
    with pytest.raises(ValueError, match="no adapter_config.json.*whole model.*model="):
        gan_of(sign(with_manifest))  # as `lora-gan fetch` leaves a base
    shutil.copytree(plain, tmp_path / "trl" / "checkpoint-20")
    with pytest.raises(ValueError, match=r"there is one in .*checkpoint-20"):
        gan_of(tmp_path / "trl")
    (tmp_path / "empty").mkdir()
    shutil.copy(plain / "adapter_config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match="no adapter_model"):
        gan_of(tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        gan_of(tmp_path / "empty")


def test_another_base_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="init_adapter="), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan_of(plain, base_folder("llama"))
    own = small_gan(output_dir=str(tmp_path)).save_checkpoint()
    with pytest.raises(ValueError, match="other weights.*give the base"):
        gan_of(own, base_folder(seed=1))


def test_another_kind_of_peft_adapter_is_refused(tmp_path):
    modules = {"target_modules": ["c_attn"], "feedforward_modules": []}
    folder = sft(tmp_path / "ia3", base_folder(), kind=IA3Config, **modules)
    with pytest.raises(ValueError, match="IA3"):
        gan_of(folder)


def test_hostile_weights_are_refused_and_not_executed(plain, tmp_path):
    folder = changed(plain, tmp_path / "sft")
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    marker = tmp_path / "executed"
    torch.save(weights, folder / "adapter_model.bin")
    assert gan_of(folder).players.has_reference, "an older PEFT's .bin is read"
    torch.save(weights | {"more": Payload(marker)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="could not be read as tensors"):
        gan_of(folder)
    assert not marker.exists()
    name = next(iter(weights))
    torch.save(weights | {name: torch.full_like(weights[name], float("nan"))}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="NaN"):
        gan_of(folder)
    torch.save(weights | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="lm_head.weight is .2, 2. in the file and .300, 32. in the model"):
        gan_of(folder)
    torch.save(weights | {"base_model.model.more": torch.zeros(2, 2)}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="model.more is .2, 2. in the file and absent in the model"):
        gan_of(folder)
    save_file({name: weights[name]}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="absent in the file"):
        gan_of(folder)


def test_embeddings_beside_the_adapter_must_be_the_bases(plain, tmp_path):
    folder = changed(plain, tmp_path / "sft")
    weights = load_file(folder / "adapter_model.safetensors")
    head = stock(base_folder()).lm_head.weight.detach()
    save_file(weights | {"base_model.model.lm_head.weight": head.clone()}, folder / "adapter_model.safetensors")
    gan_of(folder)
    save_file(weights | {"base_model.model.lm_head.weight": head * 1.01}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="has its own embeddings.*merge"):
        gan_of(folder)


def test_the_discriminator_starts_as_it_does_under_the_same_peft_config(plain):
    """The reference is drawn last, so that it changes no other draw."""
    with_it = gan_of(plain)
    without = LoraGAN(base_folder(), reward=reward, peft_config=LoraConfig(**TOGETHER), **REST)
    mine, theirs = (copies(gan.players.parameters("discriminator")) for gan in (with_it, without))
    assert not differences(mine, theirs)


# --- the command line

OPTIONS = {
    "data": "pairs.csv", "reward": "mine.py:length", "num_generations": 4, "max_completion_length": 6, "disc_lora_r": 4,
    "prompts_per_step": 2, "output_dir": "run", "init_adapter": "sft",
}  # fmt: skip


@pytest.fixture
def there(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("prompt,target\n" + "".join(f"the cat {i},le chat {i}\n" for i in range(6)))
    (tmp_path / "mine.py").write_text("def length(response):\n    return float(len(response))\n")
    shutil.copytree(plain, tmp_path / "sft")
    return tmp_path


def train(*more, **changed):
    options = OPTIONS | {"model": str(base_folder())} | changed
    return cli.main(["train", *(w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))), *more])


@pytest.mark.parametrize("kl_reference", ["base", None])
@pytest.mark.filterwarnings("ignore:.*answers of the true reward are reused")
def test_the_command_line_resumes_bitwise_without_the_folder(there, capsys, kl_reference):
    assert train(max_steps=4, save_steps=2, kl_reference=kl_reference) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"starts as the adapter {there / 'sft'}" in out
    assert f"the KL is to {'a frozen copy of it' if kl_reference is None else 'the base'}" in out
    base = sum(parameter.numel() for parameter in stock(base_folder()).parameters())
    assert f"{base:,} frozen parameters" in out
    lines = [json.loads(line) for line in (there / "run/metrics.jsonl").read_text().splitlines()]
    first = lines[0]["kl_per_response"]
    assert abs(first) < 1e-6 if kl_reference is None else first > 0.1
    names = ["generator/adapter_model.bin", "discriminator/adapter_model.bin", "generator/optimizer.pt"]
    names += ["reference/adapter_model.bin"] if kl_reference is None else []
    whole = [(there / "run/step-4" / name).read_bytes() for name in names]
    shutil.rmtree(there / "run/step-4")
    shutil.rmtree(there / "sft")
    assert cli.main(["train", "--config", "run/train.yaml", "--resume"]) == 0
    assert [(there / "run/step-4" / name).read_bytes() for name in names] == whole
    assert "another one" not in capsys.readouterr().err


def test_what_a_resume_does_not_read_is_said(there, capsys):
    assert train(max_steps=1) == 0
    assert train("--resume", max_steps=2, init_adapter="elsewhere") == 0
    line = f"init_adapter has changed: the run started from {there / 'sft'}, and elsewhere is not read."
    assert line in capsys.readouterr().err.splitlines()
    assert train("--resume", max_steps=3, init_adapter=None) == 0
    assert "another one" not in capsys.readouterr().err
    assert train("--resume", "--kl_reference", "base", max_steps=4) == 0
    assert "kl_reference has changed: null up to step 3, base from now on." in capsys.readouterr().err


def test_an_adapter_cannot_join_a_run(there, capsys):
    assert train(max_steps=1, init_adapter=None) == 0
    assert train("--resume", max_steps=2) == 2
    assert "started without one: leave init_adapter out" in capsys.readouterr().err
    assert train(max_steps=1, kl_reference="base", output_dir="other") == 0
    assert train("--resume", max_steps=2, output_dir="other", kl_reference="init_adapter") == 2
    assert "its KL is to the base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: _state(folder, init_adapter=3), "init_adapter is '3'"),
        (lambda folder: _weights(folder, lambda t: t * float("nan")), "reference/adapter_model.bin.*NaN"),
        (lambda folder: _weights(folder, lambda t: t[:1]), "does not fit"),
        (lambda folder: _config(folder, peft_type="IA3"), "can only start from LoRA"),
        (lambda folder: _config(folder, lora_alpha=99), "lora_alpha"),
        (lambda folder: (folder / "reference/adapter_config.json").unlink(), "does not name reference/adapter_config"),
    ],
    ids=["name", "nan", "shape", "kind", "scaling", "missing"],
)
def test_a_hostile_reference_in_a_checkpoint_is_refused(plain, tmp_path, change, says):
    folder = gan_of(plain).save_checkpoint(ckpt_dir=tmp_path)
    change(folder)
    sign(folder)
    with pytest.raises(ValueError, match=says):
        LoraGAN.from_checkpoint(folder, reward=reward)


def _state(folder, **values):
    file = folder / "trainer_state.json"
    file.write_text(json.dumps(read_json(file) | values))


def _config(folder, **values):
    file = folder / "reference/adapter_config.json"
    file.write_text(json.dumps(read_json(file) | values))


def _weights(folder, change):
    file = folder / "reference/adapter_model.bin"
    weights = torch.load(file, weights_only=True)
    name = next(iter(weights))
    torch.save(weights | {name: change(weights[name])}, file)


def test_eval_says_which_reference_it_judged(there, capsys):
    for folder, kl_reference, named in (
        ("a", "base", "the base"),
        ("b", None, "the adapter that the run started from"),
    ):
        assert train(max_steps=1, output_dir=folder, kl_reference=kl_reference, learning_rate=1e-9) == 0
        capsys.readouterr()
        words = ["eval", "--checkpoint", folder, "--data", "pairs.csv", "--reference", "--output", "judged.json"]
        assert cli.main([*words, "--temperature", "0"]) == 0
        assert f"\nreference: {named}. " in capsys.readouterr().out
        apart = read_json(there / "judged.json")["difference"]["metrics"]["true_reward"]
        assert (apart["mean"] == apart["low"] == apart["high"] == 0) == (kl_reference is None)


def test_names_of_bases_are_compared_as_far_as_they_say_something(plain):
    """Two ids of the hub can be compared; a folder may hold the same weights under any name."""
    gan = gan_of(plain)
    start = initial_adapter.read(plain, config=gan.config, peft_config=None)
    base = dataclasses.replace(gan.players.base, name="someone/small", path="someone/small")
    for named in ("someone/small", "", base.path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dataclasses.replace(start, base=named).require_fits(base)
    with pytest.raises(
        ValueError, match=r"trained on someone/large, but the base here is someone/small.*base_model_name"
    ):
        dataclasses.replace(start, base="someone/large").require_fits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataclasses.replace(start, base="/models/elsewhere/small").require_fits(base)
    with pytest.warns(UserWarning, match="make sure that both have the same weights"):
        dataclasses.replace(start, base="/models/large").require_fits(base)
