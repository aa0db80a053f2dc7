"""Where rows come from, what a row may be, and the order in which rows are taken.

Oracles: files written by json, csv and datasets themselves; the stock tokenizer's chat template, and TRL's; the rows of
one uninterrupted run.
"""

import csv
import itertools
import json
import sys
from datetime import datetime

import numpy as np
import pytest
from helpers import EOS, PROMPTS, TARGETS, base_folder, differences, player_state, python, reward, small_gan
from transformers import AutoTokenizer

from lora_gan import LoraGAN, data
from lora_gan.data import Row, read_rows

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
datasets.disable_progress_bars()
pandas = pytest.importorskip("pandas", reason="datasets brings it")

HARD = ['plain, with "quotes"', "two\nlines", "tab\there; and, more", "é ü 漢字 \u2028 end", " padded "]
TABLE = [{"prompt": f"{text} {i}", "target": text.upper(), "level": str(i)} for i, text in enumerate(HARD)]
ROWS = [Row(row["prompt"], row["target"], {"level": row["level"]}) for row in TABLE]


# --- sources --------------------------------------------------------------------------------------------------------


def write(path, rows=TABLE, **options):
    """The rows as a file of this suffix, written by the library whose format it is."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, list(rows[0]), **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines_in_json(folder):
    return write(folder / "rows.jsonl").rename(folder / "rows.json")


def saved(folder):
    datasets.Dataset.from_list(TABLE).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder):
    splits = {"train": TABLE, "test": TABLE[:1]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(
        folder / "saved"
    )
    return folder / "saved"


def repository(folder):
    """As the hub's repositories are laid out; two files make the split."""
    (folder / "data").mkdir()
    write(folder / "data" / "train-00000-of-00002.parquet", TABLE[:2])
    write(folder / "data" / "train-00001-of-00002.parquet", TABLE[2:])
    write(folder / "data" / "test-00000-of-00001.parquet", TABLE[:1])
    (folder / "README.md").write_text("a card")
    return folder


SOURCES = {
    "jsonl": lambda folder: write(folder / "rows.jsonl"),
    "json": lambda folder: write(folder / "rows.json"),
    "lines in .json": lines_in_json,
    "csv": lambda folder: str(write(folder / "rows.csv")),
    "csv of a spreadsheet": lambda folder: write(folder / "ROWS.CSV", delimiter=";", encoding="utf-8-sig"),
    "tsv": lambda folder: write(folder / "rows.tsv", delimiter="\t"),
    "parquet": lambda folder: write(folder / "rows.parquet"),
    "saved": saved,
    "saved splits": saved_splits,
    "repository": repository,
    "Dataset": lambda _: datasets.Dataset.from_list(TABLE),
    "DatasetDict": lambda _: datasets.DatasetDict({"train": datasets.Dataset.from_list(TABLE)}),
    "IterableDataset": lambda _: datasets.Dataset.from_list(TABLE).to_iterable_dataset(),
    "list": lambda _: TABLE,
    "function": lambda _: lambda: (row for row in TABLE),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_rows_whole_and_as_a_stream(name, tmp_path):
    source = SOURCES[name](tmp_path)
    assert list(read_rows(source)) == ROWS
    stream = read_rows(source, streaming=True)
    assert not hasattr(stream, "__len__") and list(stream) == ROWS
    assert stream.take(12, 3) == (ROWS * 3)[3:15]
    assert read_rows(stream) is stream and read_rows(ROWS) == ROWS, "what was read is not read again"


def test_an_iterator_is_read_whole_and_cannot_be_streamed():
    assert read_rows(row for row in TABLE) == ROWS
    with pytest.raises(ValueError, match="function"):
        read_rows((row for row in TABLE), streaming=True)


def test_lines_of_text_are_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\r\n\n two \u2028\n".encode())
    assert read_rows(tmp_path / "prompts.txt", prompt_column="question") == [Row("one"), Row(" two \u2028")]


def test_an_empty_cell_is_a_missing_value(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,target,level\na,,\nb,c,1\n")
    assert read_rows(tmp_path / "rows.csv") == [Row("a", None, {"level": None}), Row("b", "c", {"level": "1"})]


def test_a_split_is_chosen_by_name(tmp_path):
    assert read_rows(saved_splits(tmp_path), split="test") == ROWS[:1]
    assert read_rows({"train": TABLE, "test": TABLE[:1]}, split="test") == ROWS[:1]
    for source in (saved_splits(tmp_path / "2"), {"train": TABLE, "test": TABLE}):
        with pytest.raises(ValueError, match=r"'validation'.*'train', 'test'"):
            read_rows(source, split="validation")
    (tmp_path / "3").mkdir()
    assert read_rows(repository(tmp_path / "3"), split="test") == ROWS[:1]
    with pytest.raises(ValueError, match=r"'dev'.*test-00000-of-00001\.parquet, train-00000"):
        read_rows(tmp_path / "3", split="dev")


def test_core_formats_need_no_datasets(tmp_path, monkeypatch):
    files = [write(tmp_path / f"train.{suffix}") for suffix in ("jsonl", "json", "csv")]
    parquet, folder = write(tmp_path / "rows.parquet"), saved(tmp_path)
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for file in files:
        assert read_rows(file) == ROWS
    for source in (parquet, folder, "owner/name"):
        with pytest.raises(ImportError, match=r"lora-gan\[data\]"):
            read_rows(source)


# --- what is wrong with a source ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.csv", b"", "a.csv has no rows"),
        ("a.csv", b"prompt,target\n", "a.csv has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a.jsonl, line 2: not JSON"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt": ]', r"a.json, line 2: not JSON"),
        ("a.jsonl", b'\n{"prompt": ""}\n', r"a.jsonl, line 2: prompt is empty"),
        ("a.jsonl", b'{"prompt": null}\n', r"a.jsonl, line 1: prompt is empty"),
        ("a.jsonl", b'{"prompt": 3}\n', r"a.jsonl, line 1: prompt must be a text.*3"),
        ("a.jsonl", b'{"prompt": ["a", "b"]}\n', r"a.jsonl, line 1: prompt must be a text"),
        ("a.json", b'[{"prompt": "a"}, {"prompt": "a", "target": 3}]', r"a.json, row 2: the target must be a text.*3"),
        ("a.json", b'["a"]', r"a.json, row 1 is not a mapping"),
        ("a.csv", b'prompt,target\n"a\nb",c\nd,e,f\n', r"a.csv, line 4: 3 fields, but the header has 2"),
        ("a.csv", b'prompt,target\n"a\nb",c\n"d\n"\n', r"a.csv, line 4: 1 fields, but the header has 2"),
        ("a.csv", b'prompt,target\na,b\n"a,b\nc,d\n', r"a.csv, line 3: not CSV"),
        ("a.csv", b"prompt,target\n,b\n", r"a.csv, line 2: prompt is empty"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a.csv, line 1: two columns are called 'prompt'"),
        ("a.csv", "prompt\na\nß\n".encode("latin-1"), r"a.csv, line 3: byte 0xdf is not UTF-8"),
        ("a.csv", "prompt\na\n".encode("utf-16"), r"a.csv, line 1: byte 0xff is not UTF-8"),
        ("a.jsonl", b"PK\x03\x04\0\0", r"a.jsonl, line 1: this is a binary file"),
        ("a.parquet", b"prompt\na\n", r"a.parquet could not be read as Parquet"),
        ("a.xlsx", b"PK", r"a.xlsx: data files end in .jsonl, .json, .csv, .tsv, .txt, .parquet, not '.xlsx'"),
        ("rows", b"a", r"rows: data files end in .*not 'nothing'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_named_with_its_line(name, content, said, streaming, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        rows = read_rows(tmp_path / name, streaming=streaming)
        rows.take(3, 0)  # a stream has only looked at the first row


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.jsonl", r"no file or folder '.*none\.jsonl'; give a file \(\.jsonl, "),
        ("", r"the folder .* has no data of the split 'train'.*its data files: none"),
        ("other.csv", r"the folder .* has no data of the split 'train'.*its data files: rows\.csv"),
    ],
)
def test_what_is_not_there(name, said, tmp_path):
    if name == "other.csv":
        write(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / name if name == "none.jsonl" else tmp_path)


def test_the_hub_that_cannot_be_reached():
    with pytest.raises(ValueError, match=r"no such file or folder, and the data set 'owner/name:plain'.*split 'test'"):
        read_rows("owner/name:plain", split="test")
    with pytest.raises(ValueError, match="no file or folder ''"):
        read_rows("")


def test_what_is_no_data_set():
    for wrong in (3, None):
        with pytest.raises(ValueError, match="a data set is a file"):
            read_rows(wrong)
    with pytest.raises(ValueError, match="the data set has no rows"):
        read_rows([])


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_are_named_by_option():
    rows = [{"question": "q", "solution": "s", "source": "x"}]
    read = read_rows(rows, prompt_column="question", target_column="solution")
    assert read == [Row("q", "s", {"source": "x", "solution": "s"})], "TRL's functions ask for it under its own name"
    assert read_rows([{"prompt": "a", "completion": "c", "target_text": "t"}]) == [Row("a", "t", {"completion": "c"})]
    assert read_rows([{"prompt": "a", "target": None, "completion": "c"}])[0].target == "c"
    assert read_rows([{"prompt": "a", "target": None}]) == [Row("a", None)]
    assert read_rows([{"prompt": "a", "other": "b"}], target_column=None) == [Row("a", None, {"other": "b"})]


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        (
            {"promt": "a", "x": 1},
            {},
            r"row 1 has no column 'prompt' \(did you mean 'promt'\?\); its columns: 'promt', ",
        ),
        ({"prompt": "a", "solution": "b"}, {"target_column": "solutoin"}, r"'solutoin' \(did you mean 'solution'\?\)"),
        ({"prompt": "a"}, {"prompt_column": "x", "target_column": "x"}, "both 'x'"),
        ({"prompt": "a", "target": "b", "s": "c"}, {"target_column": "s"}, "'target' in addition to target_column='s'"),
        ({"prompt": "a", "completions": "b"}, {}, "row 1: a column cannot be called 'completions'"),
        ({"prompt": "a", "trainer_state": "b"}, {}, "row 1: a column cannot be called 'trainer_state'"),
        ({"prompt": "a", 3: "b"}, {}, "row 1: a column cannot be called 3"),
    ],
)
def test_columns_that_are_not_there_or_in_the_way(row, options, said):
    with pytest.raises(ValueError, match=said):
        read_rows([row], **options)


def test_step_refuses_a_column_that_rewards_get_from_elsewhere():
    with pytest.raises(ValueError, match="'completion_ids'"):
        small_gan().step(PROMPTS[0], completion_ids=[1])


def test_the_config_names_columns_for_fit_and_evaluate(tmp_path):
    seen = []

    def kept(prompts, completions, target, solution, source, **_):
        seen.extend(zip(prompts, target, solution, source, strict=True))
        return [float(len(completion)) for completion in completions]

    gan = small_gan(
        reward_funcs=[kept], prompt_column="question", target_column="solution", output_dir=str(tmp_path / "run")
    )
    rows = [{"question": p, "solution": t, "source": i} for i, (p, t) in enumerate(zip(PROMPTS, TARGETS, strict=True))]
    gan.fit(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}), steps=2, progress=False)
    assert set(seen) == {(p, t, t, i) for i, (p, t) in enumerate(zip(PROMPTS, TARGETS, strict=True))}
    judged = gan.evaluate({"train": rows, "test": rows[:1]})
    assert [sample["prompt"] for sample in judged["samples"]] == PROMPTS[:1], "held out: the split is test"


# --- conversations --------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|begin|>' + m['role'] + '\n' + m['content'] + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% if thinks is false %}{{ '()' }}{% endif %}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "Hello world"}],
    [{"role": "system", "content": "food"}, {"role": "user", "content": "the cat"}],
    [{"role": "user", "content": "A pub"}, {"role": "assistant", "content": "by the"}],  # to be continued
]


def chat_tokenizer(architecture="gpt2"):
    tokenizer = AutoTokenizer.from_pretrained(base_folder(architecture))
    tokenizer.chat_template = CHATML
    return tokenizer


def chat_gan(architecture="gpt2", **settings):
    return small_gan(base_folder(architecture), processing_class=chat_tokenizer(architecture), **settings)


def test_conversations_are_rows_as_in_trl(tmp_path):
    user, answer = CHATS[0], [{"role": "assistant", "content": "Bonjour"}]
    expected = [Row(user, "Bonjour")]
    assert read_rows([{"prompt": user, "completion": answer}]) == expected
    assert read_rows([{"prompt": user, "completion": "Bonjour"}]) == expected
    assert read_rows([{"messages": user + answer}]) == expected
    assert (
        read_rows([{"chat": user, "gold": answer}], prompt_column="chat", target_column="gold")[0].target == "Bonjour"
    )
    assert read_rows([{"messages": user}]) == read_rows([{"prompt": user}]) == [Row(user)]
    assert read_rows([{"messages": user + answer, "target": "x"}]) == [Row(user + answer, "x")]
    assert read_rows([{"prompt": "text", "completion": answer}]) == [Row("text", "Bonjour")]
    write(tmp_path / "a.jsonl", [{"messages": user + answer}])
    assert read_rows(tmp_path / "a.jsonl") == expected
    # A table gives every message every key: those that are None are none.
    table = datasets.Dataset.from_list([{"messages": [user[0] | {"name": "x"}, *answer]}])
    assert set(table[0]["messages"][1]) == {"role", "content", "name"}
    assert read_rows(table) == [Row([user[0] | {"name": "x"}], "Bonjour")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [{"role": "user"}]}, "row 1: a message has a 'role' and a 'content'"),
        ({"prompt": [{"from": "human", "value": "a"}]}, "row 1: a message has a 'role'"),
        ({"prompt": []}, "row 1: prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "row 1: messages has no message before the"),
        ({"prompt": "a", "completion": CHATS[0]}, "row 1: the first and the last message of a target must be"),
        ({"prompt": "a", "completion": CHATS[2]}, "row 1: the first and the last message of a target must be"),
    ],
)
def test_conversations_that_are_not_understood(row, said):
    with pytest.raises(ValueError, match=said):
        read_rows([row])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])  # llama's tokenizer opens a text with a token of its own
def test_a_conversation_is_encoded_as_the_stock_template_does(architecture):
    gan, tokenizer = chat_gan(architecture), chat_tokenizer(architecture)
    stock = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in CHATS[:2]]
    stock.append(tokenizer.apply_chat_template(CHATS[2], continue_final_message=True)["input_ids"])
    assert gan._encode(CHATS) == stock
    assert tokenizer.decode(stock[2]).endswith("assistant\nby the"), "neither closed nor opened again"
    without = chat_gan(architecture, chat_template_kwargs={"thinks": False})._encode(CHATS[:1])
    assert tokenizer.decode(without[0]) == tokenizer.decode(stock[0]) + "()"
    prompts, responses = gan.players.encoder.pairs([Row(CHATS[0])], ["by"])
    assert prompts == stock[:1]
    closing = tokenizer.convert_tokens_to_ids("<|stop|>")  # written by the template; not the tokenizer's end token
    assert responses == [[*tokenizer("by", add_special_tokens=False)["input_ids"], closing]]


def test_a_conversation_is_written_as_by_trl():
    trl = pytest.importorskip("trl.data_utils", reason="TRL is not installed")
    gan, tokenizer = chat_gan(), chat_tokenizer()
    for chat in CHATS:
        text = trl.apply_chat_template({"prompt": chat}, tokenizer)["prompt"]
        assert gan._encode([chat]) == [tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_step_on_conversations_is_a_step_on_what_the_template_writes(tmp_path):
    """Sampling, imitation, replay, generation, scores: nothing but what is shown differs."""
    settings = {"imitation_weight": 0.5, "chat_template_kwargs": {"thinks": False}}
    chats, texts = chat_gan(**settings), chat_gan(**settings)
    written = [
        chat_tokenizer().apply_chat_template(c, add_generation_prompt=True, tokenize=False, thinks=False)
        for c in CHATS[:2]
    ]
    assert written[0].endswith("assistant\n()")
    one, same = chats.step(CHATS[0], TARGETS[0]), texts.step(written[0], TARGETS[0])
    assert one.pop("prompt") == CHATS[0] and isinstance(one["response"], str)
    del same["prompt"]
    assert one == same
    two, same = chats.step(CHATS[:2], TARGETS[:2]), texts.step(written, TARGETS[:2])
    assert two["prompt"] == CHATS[:2] and two["responses"] == same["responses"]
    for player in ("generator", "discriminator"):
        assert differences(player_state(chats, player), player_state(texts, player)) == []
    assert chats.generate(CHATS[0], best_of=3) == texts.generate(written[0], best_of=3)
    assert chats.generate(CHATS[:2]) == texts.generate(written)
    assert chats.score(CHATS[0], "by") == texts.score(written[0], "by")
    assert chats.score(CHATS[:2], ["by", "at"]) == texts.score(written, ["by", "at"])
    judged = chats.evaluate([{"messages": [*CHATS[1], {"role": "assistant", "content": "by"}]}])
    assert judged["metrics"] == texts.evaluate([{"prompt": written[1], "target": "by"}])["metrics"]


def test_a_base_without_a_chat_template_says_what_to_do():
    gan = small_gan()
    for call in (lambda: gan.step(CHATS[0]), lambda: gan.generate(CHATS[:2]), lambda: gan.score(CHATS[0], "a")):
        with pytest.raises(ValueError, match=r"no chat template.*plain text.*processing_class="):
            call()
    assert gan.global_step == 0


def test_what_the_template_refuses_is_said():
    gan = chat_gan()
    gan.players.base.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"rejects the prompt 'Hello world': roles must alternate"):
        gan.step(CHATS[0])
    gan.players.base.tokenizer.chat_template = "{{ messages[0]['content'] * 20 }}"
    with pytest.raises(ValueError, match=r"do not fit.*'Hello world'"):
        gan.step(CHATS[0])
    with pytest.raises(ValueError, match="a message has a 'role'"):
        gan.step([{"content": "a"}])


def test_the_end_of_text_may_be_all_of_a_prompt():
    assert small_gan()._encode([EOS]) == [[small_gan().players.base.eos_ids[0]]]


# --- the order ------------------------------------------------------------------------------------------------------

NUMBERED = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(5)]


def counted():
    """Rows 0 to 4 by a function, and how many it was asked for."""
    asked = []

    def rows():
        for row in NUMBERED:
            asked.append(row)
            yield row

    return rows, asked


def test_a_stream_goes_on_from_any_position():
    whole = [Row(row["prompt"], row["target"]) for row in NUMBERED * 4]
    for position, count in itertools.product(range(13), (1, 2, 7)):
        assert read_rows(lambda: NUMBERED, streaming=True).take(count, position) == whole[position : position + count]
    stream = read_rows(lambda: NUMBERED, streaming=True)
    for position in (0, 3, 3, 4, 12, 2, 2, 11, 0):  # onwards, again, back
        assert stream.take(3, position) == whole[position : position + 3]


def test_a_stream_reads_no_further_than_it_must():
    rows, asked = counted()
    stream = read_rows(rows, streaming=True)
    assert len(asked) == 1, "one row, to see whether it can be read"
    for position in range(0, 40, 2):
        stream.take(2, position)
        stream.take(2, position)  # a step that failed takes its rows again, from memory
        assert len(asked) == position + 2 and len(stream._read) <= 2


def test_a_broken_row_of_a_stream_is_not_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 3}\n{"prompt": "d"}\n')
    stream = read_rows(file, streaming=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="line 3"):
            stream.take(2, 1)
    assert [row.prompt for row in stream.take(2, 0)] == ["a", "b"]
    file.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        stream.take(1, 7)


def test_a_shuffled_stream_has_the_order_of_its_library_in_every_epoch():
    table = datasets.Dataset.from_list([{"prompt": str(i)} for i in range(20)])
    oracle, expected = table.to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=5), []
    for epoch in range(3):
        oracle.set_epoch(epoch)
        expected.append([row["prompt"] for row in oracle])
    assert expected[0] != expected[1] and sorted(expected[0]) == sorted(expected[1])
    expected = sum(expected, [])
    for position in (0, 13, 33):
        stream = read_rows(table.to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=5))
        assert [row.prompt for row in stream.take(25, position)] == expected[position : position + 25]


def test_rows_of_a_list_come_in_keyed_permutations():
    rows = [Row(str(i)) for i in range(5)]
    taken = [row.prompt for row in data.take(rows, 10, seed=3, position=0)]
    assert sorted(taken[:5]) == sorted(taken[5:]) == list("01234") and taken[:5] != taken[5:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_takes_the_rows_that_one_run_takes(streaming, tmp_path):
    """5 rows, 2 a step, 6 steps: over two ends of an epoch, one of them within a step."""
    file = write(tmp_path / "rows.csv", NUMBERED)
    whole = small_gan(output_dir=str(tmp_path / "whole")).fit(
        read_rows(file, streaming=streaming), steps=6, progress=False
    )
    prompts = [prompt for record in whole for prompt in record["prompt"]]
    if streaming:
        assert prompts == [row["prompt"] for row in NUMBERED * 3][:12]
    first = small_gan(output_dir=str(tmp_path / "parts"))
    records = first.fit(read_rows(file, streaming=streaming), steps=3, progress=False)
    rest = LoraGAN.from_checkpoint(tmp_path / "parts", reward=reward)
    assert rest.position == 6
    assert records + rest.fit(read_rows(file, streaming=streaming), steps=3, progress=False) == whole


@pytest.mark.slow
def test_another_process_takes_the_rows_that_come_next(tmp_path):
    file = write(tmp_path / "rows.jsonl", NUMBERED)
    code = """
import sys, json
from helpers import small_gan, reward
from lora_gan import LoraGAN
from lora_gan.data import read_rows
folder, file, base, how = sys.argv[1:]
gan = small_gan(base, output_dir=folder) if how == "new" else LoraGAN.from_checkpoint(folder, reward=reward)
records = gan.fit(read_rows(file, streaming=True), steps=3, progress=False)
print("@" + json.dumps(records))
"""
    records = []
    for how in ("new", "resumed"):
        said = python(code, str(tmp_path / "run"), str(file), str(base_folder()), how)
        records += json.loads(said.split("@", 1)[1])
    assert [prompt for record in records for prompt in record["prompt"]] == [r["prompt"] for r in NUMBERED * 3][:12]


def test_a_step_that_failed_takes_its_rows_of_a_stream_again(tmp_path):
    gan, failing = small_gan(output_dir=str(tmp_path)), [True]

    def once_in_vain(response, target):
        if failing:
            failing.pop()
            raise RuntimeError("the reward is away")
        return reward(response)

    gan.compute_reward = once_in_vain
    stream = read_rows(lambda: NUMBERED, streaming=True)
    with pytest.raises(ValueError, match="away"):
        gan.fit(stream, steps=1, progress=False)
    records = gan.fit(stream, steps=2, progress=False)
    assert [p for record in records for p in record["prompt"]] == [row["prompt"] for row in NUMBERED[:4]]


def test_the_order_does_not_depend_on_numpy_s_own_state():
    rows = [Row(str(i)) for i in range(9)]
    first = data.take(rows, 9, seed=0, position=0)
    np.random.seed(99)
    assert data.take(rows, 9, seed=0, position=0) == first


@pytest.mark.parametrize("prompts", [5, [1], [None], [[]], [[{"content": "a"}]]])
def test_what_is_no_prompt_is_said(prompts):
    with pytest.raises(ValueError, match="text|message"):
        data.as_rows(prompts)


# --- data frames ----------------------------------------------------------------------------------------------------


FRAME = {
    "prompt": ["the cat", "a dog", "a house"],
    "target": ["sat", None, float("nan")],
    "level": [1, 2, 3],
    "share": [0.5, float("nan"), 1.0],
    "seen": [pandas.Timestamp("2026-01-02 03:04:05"), pandas.NaT, pandas.Timestamp("2026-01-03")],
    "kind": pandas.Categorical(["x", "y", None]),
    "maybe": pandas.array([1, None, 3], dtype="Int64"),
    "flag": [True, False, True],
    "many": [np.array([1, 2]), [np.float32(0.5), None], np.array(["a", None], dtype=object)],
}
FRAME_ROWS = [
    Row("the cat", "sat", {
        "level": 1, "share": 0.5, "seen": datetime(2026, 1, 2, 3, 4, 5), "kind": "x", "maybe": 1, "flag": True,
        "many": [1, 2],
    }),
    Row("a dog", None, {
        "level": 2, "share": None, "seen": None, "kind": "y", "maybe": None, "flag": False, "many": [0.5, None],
    }),
    Row("a house", None, {
        "level": 3, "share": 1.0, "seen": datetime(2026, 1, 3), "kind": None, "maybe": 3, "flag": True,
        "many": ["a", None],
    }),
]  # fmt: skip


def kinds(value):
    """The exact types in a value: numpy's numbers equal Python's, and are not them."""
    if isinstance(value, dict):
        return {key: kinds(entry) for key, entry in value.items()}
    return [type(value), *map(kinds, value)] if isinstance(value, list) else type(value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_frame_is_a_data_set(streaming):
    for source in (pandas.DataFrame(FRAME), lambda: pandas.DataFrame(FRAME, index=[7, 7, 9])):
        rows = list(read_rows(source, streaming=streaming))
        assert rows == FRAME_ROWS
        assert [kinds(row.columns) for row in rows] == [kinds(row.columns) for row in FRAME_ROWS]
    assert read_rows({"train": pandas.DataFrame(TABLE), "test": pandas.DataFrame(FRAME)}) == ROWS
    assert read_rows(pandas.DataFrame(TABLE).convert_dtypes(dtype_backend="pyarrow")) == ROWS


def test_a_run_on_a_data_frame_is_the_run_on_its_rows(tmp_path):
    frame = pandas.DataFrame({"prompt": PROMPTS, "target": TARGETS, "n": np.arange(4)})
    records = []
    for number, source in enumerate((frame, frame.to_dict("records"))):
        gan = small_gan(output_dir=str(tmp_path / str(number)))
        fitted = gan.fit(source, steps=2, progress=False)
        records.append([[step["responses"] for step in fitted], gan.evaluate(source), player_state(gan, "generator")])
    assert differences(*records) == []


def test_messages_in_a_data_frame(tmp_path):
    """As a table read from Parquet holds them: arrays of dicts, every key in each of them."""
    talks = [
        [{"role": "user", "content": "hi", "name": "me"}, {"role": "assistant", "content": "ho", "name": None}],
        [{"role": "user", "content": "hi", "name": np.nan}, {"role": "assistant", "content": "", "name": pandas.NA}],
    ]
    expected = [
        Row([{"role": "user", "content": "hi", "name": "me"}], "ho"), Row([{"role": "user", "content": "hi"}], ""),
    ]  # fmt: skip
    frame = pandas.DataFrame({"messages": talks})
    assert read_rows(frame) == expected
    frame["messages"] = [np.array(talk, dtype=object) for talk in talks]
    assert read_rows(frame) == expected
    pandas.DataFrame({"messages": [talks[0]]}).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(pandas.read_parquet(tmp_path / "rows.parquet")) == expected[:1]


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (pandas.DataFrame([["a", "b"]]), "a column called 0, a int: column names must be texts.*rename"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", ("x", 1)]), r"a column called \('x', 1\), a tuple"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", None]), "a column called (None|nan)"),
        (pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "two columns called 'prompt'"),
        (pandas.DataFrame({"prompt": []}), "has no rows"),
        (pandas.DataFrame({"promt": ["a"]}), r"row 1 has no column 'prompt' \(did you mean 'promt'"),
        (pandas.DataFrame({"prompt": ["a", None]}), "row 2: prompt is empty"),
        (pandas.DataFrame({"prompt": ["a", float("nan")]}, dtype=object), "row 2: prompt is empty"),
        (pandas.DataFrame({"prompt": [3.5]}), "row 1: prompt must be a text.*3.5"),
        (pandas.DataFrame({"prompt": ["a"], "completions": ["b"]}), "cannot be called 'completions'"),
    ],
)
def test_a_data_frame_that_is_no_data_set(frame, said):
    with pytest.raises(ValueError, match=said):
        read_rows(frame)


def test_a_frame_with_to_dicts_is_one_too():
    """polars' protocol; its values are Python's."""

    class Frame:
        def __iter__(self):
            return iter(["a column", "and another"])

        def to_dicts(self):
            return TABLE

    assert read_rows(Frame()) == ROWS


def test_data_frames_are_recognized_without_importing_their_library():
    code = """
import sys
from lora_gan.data import read_rows
read_rows([{"prompt": "a"}])
print([name for name in ("pandas", "polars") if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


# --- half a surrogate pair ------------------------------------------------------------------------------------------

HALF = "cat \ud83d"
SAID = r"'\\ud83d' in .* is half a surrogate pair, not a character"
NESTED = {
    "content": [{"role": "user", "content": HALF}],
    "a part of the content": [
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": HALF}]}
    ],
    "a call of a tool": [{"role": "user", "content": "a", "tool_calls": [{"function": {"arguments": {"x": [HALF]}}}]}],
    "the name of a key": [{"role": "user", "content": "a", HALF: "b"}],
    "the last of several": [{"role": "user", "content": "a"}, {"role": "assistant", "content": HALF}],
}


@pytest.fixture(scope="module")
def gan():
    return small_gan()


@pytest.mark.parametrize("prompt", ["\ud83d", HALF, "\udcff tail", *NESTED.values()])
def test_half_a_surrogate_pair_in_a_prompt_is_refused_everywhere(gan, prompt):
    before = player_state(gan, "generator")
    good = "the dog"
    calls = [
        lambda: gan.step(prompt=prompt),
        lambda: gan.step(prompt=[good, prompt]),
        lambda: gan.generate(prompt),
        lambda: gan.generate([good, prompt]),
        lambda: gan.score([good, prompt], ["a", "b"]),
        lambda: gan.fit([{"prompt": good}, {"prompt": prompt}], steps=1),
        lambda: gan.fit([Row(good), Row(prompt)], steps=1),
        lambda: gan.evaluate([{"prompt": prompt}]),
        lambda: read_rows(pandas.DataFrame({"prompt": [prompt]}, dtype=object)),
        lambda: read_rows([{"prompt": prompt}], columns=False),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="is half a surrogate pair, not a character") as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).isascii(), "what can be printed"
    assert differences(before, player_state(gan, "generator")) == []


def test_half_a_surrogate_pair_in_targets_columns_and_responses(gan):
    for call, where in (
        (lambda: gan.step("a", HALF), "step\\(\\): target_text: "),
        (lambda: gan.step(["a", "b"], ["c", HALF]), "step\\(\\): target_text, row 2: "),
        (lambda: gan.step("a", note=HALF), "step\\(\\): note: "),
        (lambda: gan.step("a", note={"deep": [1, (HALF,)]}), "step\\(\\): note: "),
        (lambda: gan.step(["a", "b"], note=["c", [HALF]]), "step\\(\\): note, row 2: "),
        (lambda: gan.score("a", HALF), "response 1: "),
        (lambda: gan.score(["a", "b"], ["c", HALF]), "response 2: "),
        (lambda: gan.generate(["a", HALF]), "prompt 2: "),
        (lambda: gan.generate(HALF), "the prompt: "),
        (lambda: gan.fit([{"prompt": "a", "target": HALF}], steps=1), "row 1: "),
        (lambda: gan.fit([{"prompt": "a", "note": [HALF]}], steps=1), "row 1: "),
        (lambda: gan.fit([Row("a", None, {"note": HALF})], steps=1), "row 1: "),
        (lambda: gan.evaluate([{"prompt": "a", "target": HALF}]), "row 1: "),
    ):
        with pytest.raises(ValueError, match=f"^{where}{SAID}"):
            call()


def test_a_whole_pair_and_other_rare_characters_are_texts(gan):
    out = gan.step("\U0001f600 \u2028\ufffe", "\U0001f63b", note="\ue000")
    assert out["prompt"] == "\U0001f600 \u2028\ufffe"
    assert read_rows([{"prompt": "a", "note": {"deep": [None, 1.5, b"\xff"]}}])[0].columns["note"]["deep"][2] == b"\xff"
