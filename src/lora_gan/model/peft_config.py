"""Builds the adapters' peft.LoraConfig: from the library's settings, or from a checked copy of the user's own.

Two adapters share one base, so settings that change the base are refused. Used by `Players`. `initial_adapter` and
checkpoints check saved adapters against the same lists.
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

# The fields of peft.LoraConfig that may differ from PEFT's defaults: the user's, and those that the library sets.
ACCEPTED = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "init_lora_weights",
)  # fmt: skip
SET_BY_LIBRARY = (
    "task_type", "fan_in_fan_out", "base_model_name_or_path", "inference_mode", "revision", "peft_type", "peft_version",
    "auto_mapping", "runtime_config",
)  # fmt: skip
INIT_METHODS = (True, False, "gaussian", "orthogonal")
#: The discriminator's lora_alpha / r: the same factor as the generator's defaults have.
DISC_SCALE = 2
TASK_TYPES = {"generator": ("CAUSAL_LM",), "discriminator": ("SEQ_CLS", "CAUSAL_LM")}
REFUSED_BECAUSE = {
    "lora_dropout": "players run in eval mode, in which dropout is off",
    "bias": "both players share the base's biases",
    "modules_to_save": "it would train copies of the base's modules; the library has its own score head",
    "target_parameters": "PEFT supports it for one adapter only",
    "trainable_token_indices": "both players share the base's embeddings",
    "layer_replication": "it would change the number of layers for both players",
}


def lora_config(
    player: Literal["generator", "discriminator"],
    given: LoraConfig | None,
    config: Config,
    model: PreTrainedModel,
) -> LoraConfig:
    """The player's LoraConfig: from the settings, or a checked copy of the user's own.

    Args:
        given: the user's own; None: use the settings of `config`.

    Raises:
        ValueError: it names a field that does not work on a shared base, or a setting that contradicts `given`.
    """
    is_discriminator = player == "discriminator"
    name = "disc_peft_config" if is_discriminator else "peft_config"
    if given is None and is_discriminator:
        rank, layers = config.disc_lora_r, config.disc_layers
        targets = "all-linear" if layers is None else _upper_linear(model, layers)
        wanted = LoraConfig(r=rank, lora_alpha=DISC_SCALE * rank, target_modules=targets)
    elif given is None:
        wanted = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear")
    else:
        if type(given) is not LoraConfig:
            raise ValueError(f"{name} is a {type(given).__name__}: it must be a peft.LoraConfig")
        described = ("disc_lora_r", "disc_layers") if is_discriminator else ("lora_r", "lora_alpha")
        if (changed := changed_setting(config, described)) is not None:
            raise ValueError(f"{changed} and {name}= both describe the adapter: give only one")
        _require_own_config(name, given)
        if given.task_type is not None and given.task_type not in TASK_TYPES[player]:
            raise ValueError(
                f"{name} has task_type={str(given.task_type)!r}: it must be {' or '.join(TASK_TYPES[player])}, or None"
            )
        wanted = copy.deepcopy(given)
    _exclude_not_adapted(wanted, model)
    wanted.task_type = TaskType.CAUSAL_LM  # both adapters are on the causal LM; the discriminator's file has SEQ_CLS
    wanted.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's linear layers
    wanted.base_model_name_or_path, wanted.revision, wanted.inference_mode = None, None, False
    return wanted


# Linear layers that "all-linear" leaves out, by model type. Mamba's kernels use the weight of `out_proj` without the
# layer's forward, so an adapter has no effect, and PEFT refuses the layer. The same holds for `dt_proj` in
# transformers. Qwen4-Exp's `index_qk_proj` only ranks tokens for its sparse attention, which passes no gradient.
NOT_ADAPTED = {
    "falcon_h1": ("out_proj",), "mamba2": ("out_proj",), "nemotron_h": ("out_proj",), "mamba": ("out_proj", "dt_proj"),
    "falcon_mamba": ("out_proj", "dt_proj"), "jamba": ("dt_proj",), "qwen4_exp_text": ("index_qk_proj",),
}  # fmt: skip


def _exclude_not_adapted(wanted: LoraConfig, model: PreTrainedModel) -> None:
    """Exclude from "all-linear" the layers that cannot be adapted. Other values of target_modules stay unchanged."""
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    excluded = wanted.exclude_modules
    if left_out and wanted.target_modules == "all-linear" and not isinstance(excluded, str):
        wanted.exclude_modules = {*(excluded or ()), *left_out}  # type: ignore[assignment]  # PEFT keeps a set


def _upper_linear(model: PreTrainedModel, layers: int) -> list[str]:
    """The names of the linear modules in the model's upper layers. PEFT has "all-linear" for all layers only.

    Raises:
        ValueError: the model has fewer layers, or no single list of layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    if layers > count:
        raise ValueError(f"disc_layers={layers} is not accepted: {type(model).__name__} has {count} layers")
    (name, found), first = require_layer_list(model, "disc_layers", "give disc_peft_config"), count - layers
    left_out = NOT_ADAPTED.get(model.config.model_type, ())
    return sorted(
        f"{name}.{first + i}.{inner}"
        for i, layer in enumerate(found[first:])
        for inner, module in layer.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and inner.rpartition(".")[2] not in left_out
    )


def attach(base: Base, lora: dict[str, LoraConfig], source: str = "") -> PeftModel:
    """Put the adapters on the base.

    Args:
        lora: LoraConfig by adapter name; "generator" is required.
        source: where the adapter comes from, for the message.

    Raises:
        ValueError: one line: PEFT cannot put these adapters on this base.
    """
    on_cpu = base.model.device.type == "cpu"
    if on_cpu and getattr(base.model, "is_loaded_in_8bit", False) and any(c.use_dora for c in lora.values()):
        raise ValueError(
            "use_dora=True does not work on an 8-bit base on the CPU, because PEFT loses the scales of its weights: "
            "load the base in 4 bits, or set use_dora=False"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # a mismatch of PEFT, transformers
        # PEFT doubles the rank of fused expert weights by its own pattern, and wrongly warns that the pattern did not
        # match.
        warnings.filterwarnings(
            "ignore", message=r"The following (rank|alpha)_pattern keys did not match.*gate_up_proj"
        )
        try:
            peft = get_peft_model(base.model, lora["generator"], adapter_name="generator")
            for name in list(lora)[1:]:
                peft.add_adapter(name, lora[name])
        except Exception as error:  # PEFT and quantization libraries raise many kinds
            raise ValueError(
                f"PEFT could not put these adapters{source} on the base, a {type(base.model).__name__}: "
                f"{error_line(error)}"
            ) from error
    return peft


def lora_config_from(theirs: Mapping[str, Any], where: str, **settings: Any) -> LoraConfig:
    """A LoraConfig from the accepted fields of an adapter's JSON. `settings` override these fields.

    Raises:
        ValueError: the JSON does not describe a LoRA adapter. `where` names the file.
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
    """Refuse values other than PEFT's defaults, except in the accepted fields.

    Args:
        settings: (field, value) pairs of a LoRA adapter.
        name: the adapter's name in the message.
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
    remedy = f". These fields may differ from PEFT's defaults: {', '.join(ACCEPTED)}"
    require_shareable(settings, name, accepted=(*ACCEPTED, *SET_BY_LIBRARY), remedy=remedy)
    if given.init_lora_weights not in INIT_METHODS:
        raise ValueError(
            f"{name} has init_lora_weights={given.init_lora_weights!r}, which is not accepted: the base must not "
            f"change. Set one of {', '.join(map(repr, INIT_METHODS))}"
        )


# --- checks of the adapted modules ------------------------------------------------------------------------------------


def require_trainable(lm: PreTrainedModel) -> list[str]:
    """Check that gradients reach every adapter. Returns the names of the modules with a discriminator's adapter.

    Raises:
        ValueError: an adapter is on the input embeddings, or a discriminator's adapter does not affect the score.
    """
    if isinstance(lm.get_input_embeddings(), BaseTunerLayer):
        raise ValueError(
            "target_modules name the input embeddings, which both players share: leave them out, or set all-linear"
        )
    # PEFT nests the adapters of fused expert weights, and adds ".base_layer" to their names.
    modules = lm.named_modules()
    names = [name.replace(".base_layer", "") for name, module in modules if has_adapter(module, "discriminator")]
    outside = [name for name in names if not name.startswith(f"{lm.base_model_prefix}.")]
    if outside:
        raise ValueError(
            f"the discriminator's target_modules name {outside[0]!r}, which does not affect the score: leave it out "
            "(disc_peft_config= takes exclude_modules)"
        )
    return names


def warn_of_stock_clients(base: Base, lm: PreTrainedModel, names: list[str], width: int) -> None:
    """Warn if stock sequence classification cannot open a discriminator on this base.

    Args:
        names: names of the modules with a discriminator's adapter.
        width: input width of the score head.
    """
    if problem := _stock_classifier_lacks(base, lm, names, width):
        warnings.warn(
            f"stock transformers and PEFT cannot open a discriminator on {type(lm).__name__}: {problem}. This "
            "library can still train, save, load and score with it.",
            stacklevel=5,
        )


def _stock_classifier_lacks(base: Base, lm: PreTrainedModel, names: list[str], width: int) -> str | None:
    """The first thing that stock sequence classification lacks, for the warning; None if it lacks nothing."""
    config = copy.deepcopy(base.composite or lm.config)
    kind = cast("type[PreTrainedModel] | None", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None))
    if kind is None:
        return f"transformers has no sequence classification for the model type {config.model_type!r}"
    config.num_labels = 1
    config.get_text_config().pad_token_id = None  # a pad id without a row would raise in stock transformers
    with torch.device("meta"):  # shapes only, without memory
        stock = kind(config)
    score = getattr(stock, "score", None)
    if not isinstance(score, nn.Linear) or score.in_features != width:
        return f"{kind.__name__} has no score head of width {width}"
    present = dict(stock.named_modules())
    if base.composite is not None:
        names = list(map(composite.stock_name, names))
    lacking = [name for name in names if name not in present]
    return f"{kind.__name__} has no {lacking[0]}" if lacking else None
