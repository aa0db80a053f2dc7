"""Checkpoints that an earlier version wrote load, and the run goes on as the earlier version went on.

checkpoints/KIND/step-2 was written by version 0.1.0 before its modules were sorted into packages, after two steps on
`tiny`; continued.json holds what that version did in the two steps after them. The kinds differ in what they hold:
plain (adapter_model.bin), safetensors (three heads, a moving average, replay, scales of two rewards), init_adapter (a
third adapter as the reference), peft_config (adapters that the settings do not describe).
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import sign

from lora_gan import LoraGAN, tiny
from lora_gan.storage import checkpoint

FOLDER = Path(__file__).parent / "checkpoints"
KINDS = sorted(path.name for path in FOLDER.iterdir())


def words(response, target):
    return len(set(response)) / 20 + response.count("e") / 4


def letters(prompts, completions, **columns):
    return [len(text) / 10 for text in completions]


def opened(folder: Path) -> LoraGAN:
    rewards = {"reward_funcs": [words, letters]} if folder.name == "safetensors" else {"reward": words}
    return LoraGAN.from_checkpoint(folder, model="tiny", **rewards)


def numbers(value: float | None | list[float | None]) -> list[float]:
    return [math.nan if one is None else one for one in (value if isinstance(value, list) else [value])]


def test_there_are_four_kinds():
    assert KINDS == ["init_adapter", "peft_config", "plain", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_loads_and_goes_on_as_it_did(kind):
    pairs = tiny.pairs("train", 2, seed=0)
    prompts, targets = ([pair[name] for pair in pairs] for name in ("prompt", "target"))
    gan = opened(FOLDER / kind)
    assert gan.global_step == 2
    expected = json.loads((FOLDER / kind / "continued.json").read_text(encoding="utf-8"))
    for number, before in enumerate(expected):
        record = gan.step(prompts, targets)
        if number and gan.config.asked_share < 1:
            break  # from the second step on, predictions count by their measured trust, which is new
        assert record["response"] == before.pop("response")
        if kind == "safetensors":  # its discriminator now learns from the moving average of its weights
            del before["disc_loss"]
        for name, value in before.items():
            assert numbers(record[name]) == pytest.approx(numbers(value), rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_is_saved_as_again_is_complete_and_loads(kind, tmp_path):
    gan = opened(FOLDER / kind)
    gan.save_checkpoint(ckpt_dir=tmp_path / kind)
    assert checkpoint.fault(tmp_path / kind / "step-2", deep=True) is None
    assert opened(tmp_path / kind).reward_calls == gan.reward_calls


def test_saving_again_leaves_no_stale_weights(tmp_path):
    """PEFT prefers safetensors, so a stale file beside the new adapter_model.bin would win."""
    shutil.copytree(FOLDER / "safetensors", tmp_path / "safetensors")
    gan = opened(tmp_path / "safetensors")
    gan.save_checkpoint(ckpt_dir=tmp_path / "safetensors")
    for player in ("generator", "discriminator"):
        files = (tmp_path / "safetensors" / "step-2" / player).glob("adapter_model.*")
        assert [path.name for path in files] == ["adapter_model.bin"]
    again = opened(tmp_path / "safetensors")
    assert gan.score("a prompt", "a response") == again.score("a prompt", "a response")


def test_a_removed_setting_with_another_value_is_named(tmp_path):
    """A checkpoint cannot be edited, so it opens without the setting."""
    step = shutil.copytree(FOLDER / "plain" / "step-2", tmp_path / "plain" / "step-2")
    state = json.loads((step / "trainer_state.json").read_text(encoding="utf-8"))
    state["config"] |= {"run_name": "mine", "top_p": 0.5}
    (step / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    sign(step)
    with pytest.warns(UserWarning, match=r"settings that are gone.* run_name='mine' \(.*; top_p=0.5 \(") as told:
        assert opened(tmp_path / "plain").global_step == 2
    assert "target_modules" not in str(told[0].message), "the adapters are as they were"


def test_the_moving_average_of_an_earlier_run_becomes_the_weights_and_its_heads_become_their_mean():
    saved = torch.load(FOLDER / "safetensors" / "step-2" / "discriminator" / "state.pt", weights_only=True)
    *average, heads_MH = saved["average"]
    assert not all(torch.equal(*pair) for pair in zip(average, saved["raw"], strict=True))
    gan = opened(FOLDER / "safetensors")
    *adapter, now_MH = gan.players.parameters("discriminator")
    assert all(torch.equal(*pair) for pair in zip(average, adapter, strict=True))
    assert len(heads_MH) == 3 and len(now_MH) == 4
    assert all(torch.allclose(head_H, heads_MH.mean(0)) for head_H in now_MH)
    moments, earlier = gan.discriminator.optimizer.adamw.state, saved_moments("safetensors")
    assert not moments[now_MH] and len(moments) >= len(adapter)
    assert all(torch.equal(moments[p]["exp_avg"], earlier[i]["exp_avg"]) for i, p in enumerate(adapter))
    groups = gan.discriminator.replay.groups
    assert [group.prompt for group in groups] and all(group.heads == [True] * 4 for group in groups)


def saved_moments(kind):
    file = FOLDER / kind / "step-2" / "discriminator" / "optimizer.pt"
    return torch.load(file, weights_only=True)["optimizer"]["state"]


def test_a_changed_file_is_still_found_out(tmp_path):
    shutil.copytree(FOLDER / "plain", tmp_path / "plain")
    file = tmp_path / "plain" / "step-2" / "discriminator" / "state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        opened(tmp_path / "plain")
