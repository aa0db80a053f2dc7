"""Rewards of TRL's form get what TRL's GRPOTrainer gives them. Oracle: GRPOTrainer itself."""

import asyncio
import json
import math
import threading
import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    PROMPTS,
    SMALL,
    TARGETS,
    Gone,
    base_folder,
    byte_tokenizer,
    dies,
    differences,
    player_state,
    reward,
    small_gan,
)
from transformers import AutoTokenizer, TrainerState

from lora_gan import LoraGAN, data
from lora_gan.cli import main as cli
from lora_gan.rewards import Notes, from_spec, score_parts
from lora_gan.rewards.calling import Caller
from lora_gan.run import tracking

CHATML = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
CHAT = [[{"role": "user", "content": f"{PROMPTS[i % 4]} {i}"}] for i in range(6)]
SOLUTION = r"\frac{1}{3}"


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def chat_gan(**settings) -> LoraGAN:
    tokenizer = byte_tokenizer("qwen2", "own")
    tokenizer.chat_template = CHATML
    if not {"reward", "reward_funcs"} & settings.keys():
        settings["reward"] = reward
    return LoraGAN(base_folder("qwen2"), processing_class=tokenizer, **{**SMALL, **settings})


class Recorder:
    """A reward of TRL's form that keeps its arguments."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, **columns})
        return [float(len(str(completion))) for completion in completions]


def trl_rewards(funcs, inputs, completions, completion_ids):
    """What GRPOTrainer computes of these completions, [rows][funcs], and what was logged beside it."""
    pytest.importorskip("trl")
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True),
        reward_funcs=funcs,
        reward_processing_classes=[None] * len(funcs),
        reward_func_names=[func.__name__ for func in funcs],
        environments=None,
        state=TrainerState(),
        args=SimpleNamespace(report_to=[]),
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    trainer._log_completion_extra = lambda *values: GRPOTrainer._log_completion_extra(trainer, *values)
    trainer._log_metric = lambda *values: GRPOTrainer._log_metric(trainer, *values)
    prompts = [row["prompt"] for row in inputs]
    scores = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, completion_ids)
    plain = [[None if math.isnan(score) else score for score in row] for row in scores.tolist()]
    return plain, dict(trainer._pending_extra_logs), dict(trainer._pending_metrics)


# --- what a reward receives -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_grpo(tmp_path_factory):
    """The arguments that GRPOTrainer gives a reward in its first step, on a chat base, and its end tokens."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = byte_tokenizer("qwen2", "own")
    tokenizer.chat_template = CHATML
    seen = Recorder()
    seen.__name__ = "seen"
    rows = [{"prompt": prompt, "solution": SOLUTION, "level": i} for i, prompt in enumerate(CHAT)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            model=str(base_folder("qwen2")),
            reward_funcs=[seen],
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            args=GRPOConfig(
                output_dir=str(tmp_path_factory.mktemp("grpo")), max_steps=1, per_device_train_batch_size=32,
                num_generations=32, max_completion_length=24, use_cpu=True, bf16=False, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_strategy="no", temperature=1.0,
                model_init_kwargs={"dtype": "float32"},
            ),
        )  # fmt: skip
        trainer.train()
    return seen.calls[0], trainer.eos_token_ids


def test_it_gets_by_name_all_that_grpo_gives(of_grpo):
    theirs, eos_ids = of_grpo
    seen = Recorder()
    gan = chat_gan(reward=seen, num_generations=32, max_completion_length=24)
    gan.step(CHAT[:2], [SOLUTION] * 2, solution=[SOLUTION] * 2, level=[0, 1])
    ours = seen.calls[0]
    assert theirs.keys() - ours.keys() == set() and ours.keys() - theirs.keys() == {"target"}
    for name, value in theirs.items():
        assert type(ours[name]) is type(value) or callable(value), name
        if isinstance(value, list):
            assert type(ours[name][0]) is type(value[0]), name
    assert ours["completions"][0][0].keys() == theirs["completions"][0][0].keys()
    for calls, ends in ((theirs, eos_ids), (ours, gan.players.base.eos_ids)):
        ids = calls["completion_ids"]
        assert {type(i) for row in ids for i in row} == {int}
        ended = [row for row in ids if row[-1] in ends]
        assert ended and all(len(row) == 24 for row in ids if row not in ended), "the end token is in them"
        assert not any(i in ends for row in ids for i in row[:-1])


def test_the_ids_are_those_that_were_sampled(monkeypatch):
    """Never the text tokenized again: a random base writes what no tokenizer would."""
    seen, sampled = Recorder(), []
    gan = small_gan(reward=seen, query_rate=0.5, query_design="uniform")
    monkeypatch.setattr(gan, "_sample", lambda *a, f=gan._sample, **o: sampled.append(f(*a, **o)) or sampled[-1])
    record = gan.step(PROMPTS[:2], TARGETS[:2])
    asked = [i for i, true in enumerate(sum(record["true_rewards"], [])) if true is not None]
    responses = sampled[0].responses
    ids = seen.calls[0]["completion_ids"]
    assert 0 < len(asked) < 8 and ids == [responses[i] for i in asked]
    encoder = gan.players.encoder
    assert [encoder.decode(row) for row in ids] == seen.calls[0]["completions"]
    retokenized = [encoder.response(text, data.Row(PROMPTS[0])) for text in seen.calls[0]["completions"]]
    assert ids != retokenized, "a test that would not see the difference"


@pytest.mark.parametrize("best_of", [1, 3])
def test_an_evaluation_gives_the_ids_that_were_sampled(best_of):
    seen = Recorder()
    gan = small_gan(reward=seen)
    responses = gan.generate(PROMPTS, best_of)
    found = gan.evaluate([{"prompt": prompt} for prompt in PROMPTS], best_of=best_of, batch_size=3)
    ids = seen.calls[0]["completion_ids"]
    assert type(responses[:2]) is list and responses == [sample["response"] for sample in found["samples"]]
    assert ids == responses.token_ids and [gan.players.encoder.decode(row) for row in ids] == responses
    assert max(map(len, ids)) <= SMALL["max_completion_length"]


def test_a_text_that_was_not_sampled_is_tokenized_and_closed():
    seen = Recorder()
    gan = small_gan(reward=seen)
    gan.ask([data.Row("a")] * 2, ["the cat", ""])
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    eos = tokenizer.eos_token_id
    assert seen.calls[0]["completion_ids"] == [[*tokenizer("the cat")["input_ids"], eos], [eos]]


def test_the_state_is_the_runs(tmp_path):
    seen, steps = Recorder(), []
    gan = small_gan(reward=lambda **given: steps.append(given["trainer_state"].global_step) or seen(**given),
                    output_dir=str(tmp_path))  # fmt: skip
    gan.fit([{"prompt": prompt} for prompt in PROMPTS], steps=3, progress=False)
    states = [call["trainer_state"] for call in seen.calls]
    assert steps == [0, 1, 2] and states[0] is states[2] and type(states[0]) is TrainerState
    assert (states[0].global_step, states[0].max_steps) == (3, 3)
    assert gan.trainer_state is None
    gan.step(PROMPTS[0])
    gan.evaluate([{"prompt": "a"}])
    assert [(s.global_step, s.max_steps) for s in (c["trainer_state"] for c in seen.calls[3:])] == [(3, 0), (4, 0)]
    planned = small_gan(reward=seen, max_steps=7)
    planned.ask([data.Row("a")], ["b"])
    planned.ask([data.Row("a")], ["b"], max_steps=9)
    assert [call["trainer_state"].max_steps for call in seen.calls[-2:]] == [7, 9]


# --- columns ----------------------------------------------------------------------------------------------------------


def test_a_target_that_a_step_lacks_is_none(tmp_path):
    def found(completions, target, **columns):
        return [0.0 if t is None else float(t in c) for c, t in zip(completions, target, strict=True)]

    rows = [{"prompt": "the cat", "target": "Bonjour"}, {"prompt": "the dog", "target": None}]
    gan = small_gan(reward=found, prompts_per_step=1, output_dir=str(tmp_path))
    assert [record["step"] for record in gan.fit(rows, steps=2, progress=False)] == [1, 2]


SPARSE = [{"prompt": "the cat", "kind": "a"}, {"prompt": "the dog"}, {"prompt": "the hen", "hint": None}]


@pytest.mark.parametrize("resumed", [False, True])
def test_every_column_comes_in_every_call(tmp_path, resumed):
    seen = Recorder()
    gan = small_gan(reward=seen, prompts_per_step=1, num_generations=2, output_dir=str(tmp_path))
    gan.fit(SPARSE, steps=2 if resumed else 6, progress=False)
    if resumed:
        gan = LoraGAN.from_checkpoint(tmp_path, reward=seen)
        gan.fit(SPARSE, steps=4, progress=False)
    assert len(seen.calls) == 6
    for call in seen.calls:
        assert call["kind"] == (["a"] * 2 if call["prompts"][0] == "the cat" else [None] * 2)
        assert call["hint"] == call["target"] == [None] * 2
    gan.step("the fox")
    assert "kind" not in seen.calls[-1], "a step on its own has the columns that it is given"


def test_a_streams_columns_are_those_seen_so_far(tmp_path):
    """Also those of rows that a resumed run passes over."""
    seen = Recorder()
    settings = {"prompts_per_step": 1, "num_generations": 2, "max_steps": 5}
    gan = small_gan(reward=seen, output_dir=str(tmp_path), **settings)
    rows = [{"prompt": "the dog"}, *SPARSE]
    gan.fit(data.read_rows(rows, streaming=True), steps=3, progress=False)
    assert ["kind" in call for call in seen.calls] == [False, True, True]
    assert seen.calls[2]["kind"] == [None, None] and "hint" not in seen.calls[2]
    again = LoraGAN.from_checkpoint(tmp_path, reward=seen)
    again.fit(data.read_rows(rows, streaming=True), progress=False)
    assert seen.calls[3]["kind"] == seen.calls[3]["hint"] == [None, None]
    assert seen.calls[4]["kind"] == [None, None] and seen.calls[4]["prompts"][0] == "the dog"


def graded(completions, solution):
    return [float(text == right) for text, right in zip(completions, solution, strict=True)]


MISSING = [
    (lambda gan, folder: gan.fit([{"prompt": "a", "answer": "b"}], steps=1, progress=False), "no row of the data"),
    (lambda gan, folder: gan.fit(data.read_rows([{"prompt": "a", "answer": "b"}], streaming=True), steps=1,
                                 progress=False), "no row read so far from the stream"),
    (lambda gan, folder: gan.fit([{"prompt": "a", "solution": "b", "answer": 1}], steps=1, progress=False,
                                 eval_dataset=[{"prompt": "a", "answer": "b"}]), "no row of the evaluation data"),
    (lambda gan, folder: gan.step("a", answer="b"), "no row"),
    (lambda gan, folder: gan.evaluate([{"prompt": "a", "answer": "b"}]), "no row of the evaluation data"),
    (lambda gan, folder: gan.ask([data.Row("a", None, {"answer": "b"})], ["c"]), "no row"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "rows"), MISSING)
def test_a_column_that_no_row_has_is_named_before_the_first_step(way, rows, tmp_path):
    gan = small_gan(reward=graded, output_dir=str(tmp_path / "run"))
    said = rf"graded\(completions, solution\) needs 'solution', and {rows} has such a column. .*the columns 'answer'"
    with pytest.raises(ValueError, match=said):
        way(gan, tmp_path)
    assert gan.global_step == gan.reward_calls == 0 and not (tmp_path / "run").exists()


def test_a_function_without_kwargs_gets_what_it_names():
    calls = []

    def only(completions, solution, level=7, hint="none"):
        calls.append((solution, level, hint))
        return [1.0] * len(completions)

    def alone(completion_ids):
        calls.append([len(ids) for ids in completion_ids])
        return [1.0] * len(completion_ids)

    gan = small_gan(reward_funcs=[only, alone], num_generations=2)
    gan.step("a", "t", solution="s", level=3, other="x")
    assert calls[0] == (["s", "s"], [3, 3], "none") and len(calls[1]) == 2

    def renamed(completions, target_text):
        return [float(text == "t") for text in target_text]

    assert small_gan(reward=renamed).step("a", "t")["reward_mean"] == 1.0


def test_target_column_is_there_under_both_names(tmp_path):
    seen = Recorder()
    gan = small_gan(reward=seen, target_column="solution", num_generations=2, output_dir=str(tmp_path))
    gan.fit([{"prompt": "a", "solution": "b"}], steps=1, progress=False)
    assert set(seen.calls[0]["solution"]) == set(seen.calls[0]["target"]) == {"b"}


def test_a_dry_run_knows_all_columns_and_steps(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "seen = []\n"
        "def rated(completions, kind, trainer_state, completion_ids):\n"
        "    seen.append((kind, trainer_state.max_steps, completion_ids))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    rows = [{"prompt": f"the cat {i}", "target": "x"} for i in range(9)] + [{"prompt": "last", "kind": "k"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(base_folder()), "--data", str(tmp_path / "rows.jsonl"), "--max_steps", "5"]
    options += ["--reward", f"{tmp_path / 'mine.py'}:rated", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    assert cli.main(["train", *options, "--max_completion_length", "6", "--prompts_per_step", "2"]) == 0, (
        capsys.readouterr().err
    )
    seen = from_spec(f"{tmp_path / 'mine.py'}:rated").__globals__["seen"]
    assert {steps for _, steps, _ in seen} == {5} and all(len(kind) == len(ids) for kind, _, ids in seen)


# --- TRL's own rewards ------------------------------------------------------------------------------------------------

ANSWERS = [
    r"<think>one of three</think> The answer is \boxed{\frac{1}{3}}",
    r"<think>guessing</think>\boxed{\frac{1}{2}}",
    r"\boxed{\frac{1}{3}}",
    r"<think>never ends \boxed{\frac{1}{3}}",
    "",
    "the the the the the the the the the the the the",
]
SOLUTIONS = [SOLUTION, SOLUTION, SOLUTION, SOLUTION, "not parseable", SOLUTION]
OF_TRL = {
    "think_format_reward": {},
    "get_soft_overlong_punishment": {"max_completion_len": 20, "soft_punish_cache": 16},
    "get_repetition_penalty_reward": {"ngram_size": 2},
    "accuracy_reward": {},
    "reasoning_accuracy_reward": {},
    "get_cosine_scaled_reward": {"max_len": 64},
}
NEED_MATHS = ("accuracy_reward", "reasoning_accuracy_reward", "get_cosine_scaled_reward")


def of_trl(name):
    pytest.importorskip("trl")
    if name in NEED_MATHS:
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    return from_spec({"name": f"trl.rewards:{name}", **OF_TRL[name]})


@pytest.mark.parametrize("name", OF_TRL)
def test_trls_own_rewards_give_the_numbers_that_grpo_gets(name):
    func = of_trl(name)
    gan = chat_gan(reward=func)
    rows = [data.Row(prompt, None, {"solution": right}) for prompt, right in zip(CHAT, SOLUTIONS, strict=True)]
    ids = [gan.players.encoder.response(text, row) for text, row in zip(ANSWERS, rows, strict=True)]
    notes = Notes()
    totals, parts = gan.ask(rows, ANSWERS, notes=notes)
    inputs = [{"prompt": row.prompt, **row.columns} for row in rows]
    messages = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    expected, extras, metrics = trl_rewards([func], inputs, messages, ids)
    singles = [None if total is None else float(np.float32(total)) for total in totals]  # GRPOTrainer's are float32
    assert singles == [row[0] for row in expected] and totals == next(iter(parts.values()))
    assert len(set(totals)) > 1, "a test in which nothing differs would show nothing"
    assert tracking.logged_extras(notes) == extras and tracking.logged_metrics(notes) == metrics
    assert bool(extras) == name.endswith("accuracy_reward")


def test_all_of_them_in_one_run(tmp_path):
    funcs = [of_trl(name) for name in OF_TRL]
    gan = chat_gan(reward_funcs=funcs, output_dir=str(tmp_path))
    rows = [{"prompt": prompt, "solution": SOLUTION} for prompt in CHAT]
    asked = []
    gan.true_reward.ask = lambda *a, f=gan.true_reward.ask, **o: asked.append((a, o)) or f(*a, **o)
    records = gan.fit(rows, steps=2, progress=False)
    for record, ((batch, texts, *_), options) in zip(records, asked, strict=True):
        inputs = [{"prompt": row.prompt, **row.columns} for row in batch]
        messages = [[{"role": "assistant", "content": text}] for text in texts]
        expected, _, _ = trl_rewards(funcs, inputs, messages, options["completion_ids"])
        means = np.array(expected, dtype=float).mean(0)
        names = [name for name in record if name.startswith("rewards/") and not name.endswith("/std")]
        assert [record[name] for name in names] == pytest.approx(means.tolist(), rel=1e-6)
    samples = lines_of(tmp_path / "completions.jsonl")
    assert all(sample["solution"] == SOLUTION for sample in samples) and "gold_parsed" in samples[0]
    assert "reasoning_accuracy_reward/answer_parsed" in samples[0], "both log this column, with different values"


@pytest.mark.parametrize(
    "spec", ["trl.rewards:think_format_reward", '{"name": "trl.rewards:get_soft_overlong_punishment", '
             '"max_completion_len": 6, "soft_punish_cache": 4}'], ids=["function", "factory"]
)  # fmt: skip
def test_on_the_command_line(spec, tmp_path, capsys):
    pytest.importorskip("trl")
    tokenizer = byte_tokenizer("qwen2", "own")
    tokenizer.chat_template = CHATML
    folder = tmp_path / "base"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base_folder("qwen2")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in CHAT))
    options = ["--model", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--max_steps", "1", "--reward", spec]
    options += ["--max_completion_length", "6", "--output_dir", str(tmp_path / "run"), "--prompts_per_step", "2"]
    assert cli.main(["train", *options]) == 0, capsys.readouterr().err
    (line,) = lines_of(tmp_path / "run" / "metrics.jsonl")
    name = "think_format_reward" if spec.startswith("trl") else "soft_overlong_punishment_reward"
    assert f"rewards/{name}/mean" in line
    assert (line["reward"] == 0) if name.startswith("think") else (-1 <= line["reward"] < 0)


# --- what rewards log -------------------------------------------------------------------------------------------------


def logging_reward(prompts, completions, log_metric, log_extra, **columns):
    lengths = [len(text) for text in completions]
    log_metric("longest", max(lengths))
    log_metric("longest", np.float32(min(lengths)))
    log_extra("letters", lengths)
    return [reward(text) for text in completions]


def quiet_reward(prompts, completions, **columns):
    return [reward(text) for text in completions]


async def async_reward(prompts, completions, log_metric, log_extra, **columns):
    await asyncio.sleep(0.001)
    return logging_reward(prompts, completions, log_metric, log_extra)


@pytest.mark.parametrize("func", [logging_reward, async_reward])
@pytest.mark.parametrize("settings", [{}, {"reward_workers": 4, "reward_timeout": 60.0}], ids=["plain", "threads"])
def test_what_is_logged_stands_beside_its_completions_and_changes_nothing(func, settings, tmp_path):
    rows = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(6)]
    options = {"query_rate": 0.5, **settings}
    gans = [
        small_gan(reward=each, output_dir=str(tmp_path / each.__name__), **options) for each in (func, quiet_reward)
    ]
    records, quiet = [gan.fit(rows, steps=3, progress=False) for gan in gans]
    for player in ("generator", "discriminator"):
        assert differences(*(player_state(gan, player) for gan in gans)) == []
    for record, other in zip(records, quiet, strict=True):
        new = {name for name in record.keys() - other.keys() if not name.startswith("rewards/")}
        assert new == {"longest", "extra"}
        asked = [
            (text, true) for group, trues in zip(record["responses"], record["true_rewards"], strict=True)
            for text, true in zip(group, trues, strict=True)
        ]  # fmt: skip
        lengths = [len(text) for text, true in asked if true is not None]
        assert 0 < len(lengths) < len(asked)
        assert record["longest"] == (max(lengths) + min(lengths)) / 2
        assert sum(record["extra"]["letters"], []) == [None if true is None else len(text) for text, true in asked]
    lines = lines_of(tmp_path / func.__name__ / "metrics.jsonl")
    assert [line["longest"] for line in lines] == [record["longest"] for record in records]
    samples = lines_of(tmp_path / func.__name__ / "completions.jsonl")
    assert len(samples) == 24
    for sample in samples:
        assert sample["letters"] == (None if sample["true_reward"] is None else len(sample["completion"]))


def test_one_prompt_gives_one_list():
    record = small_gan(reward=logging_reward).step(PROMPTS[0])
    assert record["extra"] == {"letters": [len(text) for text in record["responses"]]}


def test_with_several_steps_a_line_it_is_their_mean(tmp_path):
    def now_and_then(completions, trainer_state, log_metric, **columns):
        if trainer_state.global_step != 1:
            log_metric("seen/often", trainer_state.global_step)
        return [1.0 * len(text) for text in completions]

    gan = small_gan(reward=now_and_then, logging_steps=3, output_dir=str(tmp_path))
    gan.fit([{"prompt": "a"}], steps=3, progress=False)
    assert [line["seen/often"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1.0], "of the steps that logged it"


def test_an_evaluation_logs_it_as_eval(tmp_path):
    gan = small_gan(reward=logging_reward, output_dir=str(tmp_path), eval_steps=1, metric_for_best_model="longest")
    gan.fit([{"prompt": "a"}], steps=1, progress=False, eval_dataset=[{"prompt": "b"}, {"prompt": "c"}])
    found = gan.evaluate([{"prompt": "b"}, {"prompt": "c"}])
    assert lines_of(tmp_path / "metrics.jsonl")[-1]["eval_longest"] == found["logged"]["longest"]
    assert [sample["letters"] for sample in found["samples"]] == [len(s["response"]) for s in found["samples"]]


def logs(name, value=1.0, column=None, values=None):
    def logged(completions, log_metric, log_extra, **columns):
        log_metric(name, value)
        if column is not None:
            log_extra(column, [column] * len(completions) if values is None else values)
        return [reward(text) for text in completions]

    return logged


OURS = [
    "kl", "reward", "reward_mean", "prompt", "alarms", "step", "rewards/x/mean", "eval_x", "completions/mean_length",
    "disc_mine", "gen_loss", "extra", "num_tokens",
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_name_of_this_librarys_own_is_put_behind_the_rewards(name):
    plain, record = (small_gan(reward=func).step(PROMPTS[0]) for func in (logs("free"), logs(name, 5.0)))
    assert record.pop(f"logged/{name}") == 5.0 and plain.pop("free") == 1.0
    assert record == plain
    assert tracking.summary(record)["step"] == 1


def test_a_samples_own_columns_are_kept(tmp_path):
    gan = small_gan(reward=logs("a", column="completion"), output_dir=str(tmp_path))
    gan.fit([{"prompt": "a"}], steps=1, progress=False)
    sample = lines_of(tmp_path / "completions.jsonl")[0]
    assert sample["logged/completion"] == "completion" != sample["completion"]


def test_two_rewards_that_log_one_column():
    def first(completions, log_extra, log_metric, **columns):
        log_metric("m", 1.0)
        log_extra("same", [1] * len(completions))
        log_extra("other", [1] * len(completions))
        return [1.0] * len(completions)

    def second(completions, log_extra, log_metric, **columns):
        log_metric("m", 2.0)
        log_extra("same", [1] * len(completions))
        log_extra("other", [2] * len(completions))
        return [1.0] * len(completions)

    record = small_gan(reward_funcs=[first, second], num_generations=2).step("a")
    assert record["m"] == 1.5
    assert record["extra"] == {"same": [1, 1], "other": [1, 1], "second/other": [2, 2]}


def test_every_name_of_a_run_is_known_as_ours(tmp_path):
    """So that no reward can log one of them."""
    variants = [
        {}, {"imitation_weight": 0.1, "kl_target": 5.0}, {"gradient_path": "straight_through"},
        {"adversarial": True, "disc_objective": "real_vs_generated"}, {"adversarial": False},
    ]  # fmt: skip
    rows = [{"prompt": p, "target": t} for p, t in zip(PROMPTS, TARGETS, strict=True)]
    for number, settings in enumerate(variants):
        gan = small_gan(output_dir=str(tmp_path / str(number)), **settings)
        records = gan.fit(rows, steps=2, progress=False, eval_dataset=rows[:2])
        names = set(records[-1]) | {n for line in lines_of(tmp_path / str(number) / "metrics.jsonl") for n in line}
        assert {
            name for name in names if name not in tracking.OWN and not name.startswith(tracking.OWN_PREFIXES)
        } == set()
        samples = lines_of(tmp_path / str(number) / "completions.jsonl")
        assert {name for sample in samples for name in sample} <= set(tracking.SAMPLE)


@pytest.mark.parametrize(
    ("channel", "name", "value", "said"),
    [
        ("log_metric", "a", "many", r"log_metric\('a', 'many'\) is not accepted: the value must be a number"),
        ("log_metric", "a", [1.0, 2.0], "the value must be a number"),
        ("log_metric", "a", None, "the value must be a number"),
        ("log_metric", 3, 1.0, "the name must be a printable text"),
        ("log_metric", "a\ud800", 1.0, "the name must be a printable text"),
        ("log_metric", "", 1.0, "the name must be a printable text"),
        ("log_extra", "a", "text", "give a list, one value per completion"),
        ("log_extra", "a", 3, "give a list, one value per completion"),
        ("log_extra", None, [1], "the name must be a printable text"),
    ],
)
def test_what_cannot_be_logged_is_said_where_it_is_logged(channel, name, value, said):
    def wrong(completions, **given):
        given[channel](name, value)
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=said):
        small_gan(reward=wrong).step("a")


@pytest.mark.parametrize("values", [[1], [1] * 99, []])
def test_a_column_of_another_length_is_left_out(values):
    if values:
        with pytest.warns(UserWarning, match=f"passed {len(values)} values of 'x' to log_extra for 4 completions"):
            record = small_gan(reward=logs("a", column="x", values=values)).step("a")
        assert "extra" not in record and record["a"] == 1.0
    else:
        parts = score_parts([logs("a", column="x", values=values)], [], [], {}, notes=(notes := Notes()))
        assert parts == {"logged": []} and notes.extras == {("logged", "x"): []}


def test_a_column_may_come_in_pieces_and_of_any_values(tmp_path):
    odd = [float("nan"), {1, 2}, {"a": (1, math.inf)}, np.arange(2), torch.tensor(0.5), "\ud800", object, b"x", 10**400]

    def pieces(completions, log_extra, **columns):
        for i in range(len(completions)):
            log_extra("odd", [odd[i % len(odd)]])
            log_extra("mixed", [i if i % 2 else "text"])
        return [reward(text) for text in completions]

    options = {"num_generations": 9, "prompts_per_step": 1, "report_to": "tensorboard"}
    gan = small_gan(reward=pieces, output_dir=str(tmp_path), **options)
    (record,) = gan.fit([{"prompt": "a"}], steps=1, progress=False)
    (odds,) = record["extra"]["odd"]
    assert odds[0] is None and odds[3] == [0, 1] and odds[4] == 0.5 and type(odds[1]) is type(odds[2]) is str
    assert len(lines_of(tmp_path / "completions.jsonl")) == 9


def test_what_is_logged_later_or_by_a_try_that_failed_does_not_count(monkeypatch):
    hanging, tries = threading.Event(), []
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def flaky(completions, log_metric, log_extra, **columns):
        tries.append(len(tries))
        number = len(tries)
        log_metric("try", number)
        log_extra("try", [number] * len(completions))
        if number == 1:
            raise ConnectionError("gone")
        if number == 2:
            hanging.wait(20)
            log_metric("try", 100.0)
        return [float(number)] * len(completions)

    notes = Notes()
    caller = Caller(timeout=0.2, retries=2)
    parts = score_parts([flaky], ["p"] * 2, ["a", "b"], {}, caller=caller, notes=notes)
    hanging.set()
    assert parts == {"flaky": [3.0, 3.0]}
    assert notes.metrics == {("flaky", "try"): [3.0]} and notes.extras == {("flaky", "try"): [3, 3]}


def test_a_metric_that_is_not_finite_is_absent(tmp_path):
    gan = small_gan(reward=logs("odd", float("nan")), output_dir=str(tmp_path))
    (record,) = gan.fit([{"prompt": "a"}], steps=1, progress=False)
    assert math.isnan(record["odd"]) and "odd" not in lines_of(tmp_path / "metrics.jsonl")[0]


# --- and the log of answers -------------------------------------------------------------------------------------------


class Paid:
    """Logs, counts its calls, and is gone in the n-th."""

    def __init__(self, goes_at=None):
        self.calls, self.goes_at = 0, goes_at

    def __call__(self, prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns):
        if self.calls == self.goes_at:
            raise Gone
        self.calls += 1
        log_metric("paid", 1.0)
        log_extra("paid", [1] * len(completions))
        return [reward(text) + trainer_state.global_step for text in completions]


def test_an_answer_of_the_log_logs_nothing_and_is_known_by_texts_and_columns_alone(tmp_path):
    rows = [{"prompt": f"{PROMPTS[i % 4]} {i}", "kind": i} for i in range(6)]

    def run(paid):
        gan = small_gan(output_dir=str(tmp_path), reward=paid, save_steps=2)
        if list(tmp_path.glob("step-*")):
            gan.load_checkpoint()
        return gan.fit(rows, steps=4 - gan.global_step, progress=False)

    with dies():
        run(Paid(3))
    with pytest.warns(UserWarning, match="1 answers of the true reward are reused"):
        records = run(paid := Paid())
    assert paid.calls == 1, "step 3 was paid for before"
    assert "paid" not in records[0] and "extra" not in records[0] and records[1]["paid"] == 1.0
    asked = [line["asked"] for line in lines_of(tmp_path / "answers.jsonl")[1:]]
    assert all(len(digest) == 32 for digest in asked)


def test_the_question_does_not_hold_what_other_rows_have():
    """The digest of a question is that of prompts, completions and the columns that these rows have values of."""
    questions = []

    class Log:
        def key(self, reward, question):
            questions.append(question)

        def known(self, key):
            return False, None

        def keep(self, key, answer):
            pass

        def settle(self):
            pass

    for columns in ({}, {"target": [None]}, {"kind": [None], "target": [None]}):
        score_parts([quiet_reward], ["p"], ["c"], columns, caller=Caller(log=Log()), completion_ids=[[len(columns)]],
                    trainer_state=TrainerState(global_step=len(columns)))  # fmt: skip
    score_parts([quiet_reward], ["p"], ["c"], {"kind": ["a"]}, caller=Caller(log=Log()))
    assert questions[:3] == [{"prompts": ["p"], "completions": ["c"]}] * 3
    assert questions[3] == {"prompts": ["p"], "completions": ["c"], "kind": ["a"]}
