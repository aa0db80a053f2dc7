"""Chat models as they are published: every promise of the core on every family of families.py.

What differs between families: which token closes a chat turn, which tokens stop sampling, who writes the begin-of-text
token, whether a pad token exists, and how text and tokens map to each other.

Oracles: the stock tokenizer and its chat template, stock transformers and PEFT on exported folders, the predictions
made in training, an uninterrupted run.
"""

import pytest
import torch
from families import (
    CHAT_FAMILIES,
    FAMILIES,
    MULTI_TURN,
    PREFIX,
    SINGLE,
    WITH_SYSTEM,
    family_folder,
    family_gan,
)
from helpers import differences, logits, player_state, read_json, rollout_of
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from lora_gan import LoraGAN
from lora_gan.data import Row
from lora_gan.export.exporting import export

ALL = list(FAMILIES)
QUICK = ("gemma-3", "phi-3", "qwen2.5-base")  # turn end second; three stop ids; turn end known to the template alone
HEAVY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CHAT_FAMILIES]
KINDS = [(name, "chat") for name in CHAT_FAMILIES] + [(name, "plain") for name in ALL]
VARIANTS = [
    pytest.param(name, dict(kwargs), id="-".join([name, *map(str, kwargs.values())]))
    for name in CHAT_FAMILIES
    for kwargs in FAMILIES[name].template_kwargs
]
TARGET = "Bonjour le monde"
ANSWERS = ["the rain", "", "a big red dog sat on the mat", "Bonjour le monde"]


def tokenizer_of(name, **options):
    return AutoTokenizer.from_pretrained(family_folder(name), **options)


def ids_of(tokenizer, tokens):
    return set(tokenizer.convert_tokens_to_ids(sorted(tokens)))


def closing_of(family, kind):
    return family.closing if kind == "chat" else family.plain_closing


def prompts_of(family, kind):
    return list(family.chat_prompts if kind == "chat" else family.plain_prompts)


def rendered(tokenizer, messages, *, tokenize=True, **options):
    """Stock rendering of a prompt, up to where the response begins."""
    continues = messages[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not continues, "continue_final_message": continues} | options
    text_or_ids = tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **options)
    return list(text_or_ids["input_ids"]) if tokenize else text_or_ids


def recorded(gan, monkeypatch):
    """Every sampling of a LoraGAN from here on: the ids of its prompts, and the roll-out."""
    samplings, sample = [], gan._sample

    def recording(prompts, *arguments, **options):
        samplings.append((prompts, sample(prompts, *arguments, **options)))
        return samplings[-1][1]

    monkeypatch.setattr(gan, "_sample", recording)
    return samplings


def judge_trained(gan, prompts, steps=3, **columns):
    """Train the discriminator until its predictions of these prompts differ."""
    for _ in range(steps):
        gan.step(prompts, train_gen=False, **columns)
    return gan


# --- the families themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_what_its_files_say(name):
    """Read by stock transformers, which may rebuild a tokenizer from its class instead of tokenizer.json."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    config, generation = (read_json(family_folder(name) / f"{kind}.json") for kind in ("config", "generation_config"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        family.bos, family.plain_closing, family.pad
    )  # fmt: skip
    begins = tokenizer("the cat")["input_ids"]
    without = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert begins == ([tokenizer.bos_token_id] if family.adds_bos else []) + without
    assert tokenizer.decode(without) == "the cat"
    named = set()
    for found, expected in ((config, family.config_eos), (generation, family.generation_eos)):
        ids = tokenizer.convert_tokens_to_ids(list(expected))
        assert found["eos_token_id"] == (ids if len(ids) > 1 else ids[0])
        named |= set(expected)
    assert family.stops == named | {family.plain_closing} | {family.closing} - {None}
    if family.has_template:
        both = rendered(tokenizer, [*SINGLE, {"role": "assistant", "content": TARGET}], tokenize=False,
                        continue_final_message=False)  # fmt: skip
        assert both.partition(TARGET)[2].lstrip(" ").startswith(family.closing)


# --- score ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.filterwarnings("ignore:the base has a chat template, and the prompts are plain")
def test_score_is_the_prediction_in_training(name, kind, monkeypatch):
    """Compared: responses that ended with the closing id of this kind of prompt and tokenize back to their ids."""
    family, prompts = FAMILIES[name], prompts_of(FAMILIES[name], kind)
    gan = judge_trained(family_gan(name, num_generations=24), prompts)
    assert _compared(gan, prompts, closing_of(family, kind), monkeypatch) >= 20


def test_score_is_the_prediction_in_training_without_thinking(monkeypatch):
    prompts = prompts_of(FAMILIES["qwen3"], "chat")[:3]
    gan = judge_trained(
        family_gan("qwen3", num_generations=24, chat_template_kwargs={"enable_thinking": False}), prompts
    )
    assert _compared(gan, prompts, "<|im_end|>", monkeypatch) >= 20


def _compared(gan, prompts, closing, monkeypatch):
    """Compare score() with a step's predictions, in one batch and alone; how many responses could be compared."""
    tokenizer = gan.players.base.tokenizer
    closing_id = tokenizer.convert_tokens_to_ids(closing)
    samplings = recorded(gan, monkeypatch)
    out = gan.step(prompts, train_gen=False, train_disc=False)
    sampled = samplings[-1][1]
    assert sum(out["responses"], []) == sampled.texts
    predicted = sum(out["pred_rewards"], [])
    pairs = []
    for row, (ids, text) in enumerate(zip(sampled.responses, sampled.texts, strict=True)):
        if ids == [*tokenizer(text, add_special_tokens=False)["input_ids"], closing_id]:
            pairs.append((prompts[sampled.group_B[row]], text, predicted[row]))
    theirs = [pair[2] for pair in pairs]
    assert torch.tensor(theirs).std() > 1e-2, "predictions that are all the same show nothing"
    batched = gan.score([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert batched == pytest.approx(theirs, abs=1e-5)
    for prompt, text, prediction in pairs[::3]:
        assert gan.score(prompt, text) == pytest.approx([prediction], abs=1e-5)
    return len(pairs)


# --- stop ids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_end_that_any_file_names_stops_sampling(name):
    family = FAMILIES[name]
    gan = family_gan(name)
    tokenizer = gan.players.base.tokenizer
    stops = ids_of(tokenizer, family.stops)
    assert set(gan.players.base.eos_ids) == stops
    seen = set()
    for ids in rollout_of(gan, prompts_of(family, "plain"), 100).responses:
        assert not stops & set(ids[:-1]), "nothing is sampled after an end"
        assert ids[-1] in stops or len(ids) == gan.config.max_completion_length
        seen.add(ids[-1])
    assert stops <= seen, "each of them was drawn, and ended its response"


@pytest.mark.parametrize("name", ALL)
def test_a_response_is_the_stock_text_of_its_tokens_without_the_end(name):
    family = FAMILIES[name]
    gan = family_gan(name)
    tokenizer = gan.players.base.tokenizer
    stops = ids_of(tokenizer, family.stops)
    sampled = rollout_of(gan, prompts_of(family, "plain"), 30)
    for ids, text in zip(sampled.responses, sampled.texts, strict=True):
        ids = ids[:-1] if ids[-1] in stops else ids
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
    if name == "qwen3":  # added tokens that are not special are text
        assert any("think>" in text for text in sampled.texts)


# --- plain prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_plain_prompt_keeps_every_token(name):
    """Tokens that stop sampling stay in a prompt, at its end too."""
    gan = family_gan(name)
    tokenizer = tokenizer_of(name)
    texts = prompts_of(FAMILIES[name], "plain")
    for stop in sorted(FAMILIES[name].stops):
        texts += [f"the cat{stop}", f"the cat{stop}{stop}", f"the cat{stop}a dog", f"the cat{stop}\n", f"{stop}the cat"]
    for text, ids in zip(texts, gan._encode(texts), strict=True):
        assert ids == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("name", ["llama-2", "gemma-3", "qwen2.5-base"])
def test_only_the_end_that_the_tokenizer_appends_is_removed(name):
    plain = tokenizer_of(name)
    appending = tokenizer_of(name, add_bos_token=FAMILIES[name].adds_bos, add_eos_token=True)
    gan = family_gan(name, processing_class=appending)
    for text in ("the cat", f"the cat{appending.eos_token}", f"the cat{appending.eos_token * 2}"):
        assert appending(text)["input_ids"] == [*plain(text)["input_ids"], appending.eos_token_id]
        assert gan._encode([text]) == [plain(text)["input_ids"]], text


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_a_rendered_prompt_begins_and_ends_as_its_messages_do(name, kwargs):
    """A text that the template rendered gets no second begin-of-text token, and the end of a chat turn: also one that
    ends within the assistant's answer."""
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    gan = family_gan(name, chat_template_kwargs=kwargs)
    prompts = prompts_of(family, "chat")
    written = [rendered(tokenizer, prompt, tokenize=False, **kwargs) for prompt in prompts]
    messages, texts = gan._encode(prompts), gan._encode(written)
    for prompt, text in zip(prompts, written, strict=True):
        assert gan.players.encoder.closing_id(Row(text)) == gan.players.encoder.closing_id(Row(prompt))
    assert messages == texts == [rendered(tokenizer, prompt, **kwargs) for prompt in prompts]
    if family.adds_bos:
        assert all(ids[0] == tokenizer.bos_token_id != ids[1] for ids in texts)
        written = tokenizer.bos_token + "the cat"
        assert gan._encode([written]) == [tokenizer(written, add_special_tokens=False)["input_ids"]]


# --- imitation ------------------------------------------------------------------------------------------------------


def imitated(gan, prompts, target, monkeypatch, **columns):
    """The ids of prompts and targets that an imitation step learns from."""
    seen, batch = [], gan.players.batch
    assert gan.players.packs is not None  # its trial lays out rows of its own, once

    def recording(prompts, responses, *arguments, **options):
        seen.append((prompts, responses))
        return batch(prompts, responses, *arguments, **options)

    monkeypatch.setattr(gan.players, "batch", recording)
    out = gan.step(prompts, [target] * len(prompts), train_disc=False, **columns)
    monkeypatch.undo()
    assert out["imitation_loss"] > 0
    return [pair for ids in seen for pair in zip(*ids, strict=True)]


def imitating_gan(name, **settings):
    return family_gan(name, **{"imitation_weight": 1.0, "reward_weight": 0.0, "beta": 0.0} | settings)


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_imitation_learns_what_the_template_writes(name, kwargs, monkeypatch):
    """Prompt and target are the stock rendering of the whole conversation, up to the token that closes the message.

    Llama-2's target ends with a space before </s>. Qwen3's target begins with an empty <think> block, unless the prompt
    already has one. The template also writes text after the closing token (a line break, Phi-3's <|endoftext|>), which
    no target includes.
    """
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    closing = tokenizer.convert_tokens_to_ids(family.closing)
    gan = imitating_gan(name, chat_template_kwargs=kwargs)
    prompts = [SINGLE, WITH_SYSTEM, MULTI_TURN]
    for messages, (prompt, target) in zip(prompts, imitated(gan, prompts, TARGET, monkeypatch), strict=True):
        whole = [*messages, {"role": "assistant", "content": TARGET}]
        whole = rendered(tokenizer, whole, continue_final_message=False, **kwargs)
        last = len(whole) - whole[::-1].index(closing)
        assert prompt == rendered(tokenizer, messages, **kwargs)
        assert target[-1] == closing
        assert prompt + target == whole[:last]


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_imitation_goes_on_with_a_message_that_the_prompt_begins(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    closing = tokenizer.convert_tokens_to_ids(FAMILIES[name].closing)
    ((prompt, target),) = imitated(imitating_gan(name), [PREFIX], " in the town", monkeypatch)
    whole = [*PREFIX[:-1], PREFIX[-1] | {"content": PREFIX[-1]["content"] + " in the town"}]
    whole = rendered(tokenizer, whole, continue_final_message=False)
    assert prompt == rendered(tokenizer, PREFIX)
    assert prompt + target == whole[: len(whole) - whole[::-1].index(closing)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:the base has a chat template, and the prompts are plain")
def test_imitation_of_a_plain_text_ends_as_the_tokenizer_ends_texts(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    prompts = prompts_of(FAMILIES[name], "plain")
    expected = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    expected.append(tokenizer.convert_tokens_to_ids(FAMILIES[name].plain_closing))
    for prompt, (ids, target) in zip(prompts, imitated(imitating_gan(name), prompts, TARGET, monkeypatch), strict=True):
        assert (ids, target) == (tokenizer(prompt)["input_ids"], expected)


# --- what leaves the library ----------------------------------------------------------------------------------------


def players_trained(name):
    """A generator that has learned to write the target and to end, and a discriminator with different predictions."""
    prompts = [SINGLE, MULTI_TURN]
    gan = judge_trained(imitating_gan(name, learning_rate=1e-2), prompts, steps=6)
    for _ in range(50):
        gan.step(prompts, [TARGET] * 2, train_disc=False)
    return gan


@pytest.fixture(scope="module", params=HEAVY)
def exported(request, tmp_path_factory):
    gan = players_trained(request.param)
    folder = tmp_path_factory.mktemp("families") / request.param
    export(gan, folder)
    return FAMILIES[request.param], gan, folder


def test_a_stock_client_that_is_told_nothing_stops_where_the_library_does(exported):
    """generate() takes its stop ids from the exported generation config.

    The call asks for greedy decoding without a repetition penalty. It names no stop id.
    """
    family, gan, folder = exported
    folder = folder / "generator-merged"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    stops = ids_of(tokenizer, family.stops)
    assert set(_listed(GenerationConfig.from_pretrained(folder).eos_token_id)) == stops
    assert tokenizer.eos_token == family.plain_closing and tokenizer.pad_token == family.pad
    ended = 0
    for prompt in family.chat_prompts:
        ids = rendered(tokenizer, prompt)
        (ours,) = rollout_of(gan, [prompt], 1, temperature=0).responses
        theirs = model.generate(
            torch.tensor([ids]), max_new_tokens=gan.config.max_completion_length, do_sample=False,
            repetition_penalty=1.0, attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )[0, len(ids) :].tolist()  # fmt: skip
        assert theirs == ours
        ended += ours[-1] == tokenizer.convert_tokens_to_ids(family.closing)
    assert ended, "greedy decoding never ended: the comparison shows nothing"


def _listed(ids):
    return ids if isinstance(ids, list) else [ids]


@pytest.mark.parametrize(
    ("part", "client"), [("generator", AutoPeftModelForCausalLM), ("generator-merged", AutoModelForCausalLM)]
)
def test_stock_logits_of_chat_prompts_are_the_librarys(exported, part, client):
    family, gan, folder = exported
    tokenizer, model = AutoTokenizer.from_pretrained(folder / part), client.from_pretrained(folder / part).eval()
    base = AutoModelForCausalLM.from_pretrained(gan.players.base.path).eval()
    for prompt in family.chat_prompts:
        ids = rendered(tokenizer, prompt)
        assert gan._encode([prompt]) == [ids]
        row = torch.tensor([ids])
        with torch.no_grad():
            theirs, untrained = model(input_ids=row).logits, base(input_ids=row).logits
            with gan.players.use_adapter("generator"):
                ours = logits(gan, row)
        assert (theirs - ours).abs().max() < 1e-5 * max(1, ours.abs().max())
        assert (theirs - untrained).abs().max() > 1e-2, "training moved nothing: the comparison would show nothing"


@pytest.mark.parametrize(
    ("part", "client"),
    [
        ("discriminator", AutoPeftModelForSequenceClassification),
        ("discriminator-merged", AutoModelForSequenceClassification),
    ],
)
def test_stock_scores_of_chat_prompts_are_the_librarys(exported, part, client):
    """A right-padded batch by the exported tokenizer, closed by the template's token."""
    family, gan, folder = exported
    tokenizer = AutoTokenizer.from_pretrained(folder / part)
    model = client.from_pretrained(folder / part, num_labels=1).eval()
    if model.config.pad_token_id is None:  # the base's config has none; the card says so
        model.config.pad_token_id = tokenizer.pad_token_id
    prompts, answers = zip(*((prompt, answer) for prompt in family.chat_prompts for answer in ANSWERS), strict=True)
    closing = tokenizer.convert_tokens_to_ids(family.closing)
    rows = [
        [*rendered(tokenizer, prompt), *tokenizer(answer, add_special_tokens=False)["input_ids"], closing]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        theirs = model(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits[:, 0]
    ours = torch.tensor(gan.score(list(prompts), list(answers)))
    assert ours.std() > 1e-2, "a discriminator that says the same of everything shows nothing"
    assert (theirs - ours).abs().max() < 1e-5 * max(1, ours.abs().max())


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_a_resumed_run_goes_on_bitwise_equal(name, tmp_path):
    prompts, targets = [SINGLE, MULTI_TURN], [TARGET] * 2
    gan = family_gan(name, imitation_weight=0.5, output_dir=str(tmp_path))
    gan.step(prompts, targets)
    saved = gan.save_checkpoint()
    record = gan.step(prompts, targets)
    resumed = LoraGAN.from_checkpoint(saved, reward=gan.compute_reward)
    again = resumed.step(prompts, targets)
    timeless = {key for key in record if "seconds" not in key and "time" not in key}
    assert differences({key: record[key] for key in timeless}, {key: again[key] for key in timeless}) == []
    for player in ("generator", "discriminator"):
        assert differences(player_state(gan, player), player_state(resumed, player)) == []
    responses = ["the cat", "Hello world"]
    assert gan.score(prompts, responses) == resumed.score(prompts, responses)
    assert gan.generate(prompts) == resumed.generate(prompts)


# --- template options -----------------------------------------------------------------------------------------------


def test_thinking_is_switched_by_the_config_and_by_a_column(monkeypatch):
    """A row's own chat_template_kwargs override the run's, in sampling, in imitation and in score()."""
    tokenizer = tokenizer_of("qwen3")
    on, off = ({"enable_thinking": value} for value in (True, False))
    thinking, silent = (rendered(tokenizer, SINGLE, **kwargs) for kwargs in (on, off))
    assert silent == thinking + tokenizer("<think>\n\n</think>\n\n")["input_ids"]
    for kwargs, expected in ((None, thinking), (on, thinking), (off, silent)):
        gan = imitating_gan("qwen3", chat_template_kwargs=kwargs)
        assert gan._encode([SINGLE]) == [expected]
        (pair, *_) = imitated(gan, [SINGLE, SINGLE, SINGLE], TARGET, monkeypatch)
        assert pair[0] == expected
        both = imitated(gan, [SINGLE] * 3, TARGET, monkeypatch, chat_template_kwargs=[on, off, None])
        assert [prompt for prompt, _ in both] == [thinking, silent, expected]

    gan = family_gan("qwen3", num_generations=24)
    columns = {"chat_template_kwargs": [on, off]}
    judge_trained(gan, [SINGLE, SINGLE], **columns)
    samplings = recorded(gan, monkeypatch)
    out = gan.step([SINGLE, SINGLE], train_gen=False, train_disc=False, **columns)
    prompts, sampled = samplings[-1]
    assert prompts == [thinking, silent]
    closing, compared = tokenizer.convert_tokens_to_ids("<|im_end|>"), [0, 0]
    predicted = sum(out["pred_rewards"], [])
    for row, (ids, text) in enumerate(zip(sampled.responses, sampled.texts, strict=True)):
        if ids == [*tokenizer(text, add_special_tokens=False)["input_ids"], closing]:
            group = int(sampled.group_B[row])
            scores = [gan.score(SINGLE, text, chat_template_kwargs=kwargs)[0] for kwargs in (on, off)]
            assert scores[group] == pytest.approx(predicted[row], abs=1e-5)
            assert abs(scores[0] - scores[1]) > 1e-4, "the two prompts are not read the same"
            compared[group] += 1
    assert min(compared) >= 5


def test_earlier_thoughts_are_stripped_as_the_template_says():
    """Qwen3's template drops the <think> block of messages before the last question."""
    thought = {"role": "assistant", "content": "<think>\nthe rain\n</think>\n\nthe cat"}
    messages = [*SINGLE, thought, {"role": "user", "content": "where is the dog"}]
    tokenizer = tokenizer_of("qwen3")
    (ids,) = family_gan("qwen3")._encode([messages])
    assert ids == rendered(tokenizer, messages)
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids and "the cat" in tokenizer.decode(ids)
