"""Checkpoints as a stranger might make them: each refused by name, with nothing executed and memory unchanged.

Every one is signed: its manifest says what is there, as a forger's would, but where the manifest is what is wrong.
"""

import copy
import json
import os
import pickle
import shutil
import warnings
import zipfile

import pytest
import torch
from helpers import PROMPTS, TARGETS, differences, player_state, read_json, reward, sign, small_gan
from safetensors.torch import save_file
from test_checkpoint import Payload, everything

from lora_gan import LoraGAN
from lora_gan.storage import state_files
from lora_gan.storage.checkpoint import STATES
from lora_gan.storage.durable import MANIFEST, Folder
from lora_gan.training import guard

pytestmark = [
    # The run whose checkpoint is attacked has an alarm: its state is to be saved.
    pytest.mark.filterwarnings("ignore:step .* the generator exploits"),
]

GENERATOR, DISCRIMINATOR = "generator/adapter_model.bin", "discriminator/adapter_model.bin"


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    gan = small_gan(on_exploit="rollback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "WINDOW", 2)
        for _ in range(2):
            gan.step(PROMPTS[:2], TARGETS[:2])
    return gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("honest"))


# --- what is done to them ---------------------------------------------------------------------------------------------


def tensors(file, change):
    """Change what a file of torch.save holds."""

    def spoil(folder):
        state = torch.load(folder / file, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, folder / file)

    return spoil


def state(name, change):
    """Change what the two files of a state hold."""

    def spoil(folder):
        value = state_files.read(Folder(folder, manifest=False), name, limit=10**8)
        change(value)
        for file, data in state_files.encoded(name, value).items():
            (folder / file).write_bytes(data)

    return spoil


def as_earlier_versions_wrote(folder):
    """The same checkpoint with monitor.pt and state.pt."""
    for name in STATES:
        torch.save(state_files.read(Folder(folder, manifest=False), name, limit=10**8), folder / f"{name}.pt")
        for suffix in (".json", ".safetensors"):
            (folder / f"{name}{suffix}").unlink()


def pickled(file, value):
    def spoil(folder):
        as_earlier_versions_wrote(folder)
        torch.save(value(folder), folder / file)

    return spoil


def delete(state, name):
    del state[name]


def spoiled_moments(name, change):
    return tensors("generator/optimizer.pt", at("optimizer", "state", 0, name, to=change))


def first(state, change):
    name = next(iter(state))
    state[name] = change(state[name])


def in_json(file, change):
    def spoil(folder):
        value = read_json(folder / file)
        changed = change(value)
        (folder / file).write_text(json.dumps(value if changed is None else changed))

    return spoil


def raw(file, data):
    def spoil(folder):
        (folder / file).write_bytes(data)

    return spoil


def at(*path, to):
    """Set the value at a path of keys."""

    def change(value):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to(value[path[-1]]) if callable(to) else to

    return change


def without(*path):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        del value[path[-1]]

    return change


def deflated(folder):
    """A bomb: parts that grow when they are unpacked."""
    data = {}
    with zipfile.ZipFile(folder / GENERATOR) as archive:
        data = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / GENERATOR, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in data.items():
            archive.writestr(name, value + bytes(2**22) if name.endswith("data/0") else value)


def global_of(folder):
    """A pickle that names a function which weights_only does not know."""
    torch.save({"weights": os.getcwd}, folder / "generator/optimizer.pt")


def not_a_zip(folder):
    as_earlier_versions_wrote(folder)
    (folder / "discriminator/state.pt").write_bytes(pickle.dumps({"heads_MH": [1.0]}))


def expanded(state):
    first(state, lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape))


def whole_safetensors(folder):
    (folder / GENERATOR).unlink()
    (folder / "generator/adapter_model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 100)


def integers(folder):
    state = torch.load(folder / GENERATOR, weights_only=True)
    (folder / GENERATOR).unlink()
    save_file({n: t.to(torch.int32) for n, t in state.items()}, folder / "generator/adapter_model.safetensors")


def both_formats(folder):
    state = torch.load(folder / GENERATOR, weights_only=True)
    save_file(dict(state), folder / "generator/adapter_model.safetensors")


def sparse(folder):
    size = 8 * 2**20
    with (folder / "generator/optimizer.pt").open("r+b") as file:
        file.truncate(size)


SIGNED = {
    "payload": (lambda f: torch.save({"weights": Payload(f.parent / "executed")}, f / GENERATOR), "could not be read"),
    "payload in the optimizer": (
        lambda f: torch.save(Payload(f.parent / "executed"), f / "generator/optimizer.pt"), "optimizer.pt",
    ),
    "payload in the monitor": (
        pickled("generator/monitor.pt", lambda f: Payload(f.parent / "executed")), "monitor.pt",
    ),
    "function": (global_of, "optimizer.pt could not be read"),
    "old pickle": (not_a_zip, "zip format"),
    "bomb": (deflated, "compressed entries"),
    "expanded": (tensors(GENERATOR, expanded), "larger than its stored data"),
    "oversized": (tensors(GENERATOR, lambda s: first(s, lambda t: torch.zeros(4096, 4096))), "bytes, but at most"),
    "wide": (tensors(GENERATOR, lambda s: first(s, lambda t: torch.zeros(t.shape[0], t.shape[1] + 1))), "does not fit"),
    "meta": (tensors(GENERATOR, lambda s: first(s, lambda t: t.to("meta"))), "device 'meta'"),
    "half-empty": (tensors(GENERATOR, lambda s: delete(s, next(iter(s)))), "absent"),
    "surplus": (tensors(GENERATOR, lambda s: s.update(more=torch.zeros(1))), "more is"),
    "surplus payload of text": (tensors(GENERATOR, lambda s: s.update(more="text")), "must hold a dict of tensors"),
    "list for a dict": (tensors(GENERATOR, lambda s: [1, 2]), "a list"),
    "NaN": (tensors(GENERATOR, lambda s: first(s, lambda t: t * float("nan"))), "NaN"),
    "infinite score": (tensors(DISCRIMINATOR, lambda s: first(s, lambda t: t + float("inf"))), "NaN or infinite"),
    "complex": (tensors(GENERATOR, lambda s: first(s, lambda t: t.to(torch.complex64))), "complex"),
    "integers": (integers, "int32"),
    "sparse tensor": (tensors(GENERATOR, lambda s: first(s, lambda t: t.to_sparse())), "another kind than dense"),
    "header of exabytes": (whole_safetensors, "safetensors could not be read"),
    "both formats": (both_formats, "weights of each player once"),
    "padded": (sparse, "bytes, but at most|could not be read"),
    "NaN moments": (
        spoiled_moments("exp_avg", lambda t: t * float("nan")), "NaN",
    ),
    "negative squares": (
        spoiled_moments("exp_avg_sq", lambda t: t - 1), "negative",
    ),
    "an optimizer of fewer parameters": (
        tensors("generator/optimizer.pt", at("optimizer", "param_groups", 0, "params", to=[0])), "must be a list of 16",
    ),
    "groups that are none": (tensors("generator/optimizer.pt", at("optimizer", "param_groups", to=[1])), "params is a"),
    "a schedule of numbers": (tensors("generator/optimizer.pt", at("schedule", to=[3])), "last_epoch is 'None'"),
    "moments of nobody": (
        tensors("generator/optimizer.pt", lambda s: s["optimizer"]["state"].update({10**6: {}})),
        "moments of a parameter",
    ),
    "time before the beginning": (
        tensors("generator/optimizer.pt", at("schedule", "last_epoch", to=-5)), "last_epoch is '-5'",
    ),
    "a count beyond all floats": (
        tensors("generator/optimizer.pt", at("schedule", "last_epoch", to=10**400)), "last_epoch is '1000",
    ),
    "no schedule": (tensors("generator/optimizer.pt", without("schedule")), "lacks 'schedule'"),
    "heads of another size": (state("discriminator/state", at("heads_MH", to=torch.zeros(4, 3))), "heads_MH is"),
    "no heads": (state("discriminator/state", at("heads_MH", to=lambda t: t[:0].clone())), "heads_MH is"),
    "more heads than the replay knows": (
        state("discriminator/state", at("heads_MH", to=lambda t: t.repeat(2, 1))), "does not add up",
    ),
    "unit of zero": (state("discriminator/state", at("reward_unit", to=0.0)), "reward_unit"),
    "unit of text": (state("discriminator/state", at("reward_unit", to="1")), "reward_unit"),
    "unknown tokens": (
        state("discriminator/state", at("replay", "response_tokens", to=lambda t: t + 10**6)), "does not know",
    ),
    "negative lengths": (
        state("discriminator/state", at("replay", "response_lengths", to=lambda t: t - 100)), "does not add up",
    ),
    "fewer rewards": (
        state("discriminator/state", at("replay", "rewards", to=lambda t: t[:-1].clone())), "does not add up",
    ),
    "rewards that are none": (
        state("discriminator/state", at("replay", "rewards", to=lambda t: t * float("nan"))), "rewards hold NaN",
    ),
    "average of nothing": (state("discriminator/state", at("average", to=[])), "average is"),
    "average of a number": (state("discriminator/state", at("average", to=3)), "average is"),
    "probe of another width": (
        state("discriminator/state", at("probe", "features", to=lambda t: t[:, :3].contiguous())), "probe: features",
    ),
    "probe of NaN": (
        state("discriminator/state", at("probe", "weights", to=lambda t: t * float("nan"))), "weights holds NaN",
    ),
    "probe with fewer rewards": (
        state("discriminator/state", at("probe", "rewards", to=lambda t: t[:-1].clone())), "probe: rewards",
    ),
    "probe of no size": (state("discriminator/state", at("probe", "sizes", to=[0])), "probe: sizes"),
    "calibration of text": (
        state("discriminator/state", at("calibration", "moments", to=[["a"] * 3] * 3)), "calibration",
    ),
    "calibration of another size": (
        state("discriminator/state", at("calibration", "moments", to=[[0.0] * 3])), "calibration",
    ),
    "spread below zero": (in_json("trainer_state.json", at("reward_spread", "squares", to=-1.0)), "reward_spread"),
    "window of texts": (state("generator/monitor", at("window", to=[["a"] * 5])), "window"),
    "kept of another": (state("generator/monitor", at("kept", to={"weights": [], "optimizer": {}})), "kept"),
    "heads of integers": (
        state("discriminator/state", at("heads_MH", to=lambda t: t.to(torch.int32))), "heads_MH is of torch.int32",
    ),
    "heads of NaN": (
        state("discriminator/state", at("heads_MH", to=lambda t: t * float("nan"))), "heads_MH holds NaN",
    ),
    "a tensor that is not there": (
        in_json("discriminator/state.json", at("heads_MH", to={"$tensor": "x"})), "state.json does not fit",
    ),
    "no tensors": (lambda f: (f / "discriminator/state.safetensors").unlink(), "does not name discriminator/state"),
    "header of a state": (raw("generator/monitor.safetensors", b"\xff" * 99), "monitor.safetensors could not be read"),
    "deep state": (
        raw("generator/monitor.json", b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "monitor.json could not be read",
    ),
    "monitor of an earlier version": (
        pickled("generator/monitor.pt", lambda f: {"window": [], "first": 3}), "monitor lacks",
    ),
    "told numbers": (state("generator/monitor", at("told", to=[1])), "told"),
    "negative capital": (state("generator/monitor", at("test", "capital", to=-1.0)), "capital"),
    "reference of text": (state("generator/monitor", at("test", "reference", "level", to="high")), "reference"),
    "audit of half a step": (state("generator/monitor", at("audits", "since", to=0.5)), "audits"),
    "state that is no JSON": (raw("trainer_state.json", b"{"), "trainer_state.json could not be read as JSON"),
    "deep JSON": (raw("trainer_state.json", b"[" * 10**6), "trainer_state.json could not be read as JSON"),
    "state that is a list": (raw("trainer_state.json", b"[]"), "no JSON object"),
    "step of text": (in_json("trainer_state.json", at("global_step", to="1")), "global_step"),
    "step below zero": (in_json("trainer_state.json", at("global_step", to=-1)), "global_step"),
    "baseline of NaN": (in_json("trainer_state.json", at("baseline", "total", to=float("nan"))), "baseline"),
    "scales of a list": (in_json("trainer_state.json", at("reward_scales", to={"r": []})), "reward_scales"),
    "another format": (in_json("trainer_state.json", at("format", to=7)), "format 7"),
    "surplus state": (in_json("trainer_state.json", lambda s: s.update(more=1)), "more"),
    "another base": (in_json("trainer_state.json", at("base", "fingerprint", to="0" * 32)), "was made on the base"),
    "another scaling": (in_json("generator/adapter_config.json", at("lora_alpha", to=1000)), "lora_alpha=1000"),
    "config that is a number": (raw("generator/adapter_config.json", b"7"), "adapter_config.json"),
}  # fmt: skip


def link(folder):
    shutil.move(folder / GENERATOR, folder.parent / "elsewhere")
    (folder / GENERATOR).symlink_to(folder.parent / "elsewhere")


def linked_player(folder):
    shutil.move(folder / "generator", folder.parent / "player")
    (folder / "generator").symlink_to(folder.parent / "player")


def leaving(name):
    def change(manifest):
        manifest["files"][name] = next(iter(manifest["files"].values()))

    return in_json(MANIFEST, change)


def one_bit(folder):
    data = bytearray((folder / GENERATOR).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / GENERATOR).write_bytes(bytes(data))


def pipe(folder):
    (folder / GENERATOR).unlink()
    os.mkfifo(folder / GENERATOR)


UNSIGNED = {
    "link": (link, "is a link"),
    "player that is a link": (linked_player, "is a link"),
    "pipe": (pipe, "no plain file"),
    "one bit": (one_bit, "SHA-256"),
    "cut": (lambda f: os.truncate(f / GENERATOR, 100), "manifest says"),
    "path that leaves": (leaving("../../../etc/passwd"), "no file within the folder"),
    "absolute path": (leaving("/etc/passwd"), "no file within the folder"),
    "path with a drive": (leaving("C:\\x"), "no file within the folder"),
    "hash of a number": (in_json(MANIFEST, at("files", GENERATOR, "sha256", to=7)), "has no size and SHA-256"),
    "size below zero": (in_json(MANIFEST, at("files", GENERATOR, "size", to=-1)), "has no size and SHA-256"),
    "size of all": (in_json(MANIFEST, at("files", GENERATOR, "size", to=2**60)), "manifest says"),
    "wrong hash": (in_json(MANIFEST, at("files", GENERATOR, "sha256", to="0" * 64)), "SHA-256"),
    "manifest that is a list": (raw(MANIFEST, b"[]"), "no JSON object"),
    "another manifest": (raw(MANIFEST, b'{"format": 2}'), "format 1"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json could not be opened"),
}
ALL = [(name, *case, True) for name, case in SIGNED.items()] + [(n, *case, False) for n, case in UNSIGNED.items()]


@pytest.fixture(scope="module")
def trained():
    gan = small_gan(on_exploit="rollback")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "WINDOW", 2)
        for _ in range(2):
            gan.step(PROMPTS[:2], TARGETS[:2])
    return gan, copy.deepcopy(everything(gan))


@pytest.mark.parametrize(("name", "spoil", "says", "signed"), ALL, ids=[case[0] for case in ALL])
def test_a_hostile_checkpoint_is_refused_by_name(name, spoil, says, signed, honest, trained, tmp_path):
    gan, before = trained
    folder = tmp_path / "run" / honest.name
    shutil.copytree(honest, folder)
    spoil(folder)
    if signed:
        sign(folder)
    step = int(folder.name.removeprefix("step-"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=says) as refused:
            gan.load_checkpoint(step=step, ckpt_dir=folder.parent)
        assert str(folder) in str(refused.value), "the message names the file"
        assert len(str(refused.value)) < 1000, "a stranger's text does not fill the screen"
        with pytest.raises(ValueError):
            LoraGAN.from_checkpoint(folder, reward=reward)
    assert not (folder.parent / "executed").exists()
    assert differences(before, everything(gan)) == []


def test_the_settings_of_a_saved_optimizer_are_not_taken(honest, tmp_path):
    folder = tmp_path / honest.name
    shutil.copytree(honest, folder)
    for name, value in {"maximize": True, "lr": "high", "betas": (0.0, 0.0)}.items():
        tensors("generator/optimizer.pt", at("optimizer", "param_groups", 0, name, to=value))(folder)
    sign(folder)
    gan = small_gan()
    (before,) = gan.generator.optimizer.adamw.state_dict()["param_groups"]
    gan.load_checkpoint(2, ckpt_dir=tmp_path)
    assert gan.generator.optimizer.adamw.state_dict()["param_groups"] == [before]


@pytest.mark.parametrize("written", ["now", "by an earlier version"])
def test_the_honest_one_is_taken(written, honest, tmp_path):
    folder = tmp_path / honest.name
    shutil.copytree(honest, folder)
    if written != "now":
        as_earlier_versions_wrote(folder)
        sign(folder)
    taken, expected = (small_gan(on_exploit="rollback") for _ in range(2))
    taken.load_checkpoint(ckpt_dir=tmp_path)
    expected.load_checkpoint(ckpt_dir=honest.parent)
    assert taken.global_step == 2
    assert differences(everything(expected), everything(taken)) == []


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_one_player_alone_is_checked_as_well(player, honest, trained, tmp_path):
    gan, before = trained
    load = getattr(gan, f"load_{player}")
    folder = tmp_path / "step-2"
    shutil.copytree(honest, folder)
    tensors(f"{player}/adapter_model.bin", lambda s: first(s, lambda t: t * float("nan")))(folder)
    for path in (folder, folder / player):  # the manifest holds, whichever way in
        with pytest.raises(ValueError, match="SHA-256"):
            load(path)
    shutil.copytree(folder / player, tmp_path / "alone")
    with pytest.raises(ValueError, match="NaN"):
        load(tmp_path / "alone")
    assert differences(player_state(gan, player), before[player]) == []


def test_settings_of_a_stranger_run_nothing(honest, tmp_path):
    """What the checkpoint's settings say of the base is not followed where it could run code."""
    folder = tmp_path / honest.name
    shutil.copytree(honest, folder)
    change = at("config", to=lambda c: c | {"trust_remote_code": True, "model_init_kwargs": ["a", "list"]})
    in_json("trainer_state.json", change)(folder)
    gan = LoraGAN.from_checkpoint(sign(folder), reward=reward)
    assert gan.config.trust_remote_code is False and gan.config.model_init_kwargs is None
