"""Checkpoints: the layout that stock PEFT opens, written beside and renamed, loaded without executing anything.

    step-100/
      generator/      adapter_config.json  adapter_model.bin  optimizer.pt  monitor.pt (what the guard remembers)
      discriminator/  adapter_config.json  adapter_model.bin  optimizer.pt  state.pt   (raw weights, average, replay)
      trainer_state.json   (step, data position, settings, the base's fingerprint, versions)

A folder without trainer_state.json is not a checkpoint: it is written last, and the whole folder under another name.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, TaskType, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import ACCEPTED, Players
from .base import load_base
from .config import Config
from .optimizer import PlayerOptimizer

if TYPE_CHECKING:
    from .gan import LoraGAN

SCORE = "base_model.model.score.weight"  # where stock PEFT looks for a sequence classifier's head
STATE = "trainer_state.json"
PLAYERS = ("generator", "discriminator")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT prefers the first; never both are written


# --- saving


def save(gan: LoraGAN, folder: Path, step: int) -> Path:
    """Write folder/step-N so that a reader sees all of it or nothing; then drop the oldest over save_total_limit."""
    final, writing = folder / f"step-{step}", folder / f".step-{step}.writing-{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    for player in PLAYERS:
        (writing / player).mkdir(parents=True)
        with gan.discriminator.scoring():
            save_adapter(gan.players, player, writing / player, gan.config.weights_format)
    torch.save(gan.generator.optimizer.state_dict(), writing / "generator" / "optimizer.pt")
    torch.save(gan.discriminator.optimizer.state_dict(), writing / "discriminator" / "optimizer.pt")
    torch.save(gan.discriminator.state_dict(), writing / "discriminator" / "state.pt")
    torch.save(gan.monitor.state_dict(), writing / "generator" / "monitor.pt")
    (writing / STATE).write_text(json.dumps(_trainer_state(gan), indent=2) + "\n", encoding="utf-8")

    replaced = folder / f".step-{step}.replaced-{os.getpid()}"
    if final.exists():
        final.rename(replaced)
    writing.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    if gan.config.save_total_limit:
        for old in complete(folder)[: -gan.config.save_total_limit]:
            if old != final:
                shutil.rmtree(old)
    return final


def _trainer_state(gan: LoraGAN) -> dict[str, Any]:
    base, baseline = gan.players.base, gan.generator.baseline
    return {
        "format": 1,
        "global_step": gan.global_step,
        "position": gan.position,
        "reward_calls": gan.reward_calls,
        "beta_scale": gan.generator.beta_scale,
        "baseline": {"total": baseline.total, "weight": baseline.weight},
        "reward_scales": gan.reward_scales.state_dict(),
        "config": gan.config.to_file(),
        "by_peft_config": gan.players.by_peft_config,  # whose adapters the settings do not describe
        "base": {
            "name": base.name,
            "path": base.path,
            "architecture": type(base.model).__name__,
            "fingerprint": base.fingerprint,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def save_adapter(players: Players, player: str, folder: Path, weights_format: str) -> None:
    """Adapter weights and config as stock PEFT reads them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(players, player).items()}
    config: Any = copy.deepcopy(players.peft.peft_config[player])
    config.base_model_name_or_path = players.base.path
    config.inference_mode = True
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))  # a set's order would change with PYTHONHASHSEED
    if player == "discriminator":
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = ["classifier", "score"]
        state[SCORE] = players.score_MH.detach().mean(0, keepdim=True).cpu()  # heads folded into the one that scores
    config.save_pretrained(folder)
    if weights_format == "safetensors":
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        readable(folder)
    else:
        torch.save(state, folder / "adapter_model.bin")


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
    steps = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and is_complete(path)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))


def is_complete(path: Path) -> bool:
    return (
        (path / STATE).is_file()
        and (path / "discriminator" / "state.pt").is_file()
        and all(
            (path / player / "adapter_config.json").is_file()
            and (path / player / "optimizer.pt").is_file()
            and any((path / player / name).is_file() for name in WEIGHTS)
            for player in PLAYERS
        )
    )


def find(folder: Path, step: int | None) -> Path:
    """One step's folder, or the newest complete one."""
    there = complete(folder)
    if step is None and there:
        return there[-1]
    if step is not None and is_complete(folder / f"step-{step}"):
        return folder / f"step-{step}"
    steps = ", ".join(path.name.removeprefix("step-") for path in there) or "none"
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    hint = ""
    if (folder / "export.json").is_file():
        hint = "; it is an export, which stock PEFT and transformers open: name the run it was made of"
    elif folder.parent.name.startswith("step-") and is_complete(folder.parent):
        hint = f"; it is a part of one: name {folder.parent}"
    elif runs := sorted({str(path.parent.parent) for path in folder.glob(f"*/step-*/{STATE}")}):
        hint = f"; there are in {', '.join(runs[:3])}"
    raise ValueError(f"there is no complete {wanted} in {folder}: complete steps there: {steps}{hint}")


# --- loading


def load(gan: LoraGAN, path: Path) -> None:
    """Continue exactly: everything is read and checked before anything in memory changes."""
    state, base = _read_state(path), gan.players.base
    if state["base"]["fingerprint"] != base.fingerprint:
        theirs = f"{state['base']['name'] or 'in memory'!r} ({state['base'].get('architecture', 'unknown')})"
        raise ValueError(
            f"{path} was made on the base {theirs}, whose weights are not those of {base.name or 'in memory'!r} "
            f"({type(base.model).__name__}): give that base, in the same revision and quantized alike"
        )
    put_generator = _read_generator(gan, path / "generator")
    put_discriminator = _read_discriminator(gan, path / "discriminator")
    watched = path / "generator" / "monitor.pt"  # older checkpoints have none
    monitor = _read_tensors(watched) if watched.is_file() else None
    put_generator()
    put_discriminator()
    if monitor is not None:
        gan.monitor.load_state_dict(monitor)
    gan.global_step, gan.position = state["global_step"], state["position"]
    gan.reward_calls = state["reward_calls"]
    gan.generator.beta_scale = state.get("beta_scale", 1.0)
    gan.generator.baseline.total = state["baseline"]["total"]
    gan.generator.baseline.weight = state["baseline"]["weight"]
    gan.reward_scales.load_state_dict(state.get("reward_scales", {}))  # older checkpoints have none


def rebuild(cls: type[LoraGAN], path: Path, model: Any, arguments: dict[str, Any]) -> LoraGAN:
    step_folder = path if is_complete(path) else find(path, None)
    state = _read_state(step_folder)
    settings = _harmless(state["config"])
    # Where the run's folder was moved, it goes on there, unless told otherwise.
    settings["output_dir"] = str(step_folder.parent)
    known = set(Config.__dataclass_fields__)
    settings |= {name: arguments.pop(name) for name in list(arguments) if name in known}
    for player, name in zip(PLAYERS, ("peft_config", "disc_peft_config"), strict=True):
        if player in state.get("by_peft_config", ()):
            arguments.setdefault(name, _read_lora_config(step_folder / player))
    if isinstance(model, PreTrainedModel):
        settings["model_init_kwargs"] = None  # it is loaded
    if model is None:
        # What says how to load the base is used up here; the tokenizer is part of it.
        how = {name: arguments.pop(name, None) for name in ("processing_class", "quantization_config")}
        model = _recorded_base(state["base"], Config.from_dict(settings), **how)
    gan = cls(model, Config.from_dict(settings), **arguments)
    load(gan, step_folder)
    return gan


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state["base"]["fingerprint"], state["config"], state["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE} could not be read as a checkpoint's state: {error!r}") from error
    return state


def _harmless(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, without what would let a stranger's checkpoint run code when its base is loaded."""
    kept = {
        key: value
        for key, value in (settings.get("model_init_kwargs") or {}).items()
        if key in ("revision", "subfolder", "variant")
        or (key == "attn_implementation" and value in ("eager", "sdpa", "flash_attention_2"))
    }
    return settings | {"trust_remote_code": False, "model_init_kwargs": kept or None}


def _recorded_base(recorded: dict[str, str], config: Config, *, processing_class: Any, quantization_config: Any) -> Any:
    """The base a checkpoint names, only if it is on this machine: a stranger's path fetches nothing."""
    name, path = recorded["name"], recorded["path"]
    try:
        return load_base(
            "tiny" if name == "tiny" else path,
            processing_class,
            config,
            quantization_config=quantization_config,
            local_files_only=True,
        )
    except ValueError as error:
        raise ValueError(
            f"the checkpoint was made on the base {name or 'in memory'!r}, which could not be opened from this machine "
            f"alone, and nothing is fetched because a checkpoint names it: pass model= to say which to use ({error})"
        ) from error


def _read_lora_config(folder: Path) -> LoraConfig:
    """The adapter a checkpoint holds, from what of its JSON is accepted; the base it names is never followed."""
    theirs = _read_adapter_config(folder)
    try:
        return LoraConfig(**{name: theirs[name] for name in ACCEPTED if name in theirs})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} does not describe a LoRA adapter: {error}") from error


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable adapter_config.json: it is not an adapter ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'adapter_config.json'} is not an adapter's settings: {str(config)[:60]!r}")
    return config


def _read_generator(gan: LoraGAN, folder: Path) -> Callable[[], None]:
    """Read and check a generator's folder; the function returned puts it in place."""
    _require_same_scaling(folder, gan.players.peft.peft_config["generator"])
    weights = _read_weights(folder, adapter_state(gan.players, "generator"))
    optimizer = _read_optimizer(folder, gan.generator.optimizer)

    def put() -> None:
        _copy(weights, adapter_state(gan.players, "generator"))
        gan.generator.optimizer.restart(optimizer)

    return put


def _read_discriminator(gan: LoraGAN, folder: Path) -> Callable[[], None]:
    """The same for a discriminator's; one without state.pt gives all heads the one that scores, and no replay."""
    heads_MH = gan.players.heads_MH
    _require_same_scaling(folder, gan.players.peft.peft_config["discriminator"])
    weights = _read_weights(folder, {**adapter_state(gan.players, "discriminator"), SCORE: heads_MH[:1]})
    score_1H = weights.pop(SCORE)
    state = _read_tensors(folder / "state.pt") if (folder / "state.pt").is_file() else None
    if state is not None and state["heads_MH"].shape != heads_MH.shape:
        raise ValueError(
            f"{folder} has {len(state['heads_MH'])} heads, this discriminator {len(heads_MH)}: set disc_heads to match"
        )
    optimizer = _read_optimizer(folder, gan.discriminator.optimizer) if state else None

    def put() -> None:
        _copy(weights, adapter_state(gan.players, "discriminator"))
        gan.discriminator.optimizer.restart(optimizer)
        if state is not None:
            gan.discriminator.load_state_dict(state)
        else:
            gan.discriminator.restart(score_1H)

    return put


def _read_optimizer(folder: Path, optimizer: PlayerOptimizer) -> Any:
    """The optimizer's saved state, None where there is none; refused where it belongs to other parameters."""
    if not (folder / "optimizer.pt").is_file():
        return None
    state = _read_tensors(folder / "optimizer.pt")
    if isinstance(state, dict) and "param_groups" in state:
        return None  # another trainer's: its moments belong to its own parameters
    try:
        count = len(state["optimizer"]["param_groups"][0]["params"])
        fits = count == len(optimizer.parameters) and all(
            moments["exp_avg"].shape == moments["exp_avg_sq"].shape == optimizer.parameters[i].shape
            for i, moments in state["optimizer"]["state"].items()
        )
        schedule = state["schedule"]["base_lrs"]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'optimizer.pt'} is not an optimizer's state: {error!r}") from error
    if not fits or not schedule:
        raise ValueError(f"{folder / 'optimizer.pt'} does not fit: it was saved for other parameters than these")
    return state


def _read_tensors(file: Path) -> Any:
    """weights_only: a file that would execute code on loading is refused by torch."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} could not be read as tensors and plain numbers: {error}") from error


def _require_same_scaling(folder: Path, ours: LoraConfig) -> None:
    """The settings that tensors do not show: an adapter under another alpha is another adapter."""
    theirs, stock = _read_adapter_config(folder), LoraConfig()
    for name in (
        "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "alora_invocation_tokens", "use_bdlora",
    ):  # fmt: skip
        saved, here = theirs.get(name, getattr(stock, name)), getattr(ours, name)
        if saved != here:
            raise ValueError(f"{folder} does not fit: it was saved with {name}={saved!r}, this adapter has {here!r}")


def _read_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights, refused where a name or a shape is not that of the adapter in memory."""
    if (folder / "adapter_model.safetensors").is_file():
        try:
            weights = load_file(folder / "adapter_model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / 'adapter_model.safetensors'} could not be read: {error}") from error
    elif (folder / "adapter_model.bin").is_file():
        weights = _read_tensors(folder / "adapter_model.bin")
    else:
        raise ValueError(f"{folder} has no adapter_model.bin and no adapter_model.safetensors: it is not an adapter")
    differing = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if differing:
        name = differing[0]
        theirs = tuple(weights[name].shape) if name in weights else "absent"
        ours = tuple(expected[name].shape) if name in expected else "absent"
        raise ValueError(
            f"{folder} does not fit: {name} is {theirs} there and {ours} here ({len(differing)} tensors differ); the "
            "base and the LoRA settings (rank, target_modules) must be those it was saved with"
        )
    return weights


def _copy(source: dict[str, Tensor], destination: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in destination.items():
            tensor.copy_(source[name])


def load_generator(gan: LoraGAN, path: Path) -> None:
    _read_generator(gan, path / "generator" if (path / "generator").is_dir() else path)()


def load_discriminator(gan: LoraGAN, path: Path) -> None:
    _read_discriminator(gan, path / "discriminator" if (path / "discriminator").is_dir() else path)()
