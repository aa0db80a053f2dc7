"""Saved adapters opened by stock PEFT and transformers: the logits are ours to 1e-5, in float32.

Oracle: AutoPeftModelForCausalLM and AutoPeftModelForSequenceClassification on the saved folders, fed rows that the
stock tokenizer made (unpadded, or padded on the right); against the library's own left-padded rows and gan.score.
"""

import pytest
import torch
from helpers import ARCHITECTURES, PROMPTS, TARGETS, base_folder, prompt_logits, read_json, response_ids, small_gan
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoTokenizer

BASES = [(architecture, pad) for architecture in ARCHITECTURES for pad in ("own", "eos", "none")]
LONG = "a much longer answer than the others are"
PAIRS = list(zip([*PROMPTS, PROMPTS[0]], [*TARGETS, LONG], strict=True))


@pytest.fixture(scope="module", params=BASES, ids="-".join)
def trained(request, tmp_path_factory):
    """A LoraGAN after four steps, and where it was saved."""
    architecture, pad = request.param
    gan = small_gan(base_folder(architecture, pad))
    for _ in range(4):
        gan.step(PROMPTS[:2], TARGETS[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run"))
    return gan, folder, pad


def rows_of(gan):
    """Token ids of each pair: prompt and response tokenized apart, then end-of-text."""
    base = gan.players.base
    responses = [response_ids(gan, response) for _, response in PAIRS]
    return [
        base.tokenizer(prompt)["input_ids"] + response for (prompt, _), response in zip(PAIRS, responses, strict=True)
    ]


def right_padded(rows, pad_id):
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_generator_opens_as_causal_lm(trained):
    gan, folder, pad = trained
    stock = AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()
    untrained = AutoModelForCausalLM.from_pretrained(gan.players.base.path).eval()
    prompts = gan._encode(PROMPTS)
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = prompt_logits(gan, prompts)
    for row, ids in enumerate(prompts):
        with torch.no_grad():
            theirs = stock(input_ids=torch.tensor([ids])).logits[0]
            before = untrained(input_ids=torch.tensor([ids])).logits[0]
        assert (ours[row, -len(ids) :] - theirs).abs().max() < 1e-5
        assert (theirs - before).abs().max() > 1e-2, "training moved nothing: the comparison would show nothing"
    if pad != "none":
        batch = right_padded(prompts, gan.players.base.pad_on_disk)
        with torch.no_grad():
            theirs = stock(**batch).logits
        for row, ids in enumerate(prompts):
            assert (ours[row, -len(ids) :] - theirs[row, : len(ids)]).abs().max() < 1e-5


def test_discriminator_opens_as_sequence_classifier(trained):
    gan, folder, pad = trained
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    ours = torch.tensor(gan.score([prompt for prompt, _ in PAIRS], [response for _, response in PAIRS]))
    assert ours.std() > 1e-2, "a discriminator that says the same of everything shows nothing"
    rows = rows_of(gan)
    with torch.no_grad():
        single = torch.cat([stock(input_ids=torch.tensor([row])).logits[0] for row in rows])
    assert (ours - single).abs().max() < 1e-5
    if pad == "none":
        with pytest.raises(ValueError), torch.no_grad():  # stock's own limit, which the library does not have
            stock(**right_padded(rows, 0))
    else:
        with torch.no_grad():
            batched = stock(**right_padded(rows, gan.players.base.pad_on_disk)).logits[:, 0]
        assert (ours - batched).abs().max() < 1e-5


def test_stock_tokenizer_and_client_agree_with_score_on_texts(trained):
    """As a user does it: texts through the stock tokenizer, prompt + response + its own end token, right-padded."""
    gan, folder, pad = trained
    if pad == "none":
        pytest.skip("a tokenizer without a pad token pads no batch; single rows are shown above")
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(gan.players.base.path)
    rows = [
        tokenizer(prompt)["input_ids"]
        + tokenizer(response, add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for prompt, response in PAIRS
    ]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        theirs = stock(**batch).logits[:, 0]
    ours = torch.tensor(gan.score([prompt for prompt, _ in PAIRS], [response for _, response in PAIRS]))
    assert (ours - theirs).abs().max() < 1e-5


def test_a_checkpoint_holds_all_tensors_in_one_file(tmp_path):
    gan = small_gan()
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    for player in ("generator", "discriminator"):
        files = {path.name for path in (folder / player).glob("adapter_model.*")}
        assert files == {"adapter_model.bin"}
        saved = torch.load(folder / player / "adapter_model.bin", weights_only=True)
        assert all(tensor.any() for tensor in saved.values()), "a trained adapter has no tensor of zeros"
        heads = [name for name in saved if "lora_" not in name]
        assert heads == ([] if player == "generator" else ["base_model.model.score.weight"])
    ours = gan.score(PROMPTS[0], "text")
    stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / "discriminator", num_labels=1).eval()
    row = gan._encode([PROMPTS[0]])[0] + response_ids(gan, "text")
    with torch.no_grad():
        assert abs(stock(input_ids=torch.tensor([row])).logits.item() - ours[0]) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapter_configs_say_what_stock_clients_need(architecture, tmp_path):
    gan = small_gan(base_folder(architecture, "own"))
    folder = gan.save_checkpoint(step=1, ckpt_dir=tmp_path)
    for player, task in (("generator", "CAUSAL_LM"), ("discriminator", "SEQ_CLS")):
        config = read_json(folder / player / "adapter_config.json")
        assert config["task_type"] == task
        assert config["inference_mode"] is True
        assert config["fan_in_fan_out"] is (architecture == "gpt2"), f"{player}: GPT-2's layers are Conv1D"
        assert config["base_model_name_or_path"] == str(base_folder(architecture, "own"))
        assert config["target_modules"] == sorted(config["target_modules"]), "a set's order changes between processes"
        assert not {"score", "lm_head"} & set(config["target_modules"])
        assert config["modules_to_save"] == (None if player == "generator" else ["classifier", "score"])
