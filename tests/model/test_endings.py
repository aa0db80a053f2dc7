"""How a response ends: which ids stop sampling, and which id closes a text.

Oracles: the published facts of each family (families.py), stock apply_chat_template, and predictions made in training.
"""

import copy

import pytest
import torch
from families import FAMILIES, family_folder
from helpers import EOS, OTHER_EOS, base_folder, response_ids, small_gan
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan import LoraGAN, tiny
from lora_gan.config import Config
from lora_gan.data import Row
from lora_gan.model.base import load_base
from lora_gan.model.encoding import Encoder

HELLO = "Translate English to French: Hello world"
USER = [{"role": "user", "content": "Hello world"}]


def size(response, target):
    return float(len(response)) / 20


def opened(folder, **settings):
    """A base and its encoder, without adapters: quicker than a LoraGAN."""
    config = Config(max_completion_length=6, **settings)
    base = load_base(folder, None, config)
    return base, Encoder(base, config)


@pytest.mark.parametrize("ends", [[2, 1], [1, 2], [7, 2, 1], 1])
def test_the_order_of_a_list_of_end_tokens_changes_no_score(ends):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny.PATH), AutoModelForCausalLM.from_pretrained(tiny.PATH)
    model.generation_config.eos_token_id = ends
    gan = LoraGAN(model, processing_class=tokenizer, reward=size, max_completion_length=24, disc_learning_rate=2e-3)
    for _ in range(4):
        gan.step(prompt=HELLO, train_gen=False)
    out = gan.step(prompt=HELLO, train_gen=False, train_disc=False)
    scores = gan.score([HELLO] * 8, out["responses"])
    assert out["pred_rewards"] == pytest.approx(scores, abs=1e-5)
    assert max(scores) - min(scores) > 0.05, "scores that are all alike show nothing"


def test_the_tokenizers_end_token_stops_and_closes():
    tokenizer, model = AutoTokenizer.from_pretrained(tiny.PATH), AutoModelForCausalLM.from_pretrained(tiny.PATH)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    model.resize_token_embeddings(len(tokenizer))
    gan = LoraGAN(model, processing_class=tokenizer, reward=size)
    assert gan.players.base.eos_ids == (2304, 1)
    assert response_ids(gan, "Bonjour")[-1] == 2304


def test_without_a_tokenizers_end_token_the_generation_configs_first_closes():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.eos_token = None
    other = tokenizer.convert_tokens_to_ids(OTHER_EOS)
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    model.generation_config.eos_token_id = [other, 0]
    gan = small_gan(model, processing_class=tokenizer)
    assert gan.players.base.eos_ids == (other, 0)
    assert response_ids(gan, "by")[-1] == other
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="names no end-of-text token"):
        small_gan(model, processing_class=tokenizer)


def test_an_id_without_a_row_is_no_end():
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    model.generation_config.eos_token_id = [0, 99_999]
    gan = small_gan(model, processing_class=AutoTokenizer.from_pretrained(base_folder()))
    assert gan.players.base.eos_ids == (0,)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ends_of_published_models(name):
    family = FAMILIES[name]
    base, encoder = opened(family_folder(name))
    ids = {token: base.tokenizer.convert_tokens_to_ids(token) for token in family.stops}
    assert {ids[token] for token in family.stops} <= set(base.eos_ids)
    assert base.eos_ids[0] == base.tokenizer.convert_tokens_to_ids(family.plain_closing)
    assert encoder.closing_id(Row("the cat sat on")) == base.eos_ids[0]
    if family.has_template:
        assert encoder.closing_id(Row(USER)) == base.tokenizer.convert_tokens_to_ids(family.closing)
        assert encoder.closing_id(Row(USER)) in base.eos_ids
        written = base.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
        assert encoder.closing_id(Row(written)) == encoder.closing_id(Row(USER)), "a rendered prompt is a chat"


TEMPLATES = {  # name: (a template, what closes a chat response on a base whose tokenizer ends by EOS)
    "none is written": ("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", EOS),
    "no token": ("{% for m in messages %}{{ m.content }}<end>{% endfor %}", EOS),
    "after space": ("{% for m in messages %}{{ m.content }} \n" + OTHER_EOS + "\n{% endfor %}", OTHER_EOS),
    "the next message opens": (
        "{% for m in messages %}" + OTHER_EOS + "{{ m.role }}\n{{ m.content }}{% endfor %}", OTHER_EOS,
    ),
    "two": ("{% for m in messages %}{{ m.content }}" + OTHER_EOS + EOS + "{% endfor %}", OTHER_EOS),
    "refuses": ("{{ raise_exception('no') }}", EOS),
    "trims": ("{% for m in messages %}{{ m.content | trim }}" + OTHER_EOS + "{% endfor %}", OTHER_EOS),
    "parts": ("{% for m in messages %}[{{ m.content }}]" + OTHER_EOS + "{% endfor %}", OTHER_EOS),
}  # fmt: skip


@pytest.mark.parametrize("given", ["the tokenizer's", "the run's"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_after_an_answer_closes_it(name, given):
    template, closing = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(base_folder(eos_ids=2))
    settings = {"chat_template_kwargs": {"chat_template": template}}
    if given == "the tokenizer's":
        tokenizer.chat_template, settings = template, {}
    config = Config(max_completion_length=6, **settings)
    base = load_base(base_folder(eos_ids=2), tokenizer, config)
    assert Encoder(base, config).closing_id(Row(USER)) == tokenizer.convert_tokens_to_ids(closing)


def test_a_base_with_one_named_end_learns_the_templates():
    """Nobody but the template names the id: it stops sampling, and stock generate() is told of it on export."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    other = tokenizer.convert_tokens_to_ids(OTHER_EOS)
    assert small_gan(processing_class=tokenizer).players.base.eos_ids == (0,)
    tokenizer.chat_template = {"default": "{{ messages[-1].content }}", "tool_use": TEMPLATES["after space"][0]}
    gan = small_gan(processing_class=tokenizer)
    assert gan.players.base.eos_ids == (0, other), "named templates count, too"
    assert gan.players.encoder.closing_id(Row(USER)) == 0
    assert gan.players.encoder.closing_id(Row(USER, None, {"tools": [{"type": "function"}]})) == other


def test_a_rows_own_template_must_end_as_the_run_does():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.chat_template = "{{ messages[-1].content }}"
    gan = small_gan(processing_class=tokenizer)
    row = Row(USER, None, {"chat_template_kwargs": {"chat_template": TEMPLATES["two"][0]}})
    with pytest.raises(ValueError, match="closes a message with '<|stop|>'.*chat_template_kwargs"):
        gan.players.encoder.closing_id(row)


# --- texts keep their tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"the cat{OTHER_EOS}", f"the cat{EOS}", f"the {OTHER_EOS}{EOS} cat", f"{EOS}{EOS}"])
def test_end_tokens_in_a_plain_prompt_stay(text):
    gan = small_gan(base_folder(eos_ids=2))
    assert gan._encode([text]) == [gan.players.base.tokenizer(text)["input_ids"]]


def test_what_the_tokenizer_puts_behind_every_text_is_not_read_as_part_of_a_prompt():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    plain = [tokenizer(text)["input_ids"] for text in ("the cat", f"the cat{EOS}")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    assert tokenizer("the cat")["input_ids"] == [*plain[0], 0]
    gan = small_gan(processing_class=tokenizer)
    assert gan._encode(["the cat", f"the cat{EOS}"]) == plain, "one end is the tokenizer's, the other the text's"


def test_decoding_deletes_the_end_alone():
    gan = small_gan(base_folder(eos_ids=2), skip_special_tokens=False)
    tokenizer = gan.players.base.tokenizer
    ids = tokenizer(f"the {OTHER_EOS} cat {EOS}sat")["input_ids"]
    assert gan.players.encoder.decode([*ids, 0]) == f"the {OTHER_EOS} cat {EOS}sat"
    assert gan.players.encoder.decode(ids) == f"the {OTHER_EOS} cat {EOS}sat"
    assert gan.players.encoder.decode([]) == gan.players.encoder.decode([0]) == ""


def test_an_end_token_that_the_tokenizer_does_not_count_as_special_stays_inside_a_text():
    """Id 7 may be in generation_config's list and yet be an ordinary token."""
    model = AutoModelForCausalLM.from_pretrained(base_folder("gpt2", words=True))
    tokenizer = AutoTokenizer.from_pretrained(base_folder("gpt2", words=True))
    cat = tokenizer.convert_tokens_to_ids("cat")
    model.generation_config.eos_token_id = [0, cat]
    gan = small_gan(model, processing_class=tokenizer)
    ids = tokenizer("the cat sat")["input_ids"]
    assert gan.players.encoder.decode([*ids, 0]) == "the cat sat"
    assert gan._encode(["the cat"]) == [tokenizer("the cat")["input_ids"]]


@pytest.mark.parametrize("ends", [[], [OTHER_EOS]])
def test_a_text_that_has_its_end_gets_no_second_one(ends):
    gan = small_gan(base_folder(eos_ids=2))
    text = "the cat" + EOS
    assert response_ids(gan, text) == response_ids(gan, "the cat")
    inside = "the cat" + "".join(ends)
    assert response_ids(gan, inside)[-1] == 0 and response_ids(gan, inside).count(0) == 1


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.adds_bos])
def test_a_rendered_prompt_gets_no_second_begin_of_text(name):
    family = FAMILIES[name]
    base, encoder = opened(family_folder(name))
    bos = base.tokenizer.bos_token_id
    texts = [family.bos + "the cat", "the cat", f"the {family.bos}cat"]
    if family.has_template:
        texts.append(base.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True))
        assert encoder.prompt(Row(texts[-1])) == encoder.prompt(Row(USER)), "equal to the messages, token by token"
    for text in texts:
        ids = encoder.prompt(Row(text))
        assert ids[0] == bos and ids.count(bos) == text.count(family.bos) + (not text.startswith(family.bos)), text


def test_a_text_of_begin_tokens_alone_stays_a_prompt():
    base, encoder = opened(family_folder("llama-3"))
    assert encoder.prompt(Row(base.tokenizer.bos_token)) == [base.tokenizer.bos_token_id]
    with pytest.raises(ValueError, match="has no tokens"):
        encoder.prompt(Row(""))


def test_another_tokenizer_on_an_opened_base_brings_its_own_ends():
    base, _ = opened(base_folder())
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.eos_token = OTHER_EOS
    again = load_base(base, tokenizer, Config())
    assert again.eos_ids == (tokenizer.convert_tokens_to_ids(OTHER_EOS), 0) and base.eos_ids == (0,)
    assert torch.equal(again.model.get_input_embeddings().weight, base.model.get_input_embeddings().weight)
