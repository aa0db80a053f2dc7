"""Checkpoints: the layout that stock PEFT opens, there whole or not at all, loaded without executing anything.

    step-100/
      generator/      adapter_config.json  adapter_model.bin  optimizer.pt  monitor.pt (what the guard remembers)
      discriminator/  adapter_config.json  adapter_model.bin  optimizer.pt  state.pt   (raw weights, average, replay)
      reference/      adapter_config.json  adapter_model.bin  (where the KL is to the adapter of init_adapter=)
      trainer_state.json   (step, data position, settings, the base's fingerprint, versions)
      manifest.json        (size and SHA-256 of every other file; a folder without it is no checkpoint)

How a folder comes to be there whole is `durable`'s; what its files may hold is `untrusted`'s.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ..config import Config
from ..model import composite, gguf_files, named_bases
from ..model.base import load_base
from ..model.base_checks import UNLIMITED
from ..model.peft_config import ACCEPTED
from ..model.players import Players
from ..rewards import budget
from ..training import health
from . import durable, untrusted
from .durable import MANIFEST, Damaged, Folder

if TYPE_CHECKING:
    from ..gan import LoraGAN

SCORE = "base_model.model.score.weight"  # where stock PEFT looks for a sequence classifier's head
STATE = "trainer_state.json"
PLAYERS = ("generator", "discriminator")
REFERENCE = "reference"
BY_HAND = "save_checkpoint"  # what trainer_state.json says of a checkpoint that was not fit()'s own
FILES = (
    STATE, "generator/adapter_config.json", "generator/optimizer.pt", "generator/monitor.pt",
    "discriminator/adapter_config.json", "discriminator/optimizer.pt", "discriminator/state.pt",
)  # fmt: skip
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT prefers the first; never both are written

#: Tokens that a text in replay is taken to have at most, on a base that names no limit. It bounds the size of a file,
#: not one text: a group stores its prompt once, so a prompt may be several times as long.
LONGEST_TEXT = 2**17

Content = dict[str, Any]  # {name of a file within the checkpoint: what it is to hold}


# --- saving


def save(gan: LoraGAN, folder: Path, step: int) -> Path:
    """Write folder/step-N so that a reader sees all of it or nothing, and delete nothing.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    return write(snapshot(gan, by_hand=True), folder, step)


def snapshot(gan: LoraGAN, *, by_hand: bool = False) -> Content:
    """Copies of all that a checkpoint holds: training may go on while they are written.

    Args:
        gan: whose checkpoint.
        by_hand: whether `save_checkpoint()` was called: save_total_limit then never deletes it.
    """
    content: Content = {}
    for player, carries in zip(PLAYERS, (gan.generator, gan.discriminator), strict=True):
        with gan.discriminator.scoring():
            config, weights = adapter_content(gan.players, player)
        content[f"{player}/adapter_config.json"] = config
        content[f"{player}/{_weights_name(gan.config.weights_format)}"] = weights
        content[f"{player}/optimizer.pt"] = carries.optimizer.state_dict()
    if gan.players.has_reference:
        config, weights = adapter_content(gan.players, REFERENCE)
        content[f"{REFERENCE}/adapter_config.json"] = config
        content[f"{REFERENCE}/{_weights_name(gan.config.weights_format)}"] = weights
    content["discriminator/state.pt"] = gan.discriminator.state_dict()
    content["generator/monitor.pt"] = gan.monitor.state_dict()
    content[STATE] = _trainer_state(gan) | {"saved_by": BY_HAND if by_hand else "fit"}
    return copied(content)


def write(content: Content, folder: Path, step: int, *, limit: int | None = None, keep: Collection[int] = ()) -> Path:
    """Write a snapshot as folder/step-N, then remove fit()'s oldest beyond `limit`, but none of the steps in `keep`."""
    final = folder / f"step-{step}"
    durable.write_folder(final, {name: _serialized(name, value) for name, value in content.items()})
    if limit:
        spared = {final.name, *(f"step-{kept}" for kept in keep)}
        there = complete(folder)
        automatic = [path for path in there if not _is_by_hand(path)] if len(there) > limit else []
        for old in automatic[:-limit]:
            if old.name not in spared:
                durable.remove_folder(old)
    return final


def size_of(content: Content) -> int:
    """Bytes that a snapshot takes on the disk."""
    return sum(len(_serialized(name, value)) for name, value in content.items())


def _is_by_hand(path: Path) -> bool:
    """Whether `save_checkpoint()` made a complete checkpoint; one that cannot be read counts so, and stays."""
    try:
        return _read_state(Folder(path, manifest=True))["saved_by"] == BY_HAND
    except Damaged:
        return True


def _serialized(name: str, value: Any) -> bytes:
    if name.endswith(".json"):
        return (json.dumps(value, indent=2) + "\n").encode()
    if name.endswith(".safetensors"):
        return safetensors.torch.save(value, metadata={"format": "pt"})
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _trainer_state(gan: LoraGAN) -> dict[str, Any]:
    base, baseline = gan.players.base, gan.generator.baseline
    return {
        "format": 1,
        "global_step": gan.global_step,
        "position": gan.position,
        "reward_calls": gan.reward_calls,
        "other_calls": gan.budget.state_dict(),
        "prompt_kinds": sorted(gan.prompt_kinds),
        "beta_scale": gan.generator.beta_scale,
        "baseline": {"total": baseline.total, "weight": baseline.weight},
        "reward_scales": gan.reward_scales.state_dict(),
        "health": gan.health.state_dict(),
        "config": gan.config.to_file(),
        "by_peft_config": list(gan.players.by_peft_config),  # whose adapters the settings do not describe
        "base": {
            "name": base.name,
            "path": base.path,
            "architecture": type(base.model).__name__,
            "fingerprint": base.fingerprint,
        },
        "versions": dict(_versions()),
        "machine": _machine(gan),
    } | ({} if gan.init_adapter is None else {"init_adapter": gan.init_adapter})


@functools.cache  # reading them takes longer than copying small adapters
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def _machine(gan: LoraGAN) -> dict[str, Any]:
    """What sums are rounded by: under another one a run that goes on is not equal to the bit."""
    device = gan.players.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads()}


def adapter_content(players: Players, player: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's config and weights as stock PEFT reads them; the weights share memory with the parameters."""
    state = {name: tensor.detach() for name, tensor in adapter_state(players, player).items()}
    config: Any = copy.deepcopy(players.peft.peft_config[player])
    config.base_model_name_or_path = players.base.path
    config.inference_mode = True
    if player == "discriminator":
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = ["classifier", "score"]
        state[SCORE] = players.score_MH.detach().mean(0, keepdim=True)  # heads folded into the one that scores
        if players.base.composite is not None:
            state = composite.stock_tensors(state)
            if not isinstance(config.target_modules, str):
                config.target_modules = composite.targets_of_both(config.target_modules)
    # A set's order would change with PYTHONHASHSEED.
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return dict(sorted(values.items())), state


def save_adapter(players: Players, player: str, folder: Path, weights_format: str) -> None:
    """Adapter weights and config as stock PEFT reads them, into a folder."""
    config, weights = adapter_content(players, player)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("adapter_config.json", config), (_weights_name(weights_format), copied(weights))):
        (folder / name).write_bytes(_serialized(name, value))


def _weights_name(weights_format: str) -> str:
    return f"adapter_model.{weights_format}"


def copied(value: Any) -> Any:
    """A copy on the CPU of tensors, in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        there = value.detach()
        return (there.clone() if there.device.type == "cpu" else there.cpu()).contiguous()
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(entry) for entry in value)
    return value


def readable(folder: Path) -> None:
    """safetensors makes files that only their owner can read: give them the mode that every other new file has."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def adapter_state(players: Players, player: str) -> dict[str, Tensor]:
    """The player's LoRA weights by PEFT's names; they share memory with the parameters."""
    return get_peft_model_state_dict(players.peft, adapter_name=player, save_embedding_layers=False)


# --- finding


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints under a run's folder, oldest step first."""
    return [path for _, path in sorted(_steps(folder).items()) if fault(path) is None]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, also where the folder is set aside."""
    match = re.search(r"step-([0-9]+)", path.name)
    assert match is not None, path
    return int(match[1])


def _steps(folder: Path) -> dict[int, Path]:
    """Whatever stands under a step's name, by its number."""
    return {
        int(name.removeprefix("step-")): path
        for name, path in durable.standing(folder).items()
        if re.fullmatch(r"step-[0-9]{1,18}", name)
    }


def fault(path: Path, *, deep: bool = False) -> str | None:
    """Why a folder is no complete checkpoint, None where it is one; `deep` compares every file's SHA-256, too."""
    try:
        folder = Folder(path, manifest=True)
        adapters, files = [*PLAYERS], [*FILES]
        if _has_reference(folder):
            adapters.append(REFERENCE)
            files.append(f"{REFERENCE}/adapter_config.json")
        weights = [sum(folder.has(f"{adapter}/{name}") for name in WEIGHTS) for adapter in adapters]
        missing = [name for name in files if not folder.has(name)]
        if missing or set(weights) != {1}:
            what = missing[0] if missing else "the weights of each player once"
            return f"{path / MANIFEST} does not name {what}"
        folder.verify(deep=deep)
    except Damaged as error:
        return str(error)
    return None


def is_complete(path: Path) -> bool:
    return fault(path) is None


def find(folder: Path, step: int | None) -> Path:
    """One step's folder, or the newest complete one; what is newer and damaged is skipped with a warning."""
    steps = _steps(folder)
    if step is not None and step in steps and is_complete(steps[step]):
        return steps[step]
    skipped = []
    for number in sorted(steps, reverse=True) if step is None else ():
        why = fault(steps[number], deep=True)
        if why is None:
            for words in skipped:
                warnings.warn(f"{words}; going on from step {number}", stacklevel=4)
            return steps[number]
        skipped.append(f"the checkpoint of step {number} is skipped: {why}")
    there = ", ".join(str(step_of(path)) for path in complete(folder)) or "none"
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    hint = ""
    if (folder / "export.json").is_file():
        hint = "; it is an export, which stock PEFT and transformers open: name the run it was made of"
    elif folder.parent.name.startswith("step-") and is_complete(folder.parent):
        hint = f"; it is a part of one: name {folder.parent}"
    elif runs := sorted({str(path.parent.parent) for path in folder.glob(f"*/step-*/{MANIFEST}")}):
        hint = f"; there are in {', '.join(runs[:3])}"
    elif step is not None and step in steps:
        hint = f" ({fault(steps[step])})"
    elif skipped:
        hint = f" ({'; '.join(skipped[:3])})"
    raise ValueError(f"there is no complete {wanted} in {folder}: complete steps there: {there}{hint}")


# --- loading


def load(gan: LoraGAN, path: Path) -> None:
    """Continue exactly: everything is read and checked before anything in memory changes."""
    folder, base = Folder(path, manifest=True), gan.players.base
    state = _read_state(folder)
    if state["base"]["fingerprint"] != base.fingerprint:
        theirs = f"{state['base'].get('name') or 'in memory'!r} ({state['base'].get('architecture', 'unknown')})"
        raise ValueError(
            f"{path} was made on the base {theirs[:200]}, whose weights are not those of {base.name or 'in memory'!r} "
            f"({type(base.model).__name__}): give that base, in the same revision and quantized alike"
        )
    put_generator = _read_generator(gan, folder.part("generator"))
    put_discriminator = _read_discriminator(gan, folder.part("discriminator"))
    put_reference = _read_reference(gan, folder)
    monitor = _read_monitor(gan, folder.part("generator"))
    put_generator()
    put_discriminator()
    put_reference()
    gan.init_adapter = state["init_adapter"]
    gan.monitor.load_state_dict(monitor)
    gan.global_step, gan.position = state["global_step"], state["position"]
    gan.budget.counts["training"] = state["reward_calls"]
    gan.budget.load_state_dict(state["other_calls"])
    gan.prompt_kinds = set(state["prompt_kinds"])
    gan.generator.beta_scale = state["beta_scale"]
    gan.generator.baseline.total = state["baseline"]["total"]
    gan.generator.baseline.weight = state["baseline"]["weight"]
    gan.reward_scales.load_state_dict(state["reward_scales"])
    gan.health.load_state_dict(state["health"])
    _warn_of_another_machine(gan, state)


def _warn_of_another_machine(gan: LoraGAN, state: Mapping[str, Any]) -> None:
    now = _machine(gan) | _versions()
    then = state["machine"] | state["versions"]
    changed = [f"{name} {then.get(name)} then, {here} now" for name, here in now.items() if then.get(name) != here]
    if changed:
        warnings.warn(
            f"the run goes on, but not equal to the bit to one that was never interrupted: {'; '.join(changed)}",
            stacklevel=4,
        )


def rebuild(cls: type[LoraGAN], path: Path, model: Any, arguments: dict[str, Any]) -> LoraGAN:
    why = fault(path)
    if why is not None and (path / MANIFEST).exists():  # one step's folder, and not a run's
        raise Damaged(f"{path} is no complete checkpoint: {why}")
    step_folder = path if why is None else find(path, None)
    state = _read_state(Folder(step_folder, manifest=True))
    settings = _harmless(state["config"])
    # Where the run's folder was moved, it goes on there, unless told otherwise.
    settings["output_dir"] = str(step_folder.parent)
    known = set(Config.__dataclass_fields__)
    settings |= {name: arguments.pop(name) for name in list(arguments) if name in known}
    generator = generator_arguments(step_folder, settings.get("kl_reference"))
    if not arguments.keys() & {"peft_config", "init_adapter"}:
        arguments |= generator
    if "discriminator" in state["by_peft_config"]:
        theirs = Folder(step_folder, manifest=True).part("discriminator")
        arguments.setdefault("disc_peft_config", _read_lora_config(theirs))
    if isinstance(model, PreTrainedModel):
        settings["model_init_kwargs"] = None  # it is loaded
    if model is None:
        # What says how to load the base is used up here; the tokenizer is part of it.
        how = {name: arguments.pop(name, None) for name in ("processing_class", "quantization_config")}
        model = _recorded_base(state["base"], Config.from_dict(settings), **how)
    gan = cls(model, Config.from_dict(settings), **arguments)
    load(gan, step_folder)
    return gan


def generator_arguments(step_folder: Path, kl_reference: str | None) -> dict[str, Any]:
    """The arguments with which LoraGAN makes adapters of the shapes of a checkpoint's generator and reference.

    Args:
        step_folder: a complete checkpoint.
        kl_reference: the setting from now on.

    Returns:
        init_adapter, peft_config, or nothing: the settings describe the generator's adapter.
    """
    folder = Folder(step_folder, manifest=True)
    if _has_reference(folder) and kl_reference != "base":
        return {"init_adapter": step_folder / REFERENCE}
    if "generator" in _read_state(folder)["by_peft_config"]:
        return {"peft_config": _read_lora_config(folder.part("generator"))}
    return {}


def init_adapter_of(step_folder: Path) -> str | None:
    """The folder of the adapter that the run of a complete checkpoint started from; None where there was none."""
    return _read_state(Folder(step_folder, manifest=True))["init_adapter"]


def fingerprint_of(step_folder: Path) -> str:
    """Of the base's weights, as a checkpoint says."""
    return _read_state(Folder(step_folder, manifest=True))["base"]["fingerprint"]


def _has_reference(folder: Folder) -> bool:
    return any(name.startswith(f"{REFERENCE}/") for name in folder.names())


def settings_of(path: Path) -> dict[str, Any]:
    """The settings that a complete checkpoint was made with; empty where there is no such folder."""
    return _read_state(Folder(path, manifest=True))["config"] if path.is_dir() else {}


def _read_state(folder: Folder) -> dict[str, Any]:
    """A checkpoint's trainer_state.json, with every value of the kind that it must be."""
    state, where = folder.read_json(STATE), str(folder.path / STATE)
    if isinstance(state, dict):
        state.setdefault("prompt_kinds", [])  # checkpoints of earlier versions do not say
        state.setdefault("saved_by", "fit")
        state.setdefault("other_calls", dict.fromkeys(budget.KEPT, 0))
        state.setdefault("health", health.EMPTY)
        state.setdefault("init_adapter", None)  # where the generator started as a new adapter
    untrusted.require_keys(
        state,
        (
            "format", "global_step", "position", "reward_calls", "prompt_kinds", "beta_scale", "baseline",
            "reward_scales", "health", "config", "by_peft_config", "base", "versions", "machine", "saved_by",
            "other_calls", "init_adapter",
        ),
        where,
    )  # fmt: skip
    if state["format"] != 1:
        raise Damaged(f"{where} is of format {str(state['format'])[:20]}; this version reads format 1")
    for name in ("global_step", "position", "reward_calls"):
        untrusted.require_whole(state[name], f"{where}: {name}")
    untrusted.require_keys(state["other_calls"], budget.KEPT, f"{where}: other_calls")
    for name, value in state["other_calls"].items():
        untrusted.require_whole(value, f"{where}: other_calls: {name}")
    state["beta_scale"] = untrusted.require_float(state["beta_scale"], f"{where}: beta_scale", least=0.0)
    untrusted.require_keys(state["baseline"], ("total", "weight"), f"{where}: baseline")
    for name, value in state["baseline"].items():
        state["baseline"][name] = untrusted.require_float(value, f"{where}: baseline: {name}")
    for name in ("reward_scales", "config", "base", "versions", "machine"):
        if not isinstance(state[name], dict):
            raise Damaged(f"{where}: {name} is no mapping")
    for name, part in state["reward_scales"].items():
        inside = f"{where}: reward_scales: {name[:80]}"
        untrusted.require_keys(part, ("answers", "mean", "squares", "freedom"), inside)
        for key in ("answers", "freedom"):
            untrusted.require_whole(part[key], f"{inside}: {key}")
        untrusted.require_float(part["mean"], f"{inside}: mean")
        untrusted.require_float(part["squares"], f"{inside}: squares", least=0.0)
    _require_health(state["health"], f"{where}: health")
    if not isinstance(state["base"].get("fingerprint"), str):
        raise Damaged(f"{where}: base: fingerprint is no text")
    for name in ("name", "path"):
        if not isinstance(state["base"].get(name), str | None):
            raise Damaged(f"{where}: base: {name} is no text")
    if not isinstance(state["init_adapter"], str | None):
        raise Damaged(f"{where}: init_adapter is no text")
    untrusted.require_list(state["by_peft_config"], f"{where}: by_peft_config", lambda *_: None)
    untrusted.require_list(state["prompt_kinds"], f"{where}: prompt_kinds", _require_kind)
    if state["saved_by"] not in ("fit", BY_HAND):
        raise Damaged(f"{where}: saved_by is {str(state['saved_by'])[:60]!r}: it must be fit or {BY_HAND}")
    return state


def _require_health(state: Any, where: str) -> None:
    """What `Health.state_dict()` gives: plain numbers, in lists that are no longer than it keeps."""

    def numbers(*kinds: str) -> Callable[[Any, str], None]:
        """A list of so many numbers; those called "float_or_none" may be missing."""

        def check(value: Any, inside: str) -> None:
            untrusted.require_list(value, inside, lambda *_: None, len(kinds))
            for kind, number in zip(kinds, value, strict=True):
                if number is not None or kind != "float_or_none":
                    untrusted.require_float(number, inside)

        return check

    untrusted.require_keys(state, health.EMPTY, where)
    untrusted.require_list(state["told"], f"{where}: told", _require_notice)
    untrusted.require_whole(state["labels"], f"{where}: labels")
    numbers("float", "float")(state["earlier"], f"{where}: earlier")
    numbers("float", "float", "float")(state["correlation"], f"{where}: correlation")
    untrusted.require_keys(state["streaks"], health.EMPTY["streaks"], f"{where}: streaks")
    for name, streak in state["streaks"].items():
        untrusted.require_keys(streak, health.STREAK, f"{where}: streaks: {name}")
        for key, number in streak.items():
            untrusted.require_float(number, f"{where}: streaks: {name}: {key}")
    untrusted.require_keys(state["series"], health.SERIES, f"{where}: series")
    for name, (kinds, most) in health.SERIES.items():
        inside = f"{where}: series: {name}"
        untrusted.require_list(state["series"][name], inside, numbers(*kinds))
        if len(state["series"][name]) > most:
            raise Damaged(f"{inside} has more than {most} entries")


def _require_notice(value: Any, where: str) -> None:
    if value not in health.KINDS:
        raise Damaged(f"{where} is {str(value)[:60]!r}: it must be one of {', '.join(health.KINDS)}")


def _require_kind(value: Any, where: str) -> None:
    if value not in ("messages", "texts"):
        raise Damaged(f"{where} is {str(value)[:60]!r}: it must be messages or texts")


def _harmless(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, without what would let a stranger's checkpoint run code when its base is loaded."""
    theirs = settings.get("model_init_kwargs")
    kept = {
        key: value
        for key, value in (theirs if isinstance(theirs, dict) else {}).items()
        if key in ("revision", "subfolder", "variant")
        or (key == "attn_implementation" and value in ("eager", "sdpa", "flash_attention_2"))
    }
    return settings | {"trust_remote_code": False, "model_init_kwargs": kept or None}


def _recorded_base(recorded: dict[str, str], config: Config, *, processing_class: Any, quantization_config: Any) -> Any:
    """The base a checkpoint names, only if it is on this machine: a stranger's path fetches nothing."""
    name, path = recorded["name"], recorded["path"]
    try:
        base = load_base(
            name if name in named_bases.NAMES else path,
            processing_class,
            config,
            quantization_config=quantization_config,
            local_files_only=True,
        )
        # Later checkpoints name the GGUF file too, not the folder in the cache.
        return replace(base, name=name) if name and gguf_files.is_converted(path) else base
    except ValueError as error:
        which = "to say which to use"
        if gguf_files.is_converted(path):
            which = "with the GGUF file that it was converted from, as model='FILE.gguf'"
        raise ValueError(
            f"the checkpoint was made on the base {name or 'in memory'!r}, which could not be opened from this machine "
            f"alone, and nothing is fetched because a checkpoint names it: pass model= {which} ({error})"
        ) from error


def _read_lora_config(folder: Folder) -> LoraConfig:
    """The adapter a checkpoint holds, from what of its JSON is accepted; the base it names is never followed."""
    theirs = _read_adapter_config(folder)
    try:
        return LoraConfig(**{name: theirs[name] for name in ACCEPTED if name in theirs})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.path / 'adapter_config.json'} does not describe a LoRA adapter: {error}") from error


def _read_adapter_config(folder: Folder) -> dict[str, Any]:
    try:
        return folder.read_json("adapter_config.json")
    except Damaged as error:
        raise Damaged(f"{folder.path} has no readable adapter_config.json: it is not an adapter ({error})") from error


def _read_generator(gan: LoraGAN, folder: Folder) -> Callable[[], None]:
    """Read and check a generator's folder; the function returned puts it in place."""
    _require_same_scaling(folder, gan.players.peft.peft_config["generator"])
    weights = untrusted.read_weights(folder, adapter_state(gan.players, "generator"))
    optimizer = untrusted.read_optimizer(folder, gan.generator.optimizer)

    def put() -> None:
        _copy(weights, adapter_state(gan.players, "generator"))
        gan.generator.optimizer.restart(optimizer)

    return put


def _read_reference(gan: LoraGAN, folder: Folder) -> Callable[[], None]:
    """The same for the adapter that the KL is measured to. A checkpoint without one leaves the reference as it is."""
    there = _has_reference(folder)
    if not gan.players.has_reference:
        if there and gan.config.kl_reference is None:
            raise ValueError(
                f"the KL of the run in {folder.path.parent} is measured to an adapter, {REFERENCE}/ in each "
                "checkpoint: open it by LoraGAN.from_checkpoint(), give init_adapter=FOLDER as before, or set "
                "kl_reference='base' to measure it to the base from now on"
            )
        return lambda: None
    if not there:
        return lambda: None
    part = folder.part(REFERENCE)
    _require_same_scaling(part, gan.players.peft.peft_config[REFERENCE])
    weights = untrusted.read_weights(part, adapter_state(gan.players, REFERENCE))
    return lambda: _copy(weights, adapter_state(gan.players, REFERENCE))


def _read_monitor(gan: LoraGAN, folder: Folder) -> dict[str, Any]:
    parameters, file = gan.players.parameters("generator"), "monitor.pt"
    limit = untrusted.room_for(parameters, times=4)
    state, where = untrusted.read_tensors(folder, file, limit=limit), str(folder.path / file)
    untrusted.require_keys(state, gan.monitor.state_dict(), where)

    def floats(length: int) -> Callable[[Any, str], None]:
        return lambda value, inside: untrusted.require_list(value, inside, untrusted.float_or_none, length)

    untrusted.require_list(state["window"], f"{where}: window", floats(5))
    for name, length in (("first", 2), ("best", 3)):
        if state[name] is not None:
            floats(length)(state[name], f"{where}: {name}")
    if any(not isinstance(words, str) for words in state["told"]):
        raise Damaged(f"{where}: told holds something else than texts")
    if state["kept"] is not None:
        untrusted.require_keys(state["kept"], ("weights", "optimizer"), f"{where}: kept")
        untrusted.require_tensors_like(state["kept"]["weights"], parameters, f"{where}: kept: weights")
        untrusted.require_optimizer(state["kept"]["optimizer"], gan.generator.optimizer, f"{where}: kept: optimizer")
    return state


def _read_discriminator(gan: LoraGAN, folder: Folder) -> Callable[[], None]:
    """The same for a discriminator's; one without state.pt gives all heads the one that scores, and no replay."""
    heads_MH = gan.players.heads_MH
    _require_same_scaling(folder, gan.players.peft.peft_config["discriminator"])
    expected = {**adapter_state(gan.players, "discriminator"), SCORE: heads_MH[:1]}
    weights = untrusted.read_weights(folder, expected, called=composite.plain_name)
    score_1H = weights.pop(SCORE)
    state = _read_discriminator_state(gan, folder) if folder.has("state.pt") else None
    optimizer = untrusted.read_optimizer(folder, gan.discriminator.optimizer) if state else None

    def put() -> None:
        _copy(weights, adapter_state(gan.players, "discriminator"))
        gan.discriminator.optimizer.restart(optimizer)
        if state is not None:
            gan.discriminator.load_state_dict(state)
        else:
            gan.discriminator.restart(score_1H)

    return put


def _read_discriminator_state(gan: LoraGAN, folder: Folder) -> dict[str, Any]:
    parameters, heads_MH = gan.players.parameters("discriminator"), gan.players.heads_MH
    base, config = gan.players.base, gan.config
    tokens = base.context if base.context < UNLIMITED else LONGEST_TEXT
    replay = config.disc_replay_groups * (config.num_generations + 2) * tokens * 8  # bytes, at the most
    state = untrusted.read_tensors(folder, "state.pt", limit=untrusted.room_for(parameters, times=3) + replay)
    where = str(folder.path / "state.pt")
    untrusted.require_keys(state, gan.discriminator.state_dict(), where)
    if isinstance(state["heads_MH"], Tensor) and state["heads_MH"].shape[1:] == heads_MH.shape[1:]:
        theirs, ours = len(state["heads_MH"]), len(heads_MH)
        if theirs != ours:
            raise ValueError(f"{folder.path} has {theirs} heads, this discriminator {ours}: set disc_heads to match")
    untrusted.require_numbers(state["heads_MH"], f"{where}: heads_MH", like=heads_MH)
    if untrusted.require_float(state["reward_unit"], f"{where}: reward_unit") <= 0:
        raise Damaged(f"{where}: reward_unit must be above 0")
    if not isinstance(state["knows_unit"], bool):
        raise Damaged(f"{where}: knows_unit must be True or False")
    vocabulary = gan.players.lm.get_input_embeddings().weight.shape[0]
    untrusted.require_replay(state["replay"], vocabulary, len(heads_MH), f"{where}: replay")
    untrusted.require_tensors_like(state["raw"], parameters[:-1], f"{where}: raw")
    if state["average"] is not None:
        untrusted.require_tensors_like(state["average"], parameters, f"{where}: average")
    untrusted.require_list(state["correlation"], f"{where}: correlation", untrusted.require_float, 2)
    return state


def _require_same_scaling(folder: Folder, ours: LoraConfig) -> None:
    """The settings that tensors do not show: an adapter under another alpha is another adapter."""
    theirs, stock = _read_adapter_config(folder), LoraConfig()
    for name in (
        "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "alora_invocation_tokens", "use_bdlora",
    ):  # fmt: skip
        saved, here = theirs.get(name, getattr(stock, name)), getattr(ours, name)
        if saved != here:
            raise ValueError(
                f"{folder.path} does not fit: it was saved with {name}={repr(saved)[:60]}, this adapter has {here!r}"
            )


def _copy(source: dict[str, Tensor], destination: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in destination.items():
            tensor.copy_(source[name])


def load_generator(gan: LoraGAN, path: Path) -> None:
    _read_generator(gan, _player_folder(path, "generator"))()
    gan.prompt_kinds = _prompt_kinds_beside(path) or gan.prompt_kinds


def _prompt_kinds_beside(path: Path) -> set[str]:
    """Kinds of the prompts that a saved generator was trained on; empty where no readable checkpoint says so."""
    whole = path if (path / STATE).is_file() else path.parent
    try:
        return set(_read_state(Folder(whole, manifest=True))["prompt_kinds"])
    except Damaged:
        return set()


def load_discriminator(gan: LoraGAN, path: Path) -> None:
    _read_discriminator(gan, _player_folder(path, "discriminator"))()


def _player_folder(path: Path, player: str) -> Folder:
    """A player's folder, named itself or by its checkpoint, whose manifest then holds; another tool's has none."""
    if (path / MANIFEST).exists():
        return Folder(path, manifest=True).part(player)
    if path.name == player and (path.parent / MANIFEST).exists():
        return Folder(path.parent, manifest=True).part(player)
    return Folder(path / player if (path / player).is_dir() else path, manifest=False)
