"""The adapters' settings as PEFT gets them: from the library's settings, or checked copies of the user's own.

Two adapters share one base, so a setting that changes the base itself cannot be accepted. `Players` builds its adapters
here. `initial_adapter` and checkpoints check the settings of saved adapters by the same lists.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
from transformers.pytorch_utils import Conv1D

from ..config import Config
from ..wording import error_line, shown
from . import composite
from .base import Base
from .layers import has_adapter, require_layer_list

# The fields of peft.LoraConfig that may differ from its defaults. The library sets the last row itself.
ACCEPTED = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
)  # fmt: skip
SET_BY_LIBRARY = (
    "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision", "peft_type", "peft_version",
    "auto_mapping", "runtime_config",
)  # fmt: skip
INIT_METHODS = (True, False, "gaussian", "orthogonal")
TASK_TYPES = {"generator": ("CAUSAL_LM",), "discriminator": ("SEQ_CLS", "CAUSAL_LM")}
REFUSED_BECAUSE = {
    "lora_dropout": "players run in eval mode, where it would do nothing",
    "bias": "the biases are the base's, which both players share",
    "modules_to_save": "copies of the base's modules would be trained; the score head is the library's own",
    "target_parameters": "PEFT allows it to one adapter only",
    "trainable_token_indices": "the embeddings are the base's, which both players share",
    "layer_replication": "it would give the base another number of layers for both players",
}


def lora_config(
    player: Literal["generator", "discriminator"],
    given: LoraConfig | None,
    config: Config,
    model: PreTrainedModel,
) -> LoraConfig:
    """The player's adapter as PEFT gets it: from the settings, or a checked copy of the user's own.

    Raises:
        ValueError: a field that does not work on a base that two adapters share, by name; settings that contradict it.
    """
    prefix = "disc_" if player == "discriminator" else ""
    name = f"{prefix}peft_config"
    if given is None:
        targets = getattr(config, f"{prefix}target_modules")
        if player == "discriminator" and config.disc_layers is not None:
            targets = _upper_linear(model, config.disc_layers)
        wanted = LoraConfig(
            r=getattr(config, f"{prefix}lora_r"),
            lora_alpha=getattr(config, f"{prefix}lora_alpha"),
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
    else:
        if type(given) is not LoraConfig:
            raise ValueError(f"{name} is a {type(given).__name__}: it must be a peft.LoraConfig")
        described = ["lora_r", "lora_alpha", "target_modules"] + ["layers"] * (player == "discriminator")
        if (changed := changed_setting(config, [prefix + field for field in described])) is not None:
            raise ValueError(f"{changed} and {name}= both describe the adapter: give one of them")
        _require_own_config(name, given)
        if given.task_type is not None and given.task_type not in TASK_TYPES[player]:
            raise ValueError(
                f"{name} has task_type={str(given.task_type)!r}: it must be {' or '.join(TASK_TYPES[player])}, or None"
            )
        wanted = copy.deepcopy(given)
    _exclude_not_adapted(wanted, model)
    wanted.task_type = TaskType.CAUSAL_LM  # both adapters stand on the causal LM; a checkpoint says SEQ_CLS
    wanted.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's linear layers
    wanted.base_model_name_or_path, wanted.revision, wanted.inference_mode = None, None, False
    return wanted


# Linear layers that "all-linear" leaves out, by model type. PEFT refuses `out_proj`, whose weight Mamba's kernels read
# past the adapter; transformers reads the weight of `dt_proj` so, and an adapter there would never do anything.
# Qwen4-Exp's `index_qk_proj` only ranks tokens for its sparse attention, which passes no gradient.
NOT_ADAPTED = {
    "falcon_h1": ("out_proj",), "mamba2": ("out_proj",), "nemotron_h": ("out_proj",), "mamba": ("out_proj", "dt_proj"),
    "falcon_mamba": ("out_proj", "dt_proj"), "jamba": ("dt_proj",), "qwen4_exp_text": ("index_qk_proj",),
}  # fmt: skip


def _exclude_not_adapted(wanted: LoraConfig, model: PreTrainedModel) -> None:
    """Let "all-linear" mean all linear layers that can be adapted. Modules that are named one by one stay named."""
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    excluded = wanted.exclude_modules
    if left_out and wanted.target_modules == "all-linear" and not isinstance(excluded, str):  # a pattern is the user's
        wanted.exclude_modules = {*(excluded or ()), *left_out}  # type: ignore[assignment]  # PEFT keeps a set


def _upper_linear(model: PreTrainedModel, layers: int) -> list[str]:
    """The linear layers of the model's upper layers, by name: PEFT takes "all-linear" in all layers or none.

    Raises:
        ValueError: the model has fewer layers, or not one list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    if layers > count:
        raise ValueError(f"disc_layers={layers} is not accepted: {type(model).__name__} has {count} layers")
    (name, found), first = require_layer_list(model, "disc_layers", "set disc_target_modules"), count - layers
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    return sorted(
        f"{name}.{first + i}.{inner}"
        for i, layer in enumerate(found[first:])
        for inner, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and inner.rpartition(".")[2] not in left_out
    )


def attach(base: Base, lora: dict[str, LoraConfig], said: str = "") -> PeftModel:
    """Put the adapters on the base. An error of PEFT is raised as one line that contains `said`."""
    on_cpu = base.model.device.type == "cpu"
    if on_cpu and getattr(base.model, "is_loaded_in_8bit", False) and any(c.use_dora for c in lora.values()):
        raise ValueError(
            "use_dora=True does not work on a base in 8 bits on the CPU, where PEFT loses the scales of its weights: "
            "load it in 4 bits, or leave DoRA out"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # between PEFT and transformers
        # PEFT doubles the rank of fused expert weights by its own pattern. It applies the pattern, and warns that it
        # did not.
        warnings.filterwarnings(
            "ignore", message=r"The following (rank|alpha)_pattern keys did not match.*gate_up_proj"
        )
        try:
            peft = get_peft_model(base.model, lora["generator"], adapter_name="generator")
            for name in list(lora)[1:]:
                peft.add_adapter(name, lora[name])
        except Exception as error:  # PEFT's own kinds, and those of what quantizes
            raise ValueError(
                f"PEFT could not put these adapters{said} on the base, a {type(base.model).__name__}: "
                f"{error_line(error)}"
            ) from error
    return peft


def lora_config_from(theirs: Mapping[str, Any], where: str, **settings: Any) -> LoraConfig:
    """An adapter's config from what is accepted of its JSON; `settings` come before it.

    Raises:
        ValueError: it describes no LoRA adapter; `where` names the file.
    """
    kept = {name: copy.deepcopy(theirs[name]) for name in ACCEPTED if name in theirs}
    try:
        return LoraConfig(**kept | settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not describe a LoRA adapter: {error}") from error


def changed_setting(config: Config, settings: Iterable[str]) -> str | None:
    """The first of these settings that differs from its default, as name=value."""
    defaults = Config.__dataclass_fields__
    changed = [name for name in settings if getattr(config, name) != defaults[name].default]
    return f"{changed[0]}={getattr(config, changed[0])!r}" if changed else None


def require_shareable(settings: Iterable[tuple[str, Any]], name: str, *, accepted: Iterable[str], remedy: str) -> None:
    """Refuse a value that is not PEFT's default in a field where only the default works.

    Args:
        settings: (field, value) pairs of a LoRA adapter.
        name: of the adapter, for the message.
        accepted: the fields that may have any value.
        remedy: the end of the message.

    Raises:
        ValueError: it names the field, its value and the reason.
    """
    stock = LoraConfig()
    for field, value in settings:
        if field not in accepted and value and value != getattr(stock, field, None):
            reason = REFUSED_BECAUSE.get(field, "it is not known to work on a base that two adapters share")
            raise ValueError(f"{name} has {str(field)[:60]}={shown(value)}, which is not accepted: {reason}{remedy}")


def _require_own_config(name: str, given: LoraConfig) -> None:
    settings = ((field.name, getattr(given, field.name)) for field in fields(LoraConfig))
    remedy = f". What may differ from PEFT's defaults: {', '.join(ACCEPTED)}"
    require_shareable(settings, name, accepted=(*ACCEPTED, *SET_BY_LIBRARY), remedy=remedy)
    if given.init_lora_weights not in INIT_METHODS:
        raise ValueError(
            f"{name} has init_lora_weights={given.init_lora_weights!r}, which is not accepted: the base stays as it "
            f"is, and it must be one of {', '.join(map(repr, INIT_METHODS))}"
        )


# --- places of the adapters -------------------------------------------------------------------------------------------


def require_trainable(lm: PreTrainedModel) -> list[str]:
    """The names of the modules with a discriminator's adapter, if both players can train every adapter.

    Raises:
        ValueError: an adapter on the input embeddings, or a discriminator's that no score passes through.
    """
    if isinstance(lm.get_input_embeddings(), BaseTunerLayer):
        raise ValueError(
            "target_modules name the input embeddings, which both players share: leave them out (all-linear does)"
        )
    # An expert's adapter stands around the layer that PEFT made of it.
    modules = lm.named_modules()
    places = [name.replace(".base_layer", "") for name, module in modules if has_adapter(module, "discriminator")]
    outside = [name for name in places if not name.startswith(f"{lm.base_model_prefix}.")]
    if outside:
        raise ValueError(
            f"disc_target_modules name {outside[0]!r}, which no score passes through: leave it out "
            "(disc_peft_config= takes exclude_modules)"
        )
    return places


def warn_of_stock_clients(base: Base, lm: PreTrainedModel, places: list[str], width: int) -> None:
    """Warn where stock sequence classification lacks something that discriminator/ needs.

    Args:
        places: names of the modules with a discriminator's adapter.
        width: of the score head.
    """
    if problem := _stock_classifier_lacks(base, lm, places, width):
        warnings.warn(
            f"stock transformers and PEFT cannot open a discriminator on {type(lm).__name__}: {problem}. This "
            "library trains, saves, loads and scores with it all the same.",
            stacklevel=5,
        )


def _stock_classifier_lacks(base: Base, lm: PreTrainedModel, places: list[str], width: int) -> str | None:
    config = copy.deepcopy(base.composite or lm.config)
    kind = cast("type[PreTrainedModel] | None", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None))
    if kind is None:
        return f"transformers has no sequence classification for the model type {config.model_type!r}"
    config.num_labels = 1
    config.get_text_config().pad_token_id = None  # one that has no row would stop stock transformers here
    with torch.device("meta"):  # shapes alone, no memory
        stock = kind(config)
    score = getattr(stock, "score", None)
    if not isinstance(score, nn.Linear) or score.in_features != width:
        return f"{kind.__name__} has no score head of width {width}"
    there = dict(stock.named_modules())
    if base.composite is not None:
        places = list(map(composite.stock_name, places))
    lacking = [name for name in places if name not in there]
    return f"{kind.__name__} has no {lacking[0]}" if lacking else None
