"""`init_adapter=`: a saved LoRA adapter, such as TRL's SFTTrainer writes, as the start of the generator.

The folder is a stock PEFT one, or a generator of this library: a run, one of its steps, its generator/, an export.
Everything is read and checked as a stranger's files: nothing is executed, and the base that the adapter names is never
followed. Used by `gan`.
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
from .peft_config import (
    ACCEPTED,
    INIT_METHODS,
    SET_BY_LIBRARY,
    changed_setting,
    lora_config_from,
    require_shareable,
)
from .pretrained import hub_id

if TYPE_CHECKING:
    from ..config import Config
    from .base import Base

#: Fields that may say anything: dropout does nothing here, and how the weights began is past.
TRAINING_FIELDS = ("lora_dropout", "eva_config")
#: Methods of initialization that leave the base's weights unchanged. The others (pissa, olora, loftq, corda, …) do not.
HARMLESS_INITS = (*INIT_METHODS, "eva")
LARGEST_RANK = 2**14


@dataclass(frozen=True)
class InitAdapter:
    """A LoRA adapter on the disk, whose settings are checked and whose weights are not read yet.

    Attributes:
        name: the folder, as it is recorded in checkpoints.
        folder: where its files are.
        config: its settings, as the generator gets them.
        base: the base that it names; "" where it names none.
        fingerprint: of the base's weights, where a checkpoint of this library says so.
    """

    name: str
    folder: Folder
    config: LoraConfig
    base: str
    fingerprint: str | None

    def require_fits(self, base: Base) -> None:
        """The adapter was trained on this base, as far as names and fingerprints show it.

        Raises:
            ValueError: it was trained on another one.
        """
        here = base.name or base.path or "the base in memory"
        if self.fingerprint is not None:
            if self.fingerprint != base.fingerprint:
                raise ValueError(
                    f"init_adapter={self.name} was trained on other weights than those of {here} "
                    f"({type(base.model).__name__}): give the base that it was trained on, in the same revision and "
                    "quantized alike"
                )
            return
        if not self.base or not base.path or self.base in (base.name, base.path):
            return
        if _is_hub_id(self.base) and _is_hub_id(base.path):
            raise ValueError(
                f"init_adapter={self.name} was trained on {self.base[:120]}, and the base here is {base.path}: give "
                "the base that it was trained on. If both have the same weights, write this base's name into "
                "base_model_name_or_path of its adapter_config.json"
            )
        if Path(self.base).name.lower() != Path(base.path).name.lower():
            warnings.warn(
                f"init_adapter={self.name} names the base {self.base[:120]}, and the base here is {here}: make sure "
                "that both have the same weights, or the adapter means nothing here",
                stacklevel=4,
            )


def read(path: Path, *, config: Config, peft_config: LoraConfig | None) -> InitAdapter:
    """Find the adapter and check its settings; its weights are read by `adapter_files.load_initial`.

    Args:
        path: a stock PEFT folder, or one of this library's: a run (its newest complete step is taken), a step, a
            player's folder, an export.
        config: whose lora_r, lora_alpha and target_modules must be left at their defaults.
        peft_config: what LoraGAN was given; the adapter's own settings are taken, so there must be none.

    Raises:
        ValueError: no such folder, no LoRA adapter of a causal LM, settings that do not work on a base that two
            adapters share, or another description of the generator's adapter beside it.
    """
    name = str(path.resolve()) if path.exists() else str(path)
    if peft_config is not None:
        raise ValueError("init_adapter= and peft_config= both describe the generator's adapter: give one of them")
    if not path.is_dir():
        there = f"init_adapter={path} is no folder: it must be one with adapter_config.json and the adapter's weights"
        hub = f". From the hub, fetch it first: hf download {path} --local-dir FOLDER" if _is_hub_id(str(path)) else ""
        raise ValueError(there + hub)
    if not (path / "adapter_config.json").exists() and any(path.glob("step-*")):
        path = checkpoint.find(path, None)
    folder = checkpoint.player_folder(path, "generator")
    if not folder.has("adapter_config.json"):
        steps = sorted(path.glob("checkpoint-*/adapter_config.json"))
        hint = f"; there is one in {steps[-1].parent}" if steps else ""
        full = " It holds a whole model: give that as model= instead" if (path / "config.json").is_file() else ""
        raise ValueError(
            f"init_adapter={path} has no adapter_config.json, so it is no adapter that PEFT saved{hint}.{full}"
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
    """Of the base's weights, where the adapter is part of a checkpoint of this library."""
    if folder.files is None:
        return None
    base = Folder(folder.path.parent, manifest=True).read_json(checkpoint.STATE).get("base")
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    return fingerprint if isinstance(fingerprint, str) else None


def _lora_config(theirs: Mapping[str, Any], where: str, config: Config) -> LoraConfig:
    """The adapter's settings, from what of its JSON is accepted."""
    kind = theirs.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where} is a PEFT adapter of type {shown(kind)}: only LoRA can be the generator's start")
    task = theirs.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{where} has task_type={shown(task)}: the generator is a CAUSAL_LM")
    if (changed := changed_setting(config, ("lora_r", "lora_alpha", "target_modules"))) is not None:
        raise ValueError(
            f"{changed} and init_adapter= both describe the generator's adapter, whose settings are those it was saved "
            f"with: leave {changed.partition('=')[0]} out"
        )
    remedy = ". Merge the adapter into its base, and give the result as model= instead"
    accepted = (*ACCEPTED, *SET_BY_LIBRARY, *TRAINING_FIELDS)
    require_shareable(theirs.items(), where, accepted=accepted, remedy=remedy)
    stock = LoraConfig()
    init = theirs.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in HARMLESS_INITS:
        raise ValueError(
            f"{where} has init_lora_weights={shown(init)}, which changes the base's weights: save it as plain LoRA "
            "(PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)), and give that"
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
    """Whether a name can only be one on the hub."""
    return "/" in name and not Path(name).exists() and hub_id(name) is not None
