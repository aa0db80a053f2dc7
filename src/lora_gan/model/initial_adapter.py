"""`init_adapter=`: the generator starts from a saved LoRA adapter, for example from TRL's SFTTrainer.

The folder is a stock PEFT folder, or a generator of this library: a run, a step, a generator/ folder, an export. All
files are checked as untrusted: no code in them is executed, and the base that the adapter names is not loaded. Used by
`gan`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from ..storage import checkpoint, untrusted
from ..storage.durable import Folder
from ..wording import shown
from .peft_config import ACCEPTED, INIT_METHODS, SET_BY_LIBRARY, changed_setting, lora_config_from, require_shareable
from .pretrained import hub_id

if TYPE_CHECKING:
    from ..config import Config
    from .base import Base

#: Fields with any value: dropout is off here, and the initialization of trained weights has no effect any more.
TRAINING_FIELDS = ("lora_dropout", "eva_config")
#: Initializations that leave the base's weights unchanged. The others (pissa, olora, loftq, corda, …) change them.
HARMLESS_INITS = (*INIT_METHODS, "eva")
LARGEST_RANK = 2**14


@dataclass(frozen=True)
class InitAdapter:
    """A LoRA adapter on the disk: its settings are checked, its weights are not read yet.

    Attributes:
        name: the folder, as recorded in checkpoints.
        folder: the adapter's files.
        config: the adapter's settings, for the generator.
        base: name of the adapter's base; "" if its config names none.
        fingerprint: hash of the base's weights, from a checkpoint of this library; None elsewhere.
    """

    name: str
    folder: Folder
    config: LoraConfig
    base: str
    fingerprint: str | None

    def require_fits(self, base: Base) -> None:
        """Check by fingerprint or name that the adapter was trained on this base. Warns if the names are unclear.

        Raises:
            ValueError: the adapter was trained on another base.
        """
        here = base.name or base.path or "the base in memory"
        if self.fingerprint is not None:
            if self.fingerprint != base.fingerprint:
                raise ValueError(
                    f"init_adapter={self.name} was trained on other weights than those of {here} "
                    f"({type(base.model).__name__}): give the base that it was trained on, in the same revision and "
                    "quantization"
                )
            return
        if not self.base or not base.path or self.base in (base.name, base.path):
            return
        if _is_hub_id(self.base) and _is_hub_id(base.path):
            raise ValueError(
                f"init_adapter={self.name} was trained on {self.base[:120]}, but the base here is {base.path}: give "
                "the base that it was trained on. If both have the same weights, write this base's name into "
                "base_model_name_or_path of its adapter_config.json"
            )
        if Path(self.base).name.lower() != Path(base.path).name.lower():
            warnings.warn(
                f"init_adapter={self.name} names the base {self.base[:120]}, but the base here is {here}: make sure "
                "that both have the same weights, because the adapter does not work on other weights",
                stacklevel=4,
            )


def read(path: Path, *, config: Config, peft_config: LoraConfig | None) -> InitAdapter:
    """Find the adapter and check its settings; its weights are read by `adapter_files.load_initial`.

    Args:
        path: a stock PEFT folder, or a folder of this library: a run (its newest complete step), a step, a player's
            folder, an export.
        config: its lora_r and lora_alpha must be at their defaults: the adapter's own are used.
        peft_config: LoraGAN's argument. It must be None: the adapter's own settings are used.

    Raises:
        ValueError: there is no such folder, it has no LoRA adapter of a causal LM, the adapter's settings do not work
            on a shared base, or `config` or `peft_config` describe another adapter.
    """
    name = str(path.resolve()) if path.exists() else str(path)
    if peft_config is not None:
        raise ValueError("init_adapter= and peft_config= both describe the generator's adapter: give only one")
    if not path.is_dir():
        hub = f". Download it from the hub: hf download {path} --local-dir FOLDER" if _is_hub_id(str(path)) else ""
        raise ValueError(
            f"init_adapter={path} is not a folder: give one with adapter_config.json and the adapter's weights{hub}"
        )
    if not (path / "adapter_config.json").exists() and any(path.glob("step-*")):
        path = checkpoint.find(path, None)
    folder = checkpoint.player_folder(path, "generator")
    if not folder.has("adapter_config.json"):
        steps = sorted(path.glob("checkpoint-*/adapter_config.json"))
        hint = f"; there is one in {steps[-1].parent}" if steps else ""
        full = " It contains a whole model: give it as model= instead" if (path / "config.json").is_file() else ""
        raise ValueError(
            f"init_adapter={path} has no adapter_config.json, so it is not an adapter saved by PEFT{hint}.{full}"
        )
    theirs = folder.read_json("adapter_config.json")
    base = theirs.get("base_model_name_or_path")
    return InitAdapter(
        name=name,
        folder=folder,
        config=_lora_config(theirs, f"init_adapter={name}", config),
        base=base if isinstance(base, str) else "",
        fingerprint=_fingerprint(folder),
    )


def _fingerprint(folder: Folder) -> str | None:
    """The hash of the base's weights in a checkpoint of this library; None elsewhere."""
    if folder.files is None:
        return None
    base = Folder(folder.path.parent, manifest=True).read_json(checkpoint.STATE).get("base")
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def _lora_config(theirs: Mapping[str, Any], where: str, config: Config) -> LoraConfig:
    """The adapter's settings, from the accepted fields of its JSON."""
    kind = theirs.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where} is a PEFT adapter of type {shown(kind)}: the generator can only start from LoRA")
    task = theirs.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{where} has task_type={shown(task)}: it must be CAUSAL_LM, because it starts the generator")
    if (changed := changed_setting(config, ("lora_r", "lora_alpha"))) is not None:
        raise ValueError(
            f"{changed} and init_adapter= both describe the generator's adapter, and the saved adapter's settings are "
            f"used: leave {changed.partition('=')[0]} out"
        )
    remedy = ". Merge the adapter into its base, and give the result as model= instead"
    accepted = (*ACCEPTED, *SET_BY_LIBRARY, *TRAINING_FIELDS)
    require_shareable(theirs.items(), where, accepted=accepted, remedy=remedy)
    stock = LoraConfig()
    init = theirs.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in HARMLESS_INITS:
        raise ValueError(
            f"{where} has init_lora_weights={shown(init)}, which changes the base's weights: save it as plain LoRA "
            "(PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)), and give the saved folder"
        )
    ranks = [theirs.get("r", stock.r), *_values(theirs.get("rank_pattern"))]
    for rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"{where} has the rank {shown(rank)}: it must be a whole number from 1 to {LARGEST_RANK}")
    for alpha in [theirs.get("lora_alpha", stock.lora_alpha), *_values(theirs.get("alpha_pattern"))]:
        untrusted.require(alpha, float, f"{where}: lora_alpha")
    return lora_config_from(theirs, where, init_lora_weights=True)


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else []


def _is_hub_id(name: str) -> bool:
    """Whether a name is a valid hub id with an owner, and no local path."""
    return "/" in name and not Path(name).exists() and hub_id(name) is not None
