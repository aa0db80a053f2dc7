"""Saves adapters as files for stock PEFT, and checks such files before loading. Used by `run.snapshot` and `export`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..storage import checkpoint, untrusted
from ..storage.durable import Folder
from . import composite
from .initial_adapter import InitAdapter
from .peft_config import lora_config_from
from .players import Players

SCORE = "base_model.model.score.weight"  # where stock PEFT looks for a sequence classifier's head


def adapter_state(players: Players, player: str) -> dict[str, Tensor]:
    """The player's LoRA weights by PEFT's names; they share memory with the parameters."""
    return get_peft_model_state_dict(players.peft, adapter_name=player, save_embedding_layers=False)


def adapter_content(players: Players, player: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's config and weights as stock PEFT reads them; the weights share memory with the parameters."""
    state = {name: tensor.detach() for name, tensor in adapter_state(players, player).items()}
    config: Any = copy.deepcopy(players.peft.peft_config[player])
    config.base_model_name_or_path = players.base.path
    config.inference_mode = True
    if player == "discriminator":
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = ["classifier", "score"]
        state[SCORE] = players.score_MH.detach().mean(0, keepdim=True)  # stock PEFT reads one head: the mean
        if players.base.composite is not None:
            state = composite.stock_tensors(state)
            if not isinstance(config.target_modules, str):
                config.target_modules = composite.targets_of_both(config.target_modules)
    # The order of a set depends on PYTHONHASHSEED.
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return dict(sorted(values.items())), state


def save_adapter(players: Players, player: str, folder: Path) -> None:
    """Write the adapter's config, and its weights as safetensors, into a folder, as stock PEFT reads them."""
    config, weights = adapter_content(players, player)
    folder.mkdir(parents=True, exist_ok=True)
    file = "adapter_model.safetensors"
    (folder / "adapter_config.json").write_bytes(checkpoint.serialized("adapter_config.json", config))
    (folder / file).write_bytes(checkpoint.serialized(file, checkpoint.copied(weights)))


def read_lora_config(folder: Folder) -> LoraConfig:
    """The settings of a saved adapter, from the accepted fields of its JSON. Its base is neither loaded nor fetched."""
    return lora_config_from(folder.read_json("adapter_config.json"), str(folder.path / "adapter_config.json"))


def require_same_scaling(folder: Folder, ours: PeftConfig) -> None:
    """Compare the settings that the tensors do not show. The same tensors under another alpha are another adapter.

    Raises:
        ValueError: the first setting that differs, with both values.
    """
    theirs, stock = folder.read_json("adapter_config.json"), LoraConfig()
    for name in (
        "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
        "alora_invocation_tokens", "use_bdlora",
    ):  # fmt: skip
        saved, here = theirs.get(name, getattr(stock, name)), getattr(ours, name)
        if saved != here:
            raise ValueError(
                f"{folder.path} does not fit: it was saved with {name}={repr(saved)[:60]}, this adapter has {here!r}. "
                "Give the same value (peft_config= and disc_peft_config= have every field), or load another folder"
            )


def copy_weights(source: dict[str, Tensor], destination: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in destination.items():
            tensor.copy_(source[name])


def load_initial(start: InitAdapter, players: Players) -> None:
    """Copy the weights of `init_adapter=` into the generator, and into the reference where it is an adapter.

    Raises:
        ValueError: the name, shape, dtype or values of a tensor do not fit this adapter on this base.
    """
    embeddings = _embeddings(players)
    try:
        weights = untrusted.read_weights(start.folder, adapter_state(players, "generator"), optional=embeddings)
    except ValueError as error:
        raise type(error)(f"init_adapter={start.name} cannot be the generator's start: {error}") from error
    for name in embeddings.keys() & weights.keys():
        ours = embeddings[name].detach().cpu()
        if not torch.equal(weights[name].to(ours.dtype), ours):
            raise ValueError(
                f"init_adapter={start.name} has its own embeddings ({name}), but both players share the base's: "
                "merge the adapter into its base, and give the result as model= instead"
            )
    for player in ("generator", *(["reference"] if players.has_reference else [])):
        copy_weights(weights, adapter_state(players, player))


def _embeddings(players: Players) -> dict[str, Tensor]:
    """The base's input and output embeddings, by the names that PEFT gives to copies in an adapter's file.

    PEFT saves such copies if the adapter is on an embedding, or if the vocabulary was resized.
    """
    found: dict[str, Tensor] = {}
    embeddings = (players.lm.get_input_embeddings(), players.lm.get_output_embeddings())
    for name, module in players.lm.named_modules():
        if any(module is embedding for embedding in embeddings):
            inside = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weight = cast(Tensor, inside.weight)
            found |= {f"base_model.model.{name}.{inner}weight": weight for inner in ("", "base_layer.")}
    return found
