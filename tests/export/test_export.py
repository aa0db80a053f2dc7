"""What export() leaves, opened by stock PEFT and transformers alone, from a folder that was moved since.

Oracle: the players in memory, in float32: gan.score to 1e-5; the generator's logits to 1e-5 of the largest one (these
wild bases have logits up to 6, and a forward in float32 is itself 1e-5 away from one in float64).
"""

import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    EOS,
    PADS,
    PROMPTS,
    TARGETS,
    WORDS,
    base_folder,
    copies,
    prompt_logits,
    random_model,
    read_json,
    response_ids,
    small_gan,
)
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from safetensors.torch import load_file
from test_bases import BASES as BASES_OF_ALL_KINDS
from test_bases import OTHERS as OTHER_BASES
from test_bases import WITHOUT_CLASSIFIER, gan_of
from test_sampling import MANY
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from lora_gan import LoraGAN
from lora_gan.export.exporting import PARTS, export, merged_weights, push, scoring_tokenizer

ROWS = [{"prompt": prompt, "target": target} for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
LONG = "a much longer answer than the others are"
ASKED, ANSWERS = [*PROMPTS, PROMPTS[0]], [*TARGETS, LONG]


def trained_gan(model=None, steps=4, **settings):
    gan = small_gan(model, **settings)
    for _ in range(steps):
        gan.step(PROMPTS[:2], TARGETS[:2])
    return gan


QUICK = [("gpt2", "none"), ("llama", "own"), ("qwen2", "eos")]  # each architecture and each habit of padding once
BASES = [
    pytest.param((a, p), marks=[] if (a, p) in QUICK else pytest.mark.slow, id=f"{a}-{p}")
    for a in ARCHITECTURES
    for p in PADS
]


@pytest.fixture(scope="module", params=BASES)
def exported(request, tmp_path_factory):
    """A LoraGAN after four steps, and its export, moved after it was written."""
    gan = trained_gan(base_folder(*request.param))
    folder = tmp_path_factory.mktemp("export")
    export(gan, folder / "first")
    (folder / "first").rename(folder / "moved")
    return gan, folder / "moved", request.param[1]


def generator_logits(gan, prompts):
    """The generator's logits at every token of each prompt, as the library computes them."""
    encoded = gan._encode(prompts)
    with torch.no_grad(), gan.players.use_adapter("generator"):
        logits = prompt_logits(gan, encoded)
    return [logits[row, -len(ids) :] for row, ids in enumerate(encoded)]


def near(theirs, ours):
    return (theirs - ours).abs().max() < 1e-5 * max(1, ours.abs().max())


def stock_scores(model, tokenizer, eos_id, prompts=ASKED, answers=ANSWERS):
    """As a user scores: stock tokenizer, right-padded batch, pad id and mask as the tokenizer gives them."""
    rows = [
        tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"] + [eos_id]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert (batch["attention_mask"][:, 0] == 1).all(), "positions are counted from the left: padding belongs right"
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0]


# --- stock clients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "client"), [("generator", AutoPeftModelForCausalLM), ("generator-merged", AutoModelForCausalLM)]
)
def test_stock_clients_open_the_generator(exported, part, client):
    gan, folder, _ = exported
    stock, tokenizer = client.from_pretrained(folder / part).eval(), AutoTokenizer.from_pretrained(folder / part)
    base = AutoModelForCausalLM.from_pretrained(gan.players.base.path).eval()
    for prompt, ours in zip(PROMPTS, generator_logits(gan, PROMPTS), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs, untrained = stock(input_ids=ids).logits[0], base(input_ids=ids).logits[0]
        assert near(theirs, ours)
        assert (theirs - untrained).abs().max() > 1e-2, "training moved nothing: the comparison would show nothing"


@pytest.mark.parametrize("part", ["discriminator", "discriminator-merged"])
def test_stock_clients_open_the_discriminator_and_serve_batches(exported, part):
    gan, folder, pad = exported
    tokenizer = AutoTokenizer.from_pretrained(folder / part)
    if part == "discriminator":
        stock = AutoPeftModelForSequenceClassification.from_pretrained(folder / part, num_labels=1)
        if pad == "none":  # the base's config has none; the card says so
            stock.config.pad_token_id = tokenizer.pad_token_id
    else:
        stock = AutoModelForSequenceClassification.from_pretrained(folder / part)
        assert stock.config.pad_token_id == tokenizer.pad_token_id
        assert (stock.config.num_labels, stock.config.problem_type) == (1, "regression")
        assert stock.config.id2label == {0: "reward"}
    ours = torch.tensor(gan.score(ASKED, ANSWERS))
    assert ours.std() > 1e-2, "a discriminator that says the same of everything shows nothing"
    assert (ours - stock_scores(stock, tokenizer, gan.players.base.eos_ids[0])).abs().max() < 1e-5


def test_the_merged_generator_generates_what_the_adapter_does(exported):
    gan, folder, _ = exported
    config = GenerationConfig.from_pretrained(folder / "generator-merged")
    assert config.eos_token_id == gan.players.lm.generation_config.eos_token_id
    stock = AutoModelForCausalLM.from_pretrained(folder / "generator-merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "generator-merged")
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = stock.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == gan.generate(prompt, temperature=0)[0]


def test_the_generation_config_is_the_bases(tmp_path):
    gan = small_gan(base_folder("qwen2", eos_ids=2))
    export(gan, tmp_path / "out", parts=("generator-merged",))
    ours = GenerationConfig.from_pretrained(base_folder("qwen2", eos_ids=2)).to_diff_dict()
    assert len(ours["eos_token_id"]) == 2
    assert GenerationConfig.from_pretrained(tmp_path / "out" / "generator-merged").to_diff_dict() == ours


def test_every_card_is_valid_and_its_code_runs(exported, monkeypatch, capsys):
    """The code of each card, run as it stands beside the folders it names; the discriminator's equals gan.score."""
    gan, folder, _ = exported
    monkeypatch.chdir(folder)
    for part in PARTS:
        card = ModelCard.load(folder / part / "README.md")
        merged, generator = part.endswith("-merged"), part.startswith("generator")
        assert card.data.library_name == ("transformers" if merged else "peft")
        assert card.data.pipeline_tag == ("text-generation" if generator else "text-classification")
        assert card.data.base_model is None, "the base is a folder: a path is no base_model the hub accepts"
        assert card.data.license is None and "lora-gan" in card.data.tags
        assert str(base_folder()).rpartition("/")[0] not in card.text, "whose folder the base lay in is private"
        names = {}
        exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
        if not generator:
            ours = torch.tensor(gan.score(ASKED, ANSWERS))
            assert (ours - torch.tensor(names["score"](ASKED, ANSWERS))).abs().max() < 1e-5
    assert len(capsys.readouterr().out.splitlines()) >= len(PARTS)


def test_the_cards_code_knows_tokenizers_that_end_every_text_and_chats(tmp_path, monkeypatch):
    ending = AutoTokenizer.from_pretrained(base_folder())
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, ending.eos_token_id)]
    )
    chatting = AutoTokenizer.from_pretrained(base_folder("llama"))
    chatting.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}: {% endif %}{% if loud %}!{% endif %}"
    )
    cases = {
        "ending": (small_gan(processing_class=ending), ["Hello world", "food[French]"]),
        "chatting": (
            small_gan(base_folder("llama"), processing_class=chatting, chat_template_kwargs={"loud": True}),
            [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "The cat"}]],
        ),
    }
    for name, (gan, prompts) in cases.items():
        for _ in range(3):
            gan.step(prompts)
        export(gan, tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        for part in PARTS:
            text = (tmp_path / name / part / "README.md").read_text()
            names = {}
            exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
            if part.startswith("discriminator"):
                ours = torch.tensor(gan.score(prompts, ["text", LONG]))
                assert ours.std() > 1e-3
                assert (ours - torch.tensor(names["score"](prompts, ["text", LONG]))).abs().max() < 1e-5


def test_the_text_classification_pipeline_shows_the_reward_itself(exported):
    gan, folder, _ = exported
    ours = torch.tensor(gan.score(PROMPTS, ["text"] * 4))
    tokenizer = AutoTokenizer.from_pretrained(folder / "discriminator-merged")
    stock = pipeline("text-classification", str(folder / "discriminator-merged"), tokenizer=tokenizer, batch_size=4)
    shown = stock([prompt + "text" + EOS for prompt in PROMPTS])
    joined = [
        gan.players.base.tokenizer(prompt + "text")["input_ids"]
        == gan._encode([prompt])[0] + response_ids(gan, "text")[:-1]
        for prompt in PROMPTS
    ]
    assert any(joined)
    for mine, theirs, same in zip(ours, shown, joined, strict=True):
        assert theirs["label"] == "reward"
        assert not same or abs(mine - theirs["score"]) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:stock transformers and PEFT cannot")
@pytest.mark.parametrize("name", [*BASES_OF_ALL_KINDS, *OTHER_BASES])
def test_any_base_is_merged(name, tmp_path):
    """Experts too, whose fused weights carry several adapters; no pad token, so that batches need the classifier's."""
    gan = gan_of(name, "none", learning_rate=1e-2, disc_learning_rate=1e-2)
    prompts, answers = MANY[:3], ["the cat", "a red tree and", "dog"]
    for _ in range(3):
        gan.step(prompts)
    if name in WITHOUT_CLASSIFIER:
        with pytest.raises(ValueError, match="no sequence classifier.*leave 'discriminator-merged' out of parts"):
            export(gan, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        export(gan, tmp_path / "out", parts=("generator", "generator-merged", "discriminator"))
    else:
        export(gan, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "generator-merged").eval()
    for ids, ours in zip(gan._encode(prompts), generator_logits(gan, prompts), strict=True):
        with torch.no_grad():
            assert near(stock(input_ids=torch.tensor([ids])).logits[0], ours)
    if name not in WITHOUT_CLASSIFIER:
        ours = torch.tensor(gan.score(prompts, answers))
        assert ours.std() > 1e-3
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "discriminator-merged")
        # The tokenizer as it was made: for some folders transformers takes a class of its own, which knows no words.
        theirs = stock_scores(stock, scoring_tokenizer(gan.players.base), gan.players.base.eos_ids[0], prompts, answers)
        assert (ours - theirs).abs().max() < 1e-5


# --- what is written ------------------------------------------------------------------------------------------------


def test_everything_is_safetensors_and_nothing_in_memory_changes(tmp_path):
    gan = trained_gan()
    before, scores = copies(gan.players.lm.state_dict().values()), gan.score(ASKED, ANSWERS)
    heads, dtype, playing = gan.players.heads_MH.detach().clone(), gan.players.lm.dtype, gan.players.active
    export(gan, tmp_path / "out", dtype="float16")
    after = list(gan.players.lm.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(heads, gan.players.heads_MH) and gan.players.lm.dtype == dtype
    assert gan.players.active == playing and gan.score(ASKED, ANSWERS) == scores
    assert all(parameter.requires_grad for parameter in gan.players.parameters("generator"))
    files = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    for part in PARTS:
        name = "model.safetensors" if part.endswith("-merged") else "adapter_model.safetensors"
        tensors = load_file(tmp_path / "out" / part / name)
        assert all(tensor.dtype == torch.float16 for tensor in tensors.values()) == part.endswith("-merged")
    gan.step(PROMPTS[:2], TARGETS[:2])  # and training goes on


def test_merged_weights_equal_base_plus_scaled_product_of_the_adapter():
    """By hand: W + alpha/r · B·A, Conv1D's transposed; a layer without an adapter as it was."""
    gan = trained_gan()
    merged = merged_weights(gan.players, "discriminator", torch.float32)
    base = dict(AutoModelForCausalLM.from_pretrained(gan.players.base.path).state_dict())
    assert merged.keys() == base.keys()
    layer = gan.players.lm.transformer.h[1].mlp.c_fc
    product = layer.lora_B["discriminator"].weight @ layer.lora_A["discriminator"].weight
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.allclose(merged[name], base[name] + (8 / 4) * product.T, atol=1e-6)
    assert not torch.allclose(merged[name], base[name], atol=1e-4)
    assert torch.equal(merged["transformer.wte.weight"], base["transformer.wte.weight"])


@pytest.mark.parametrize("field", ["use_dora", "use_rslora"])
def test_other_kinds_of_adapter_are_merged_and_named(field, tmp_path):
    gan = trained_gan(
        base_folder("qwen2"),
        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], **{field: True}),
        lora_r=16, lora_alpha=32,
    )  # fmt: skip
    export(gan, tmp_path / "out", parts=("generator-merged",))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "generator-merged").eval()
    for ids, ours in zip(gan._encode(PROMPTS), generator_logits(gan, PROMPTS), strict=True):
        with torch.no_grad():
            theirs = stock(input_ids=torch.tensor([ids])).logits[0]
        assert near(theirs, ours)
    text = (tmp_path / "out" / "generator-merged" / "README.md").read_text()
    kind = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}[field]
    assert f"{kind}, r 3, alpha 6, on `down_proj`, `q_proj`" in text


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_with_an_adapter_of_its_own_is_untied(tmp_path):
    gan = trained_gan(
        base_folder("qwen2"), peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]), lora_r=16, lora_alpha=32
    )
    assert gan.players.lm.config.tie_word_embeddings
    export(gan, tmp_path / "out", parts=("generator-merged",))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "generator-merged").eval()
    for ids, ours in zip(gan._encode(PROMPTS), generator_logits(gan, PROMPTS), strict=True):
        with torch.no_grad():
            theirs = stock(input_ids=torch.tensor([ids])).logits[0]
        assert near(theirs, ours)
    assert gan.players.lm.config.tie_word_embeddings, "the base in memory is as it was"


@pytest.mark.parametrize("spare", [0, 3])
def test_a_base_without_any_pad_token_gets_one_of_its_own(spare, tmp_path):
    """GPT-2's case: every row of the embedding is a token, and the only special one ends texts. And Qwen's: rows to
    spare, pad token = end of text, nothing in the config."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([EOS, *WORDS])}, unk_token=EOS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=EOS, pad_token=EOS if spare else None, padding_side="left"
    )
    model = random_model("gpt2", len(tokenizer) + spare, 0, None)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    prompts, answers = ["the cat sat", "a dog", "red and big"], ["on the mat", "ran", "then it saw a new old house"]
    gan = small_gan(tmp_path / "base")
    for _ in range(3):
        gan.step(prompts)
    export(gan, tmp_path / "out")
    ours = torch.tensor(gan.score(prompts, answers))
    for part, client in (
        ("discriminator", AutoPeftModelForSequenceClassification),
        ("discriminator-merged", AutoModelForSequenceClassification),
    ):
        stock = client.from_pretrained(tmp_path / "out" / part, num_labels=1)
        padder = AutoTokenizer.from_pretrained(tmp_path / "out" / part)
        assert padder.pad_token_id == len(tokenizer) and padder.padding_side == "right"
        assert stock.get_input_embeddings().num_embeddings == len(tokenizer) + (spare or 1)
        if part == "discriminator":
            stock.config.pad_token_id = padder.pad_token_id
        assert (ours - stock_scores(stock, padder, 0, prompts, answers)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "generator").pad_token_id == (0 if spare else None)
    assert gan.players.base.tokenizer.padding_side == "left", "the tokenizer in memory is as it was"


def test_half_precision_rounds_once(tmp_path):
    """bfloat16 of the sum in float32, not the sum of two bfloat16 numbers."""
    gan = trained_gan()
    export(gan, tmp_path / "out", parts=("generator-merged",), dtype=torch.bfloat16)
    layer = gan.players.lm.transformer.h[0].attn.c_attn
    product = layer.lora_B["generator"].weight @ layer.lora_A["generator"].weight
    exact = (layer.base_layer.weight + (8 / 4) * product.T).detach()
    written = load_file(tmp_path / "out" / "generator-merged" / "model.safetensors")[
        "transformer.h.0.attn.c_attn.weight"
    ]
    assert (
        written == exact.bfloat16()
    ).float().mean() > 0.999  # a sum on the edge between two numbers may go either way
    assert read_json(tmp_path / "out" / "generator-merged" / "config.json")["dtype"] == "bfloat16"


def test_merged_weights_are_by_default_in_the_dtype_of_the_base_here(tmp_path):
    gan = trained_gan(steps=2, dtype="bfloat16")
    export(gan, tmp_path / "out")
    for part in ("generator-merged", "discriminator-merged"):
        weights = load_file(tmp_path / "out" / part / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    ours = torch.tensor(gan.score(ASKED, ANSWERS))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "discriminator-merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "discriminator-merged")
    assert (ours - stock_scores(stock, tokenizer, gan.players.base.eos_ids[0])).abs().max() < 0.1 * ours.std()


def test_the_export_of_a_checkpoint_holds_the_same_weights(tmp_path):
    gan = trained_gan()
    saved = gan.save_checkpoint(ckpt_dir=tmp_path / "run")
    export(LoraGAN.from_checkpoint(saved), tmp_path / "out", parts=["discriminator", "generator"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"discriminator", "generator", "export.json"}
    ours = torch.tensor(gan.score(ASKED, ANSWERS))
    stock = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out" / "discriminator", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "discriminator")
    assert (ours - stock_scores(stock, tokenizer, gan.players.base.eos_ids[0])).abs().max() < 1e-5


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_former_export_is_replaced_whole(tmp_path):
    gan = small_gan()
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    assert export(gan, out, parts=("generator", "discriminator")) == out
    export(gan, out, parts=("discriminator",))
    assert {path.name for path in out.iterdir()} == {"discriminator", "export.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half-written stays"


def test_what_no_export_wrote_is_never_replaced(tmp_path):
    gan = small_gan()
    run = gan.save_checkpoint(ckpt_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="not empty.*'manifest.json'.*new or empty folder, or an earlier export"):
        export(gan, run)
    export(gan, tmp_path / "out", parts=("generator",))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty.*'notes.txt'"):
        export(gan, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "like" / "generator").mkdir(parents=True)
    with pytest.raises(ValueError, match="no export.json"):
        export(gan, tmp_path / "like")
    with pytest.raises(ValueError, match="is a file"):
        export(gan, tmp_path / "out" / "notes.txt")


def test_an_export_that_fails_leaves_the_former_one_and_nothing_else(tmp_path, monkeypatch):
    gan = small_gan()
    export(gan, tmp_path / "out", parts=("generator",))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr("lora_gan.export.exporting._classifier", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(gan, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("generator", "merged")}, "parts=.*merged.*generator-merged"),
        ({"parts": ()}, "parts=.*one or more"),
        ({"dtype": "int8"}, "dtype='int8' is not accepted.*float32, bfloat16, float16"),
        ({"evaluation": {"generator": 0.5}}, "evaluation= must be a result of gan.evaluate"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub='a/b/c' is not accepted: it must be USER/NAME"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(small_gan(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_quantized_base_is_not_merged(tmp_path):
    """Told by the mark that transformers puts on such a model; no quantizer runs here."""
    gan = small_gan()
    gan.players.lm.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized base.*parts="):
        export(gan, tmp_path / "out")
    export(gan, tmp_path / "out", parts=("generator", "discriminator"))


# --- what the card says ---------------------------------------------------------------------------------------------


def cards(folder):
    return {path.parent.name: path.read_text(encoding="utf-8") for path in Path(folder).glob("*/README.md")}


def test_the_card_tells_the_run(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"), query_rate=0.5, seed=7, reward=None, reward_funcs=[worth])
    records = gan.fit(ROWS, steps=3, progress=False)
    judged = gan.evaluate(ROWS)
    export(gan, tmp_path / "out", evaluation=judged)
    for part, text in cards(tmp_path / "out").items():
        assert "| steps | 3 |" in text and "| reward calls | 12 in training, 4 in evaluation |" in text
        assert "| true reward | `worth` |" in text and "| seed | 7 |" in text
        assert "query rate 0.5" in text
        assert f"| disc_loss | {records[-1]['disc_loss']:.6g} |" in text
        assert f"{judged['metrics']['true_reward']['mean']:.3f} [" in text and "over 4 rows" in text
        assert "no evaluation" not in text and str(tmp_path) not in text, part
        assert '"query_rate": 0.5' in text and '"num_generations": 4' in text


def worth(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def test_what_is_not_known_is_left_out(tmp_path):
    """Nothing was trained, and the folder holds another run's metrics and options."""
    run = tmp_path / "run"
    small_gan(output_dir=str(run)).fit(ROWS, steps=2, progress=False)
    (run / "train.yaml").write_text("data: secret/pairs\nreward: chrf\n")
    gan = small_gan(output_dir=str(run))
    del gan.compute_reward  # the default, which nobody asked
    export(gan, tmp_path / "out")
    for text in cards(tmp_path / "out").values():
        assert "secret" not in text and "chrf" not in text and "true reward |" not in text
        assert "Last logged metrics" not in text and "## Evaluation" not in text
        assert "No training step was taken" in text and "no evaluation" in text
    assert "It was not trained" in cards(tmp_path / "out")["discriminator"]
    for _ in range(2):  # as many steps as the other run, and fewer rewards
        gan.step(PROMPTS[0], train_disc=False, adversarial=True)
    export(gan, tmp_path / "out")
    assert "| steps | 2 |" in cards(tmp_path / "out")["generator"]
    for text in cards(tmp_path / "out").values():
        assert "secret" not in text and "Last logged metrics" not in text


def test_the_reward_of_the_run_is_named_not_the_one_set_now(tmp_path):
    gan = small_gan(
        output_dir=str(tmp_path / "run"), reward=None, reward_funcs=[worth, brevity], reward_weights=[1.0, 0.5]
    )
    gan.fit(ROWS, steps=2, progress=False)
    export(gan, tmp_path / "out", parts=("generator",))
    assert "| true reward | `worth`, `brevity` × 0.5 |" in cards(tmp_path / "out")["generator"]
    reopened = LoraGAN.from_checkpoint(tmp_path / "run")  # the default reward is set, which this run never asked
    export(reopened, tmp_path / "out", parts=("generator",))
    assert "| true reward | `worth`, `brevity` |" in cards(tmp_path / "out")["generator"]


def brevity(response, target):
    return -float(len(response))


def test_a_run_of_the_command_line_names_its_data_and_reward(tmp_path):
    run = tmp_path / "run"
    gan = small_gan(output_dir=str(run))
    gan.fit(ROWS, steps=2, progress=False)
    (run / "train.yaml").write_text(
        f"data: someone/pairs\nreward: [chrf, {{name: {tmp_path}/r.py:f, weight: 2, api_key: private}}]\n"
    )
    export(LoraGAN.from_checkpoint(run), tmp_path / "out", parts=("generator",))
    card = ModelCard.load(tmp_path / "out" / "generator" / "README.md")
    assert card.data.datasets == ["someone/pairs"] and "| data | `someone/pairs` |" in card.text
    assert "| true reward | `chrf`, `r.py:f` × 2 |" in card.text and str(tmp_path) not in card.text
    assert "private" not in card.text
    (run / "train.yaml").write_text(f"data: {tmp_path}/pairs.csv\n")
    export(LoraGAN.from_checkpoint(run), tmp_path / "out", parts=("generator",))
    card = ModelCard.load(tmp_path / "out" / "generator" / "README.md")
    assert card.data.datasets is None and "| data | `pairs.csv` |" in card.text


def test_a_base_of_the_hub_is_named_in_the_metadata(tmp_path):
    gan = small_gan()
    object.__setattr__(gan.players.base, "path", "someone/small-gpt2")
    export(gan, tmp_path / "out")
    for part in PARTS:
        card = ModelCard.load(tmp_path / "out" / part / "README.md")
        assert card.data.base_model == "someone/small-gpt2" and "a local folder of the machine" not in card.text
    config = read_json(tmp_path / "out" / "generator" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "someone/small-gpt2"


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub's client with its own signatures and nothing behind them; what was asked of it is recorded."""
    api = create_autospec(HfApi, instance=True)
    made = lambda repo_id: SimpleNamespace(repo_id=repo_id)  # noqa: E731
    api.create_repo.side_effect = lambda repo_id, **_: made(repo_id)
    api.uploaded = {}
    api.upload_folder.side_effect = lambda *, folder_path, repo_id, **_: api.uploaded.update(
        {repo_id: {path.name for path in Path(folder_path).iterdir()}}
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_not_a_real_one")
    return api


def test_each_part_is_uploaded_as_a_model_of_its_own(hub, tmp_path):
    export(trained_gan(steps=1), tmp_path / "out", push_to_hub="someone/pairs", private=True)
    assert set(hub.uploaded) == {f"someone/pairs-{part}" for part in PARTS}
    for call in hub.create_repo.call_args_list:
        assert call.kwargs["private"] is True and call.kwargs["exist_ok"] is True
    for part in PARTS:
        weights = "model.safetensors" if part.endswith("-merged") else "adapter_model.safetensors"
        assert {weights, "README.md", "tokenizer.json"} <= hub.uploaded[f"someone/pairs-{part}"]
        text = (tmp_path / "out" / part / "README.md").read_text()
        assert f"from_pretrained('someone/pairs-{part}'" in text, "the card loads it by its name on the hub"


def test_an_upload_that_fails_says_that_the_export_is_there_and_goes_on_later(hub, tmp_path):
    hub.upload_folder.side_effect = OSError("connection reset")
    with pytest.raises(ValueError, match="someone/x-generator could not be uploaded: connection reset.*complete in"):
        export(small_gan(), tmp_path / "out", parts=("generator",), push_to_hub="someone/x")
    hub.upload_folder.side_effect = None
    push(tmp_path / "out", "someone/x")
    assert hub.upload_folder.call_args.kwargs["folder_path"] == tmp_path / "out" / "generator"
    with pytest.raises(ValueError, match="is not an export"):
        push(tmp_path, "someone/x")


def test_without_a_token_nothing_is_computed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token for the hub: log in with `hf auth login`, or set HF_TOKEN"):
        export(small_gan(), tmp_path / "out", push_to_hub="someone/x")
    assert not list(tmp_path.iterdir()) and not hub.create_repo.called
