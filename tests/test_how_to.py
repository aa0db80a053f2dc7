"""docs/how-to/: the code of each page runs, in an empty folder, offline.

Blocks of bash and Python run as they are written, except that each run takes 2 steps. Blocks fenced as sh, yaml or json
are shown only: they need a network, a hub id or a server. The judge's page meets a stub server on the loopback
interface, and the person's page a pseudo-terminal.
"""

import inspect
import json
import os
import pty
import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
from counting_server import CountingServer, chat_completion
from test_tutorial import run_blocks

from lora_gan import Config, LoraGAN
from lora_gan.cli.commands import export
from lora_gan.rewards.human import Human
from lora_gan.rewards.judge import Judge

FOLDER = Path(__file__).parents[1] / "docs" / "how-to"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
WITHOUT_CODE = {"chat"}


def short(page):
    """The page's text, each run with 2 steps."""
    return re.sub(r"(--max_steps |\b(?:max_)?steps=)\d+", r"\g<1>2", PAGES[page])


def run_python(page):
    """Run the page's blocks of Python in this process, one after the other; the names they leave."""
    names = {"__name__": "how_to"}
    for kind, code in BLOCK.findall(short(page)):
        if kind == "python":
            exec(compile(code, f"docs/how-to/{page}.md", "exec"), names)
    return names


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the pages themselves ---------------------------------------------------------------------------------------------


def test_each_page_with_code_is_run_here():
    tested = Path(__file__).read_text(encoding="utf-8")
    with_code = {page for page in PAGES if re.search(r"^```(bash|python)$", PAGES[page], flags=re.MULTILINE)}
    assert with_code == PAGES.keys() - WITHOUT_CODE and len(with_code) >= 9
    for page in with_code:
        assert re.search(rf'(run_python|short)\("{page}"\)', tested), f"docs/how-to/{page}.md is not run"


@pytest.mark.parametrize("page", PAGES)
def test_code_is_fenced_as_a_kind_that_says_whether_it_runs(page):
    assert {kind for kind, _ in BLOCK.findall(PAGES[page])} <= {"bash", "python", "sh", "yaml", "json"}


@pytest.mark.parametrize("page", sorted(PAGES.keys() - WITHOUT_CODE))
def test_the_options_of_a_page_exist(page):
    """The first column of the tables under "Options" names settings, options of rewards, or of `lora-gan export`."""
    known = {field.name for field in fields(Config)}
    for function in (LoraGAN.__init__, Judge, Human, export):
        known |= set(inspect.signature(function).parameters)
    known |= {"OMP_NUM_THREADS", "max_completion_tokens"}  # of OpenMP, and of chat completions: the judge passes it on
    section = PAGES[page].split("\n## Options\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(?:--)?(\w+)", cell)}
    named -= {"base", "gan", "GRPOConfig"}  # a value of kl_reference, a method's object, and TRL's class
    assert named <= known, f"not an option: {sorted(named - known)}"


# --- in this process --------------------------------------------------------------------------------------------------


def test_own_reward_in_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_python("own-reward")
    assert names["shared_words"]("Le chat rit", "le chat dort") == pytest.approx(2 / 3)
    assert len(lines_of(tmp_path / "runs" / "python" / "metrics.jsonl")) == 2
    assert capsys.readouterr().out


def test_judge(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="openai is absent: the extra `judge` brings it")
    scores = iter(range(10**6))
    server = CountingServer(
        lambda body: chat_completion(f'{{"score": {next(scores) % 11}}}', prompt_tokens=50, completion_tokens=5)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    try:
        usage = run_python("judge")["judge"].usage
    finally:
        server.close()
    assert 0 < usage["requests"] == server.requests <= 16, "a group of 8 in each of 2 steps, equal texts asked once"
    assert usage["cost"] == pytest.approx(server.requests * (50 * 2.0 + 5 * 8.0) / 1e6)
    assert len(lines_of(tmp_path / "judge.jsonl")) == server.requests
    assert str(usage) in capsys.readouterr().out


def test_the_yaml_of_the_judge_is_what_its_python_says():
    """The same judge in both forms; the YAML blocks are read, not run."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("openai", reason="openai is absent: the extra `judge` brings it")
    first, own = [yaml.safe_load(code)["reward"] for kind, code in BLOCK.findall(PAGES["judge"]) if kind == "yaml"]
    accepted = inspect.signature(Judge).parameters
    for reward in (first, own):
        assert reward.pop("name") == "judge" and reward.keys() <= accepted.keys()
    (code,) = [code for kind, code in BLOCK.findall(PAGES["judge"]) if kind == "python"]
    for option in ("cache", "rubric"):
        assert json.dumps(first[option]) in code
    assert f"price_per_million={tuple(first['price_per_million'])}" in code


def test_person_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan = run_python("person")["gan"]
    assert gan.config.query_rate == 0.25 and (tmp_path / "my_ratings.jsonl").read_text() == ""


def test_noisy_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan = run_python("noisy-reward")["gan"]
    lines = lines_of(tmp_path / "runs" / "noisy" / "metrics.jsonl")
    assert [line["asked"] for line in lines] == [8, 8], "one group of 8 in each step, as the page says"
    assert gan.config.reward_budget == 500


def test_threads_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(run_python("threads")["gan"], LoraGAN)


# --- each block, in processes of its own ------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_reward(tmp_path):
    said = run_blocks(short("own-reward"), tmp_path)
    assert "shared_words: asked for 100%" in " ".join(said[1].split())
    assert (tmp_path / "runs" / "command" / "step-2").is_dir()


@pytest.mark.slow
def test_few_calls(tmp_path):
    assert len(run_blocks(short("few-calls"), tmp_path)) == 1
    lines = lines_of(tmp_path / "runs" / "few" / "metrics.jsonl")
    assert len(lines) == 2 and {line["asked"] for line in lines} <= {0, 8}, "whole groups are asked for"
    assert len(lines_of(tmp_path / "pairs.jsonl")) == 4096


@pytest.mark.slow
def test_sft_adapter(tmp_path):
    pytest.importorskip("trl", reason="the page trains the SFT adapter by TRL")
    *_, trained = run_blocks(short("sft-adapter"), tmp_path)
    assert "starts as the adapter" in " ".join(trained.split()) and "the KL is to" in " ".join(trained.split())
    ours = json.loads((tmp_path / "runs" / "after-sft" / "step-2" / "generator" / "adapter_config.json").read_text())
    assert (ours["r"], ours["lora_alpha"]) == (8, 16), "the adapter's own settings are taken"


@pytest.mark.slow
def test_export(tmp_path):
    said = run_blocks(short("export"), tmp_path)
    parts = {path.name for path in (tmp_path / "exported").iterdir() if path.is_dir()}
    assert parts == {"generator", "generator-merged", "discriminator", "discriminator-merged"}
    assert all(f"`{part}`" in PAGES["export"] for part in parts)
    gan = LoraGAN.from_checkpoint(tmp_path / "runs" / "mine")
    prompt = "Translate English to French: Hello world"
    assert float(said[3]) == pytest.approx(gan.score(prompt, "Bonjour le monde")[0], abs=1e-5)
    assert said[2].strip() == gan.generate(prompt, temperature=0)[0]


@pytest.mark.slow
def test_trl(tmp_path):
    pytest.importorskip("trl", reason="the page needs TRL")
    (said,) = run_blocks(short("trl"), tmp_path)
    rewards = json.loads(said.splitlines()[-1])
    assert len(rewards) == 2 and all(isinstance(reward, float) for reward in rewards)


@pytest.mark.slow
def test_threads(tmp_path):
    run_blocks(short("threads"), tmp_path)
    state = json.loads((tmp_path / "runs" / "one-thread" / "step-2" / "trainer_state.json").read_text())
    assert state["machine"]["threads"] == 1


@pytest.mark.slow
def test_person(tmp_path):
    """A person at a terminal types 7 and 3 in turn. An equal run with this log of ratings then shows nothing again."""
    ((_, code),) = [block for block in BLOCK.findall(short("person")) if block[0] == "bash"]
    seen = at_a_terminal(code, tmp_path, typed="7\n3\n" * 16)
    run = tmp_path / "runs" / "human"
    ratings = lines_of(run / "ratings.jsonl")
    assert 1 <= len(ratings) <= 32 and {line["rating"] for line in ratings} <= {7.0, 3.0}
    assert seen.count("rating 0 to 10") == len(ratings) <= lines_of(run / "metrics.jsonl")[-1]["reward_calls"]
    equal = code.replace("--reward human", """--reward '{"name": "human", "log": "runs/human/ratings.jsonl"}'""")
    seen = at_a_terminal(equal.replace("--output_dir runs/human", "--output_dir runs/again"), tmp_path, typed="9\n")
    assert "rating 0 to 10" not in seen and lines_of(run / "ratings.jsonl") == ratings


def at_a_terminal(code, work, typed):
    """Run bash with a pseudo-terminal as stdin, stdout and stderr, into which `typed` is typed at once."""
    module = Path(__file__).parents[1] / "src"
    environment = os.environ | {
        "PYTHONPATH": str(module),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
    }
    prefix = f'lora-gan() {{ "{sys.executable}" -m lora_gan "$@"; }}\n'
    ours, theirs = pty.openpty()
    seen = []

    def read():
        try:
            while data := os.read(ours, 4096):
                seen.append(data)
        except OSError:  # Linux: the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    os.write(ours, typed.encode())
    program = ["bash", "-euo", "pipefail", "-c", prefix + code]
    run = subprocess.Popen(
        program, cwd=work, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    assert run.wait(timeout=300) == 0, b"".join(seen).decode(errors="replace")
    reader.join(timeout=10)
    os.close(ours)
    return b"".join(seen).decode(errors="replace")
