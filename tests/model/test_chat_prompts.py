"""Prompts reach the model as the user means them: chat runs, plain prompts, template columns, targets of messages.

Oracles: stock apply_chat_template, and the same call with the messages written out.
"""

import json
import re
import warnings

import datasets
import pytest
from families import FAMILIES, family_folder, family_gan
from helpers import base_folder, differences, player_state, reward, small_gan
from transformers import AutoTokenizer

from lora_gan import LoraGAN
from lora_gan.cli import preview
from lora_gan.cli.main import main
from lora_gan.config import Config
from lora_gan.data import Row, read_rows
from lora_gan.model.base import load_base
from lora_gan.model.encoding import Encoder

QUESTION = "where is the cat"
USER = [{"role": "user", "content": QUESTION}]
OTHER = [{"role": "user", "content": "why is the sky blue"}]


def said(call):
    """The warnings of a call, as texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


# --- a run remembers what its prompts were ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A run on chat messages, on a base whose tokenizer ends otherwise than its template."""
    folder = tmp_path_factory.mktemp("run")
    gan = family_gan("gemma-3", output_dir=str(folder))
    gan.fit([{"prompt": USER}, {"prompt": OTHER}], steps=2, progress=False)
    return gan, folder


def test_generate_score_and_evaluate_follow_the_run(chat_run):
    gan, folder = chat_run
    opened = LoraGAN.from_checkpoint(folder, reward=reward)
    for its in (gan, opened):
        answer = its.generate(USER)
        assert its.generate(QUESTION) == answer != its.generate(QUESTION, apply_chat_template=False)
        assert its.score(QUESTION, "the rain") == its.score(USER, "the rain")
        assert its.score(QUESTION, "the rain") != its.score(QUESTION, "the rain", apply_chat_template=False)
        judged = its.evaluate([{"prompt": QUESTION}])
        assert judged["metrics"] == its.evaluate([{"prompt": USER}])["metrics"]
        assert judged["samples"][0]["response"] == answer[0]
        plain = its.evaluate([{"prompt": QUESTION}], apply_chat_template=False)
        assert plain["samples"][0]["response"] == its.generate(QUESTION, apply_chat_template=False)[0]


def test_the_commands_follow_the_run(chat_run, capsys, tmp_path):
    gan, folder = chat_run
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": QUESTION, "completion": "the rain"}) + "\n")

    def printed(*words):
        assert main([words[0], "--checkpoint", str(folder), *words[1:]]) == 0
        return capsys.readouterr().out

    assert printed("generate", "--prompt", QUESTION) == gan.generate(USER)[0] + "\n"
    off = ("--apply_chat_template", "false")
    assert (
        printed("generate", "--prompt", QUESTION, *off) == gan.generate(QUESTION, apply_chat_template=False)[0] + "\n"
    )
    pair = ("--prompt", QUESTION, "--response", "the rain")
    assert float(printed("score", *pair)) == pytest.approx(gan.score(USER, "the rain")[0], abs=1e-6)
    plain = gan.score(QUESTION, "the rain", apply_chat_template=False)[0]
    assert float(printed("score", *pair, *off)) == pytest.approx(plain, abs=1e-6)
    line = json.loads(printed("score", "--data", str(tmp_path / "rows.jsonl")))
    assert line["prompt"] == QUESTION and line["pred_reward"] == pytest.approx(gan.score(USER, "the rain")[0], abs=1e-6)
    line = json.loads(printed("generate", "--data", str(tmp_path / "rows.jsonl")))
    assert line["completion"] == gan.generate(USER)[0]
    judged = printed("eval", "--data", str(tmp_path / "rows.jsonl"), "--reward", "length")
    assert judged != printed("eval", "--data", str(tmp_path / "rows.jsonl"), "--reward", "length", *off)


def test_a_generator_that_is_swapped_in_brings_what_its_prompts_were(chat_run, tmp_path):
    gan, folder = chat_run
    for path in (folder / "step-2", folder / "step-2" / "generator"):
        other = family_gan("gemma-3")
        other.load_generator(path)
        assert other.generate(QUESTION, seed=5) == other.generate(USER, seed=5)
    other.load_discriminator(folder / "step-2")
    assert other.score(QUESTION, "the rain") == gan.score(USER, "the rain")
    state = folder / "step-2" / "generator" / "adapter_model.bin"
    alone = tmp_path / "generator"  # of a checkpoint that is not there: it says nothing, and nothing changes
    alone.mkdir()
    for file in state.parent.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    other.load_generator(alone)
    assert other.prompt_kinds == {"messages"}


@pytest.mark.parametrize("prompts", [[QUESTION], [QUESTION, USER]], ids=["texts", "both"])
def test_a_run_that_saw_plain_prompts_leaves_them_plain(prompts, tmp_path):
    gan = family_gan("gemma-3", apply_chat_template=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.step(prompts)
    gan.save_checkpoint(ckpt_dir=tmp_path)
    opened = LoraGAN.from_checkpoint(tmp_path, reward=reward)
    assert opened.prompt_kinds == gan.prompt_kinds
    for its in (gan, opened):
        assert its.generate(QUESTION) == its.generate(QUESTION, apply_chat_template=False)
        assert its.generate(QUESTION, apply_chat_template=True) == its.generate(USER)


def test_a_run_on_rendered_prompts_was_a_chat():
    gan = family_gan("qwen2.5")
    written = gan.players.base.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert said(lambda: gan.step(written)) == []
    assert gan.generate(QUESTION) == gan.generate(USER) == gan.generate(written)


def test_checkpoints_of_before_do_not_say_what_the_prompts_were(tmp_path):
    from helpers import read_json, sign

    gan = small_gan()
    folder = gan.save_checkpoint(step=1, ckpt_dir=tmp_path)
    state = read_json(folder / "trainer_state.json")
    del state["prompt_kinds"]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert LoraGAN.from_checkpoint(sign(folder), reward=reward).prompt_kinds == set()
    for wrong in ("messages", ["letters"], [3], {"messages": True}):
        (folder / "trainer_state.json").write_text(json.dumps(state | {"prompt_kinds": wrong}))
        with pytest.raises(ValueError, match="prompt_kinds"):
            LoraGAN.from_checkpoint(sign(folder), reward=reward)


# --- plain prompts on a base with a chat template ---------------------------------------------------------------------


def test_the_first_step_tells_once_of_plain_prompts():
    gan = family_gan("smollm2")
    first = said(lambda: gan.step(QUESTION))
    assert len(first) == 1 and "chat template" in first[0] and "apply_chat_template=True" in first[0]
    assert said(lambda: gan.step(QUESTION)) == []
    for quiet in (family_gan("smollm2", apply_chat_template=False), family_gan("llama-3-base")):
        assert said(lambda gan=quiet: gan.step(QUESTION)) == []
    assert said(lambda: family_gan("smollm2").step(USER)) == []


def test_one_setting_turns_plain_prompts_into_user_messages(tmp_path):
    seen = []

    def judge(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [reward(completion[0]["content"]) for completion in completions]

    gan, oracle = family_gan("qwen3", apply_chat_template=True, reward=judge), family_gan("qwen3")
    assert said(lambda: gan.step([QUESTION, OTHER[0]["content"]])) == []
    oracle.step([USER, OTHER])
    for player in ("generator", "discriminator"):
        assert differences(player_state(oracle, player), player_state(gan, player)) == []
    assert {str(prompt) for prompt, _ in seen} == {str(USER), str(OTHER)}, "a reward sees the messages"
    rows = [{"prompt": QUESTION}, {"prompt": USER}]
    gan.fit(rows, steps=1, progress=False)
    assert gan.prompt_kinds == {"messages"}
    written = gan.players.base.tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert gan._encode([USER]) == gan.players.encoder.prompts(gan.as_meant([Row(written)])), "rendered stays rendered"


@pytest.mark.parametrize("call", ["step", "generate", "fit"])
def test_the_setting_needs_a_template(call, tmp_path):
    gan = small_gan(apply_chat_template=True, output_dir=str(tmp_path))
    calls = {"step": lambda: gan.step("a"), "generate": lambda: gan.generate("a"),
             "fit": lambda: gan.fit([{"prompt": "a"}], steps=1)}  # fmt: skip
    with pytest.raises(ValueError, match="needs a chat template.*processing_class="):
        calls[call]()
    with pytest.raises(ValueError, match="apply_chat_template='yes' is not accepted"):
        small_gan(apply_chat_template="yes")


def test_the_dry_run_says_how_prompts_reach_the_model(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": QUESTION}) + "\n")

    def dry(name, *words):
        command = ["train", "--model", str(family_folder(name)), "--data", str(file), "--reward", "repetition"]
        assert main([*command, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--dry-run", *words]) == 0
        return re.sub(r"\n +", " ", capsys.readouterr().out)  # lines that go on

    told = dry("gemma-3", "--max_completion_length", "6")
    assert "plain text; a response ends with '<eos>'" in told and "Set apply_chat_template=True" in told
    told = dry("gemma-3", "--max_completion_length", "6", "--apply_chat_template", "true")
    assert (
        "chat messages; a response ends with '<end_of_turn>'" in told
        and "!" not in told.split("prompts")[1].split("\n")[0]
    )
    assert "apply_chat_template" not in dry("llama-3-base", "--max_completion_length", "6")


def test_the_dry_run_tries_the_reward_on_prompts_as_training_sends_them(monkeypatch):
    """A chat run that goes on with plain prompts sends them as they are."""
    gan = family_gan("gemma-3")
    gan.step(OTHER)
    seen, prompt = [], Encoder.prompt
    monkeypatch.setattr(Encoder, "prompt", lambda self, row, *_: seen.append(row.prompt) or prompt(self, row, *_))
    list(preview.Preview(gan, [Row(QUESTION)], steps=1).dry_run())
    assert seen and set(map(str, seen)) == {QUESTION}


@pytest.mark.parametrize("setting", [True, None])
def test_a_card_says_how_plain_prompts_were_sent(setting, tmp_path):
    gan = family_gan("gemma-3", apply_chat_template=setting)
    gan.step(QUESTION if setting else USER)
    gan.export(tmp_path / "exported", parts=["discriminator"])
    text = (tmp_path / "exported" / "discriminator" / "README.md").read_text()
    assert ("In training, each plain-text prompt was one user message" in text) == bool(setting)
    assert ("For a plain-text prompt, use `tokenizer(prompt)` instead" in text) == (not setting)


def test_one_message_is_no_list_of_prompts():
    gan = small_gan()
    for call in (lambda: gan.generate(USER[0]), lambda: gan.score(USER[0], ["a", "b"])):
        with pytest.raises(ValueError, match=r"prompts must be texts or chat messages, not .*one message.*\[message\]"):
            call()


@pytest.mark.parametrize("response", [None, 5, [{"role": "assistant", "content": "a"}], ["a"]])
def test_a_response_to_be_scored_is_a_text(response):
    with pytest.raises(ValueError, match="response 2 must be a text, not "):
        small_gan().score(["a", "b"], ["a", response])


# --- messages as they were written ------------------------------------------------------------------------------------


def calling(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, argument, kind):
    parameters = {"type": "object", "properties": {argument: {"type": kind}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CALLS = [
    {"role": "user", "content": "weather in Paris"},
    {"role": "assistant", "tool_calls": [calling("w", city="Paris")]},
    {"role": "tool", "name": "w", "content": "rain"},
    {"role": "user", "content": "and the time"},
    {"role": "assistant", "tool_calls": [calling("t", zone="CET")]},
    {"role": "tool", "name": "t", "content": "noon"},
]
TOOLS = [tool("w", "city", "string"), tool("t", "zone", "number")]
ROW = {"prompt": CALLS, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
SECOND = {"prompt": USER, "tools": None, "chat_template_kwargs": {"mood": "kind"}}


def roomy(name):
    """A family's base that takes longer texts than its two layers were made for."""
    base = load_base(family_folder(name), None, Config())
    base.model.config.max_position_embeddings = 4096
    return base


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet", "datasets", "streamed", "saved"])
def test_conversations_come_out_of_a_table_as_they_went_in(kind, tmp_path):
    table = datasets.Dataset.from_list([ROW, SECOND])
    assert "zone" in str(table[0]["prompt"][1]), "Arrow gives every mapping the keys of all"
    file = tmp_path / f"rows.{kind}"
    if kind == "list":
        rows = read_rows([ROW, SECOND])
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in (ROW, SECOND)))
        rows = read_rows(file)
    elif kind == "parquet":
        table.to_parquet(file)
        rows = read_rows(file)
    elif kind == "saved":
        table.save_to_disk(str(tmp_path / "saved"))
        rows = read_rows(tmp_path / "saved")
    else:
        rows = read_rows(table if kind == "datasets" else table.to_iterable_dataset())
        rows = rows if kind == "datasets" else rows.take(2, 0)
    assert [row.prompt for row in rows] == [CALLS, USER]
    assert rows[0].columns["tools"] == TOOLS and rows[1].columns["tools"] is None
    assert [row.columns["chat_template_kwargs"] for row in rows] == [{"enable_thinking": False}, {"mood": "kind"}]


def test_nulls_that_json_holds_stay_where_they_are():
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Paris", "zone": None}}}
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}, USER[0]]
    assert read_rows([{"prompt": prompt}])[0].prompt == prompt


def test_options_about_the_form_of_the_ids_change_no_ids():
    """They are for who calls the tokenizer: a run's options with them read as those without."""
    encoder = Encoder(load_base(family_folder("gemma-3"), None, Config()), Config())
    options = {"tokenize": False, "return_dict": False, "return_tensors": "pt"}
    (asked,) = encoder.prompts([Row(USER, None, {"chat_template_kwargs": options})])
    assert asked == encoder.prompts([Row(USER)])[0]


def test_columns_reach_the_template_of_their_row():
    base = roomy("qwen3")
    encoder = Encoder(base, Config(chat_template_kwargs={"enable_thinking": True}))
    tokenizer = base.tokenizer
    for row in read_rows([ROW, SECOND, ROW | {"tools": json.dumps(TOOLS), "chat_template_kwargs": '{"a": 1}'}]):
        own = row.columns["chat_template_kwargs"]
        options = {"enable_thinking": True} | (json.loads(own) if isinstance(own, str) else own)
        tools = TOOLS if row.columns["tools"] is not None else None
        stock = tokenizer.apply_chat_template(row.prompt, tools=tools, add_generation_prompt=True, **options)
        assert encoder.prompt(row) == stock["input_ids"]
    ids = [encoder.prompt(Row(USER, None, {"chat_template_kwargs": {"enable_thinking": on}})) for on in (True, False)]
    assert ids[0] != ids[1]


def test_columns_of_the_template_reach_training_generation_scores_and_judgement():
    gan, oracle = family_gan("qwen3"), family_gan("qwen3", chat_template_kwargs={"enable_thinking": False})
    options = {"enable_thinking": False}
    gan.step(USER, chat_template_kwargs=options)
    oracle.step(USER)
    for player in ("generator", "discriminator"):
        assert differences(player_state(oracle, player), player_state(gan, player)) == []
    assert gan.generate(USER, chat_template_kwargs=options) == oracle.generate(USER) != gan.generate(USER)
    assert gan.score(USER, "the rain", chat_template_kwargs=options) == oracle.score(USER, "the rain")
    judged = gan.evaluate([{"prompt": USER, "chat_template_kwargs": options}])
    assert judged["metrics"] == oracle.evaluate([{"prompt": USER}])["metrics"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "hammer, saw"}, r"row 1: the column 'tools' is a text that is not JSON"),
        ({"tools": {"name": "w"}}, r"row 1: the column 'tools' must be a list"),
        ({"chat_template_kwargs": [1]}, r"row 1: chat_template_kwargs must be a mapping"),
        ({"chat_template_kwargs": {3: 1}}, r"row 1: chat_template_kwargs must be a mapping of names"),
    ],
)
def test_columns_that_no_template_takes_are_said_where_they_stand(columns, message):
    with pytest.raises(ValueError, match=message):
        read_rows([{"prompt": USER} | columns])
    assert read_rows([{"prompt": "plain"} | columns])[0].columns == columns, "a plain prompt has no template"


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama-3", "gemma-3", "mistral"])
@pytest.mark.parametrize(
    "prompt", [USER, [{"role": "system", "content": "Answer briefly."}, *OTHER]], ids=["", "system"]
)
def test_a_target_is_what_the_template_writes_after_the_prompt(name, prompt):
    family, base = FAMILIES[name], family_gan(name).players.base
    encoder, tokenizer = Encoder(base, Config(max_completion_length=64)), base.tokenizer
    answer = [{"role": "assistant", "content": "the rain in town"}]
    whole = tokenizer.apply_chat_template([*prompt, *answer])["input_ids"]
    ids = encoder.prompt(Row(prompt)) + encoder.target(Row(prompt, "the rain in town"))
    assert ids == whole[: len(ids)] and ids[-1] == tokenizer.convert_tokens_to_ids(family.closing)
    assert len(whole) - len(ids) <= 2, "at most a line's end is left out"


def test_targets_of_several_messages_are_imitated_whole():
    row = read_rows([{"prompt": CALLS[:1], "target": [*CALLS[1:3], {"role": "assistant", "content": "It rains."}]}])[0]
    assert row.target == "It rains." and len(row.target_messages) == 3
    base = roomy("qwen3")
    encoder = Encoder(base, Config(max_completion_length=200, chat_template_kwargs={"enable_thinking": True}))
    text = base.tokenizer.decode(encoder.target(row))
    assert text.count("<tool_call>") == 1 and "<tool_response>\nrain" in text and text.endswith("It rains.<|im_end|>")
    one = read_rows([{"messages": [CALLS[0], {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]}])[0]
    assert one.target == "Yes"
    calls = read_rows([{"prompt": CALLS[:1], "completion": CALLS[1:2]}])[0]
    assert calls.target == "" and "<tool_call>" in base.tokenizer.decode(encoder.target(calls))


def test_a_target_that_goes_on_with_the_prompts_last_message():
    begun = [*USER, {"role": "assistant", "content": "the rain"}]
    base = family_gan("smollm2").players.base
    encoder = Encoder(base, Config(max_completion_length=64))
    ids = encoder.prompt(Row(begun)) + encoder.target(Row(begun, " in town"))
    whole = base.tokenizer.apply_chat_template([*USER, {"role": "assistant", "content": "the rain in town"}])[
        "input_ids"
    ]
    assert ids == whole[: len(ids)] and len(whole) - len(ids) == 1


def test_imitation_learns_the_end_of_a_turn():
    """After some steps on one target the generator writes it, and stops where the template does."""
    gan = family_gan(
        "gemma-3",
        imitation_weight=1.0,
        reward_weight=0.0,
        learning_rate=3e-2,
        max_completion_length=12,
        num_generations=2,
    )
    for _ in range(30):
        gan.step(USER, "the big red dog", train_disc=False)
    assert gan.generate(USER, temperature=0) == ["the big red dog"]
    ids = gan.players.encoder.target(Row(USER, "the big red dog"))
    assert ids[-1] == gan.players.base.tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_messages_as_step_takes_them_for_a_target():
    gan, oracle = (family_gan("qwen3", imitation_weight=1.0) for _ in range(2))
    gan.step(USER, [{"role": "assistant", "content": "the rain"}])
    oracle.step(USER, "the rain")
    assert differences(player_state(oracle, "generator"), player_state(gan, "generator")) == []
    with pytest.raises(ValueError, match="must be the assistant's"):
        gan.step(USER, [{"role": "user", "content": "the rain"}])


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_a_reward_sees_special_tokens_where_the_run_keeps_them():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin|>", "<|stop|>"]})
    seen = {}
    for keeps in (False, True):
        texts = seen.setdefault(keeps, [])

        def watch(response, target, texts=texts):
            texts.append(response)
            return reward(response)

        gan = small_gan(
            processing_class=tokenizer, reward=watch, skip_special_tokens=not keeps, num_generations=64,
            max_completion_length=16,
        )  # fmt: skip
        gan.step("the cat", train_gen=False)
    assert any("<|begin|>" in text for text in seen[True]) and not any("<|" in text for text in seen[False])
    assert not any("<|endoftext|>" in text for text in seen[True]), "the token that ends a response is never part of it"
    assert len(seen[True]) == len(seen[False]) and all(
        plain == text.replace("<|begin|>", "").replace("<|pad|>", "").replace("<|stop|>", "")
        for plain, text in zip(seen[False], seen[True], strict=True)
    )
