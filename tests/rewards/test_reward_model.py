"""Classifier, Entailment and CosineReward on tiny random models, against the stock libraries."""

import random
import warnings

import numpy as np
import pytest
import torch
from helpers import base_folder, byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from lora_gan import LoraGAN, rewards
from lora_gan.data import Row
from lora_gan.rewards import Classifier, CosineReward, Entailment, RewardError, RewardUnavailable, score_parts

PROMPTS = ["where is the cat", "name it", "what is it , then", "say what the big red dog saw"]
RESPONSES = ["the cat sat on the mat", "dog", "a big red dog ran", ""]
WORDS = "the a cat dog sat ran on mat big red what is it where name say saw then , .".split()
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"


def bert_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=24,
    )  # fmt: skip


BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "initializer_range": 0.5, "vocab_size": 4 + len(WORDS),
}  # fmt: skip


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def seeded(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Made when asked for: bert (3 labels), toxic (2 independent labels), nli, reward (Llama, one output), nopad."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save(*make(name), tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def make(name):
    labels = {"bert": ["bad", "Fair", "good"], "toxic": ["toxic", "rude"], "nli": ["contradiction", "ENTAILMENT", "n"]}
    if name in labels:
        names = dict(enumerate(labels[name]))
        config = BertConfig(id2label=names, label2id={v: k for k, v in names.items()}, **BERT)
        if name == "toxic":
            config.problem_type = "multi_label_classification"
        return seeded(BertForSequenceClassification, config), bert_tokenizer()
    tokenizer = byte_tokenizer("llama" if name == "reward" else "gpt2", {"reward": "own", "nopad": "none"}[name])
    ids = {
        "vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.5,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    if name == "nopad":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=160, **ids)
        return seeded(GPT2ForSequenceClassification, config), tokenizer
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=160, **ids,
    )  # fmt: skip
    return seeded(LlamaForSequenceClassification, config), tokenizer


def stock(folder, texts, pairs=None, **options):
    """Logits of one row at a time, without padding, by stock transformers."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = []
    for i, text in enumerate(texts):
        pair = None if pairs is None else [pairs[i]]  # in a list: outside one, stock reads an empty text as no pair
        inputs = tokenizer([text], pair, return_tensors="pt", **options)
        if model.config.model_type in ("llama", "gpt2"):
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].double())
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------ classifier


def test_a_label_is_the_pipelines_probability(folders):
    for name, labels in (("bert", ["bad", "Fair", "good"]), ("toxic", ["toxic", "rude"])):
        expected = pipeline("text-classification", str(folders(name)), top_k=None, device="cpu")(RESPONSES)
        for number, label in enumerate(labels):
            wanted = [next(one["score"] for one in row if one["label"] == label) for row in expected]
            for given in (label, label.upper(), number):
                scores = Classifier(folders(name), label=given, device="cpu")(PROMPTS, RESPONSES)
                assert scores == pytest.approx(wanted, abs=1e-6) and all(type(score) is float for score in scores)
    assert len({round(score, 3) for score in scores}) > 1


def test_logits_and_their_sign(folders):
    logits = stock(folders("bert"), RESPONSES)
    classifier = Classifier(folders("bert"), label="good", output="logit", device="cpu")
    assert classifier(PROMPTS, RESPONSES) == pytest.approx(logits[:, 2].tolist(), abs=1e-5)
    lower = Classifier(folders("bert"), label="good", lower_is_better=True, device="cpu")
    expected = (-logits.softmax(-1)[:, 2]).tolist()
    assert lower(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reads", ["response", "text", "chat"])
def test_a_reward_model_gives_its_logit(folders, reads):
    folder = folders("reward")
    if reads == "chat":
        chats = [f"[user] {p} [assistant] {r} " for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        expected = stock(folder, chats, add_special_tokens=False)
    else:
        texts = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)] if reads == "text" else RESPONSES
        expected = stock(folder, texts)
    classifier = Classifier(folder, reads=reads, device="cpu")
    assert classifier(PROMPTS, RESPONSES) == pytest.approx(expected[:, 0].tolist(), abs=1e-5)


def test_chat_messages_reach_the_chat_template_whole(folders):
    classifier = Classifier(folders("reward"), reads="chat", device="cpu")
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "where is the cat"}]
    expected = stock(folders("reward"), ["[system] be kind [user] where is the cat [assistant] dog "],
                     add_special_tokens=False)  # fmt: skip
    parts = score_parts([classifier], [prompt], ["dog"], {})
    assert parts["classifier"] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
    assert classifier(["where is the cat"], [[{"role": "assistant", "content": "dog"}]]) == classifier(
        ["where is the cat"], ["dog"]
    )


def test_prompt_and_response_as_a_pair(folders):
    expected = stock(folders("bert"), PROMPTS, RESPONSES).softmax(-1)[:, 0]
    assert (expected - stock(folders("bert"), RESPONSES, PROMPTS).softmax(-1)[:, 0]).abs().max() > 1e-3  # order counts
    scores = Classifier(folders("bert"), label="bad", reads="pair", device="cpu")(PROMPTS, RESPONSES)
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "reward", "nopad"])
def test_a_score_does_not_depend_on_the_batch(folders, name):
    def scores(size, rows=slice(None)):
        classifier = Classifier(folders(name), label=0, batch_size=size, device="cpu")
        return classifier(PROMPTS[rows], RESPONSES[rows])

    alone = [scores(1, slice(i, i + 1))[0] for i in range(4)]
    for size in (1, 3, 16):
        assert scores(size) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == 4


def test_without_a_pad_token_stock_would_raise(folders):
    """What the test above would not see: that this base has no pad token, in the config or the tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folders("nopad"))
    with pytest.raises(ValueError, match="no padding token"):
        model(torch.zeros(2, 3, dtype=torch.long))
    expected = stock(folders("nopad"), RESPONSES[:3])  # an empty text has no tokens here
    assert Classifier(folders("nopad"), device="cpu")(PROMPTS[:3], RESPONSES[:3]) == pytest.approx(
        expected[:, 0].tolist(), abs=1e-5
    )
    eos = AutoTokenizer.from_pretrained(folders("nopad")).eos_token
    assert Classifier(folders("nopad"), device="cpu")(["p"], [""]) == pytest.approx(
        stock(folders("nopad"), [eos])[:, 0].tolist(), abs=1e-5
    )


def test_what_is_too_long_is_cut_and_said(folders):
    long, short = "the cat sat on the mat . " * 9, "the dog ran"
    response = Classifier(folders("bert"), label=0, device="cpu")
    expected = stock(folders("bert"), [long, short], truncation=True, max_length=24).softmax(-1)[
        :, 0
    ]  # the tokenizer's
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than the 24 tokens .* truncated at the end"):
        assert response(["p"] * 2, [long, short]) == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.warns(UserWarning, match="the 8 tokens"):
        scores = Classifier(folders("bert"), label=0, max_length=8, device="cpu")(["p"], [long])
    expected = stock(folders("bert"), [long], truncation=True, max_length=8).softmax(-1)[:, 0]
    assert scores == pytest.approx(expected.tolist(), abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response(["p"] * 2, [long, short])  # once is enough
        Classifier(folders("bert"), label=0, device="cpu")(["p"], [short])


def test_prompt_and_response_lose_the_prompts_beginning(folders):
    """What is cut from prompt + response must not be the response."""
    classifier = Classifier(folders("reward"), reads="text", max_length=12, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folders("reward"))
    prompt, response = "the cat sat on the mat " * 4, "a dog"
    ids = tokenizer(prompt + response)["input_ids"]
    kept = torch.tensor([[ids[0], *ids[-11:]]])  # the token that begins every text, and the last 11
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(folders("reward"))(kept).logits.item()
    with pytest.warns(UserWarning, match="truncated at the beginning"):
        assert classifier([prompt], [response]) == pytest.approx([expected], abs=1e-5)


def test_opened_at_the_first_score_and_without_a_trace(folders):
    classifier = Classifier(folders("bert"), label=0, device="cpu")
    assert classifier._lm is None and classifier([], []) == [] and classifier._lm is None

    def state():
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before, grad = state(), torch.is_grad_enabled()
    classifier(PROMPTS, RESPONSES)
    assert state() == before and torch.is_grad_enabled() == grad
    assert not classifier._lm.training and not any(p.requires_grad for p in classifier._lm.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"has several labels: set label= to one of 'bad' \(0\), 'Fair' \(1\), 'good' \(2\)"),
        ({"label": "toxic"}, r"has no label 'toxic': set label= to one of 'bad' \(0\)"),
        ({"label": 3}, "has no label 3"),
        ({"label": True}, "has no label True"),
        ({"label": 0, "reads": "chat"}, "has no chat template: use reads='pair' or reads='text'"),
    ],
)
def test_what_does_not_fit_the_model_is_said(folders, options, said):
    classifier = Classifier(folders("bert"), device="cpu", **options)
    for _ in range(2):  # and it is said each time
        with pytest.raises(ValueError, match=said):
            classifier(PROMPTS, RESPONSES)


def test_what_a_classifier_refuses(folders):
    with pytest.raises(ValueError, match="reads='both' is not accepted: .*response, pair, text, chat"):
        Classifier("x", reads="both")
    with pytest.raises(ValueError, match="output='odds'"):
        Classifier("x", output="odds")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Classifier("x", batch_size=0)
    chat = [[{"role": "user", "content": "hi"}]]
    with pytest.raises(RewardError, match="'classifier' raised ValueError.*for chat messages use reads='chat'"):
        score_parts([Classifier(folders("bert"), label=0, reads="pair", device="cpu")], chat, ["a"], {})


def test_what_is_no_classifier_is_unavailable(folders, tmp_path):
    for model, said in (
        (tmp_path / "absent", "there is no folder"),
        (tmp_path, "cannot open .* as a sequence-classification model"),
        ("no-owner/no-model-anywhere", "cannot open no-owner/no-model-anywhere"),
        (base_folder("llama"), r"is not a trained sequence-classification model: its weights lack score\.weight"),
    ):
        before = torch.get_rng_state()
        with pytest.raises(RewardUnavailable, match=said):
            score_parts([Classifier(model, label=0, device="cpu")], ["p"], ["r"], {})
        assert torch.equal(torch.get_rng_state(), before)  # the head that is missing was drawn, and left no trace


# ------------------------------------------------------------------------------------------------------ entailment


def test_entailment_is_the_probability_of_its_label(folders):
    expected = stock(folders("nli"), PROMPTS, RESPONSES).softmax(-1)[:, 1]
    for premise, columns in (
        ("source", {"source": PROMPTS}),
        ("prompt", {}),
        ("fact", {"fact": PROMPTS, "x": [0] * 4}),
    ):
        entailment = Entailment(folders("nli"), premise=premise, device="cpu")
        parts = score_parts([entailment], PROMPTS, RESPONSES, columns)
        assert parts == {"entailment": pytest.approx(expected.tolist(), abs=1e-6)}
    assert Entailment(folders("nli"), device="cpu", batch_size=1)(
        ["p"] * 3, RESPONSES[:3], source=[PROMPTS[0], None, PROMPTS[2]]
    ) == [pytest.approx(float(expected[0]), abs=1e-6), None, pytest.approx(float(expected[2]), abs=1e-6)]


def test_entailment_says_what_it_lacks(folders):
    entailment = Entailment(folders("nli"), device="cpu")
    with pytest.raises(ValueError, match=r"no column 'source' .*set premise= to one of prompt, target, fact"):
        entailment(["p"], ["r"], target=["t"], fact=["f"])
    with pytest.raises(ValueError, match="a premise must be text or None, not int: 3"):
        entailment(["p"], ["r"], source=[3])
    with pytest.raises(ValueError, match=r"has no label 'entailment': set label= to one of 'bad' \(0\)"):
        Entailment(folders("bert"), device="cpu")(["p"], ["r"], source=["s"])
    expected = stock(folders("bert"), ["the cat"], ["a dog"]).softmax(-1)[:, 2].tolist()
    other = Entailment(folders("bert"), label="good", device="cpu")
    assert other(["p"], ["a dog"], source=["the cat"]) == pytest.approx(expected, abs=1e-6)


def test_a_classifier_is_a_gans_true_reward(folders):
    entailment = Entailment(folders("nli"), premise="prompt", device="cpu")
    gan = LoraGAN(
        base_folder(), reward_funcs=[Classifier(folders("bert"), label="good", device="cpu"), entailment],
        num_generations=2, max_completion_length=4,
    )  # fmt: skip
    rows = [Row(prompt) for prompt in PROMPTS]
    totals, parts = gan.ask(rows, RESPONSES)
    good = stock(folders("bert"), RESPONSES).softmax(-1)[:, 2]
    entailed = stock(folders("nli"), PROMPTS, RESPONSES).softmax(-1)[:, 1]
    assert list(parts) == ["classifier", "entailment"]
    assert totals == pytest.approx((good + entailed).tolist(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- cosine


def test_cosine_takes_any_sentence_transformers_model(folders, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    save(seeded(BertModel, BertConfig(**BERT)), bert_tokenizer(), tmp_path / "bert")
    body = parts.Transformer(str(tmp_path / "bert"))
    SentenceTransformer(
        modules=[body, parts.Pooling(body.get_embedding_dimension())], device="cpu"
    ).save(str(tmp_path / "model"))  # fmt: skip
    vectors = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode
    a, b = vectors(RESPONSES[:3]).astype(float), vectors(PROMPTS[:3]).astype(float)
    expected = [x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]
    spec = {"name": "cosine", "model": str(tmp_path / "model"), "device": "cpu"}
    for reward in (CosineReward(tmp_path / "model", device="cpu"), rewards.from_spec(spec)):
        assert reward.batch(RESPONSES[:3], PROMPTS[:3]) == pytest.approx(expected, abs=1e-6)
    assert len({round(score, 3) for score in expected}) == 3
