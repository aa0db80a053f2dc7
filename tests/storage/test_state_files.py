"""Values with tensors as safetensors and JSON: what is read is bitwise what was written, and nothing is a pickle."""

import json
import math
import struct

import pytest
import torch
from helpers import PROMPTS, TARGETS, small_gan

from lora_gan.run import snapshot
from lora_gan.storage import state_files
from lora_gan.storage.checkpoint import copied
from lora_gan.storage.durable import Damaged, Folder
from lora_gan.training import guard


def write(folder, value):
    for name, data in state_files.encoded("state", value).items():
        (folder / name).write_bytes(data)
    return Folder(folder, manifest=False)


def same(one, other) -> bool:
    """Equal in type and bitwise equal, at every level."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return struct.pack("d", one) == struct.pack("d", other) if isinstance(one, float) else one == other


FLOATS = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, math.pi * 1e-300, math.inf, -math.inf, math.nan]
VALUES = {
    "floats": {"all": FLOATS},
    "plain": {"a": None, "b": True, "c": 2**70, "d": "text \ud800", "e": [], "f": {}, "g": ((1, 2.0), [])},
    "keys that are numbers": {0: {"x": 1}, 7: (0.9, 0.999)},
    "tensors": {
        "float64": torch.tensor(FLOATS, dtype=torch.float64), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4),
        "flags": torch.tensor([[True, False]]), "ids": torch.arange(5), "none": torch.zeros(0, dtype=torch.int64),
        "listed": [torch.ones(2, 3), {"deeper": (torch.zeros(1),)}], 3: torch.tensor([1.0]),
    },
    "a tensor alone": torch.arange(3.0),
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_read_is_what_was_written(value, tmp_path):
    assert same(state_files.read(write(tmp_path, value), "state", limit=10**6), value)


def test_a_runs_state_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "WINDOW", 2)
    gan = small_gan(on_exploit="rollback")
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    content = snapshot.take(gan.state)
    assert content["generator/monitor"]["kept"]["optimizer"]["optimizer"]["state"], "the moments are in it"
    for name in ("generator/monitor", "discriminator/state"):
        assert same(state_files.read(write(tmp_path, content[name]), "state", limit=10**7), content[name])


def test_it_is_as_what_earlier_versions_wrote_reads(tmp_path):
    gan = small_gan()
    gan.step(PROMPTS[:2], TARGETS[:2])
    value = copied(gan.discriminator.state_dict())
    torch.save(value, tmp_path / "state.pt")
    assert same(state_files.read(Folder(tmp_path, manifest=False), "state", limit=10**7), value)


def test_a_new_checkpoint_holds_pickles_for_stock_peft_and_optimizers_alone(tmp_path):
    gan = small_gan()
    gan.step(PROMPTS[:2], TARGETS[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path)
    zipped = {path.name for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:2] == b"PK"}
    assert zipped == {"adapter_model.bin", "optimizer.pt"}


@pytest.mark.parametrize(
    "rest",
    [
        {"$tensor": "absent"}, {"$tensor": ["x"]}, {"$tuple": 3}, {"$items": [[1]]}, {"$items": [[{}, 1]]},
        {"$items": 7}, {"deep": {"$tensor": None}},
    ],
    ids=str,
)  # fmt: skip
def test_json_that_does_not_fit_its_tensors_is_refused(rest, tmp_path):
    folder = write(tmp_path, {"x": torch.zeros(2)})
    (tmp_path / "state.json").write_text(json.dumps(rest))
    with pytest.raises(Damaged, match="state.json does not fit state.safetensors"):
        state_files.read(folder, "state", limit=10**6)


def test_nesting_beyond_pythons_stack_is_refused(tmp_path):
    folder = write(tmp_path, {})
    (tmp_path / "state.json").write_text('{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    with pytest.raises(Damaged, match="state.json"):
        state_files.read(folder, "state", limit=10**6)


def test_tensors_beyond_the_limit_are_not_read(tmp_path):
    folder = write(tmp_path, {"x": torch.zeros(1000)})
    with pytest.raises(Damaged, match=r"state.safetensors has .* at most 1,000"):
        state_files.read(folder, "state", limit=1000)
