"""Converts a run's state to the files of a checkpoint, and back.

A restore reads and checks all files before it changes anything. `untrusted` checks the content of the files;
`storage.checkpoint` defines the layout. Used by `gan` and `saving`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import REMOVED, Config
from ..context import UNLIMITED
from ..model import base_checks, composite, gguf_files, named_bases
from ..model.adapter_files import (
    SCORE,
    adapter_content,
    adapter_state,
    copy_weights,
    read_lora_config,
    require_same_scaling,
)
from ..model.base import load_base
from ..state import RunState
from ..storage import checkpoint, state_files, untrusted
from ..storage.checkpoint import ADAPTER, BY_HAND, PLAYERS, REFERENCE, STATE, Content, copied, has_reference
from ..storage.durable import MANIFEST, Damaged, Folder
from ..training import guard
from ..training.estimate import GroupSpread
from ..training.guard import LevelTest
from ..training.monitor import AUDITS, Audits
from ..training.probe import MOST_ROWS
from ..wording import shown
from . import saved_optimizer, trainer_state

#: Assumed most tokens of a text in replay, on a base without a context limit. The number bounds the size of a file and
#: not of one text: a group stores its prompt once, so a prompt may be several times as long.
LONGEST_TEXT = 2**17

#: Removed settings of which a checkpoint may hold any value: `_read_discriminator_state` converts what they led to.
CONVERTED = ("disc_average", "disc_heads")

#: The state of `Calibration` that gives the adapter's predictions weight 1 and trust 1, until others are measured.
ADAPTER_ALONE = {"moments": [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], "differences": 8.0}


def take(state: RunState, *, by_hand: bool = False) -> Content:
    """Copies of all content of a checkpoint, so that training can continue while the files are written.

    Args:
        state: the state to save.
        by_hand: whether `save_checkpoint()` was called: save_total_limit never deletes such a checkpoint.
    """
    content: Content = {}
    for adapter in (*PLAYERS, REFERENCE) if state.players.has_reference else PLAYERS:
        config, weights = adapter_content(state.players, adapter)
        content[f"{adapter}/adapter_config.json"] = config
        content[f"{adapter}/{ADAPTER}"] = weights
    content["generator/optimizer.pt"] = state.generator.optimizer.state_dict()
    content["discriminator/optimizer.pt"] = state.discriminator.optimizer.state_dict()
    content["discriminator/state"] = state.discriminator.state_dict()
    content["generator/monitor"] = state.monitor.state_dict()
    content[STATE] = trainer_state.content(state) | {"saved_by": BY_HAND if by_hand else "fit"}
    return copied(content)


def restore(state: RunState, path: Path) -> None:
    """Load a complete checkpoint, so that the run continues exactly. Nothing in memory changes if this raises.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another base, another reference or other settings.
    """
    folder, base = Folder(path, manifest=True), state.players.base
    saved = trainer_state.read(folder)
    if saved["base"]["fingerprint"] != base.fingerprint:
        theirs = f"{saved['base'].get('name') or 'in memory'!r} ({saved['base'].get('architecture', 'unknown')})"
        raise ValueError(
            f"{path} was made on the base {theirs[:200]}, and its weights differ from those of "
            f"{base.name or 'in memory'!r} ({type(base.model).__name__}): give the base of the checkpoint, in the same "
            "revision and with the same quantization"
        )
    put_generator = _read_generator(state, folder.part("generator"))
    put_discriminator = _read_discriminator(state, folder.part("discriminator"))
    put_reference = _read_reference(state, folder)
    monitor = _read_monitor(state, folder.part("generator"))
    put_generator()
    put_discriminator()
    put_reference()
    state.init_adapter = saved["init_adapter"]
    state.monitor.load_state_dict(monitor)
    budget = state.true_reward.budget
    budget.audits = min(state.monitor.audits.reserved, state.config.audit_calls)
    state.global_step, state.position = saved["global_step"], saved["position"]
    budget.counts["training"] = saved["reward_calls"]
    budget.load_state_dict(saved["other_calls"])
    state.prompt_kinds = set(saved["prompt_kinds"])
    state.generator.beta_scale = saved["beta_scale"]
    state.generator.baseline.total = saved["baseline"]["total"]
    state.generator.baseline.weight = saved["baseline"]["weight"]
    state.generator.spread = GroupSpread(**saved["reward_spread"])
    state.true_reward.scales.load_state_dict(saved["reward_scales"])
    state.health.load_state_dict(saved["health"])
    _warn_of_another_machine(state, saved)


def _warn_of_another_machine(state: RunState, saved: Mapping[str, Any]) -> None:
    now = trainer_state.machine(state.players) | trainer_state.versions()
    then = saved["machine"] | saved["versions"]
    changed = [f"{name} {then.get(name)} then, {here} now" for name, here in now.items() if then.get(name) != here]
    if changed:
        warnings.warn(
            f"the run continues, but not bitwise equal to one that was never interrupted: {'; '.join(changed)}",
            stacklevel=4,
        )


def _read_generator(state: RunState, folder: Folder) -> Callable[[], None]:
    """Read and check a generator's folder. The returned function copies its values into the state."""
    require_same_scaling(folder, state.players.peft.peft_config["generator"])
    weights = untrusted.read_weights(folder, adapter_state(state.players, "generator"))
    optimizer = saved_optimizer.read(folder, state.generator.optimizer)

    def put() -> None:
        copy_weights(weights, adapter_state(state.players, "generator"))
        state.generator.optimizer.restart(optimizer)

    return put


def _read_reference(state: RunState, folder: Folder) -> Callable[[], None]:
    """The same for the reference adapter of the KL. A checkpoint without one does not change the reference."""
    is_saved, players = has_reference(folder), state.players
    if is_saved and not players.has_reference and state.config.kl_reference is None:
        raise ValueError(
            f"the KL of the run in {folder.path.parent} is measured to an adapter, which each checkpoint holds in "
            f"{REFERENCE}/. Open the run by LoraGAN.from_checkpoint(), give init_adapter=FOLDER as before, or set "
            "kl_reference='base' to measure the KL to the base from now on"
        )
    if not (is_saved and players.has_reference):
        return lambda: None
    reference = folder.part(REFERENCE)
    require_same_scaling(reference, players.peft.peft_config[REFERENCE])
    weights = untrusted.read_weights(reference, adapter_state(players, REFERENCE))
    return lambda: copy_weights(weights, adapter_state(players, REFERENCE))


def _read_monitor(state: RunState, folder: Folder) -> dict[str, Any]:
    parameters, where = state.players.parameters("generator"), str(folder.path / "monitor")
    saved = state_files.read(folder, "monitor", limit=untrusted.room_for(parameters, times=4))
    if isinstance(saved, dict) and "best" in saved:  # earlier versions compared windows, and had no audits
        saved = {name: value for name, value in saved.items() if name != "best"}
        audits = Audits(reserved=state.config.audit_calls)
        saved |= {"test": asdict(LevelTest()), "audits": asdict(audits), "window": []}
    untrusted.require_keys(saved, state.monitor.state_dict(), where)
    untrusted.require(saved["window"], [(float | None,) * 3], f"{where}: window")
    if saved["first"] is not None:
        untrusted.require(saved["first"], (float, float), f"{where}: first")
    untrusted.require(saved["told"], [str], f"{where}: told")
    untrusted.require(saved["test"], guard.SHAPE, f"{where}: test")
    if saved["test"]["reference"] is not None:
        untrusted.require(saved["test"]["reference"], guard.REFERENCE, f"{where}: test: reference")
    untrusted.require(saved["audits"], AUDITS, f"{where}: audits")
    if saved["kept"] is not None:
        untrusted.require_keys(saved["kept"], ("weights", "optimizer"), f"{where}: kept")
        untrusted.require_tensors_like(saved["kept"]["weights"], parameters, f"{where}: kept: weights")
        saved_optimizer.require(saved["kept"]["optimizer"], state.generator.optimizer, f"{where}: kept: optimizer")
    return saved


def _read_discriminator(state: RunState, folder: Folder) -> Callable[[], None]:
    """The same for a discriminator's folder. A folder of PEFT alone has one head, which all heads then copy, and no
    replay."""
    heads_MH = state.players.heads_MH
    require_same_scaling(folder, state.players.peft.peft_config["discriminator"])
    expected = {**adapter_state(state.players, "discriminator"), SCORE: heads_MH[:1]}
    weights = untrusted.read_weights(folder, expected, called=composite.plain_name)
    score_1H = weights.pop(SCORE)
    saved = _read_discriminator_state(state, folder) if state_files.has(folder, "state") else None
    keeps_heads = saved is not None and saved["heads_MH"].shape == heads_MH.shape
    optimizer = saved_optimizer.read(folder, state.discriminator.optimizer, keeps_last=keeps_heads) if saved else None

    def put() -> None:
        copy_weights(weights, adapter_state(state.players, "discriminator"))
        state.discriminator.optimizer.restart(optimizer)
        if saved is not None:
            state.discriminator.load_state_dict(saved if keeps_heads else _with_mean_head(saved, len(heads_MH)))
        else:
            state.discriminator.restart(score_1H)

    return put


def _read_discriminator_state(state: RunState, folder: Folder) -> dict[str, Any]:
    parameters, heads_MH = state.players.parameters("discriminator"), state.players.heads_MH
    base, config = state.players.base, state.config
    tokens = base.context if base.context < UNLIMITED else LONGEST_TEXT
    replay = config.disc_replay_groups * (config.num_generations + 2) * tokens * 8  # most bytes
    # Some bases project the last hidden states, and the probe reads those of a lower layer.
    widths = {heads_MH.shape[1], state.players.lm.config.get_text_config().hidden_size}
    probe = (MOST_ROWS + config.num_generations) * (max(widths) + 4) * 4
    saved = state_files.read(folder, "state", limit=untrusted.room_for(parameters, times=3) + replay + probe)
    where = str(folder.path / "state")
    if isinstance(saved, dict):
        # Earlier versions had no probe, and used the adapter's predictions in full.
        earlier = {"calibration": ADAPTER_ALONE, "probe": state.discriminator.state_dict()["probe"]}
        saved = earlier | saved
        if isinstance(saved["probe"], dict):
            saved["probe"] = {"explained": 0.0} | saved["probe"]
        # Some earlier runs predicted by a moving average of the weights. The adapter's file holds this average, and the
        # state holds the heads' part as the last tensor.
        average, _ = saved.pop("average", None), saved.pop("raw", None)
        if average is not None:
            untrusted.require_list(average, f"{where}: average", len(parameters))
            saved["heads_MH"] = average[-1]
        if isinstance(saved.get("replay"), dict):
            saved["replay"].pop("seen", None)
    untrusted.require_keys(saved, state.discriminator.state_dict(), where)
    saved_MH = saved["heads_MH"]
    heads = len(saved_MH) if isinstance(saved_MH, Tensor) and saved_MH.dim() == 2 else 0
    heads = heads or len(heads_MH)  # earlier versions had a setting for the number of heads
    untrusted.require_numbers(saved_MH, f"{where}: heads_MH", like=heads_MH[:1].expand(heads, -1))
    plain = {
        "reward_unit": untrusted.POSITIVE,
        "knows_unit": bool,
        "correlation": (float, float),
        "calibration": {"moments": ((float,) * 3,) * 3, "differences": float},
    }
    untrusted.require({name: saved[name] for name in plain}, plain, where)
    vocabulary = base_checks.embedding_rows(state.players.lm)
    untrusted.require_replay(saved["replay"], vocabulary, heads, f"{where}: replay")
    untrusted.require_probe(saved["probe"], widths, f"{where}: probe")
    return saved


def _with_mean_head(saved: dict[str, Any], heads: int) -> dict[str, Any]:
    """The state of a discriminator with another number of heads: each head becomes their mean, and learns from all of
    the replay."""
    replay = saved["replay"]
    flags = torch.ones(len(replay["heads"]), heads, dtype=torch.bool)
    mean_1H = saved["heads_MH"].mean(0, keepdim=True)
    return saved | {"heads_MH": mean_1H.expand(heads, -1), "replay": replay | {"heads": flags}}


def load_generator(state: RunState, path: Path) -> None:
    _read_generator(state, checkpoint.player_folder(path, "generator"))()
    state.prompt_kinds = _prompt_kinds_beside(path) or state.prompt_kinds


def load_discriminator(state: RunState, path: Path) -> None:
    _read_discriminator(state, checkpoint.player_folder(path, "discriminator"))()


def _prompt_kinds_beside(path: Path) -> set[str]:
    """Kinds of the prompts on which a saved generator was trained; empty without a readable checkpoint around it."""
    step_folder = path if (path / STATE).is_file() else path.parent
    try:
        return set(trainer_state.read(Folder(step_folder, manifest=True))["prompt_kinds"])
    except Damaged:
        return set()


def arguments_of(path: Path, model: Any, given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The arguments of a LoraGAN that can load a checkpoint.

    Args:
        path: a step's folder, or a run's folder for its newest complete step.
        model: the base; None: the base that the checkpoint names, if it is on this machine.
        given: arguments and settings that override those of the checkpoint.

    Returns:
        The step's folder, and the arguments of LoraGAN.

    Raises:
        ValueError: there is no complete checkpoint, or its base is not on this machine.
    """
    arguments, fault = dict(given), checkpoint.fault(path)
    if fault is not None and (path / MANIFEST).exists():  # a step's folder, not a run's
        raise Damaged(f"{path} is no complete checkpoint: {fault}")
    step_folder = path if fault is None else checkpoint.find(path, None)
    saved = trainer_state.read(Folder(step_folder, manifest=True))
    kept = {name: value for name, value in saved["config"].items() if name not in CONVERTED}
    settings = _harmless(_without_removed(kept, step_folder))
    # After a move of the folder the run continues in its new folder, unless output_dir is given.
    settings["output_dir"] = str(step_folder.parent)
    known = set(Config.__dataclass_fields__)
    settings |= {name: arguments.pop(name) for name in list(arguments) if name in known}
    generator = trainer_state.generator_arguments(step_folder, settings.get("kl_reference"))
    if not arguments.keys() & {"peft_config", "init_adapter"}:
        arguments |= generator
    if "discriminator" in saved["by_peft_config"]:
        theirs = Folder(step_folder, manifest=True).part("discriminator")
        arguments.setdefault("disc_peft_config", read_lora_config(theirs))
    if isinstance(model, PreTrainedModel):
        settings["model_init_kwargs"] = None  # the model is already loaded
    if model is None:
        # The arguments that load the base and its tokenizer are used here, and must not reach LoraGAN again.
        loading = {name: arguments.pop(name, None) for name in ("processing_class", "quantization_config")}
        model = _recorded_base(saved["base"], Config.from_dict(settings), **loading)
    return step_folder, {"model": model, "config": Config.from_dict(settings), **arguments}


def _without_removed(settings: Mapping[str, Any], step_folder: Path) -> dict[str, Any]:
    """A checkpoint's settings without those that are gone. Warns of each that had another value than its default."""
    lost = [
        f"{name}={shown(settings[name])} ({successor})"
        for name, (default, successor) in REMOVED.items()
        if name in settings and settings[name] != default
    ]
    if lost:
        warnings.warn(
            f"{step_folder} has settings that are gone, and the run continues without them: {'; '.join(lost)}",
            stacklevel=4,
        )
    return {name: value for name, value in settings.items() if name not in REMOVED}


def _harmless(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, without those that could let an untrusted checkpoint run code when its base loads."""
    theirs = settings.get("model_init_kwargs")
    kept = {
        key: value
        for key, value in (theirs if isinstance(theirs, dict) else {}).items()
        if key in ("revision", "subfolder", "variant")
        or (key == "attn_implementation" and value in ("eager", "sdpa", "flash_attention_2"))
    }
    return settings | {"trust_remote_code": False, "model_init_kwargs": kept or None}


def _recorded_base(recorded: dict[str, str], config: Config, *, processing_class: Any, quantization_config: Any) -> Any:
    """The base that a checkpoint names, if it is on this machine. An untrusted name must not start a download.

    Raises:
        ValueError: the base cannot be opened from this machine alone.
    """
    name, path = recorded["name"], recorded["path"]
    try:
        base = load_base(
            name if name in named_bases.NAMES else path,
            processing_class,
            config,
            quantization_config=quantization_config,
            local_files_only=True,
        )
        # Later checkpoints also name the GGUF file, not the folder in the cache.
        return replace(base, name=name) if name and gguf_files.is_converted(path) else base
    except ValueError as error:
        which = "to name the base"
        if gguf_files.is_converted(path):
            which = "with the GGUF file that it was converted from, as model='FILE.gguf'"
        raise ValueError(
            f"the checkpoint was made on the base {name or 'in memory'!r}, which could not be opened from this machine "
            f"alone. A name in a checkpoint starts no download: pass model= {which} ({error})"
        ) from error
