"""A run that starts can end: every row is checked before the first step, rows of a stream as they arrive.

Oracles: rows that are known to be wrong at a known line; an undisturbed run on the rows that are left.
"""

import json
import subprocess
import sys
import warnings

import pytest
from families import family_folder, family_gan
from helpers import PROMPTS, SMALL, base_folder, differences, player_state, small_gan
from test_chat_prompts import said
from transformers import AutoTokenizer

from lora_gan import LoraGAN, data, tiny
from lora_gan.cli.main import main
from lora_gan.data import read_rows
from lora_gan.run.row_checks import CheckedRows

LONG = "cat " * 120  # more tokens than the 96 of these bases
SHORT = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": "by"} for i in range(6)]
STRICT = (  # refuses what is not said to it politely
    "{% for m in messages %}{% if 'rude' in m.content %}{{ raise_exception('be polite') }}{% endif %}"
    "{{ m.content }}<|stop|>{% endfor %}"
)


def calls_counted():
    asked = []

    def reward(response, target=None):
        asked.append(response)
        return len(response) / 20

    return reward, asked


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(text):
    return [{"role": "user", "content": text}]


def answered(first, second):
    """A row whose target is three messages."""
    says = {"role": "assistant", "content": "by"}
    return {"prompt": chat(first), "target": [says, *chat(second), says]}


REFUSED = r"line 4: .*template rejects the prompt.*be polite"
WRONG = {  # what is wrong with row 4: the rows, settings, and what is said
    "long": (SHORT[:3] + [{"prompt": LONG}], {}, r"line 4: a prompt of \d+ tokens.*'cat cat.*on_long_prompt"),
    "template": ([{"prompt": chat(text)} for text in ("a", "b", "c", "rude")], {}, REFUSED),
    "rendered": ([{"prompt": chat("a")}] * 3 + [{"prompt": chat(LONG)}], {}, r"line 4: a prompt of \d+ tokens"),
    "no target": (SHORT[:3] + [{"prompt": "a"}], {"imitation_weight": 0.5}, r"line 4: imitation needs target_text"),
    "warm-up": (SHORT[:3] + [{"prompt": "a"}], {"imitation_warmup_steps": 2}, r"line 4: imitation needs target_text"),
    "target": (
        [answered("a", "b"), answered("a", "c"), answered("b", "c"), answered("d", "rude")],
        {"imitation_weight": 0.5},
        REFUSED,
    ),
    "tools": ([{"prompt": chat("a")}] * 3 + [{"prompt": chat("a"), "tools": "x"}], {}, r"line 4: the column 'tools'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_is_named_before_the_first_step(name, tmp_path):
    rows, settings, message = WRONG[name]
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.chat_template = STRICT
    reward, asked = calls_counted()
    gan = small_gan(processing_class=tokenizer, reward=reward, output_dir=str(tmp_path / "run"), **settings)
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        gan.fit(file, steps=1, progress=False)
    assert gan.global_step == 0 and not asked and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message.replace("line", "row")):
        gan.fit(rows, steps=1, progress=False)
    if not settings:
        with pytest.raises(ValueError, match=message):  # held-out rows too
            gan.fit(rows[:3], steps=1, eval_dataset=file, progress=False)
        with pytest.raises(ValueError, match=message):
            gan.evaluate(file)
    assert gan.global_step == 0 and not asked


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_the_command_names_it_before_anything_is_printed(words, tmp_path, capsys):
    rows = tiny.pairs("train", 40, seed=0)
    rows[33]["prompt"] = LONG * 4
    file = write(tmp_path / "rows.jsonl", rows)
    command = ["train", "--model", "tiny", "--data", str(file), "--reward", "exact_match", "--max_steps", "2"]
    command += ["--num_generations", "2", "--max_completion_length", "4", "--output_dir", str(tmp_path / "run"), *words]
    assert main(command) == 2
    told = capsys.readouterr()
    assert f"{file}, line 34: a prompt of" in told.err and not told.out and not (tmp_path / "run").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*command, "--on_long_prompt", "drop"]) == 0
    assert "39 rows" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 3, 6])
def test_dropping_trains_as_on_the_rows_that_are_left(place, tmp_path):
    rows = [*SHORT[:place], {"prompt": LONG, "target": "by"}, *SHORT[place:]]
    gan = small_gan(on_long_prompt="drop", output_dir=str(tmp_path / "a"))
    told = said(lambda: gan.fit(rows, steps=4, progress=False))
    assert any(f"1 of 7 rows are dropped (on_long_prompt='drop'); the first: row {place + 1}:" in text for text in told)
    oracle = small_gan(output_dir=str(tmp_path / "b"))
    oracle.fit(SHORT, steps=4, progress=False)
    for player in ("generator", "discriminator"):
        assert differences(player_state(oracle, player), player_state(gan, player)) == []


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_stream_drops_rows_as_they_come_and_resumes_where_it_was(place, tmp_path):
    rows = [*SHORT[:place], {"prompt": LONG, "target": "by"}, *SHORT[place:]]
    file = write(tmp_path / "rows.jsonl", rows)
    settings = {"on_long_prompt": "drop", "max_steps": 5}
    gan = small_gan(output_dir=str(tmp_path / "a"), **settings)
    told = said(lambda: gan.fit(read_rows(file, streaming=True), progress=False))
    assert sum(f"line {place + 1}: a prompt of" in text for text in told) == 1, "said once, though there are epochs"
    oracle = small_gan(output_dir=str(tmp_path / "b"), **settings)
    oracle.fit(read_rows(write(tmp_path / "short.jsonl", SHORT), streaming=True), progress=False)
    halves = small_gan(output_dir=str(tmp_path / "c"), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halves.fit(read_rows(file, streaming=True), steps=2, progress=False)
        resumed = LoraGAN.from_checkpoint(tmp_path / "c", reward=halves.compute_reward)
        resumed.fit(read_rows(file, streaming=True), progress=False)
    for player in ("generator", "discriminator"):
        assert differences(player_state(oracle, player), player_state(gan, player)) == []
        assert differences(player_state(oracle, player), player_state(resumed, player)) == []


def test_truncating_keeps_the_end_of_a_prompt_and_its_begin_token():
    for architecture in ("gpt2", "llama"):  # llama's tokenizer begins every text with a token
        gan = small_gan(base_folder(architecture), on_long_prompt="truncate_left")
        (ids,) = gan._encode([LONG])
        whole = gan.players.base.tokenizer(LONG)["input_ids"]
        room = 96 - SMALL["max_completion_length"]
        assert len(ids) == room and ids[-20:] == whole[-20:]
        assert ids == (whole[:1] + whole[1 - room :] if architecture == "llama" else whole[-room:])
        out = gan.step([LONG, PROMPTS[0]])
        sampled = gan.step([LONG], train_gen=False, train_disc=False)
        assert len(out["responses"][0]) == 4 and gan.generate(LONG)
        scores = gan.score([LONG] * 4, sampled["responses"][0])
        assert all(score is not None for score in scores)


def test_a_score_reads_a_cut_prompt_as_training_did():
    gan = small_gan(
        base_folder("gpt2", words=True), on_long_prompt="truncate_left", max_completion_length=20, num_generations=24
    )
    for _ in range(2):
        gan.step([LONG])
    out = gan.step([LONG], train_gen=False, train_disc=False)
    found = gan.score([LONG] * 24, out["responses"][0])
    tokenizer, equal = gan.players.base.tokenizer, 0
    for text, ours, trained in zip(out["responses"][0], found, out["pred_rewards"][0], strict=True):
        if len(tokenizer(text)["input_ids"]) < 15:  # ended by itself
            equal += ours == pytest.approx(trained, abs=1e-5)
    assert equal >= 3


def test_a_score_of_a_response_without_an_end_reads_the_cut_prompt_as_training_did():
    gan = small_gan(
        base_folder("gpt2", words=True), on_long_prompt="truncate_left", max_completion_length=20, num_generations=24
    )
    for _ in range(2):
        gan.step([LONG])
    rows, encoder = data.as_rows([LONG]), gan.players.encoder
    prompts = encoder.prompts(rows)
    sampled = gan._sample(prompts, gan._uniforms(prompts, 24, "test"))
    trained, whole = gan.discriminator.predict(sampled).mean(0), 0
    for text, ids, predicted in zip(sampled.texts, sampled.responses, trained, strict=True):
        if len(ids) == 20 and encoder.response(text, rows[0])[:-1] == ids:  # cut, and tokenized as it was sampled
            assert gan.score(LONG, text) == [pytest.approx(predicted, abs=1e-5)]
            whole += 1
    assert whole >= 1


@pytest.mark.filterwarnings("ignore:3 of 3 rows are dropped")
def test_nothing_is_left():
    gan = small_gan(on_long_prompt="drop")
    with pytest.raises(ValueError, match="no row is left.*row 1: a prompt of"):
        gan.fit([{"prompt": LONG}] * 3, steps=1, progress=False)
    with pytest.raises(ValueError, match="no rows"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.fit(read_rows(lambda: [{"prompt": LONG}] * 3, streaming=True), steps=1, progress=False)
    with pytest.raises(ValueError, match="on_long_prompt='cut' is not accepted: it must be one of raise, drop"):
        small_gan(on_long_prompt="cut")
    with pytest.raises(ValueError, match="do not fit"):  # no room at all: nothing to cut to
        small_gan(on_long_prompt="truncate_left", max_completion_length=96).step(LONG)


def test_rows_are_checked_once():
    gan = small_gan()
    rows = gan.check_rows(SHORT)
    assert isinstance(rows, CheckedRows) and gan.check_rows(rows) is rows


def test_what_a_resume_is_recommended_for_can_succeed(tmp_path):
    """A stream meets a wrong row in the middle: what is printed, with the row mended, ends the run."""
    rows = tiny.pairs("train", 8, seed=0)
    file = write(tmp_path / "rows.jsonl", [*rows[:5], {"prompt": LONG * 4, "target": "x"}, *rows[5:]])
    command = ["train", "--model", "tiny", "--data", str(file), "--streaming", "--reward", "exact_match"]
    command += ["--max_steps", "6", "--num_generations", "2", "--max_completion_length", "4", "--prompts_per_step", "1"]
    command += ["--output_dir", str(tmp_path / "run")]

    def run(words):
        done = subprocess.run([sys.executable, "-m", "lora_gan", *words], capture_output=True, text=True, timeout=120)
        return done.returncode, " ".join(done.stderr.split())

    code, told = run(command)
    assert code == 2 and f"{file}, line 6: a prompt of" in told
    assert "fix the cause, then continue with: lora-gan train --config" in told
    go_on = told.split("continue with: lora-gan ")[1].split()
    code, told = run([*go_on, "--on_long_prompt", "drop"])
    assert code == 0, told
    assert (tmp_path / "run" / "step-6").is_dir()


def test_held_out_prompts_are_checked_in_the_form_that_they_will_have(tmp_path):
    """After training on messages a plain prompt is sent as one, and then it is longer."""
    gan = family_gan("smollm2", output_dir=str(tmp_path))
    room = gan.players.base.context - gan.config.max_completion_length
    tokenizer, plain = gan.players.base.tokenizer, "cat"
    while len(tokenizer(plain + " cat")["input_ids"]) <= room:
        plain += " cat"
    with pytest.raises(ValueError, match="row 1: a prompt of"):
        gan.fit([{"prompt": chat("why")}], steps=1, eval_dataset=[{"prompt": plain}], progress=False)
    assert gan.global_step == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan.fit([{"prompt": "why"}], steps=1, eval_dataset=[{"prompt": plain}], progress=False)
    assert gan.global_step == 1


def test_the_command_checks_held_out_prompts_in_that_form_too(tmp_path, capsys):
    gan = family_gan("smollm2")
    tokenizer, plain = gan.players.base.tokenizer, "cat"
    while len(tokenizer(plain + " cat")["input_ids"]) <= gan.players.base.context - 8:
        plain += " cat"
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": plain}])
    command = ["train", "--model", str(family_folder("smollm2")), "--data", "", "--eval_data", str(held_out)]
    command += ["--reward", "repetition", "--max_steps", "1", "--num_generations", "2", "--max_completion_length", "8"]
    for kind, prompt, code in (("chat", chat("why"), 2), ("plain", "why", 0)):
        command[4] = str(write(tmp_path / f"{kind}.jsonl", [{"prompt": prompt}]))
        for streams in ([], ["--streaming"]):
            folder = tmp_path / f"{kind}{len(streams)}"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert main([*command, "--output_dir", str(folder), *streams]) == code
            assert code == 0 or f"{held_out}, line 1: a prompt of" in capsys.readouterr().err
            assert folder.exists() == (code == 0), "before the first step"


def test_the_error_of_a_long_prompt_names_settings_that_help():
    others = {
        "raise": "or set on_long_prompt to drop or truncate_left",
        "drop": "or set on_long_prompt to truncate_left",
    }
    for setting, said_then in others.items():
        with pytest.raises(ValueError, match=f"{said_then}$"):
            small_gan(on_long_prompt=setting).generate(LONG)
    with pytest.raises(ValueError, match="or set a smaller max_completion_length$"):
        small_gan(on_long_prompt="truncate_left").generate(LONG, max_completion_length=96)


def test_whatever_a_template_raises_names_the_row():
    gan = family_gan("gemma-3")
    rows = [{"prompt": chat("why"), "chat_template_kwargs": {"chat_template": "{{ 1 / 0 }}"}}]
    with pytest.raises(ValueError, match="row 1: the base's chat template rejects the prompt 'why': division by"):
        gan.check_rows(rows)


def test_the_eval_command_counts_the_rows_that_were_judged(tmp_path, capsys):
    family_gan("smollm2", on_long_prompt="drop").save_checkpoint(ckpt_dir=tmp_path / "run")
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "why"}, {"prompt": LONG * 4}, {"prompt": "where"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = ["--checkpoint", str(tmp_path / "run"), "--data", str(rows), "--reward", "repetition"]
        assert main(["eval", *words]) == 0
    assert capsys.readouterr().out.startswith("2 rows, step 0;")


def test_a_step_that_failed_remembers_no_kind_of_prompt():
    gan = family_gan("smollm2", reward=lambda response, target: 1 / 0)
    with pytest.raises(ValueError, match="raised ZeroDivisionError"):
        gan.step(chat("why"))
    assert gan.prompt_kinds == set()


def test_columns_are_not_asked_for_where_no_step_asks_the_reward(tmp_path):
    def needs_column(prompts, completions, rating):
        raise AssertionError

    gan = small_gan(reward=needs_column, adversarial=True, disc_objective="real_vs_generated", output_dir=str(tmp_path))
    assert len(gan.fit([{"prompt": "why", "target": "because"}], steps=1, progress=False)) == 1
    with pytest.raises(ValueError, match="rating"):
        small_gan(reward=needs_column, output_dir=str(tmp_path)).fit([{"prompt": "why"}], steps=1, progress=False)
