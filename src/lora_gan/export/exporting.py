"""Exports a run as adapters and merged models for stock PEFT and transformers, each with a model card.

- `generator/`: LoRA adapter; open with AutoPeftModelForCausalLM.
- `generator-merged/`: causal language model; open with AutoModelForCausalLM.
- `discriminator/`: LoRA adapter with a score head; open with AutoPeftModelForSequenceClassification, num_labels=1.
- `discriminator-merged/`: sequence classifier, a reward model; open with AutoModelForSequenceClassification.
- `export.json`: list of the exported parts. A later export may replace a folder that has this file.

Weights are safetensors. The LoraGAN in memory stays unchanged: it is not merged, cast or moved.

A classifier reads the score at the last token that is not its pad token, so the choice of the pad token matters. If the
base's config names a special token as pad token, the exported tokenizer uses this token. Without a pad token in the
config, stock transformers refuses batches, so the classifier gets a pad token that ends no text. It is the first
available of:

1. the tokenizer's own pad token, unless it is also its eos, bos or unk token;
2. a new `<|pad|>` in an unused row of the embedding;
3. an existing special token that ends no text: a reserved token, or bos. The adapter then opens on the unchanged base;
4. a new `<|pad|>` in an additional row. PEFT adds the row when it opens the adapter.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ..model import base_checks
from ..model.adapter_files import save_adapter
from ..model.base import Base
from ..model.endings import ids_of
from ..model.players import Players
from ..model.pretrained import hub_id, without_progress_bars
from ..state import RunState
from ..storage import durable
from ..storage.checkpoint import readable
from ..version import __version__
from . import card, facts
from .licences import licence_id

Player = Literal["generator", "discriminator"]
PARTS = ("generator", "generator-merged", "discriminator", "discriminator-merged")
MANIFEST = "export.json"
PAD_TOKEN = "<|pad|>"


def export(
    state: RunState,
    folder: str | os.PathLike[str],
    *,
    parts: tuple[str, ...] | list[str] = PARTS,
    dtype: str | torch.dtype | None = None,
    evaluation: dict[str, Any] | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write the players for stock PEFT and transformers. The folder appears complete or not at all.

    Args:
        state: the run; its current players are exported.
        folder: a new or empty folder, or an earlier export, which is replaced.
        parts: one or more of "generator", "generator-merged", "discriminator", "discriminator-merged".
        dtype: dtype of the merged weights: float32, bfloat16 or float16; None: the dtype of the base. Merging is
            computed in float32 and rounded once.
        evaluation: for the cards: the result of gan.evaluate(), or several results by name. The means of an unnamed
            result, or of the result "generator", also go into the metadata of the generator's cards.
        license: for the cards: a licence id of the hub, such as "apache-2.0"; None: the cards name no licence.
        push_to_hub: a name on the hub, "user/name": each part is uploaded as a separate model, "user/name-PART".
        private: whether new repositories on the hub are private.

    Returns:
        The folder.

    Raises:
        ValueError: the part, dtype or licence is unknown, the folder has other content, or there is no token for the
            hub. Merged parts: the base is quantized, or transformers has no sequence classifier for it. If one part
            fails, the message names the part.
        OSError: a part could not be written; the message names the part. After any error the folder is unchanged.
    """
    parts, dtype = _known_parts(parts), _dtype(dtype, state.players)
    license = None if license is None else licence_id(license)
    final = Path(folder).absolute()
    _require_replaceable(final)
    if push_to_hub is not None:
        _require_hub(push_to_hub)
    if any(part.endswith("-merged") for part in parts):
        _require_mergeable(state.players)

    run = facts.RunFacts.of(state, evaluation, license)
    with durable.replacing(final) as writing:
        for part in parts:
            with _exporting(part):
                tokenizer = _write(state.players, part, writing / part, dtype)
                name = part if push_to_hub is None else f"{push_to_hub}-{part}"
                text = card.card(run, part, name=name, tokenizer=tokenizer)
                (writing / part / "README.md").write_text(f"{text}\n", encoding="utf-8")
        manifest = {"format": 1, "parts": list(parts), "step": state.global_step, "lora_gan": __version__}
        (writing / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if push_to_hub is not None:
        push(final, push_to_hub, private=private)
    return final


def push(folder: str | os.PathLike[str], name: str, *, private: bool = False) -> list[str]:
    """Upload an export. Each part becomes a separate model repository, "user/name-PART".

    from_pretrained, PEFT and TRL's reward_funcs then need only the hub id, and no subfolder.

    Returns:
        The addresses of the repositories.

    Raises:
        ValueError: the folder is not an export, the hub does not accept the name, there is no token, or the upload
            failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # the class depends on huggingface_hub's HTTP library

    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not an export: it has no {MANIFEST}. Write one with gan.export(folder)")
    _require_hub(name)
    addresses, api = [], HfApi()
    for part in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parts"]:
        repo = f"{name}-{part}"
        try:
            # The hub adds the user to a name without one, so the repo id comes from its answer.
            created = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            api.upload_folder(
                folder_path=folder / part, repo_id=created.repo_id, repo_type="model", commit_message=f"Upload {part}"
            )
        except (HTTPError, OSError) as error:
            raise ValueError(
                f"{repo} could not be uploaded: {error}. The export is complete in {folder}; upload it again with "
                f"lora_gan.export.exporting.push({str(folder)!r}, {name!r})"
            ) from error
        addresses.append(str(created))
    return addresses


# --- checks of the arguments


def _known_parts(parts: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    wanted = (parts,) if isinstance(parts, str) else tuple(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise ValueError(f"parts={wanted!r} is not accepted: give one or more of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted)


def _dtype(dtype: str | torch.dtype | None, players: Players) -> torch.dtype:
    accepted = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
    if dtype is None:
        return players.lm.dtype
    if dtype not in (*accepted, *accepted.values()):
        raise ValueError(f"dtype={dtype!r} is not accepted: it must be None, or one of {', '.join(accepted)}")
    return accepted[dtype] if isinstance(dtype, str) else dtype


def _require_replaceable(folder: Path) -> None:
    """Refuse a folder with other files than those of an export, because exporting replaces the folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to export to")
    present = {path.name for path in folder.iterdir()}
    foreign = sorted(present - {*PARTS, MANIFEST})
    if foreign or (present and MANIFEST not in present):
        found = f"{foreign[0]!r}, which no export wrote" if foreign else f"no {MANIFEST}, which every export has"
        raise ValueError(f"{folder} is not empty, and holds {found}: give a new or empty folder, or an earlier export")


def _require_mergeable(players: Players) -> None:
    if getattr(players.lm, "hf_quantizer", None) is not None:
        raise ValueError(
            "a quantized base cannot be merged with an adapter, because its weights would be rounded twice: export "
            "parts=('generator', 'discriminator'), or first open the checkpoint on the unquantized base "
            "(LoraGAN.from_checkpoint(path, model=...))"
        )


def _require_hub(name: str) -> None:
    """Check the name and the token, before any part is computed."""
    from huggingface_hub import get_token

    if any(hub_id(f"{name}-{part}") is None for part in PARTS):
        raise ValueError(
            f"push_to_hub={name!r} is not accepted: it must be USER/NAME with letters, digits, '-', '_' and '.', and "
            f"NAME-{PARTS[-1]} may have at most 96 characters"
        )
    if not get_token():
        raise ValueError("there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")


# --- the parts


@contextmanager
def _exporting(part: str) -> Iterator[None]:
    """Errors inside the block name the part. OSError and out of memory keep their types; others become ValueError."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"while the part {part!r} was exported")
        raise
    except OSError as error:
        raise OSError(f"the part {part!r} could not be exported: {error}") from error
    except Exception as error:  # transformers, PEFT, safetensors and tokenizers raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the part {part!r} could not be exported: {reason}") from error


def _write(players: Players, part: str, folder: Path, dtype: torch.dtype) -> PreTrainedTokenizerBase:
    """Write the weights, config and tokenizer of one part. Returns the tokenizer."""
    folder.mkdir(parents=True)
    player: Player = "generator" if part.startswith("generator") else "discriminator"
    tokenizer = players.base.tokenizer if player == "generator" else scoring_tokenizer(players.base)
    if part == player:
        save_adapter(players, player, folder)
    else:
        weights = merged_weights(players, player, dtype)
        model = _causal_lm(players, weights) if player == "generator" else _classifier(players, weights, tokenizer)
        with without_progress_bars():
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable(folder)
    return tokenizer


@torch.no_grad()
def merged_weights(players: Players, player: Player, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base's weights with one player's adapter merged in, under the base's own names, on the CPU.

    Copies are merged layer by layer, so the CPU holds at most one more base, and the GPU none. PEFT's own merging works
    in place, and unmerging would not restore the weights bitwise.
    """
    layers: dict[str, Any] = {
        name: module for name, module in players.lm.named_modules() if isinstance(module, BaseTunerLayer)
    }
    inside = tuple(f"{name}." for name in layers)
    outside = {key: value for key, value in players.lm.state_dict().items() if not key.startswith(inside)}
    weights = {key: _stored(value, dtype) for key, value in outside.items()}
    for name, layer in layers.items():
        if name.startswith(inside):
            continue  # PEFT nests the adapters of fused expert weights; the loop below merges the nested ones
        merged = copy.deepcopy(layer).float()
        while isinstance(merged, LoraLayer):
            merged.merge(adapter_names=[player])
            merged = merged.base_layer
        weights |= {f"{name}.{key}": _stored(tensor, dtype) for key, tensor in merged.state_dict().items()}
    return weights


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU; floating-point tensors are cast to this dtype."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _causal_lm(players: Players, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A stock causal language model with these weights. Its generation config has all stop ids."""
    config, generation = copy.deepcopy(players.lm.config), copy.deepcopy(players.lm.generation_config)
    rows = base_checks.embedding_rows(players.lm)
    for owner in (
        config.get_text_config(),
        generation,
    ):  # stock clients cannot open a model with a pad id without a row
        if owner is not None:
            owner.pad_token_id = base_checks.pad_with_a_row(owner.pad_token_id, rows)
    with torch.device("meta"):  # without memory: the weights are assigned below
        model = type(players.lm)(config)
    model.load_state_dict(weights, assign=True)
    # Stock generate() stops only at the ids of the generation config.
    stops = list(dict.fromkeys([*ids_of(generation.eos_token_id), *players.base.eos_ids]))
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config = generation
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None:
        if torch.equal(head.weight, base_checks.embedding_weight(model)):
            model.tie_weights()
        else:  # an adapter on one of the embeddings has made them different
            model.config.tie_word_embeddings = False
    return model


def _classifier(players: Players, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A stock sequence classifier with one output, the predicted reward."""
    config = copy.deepcopy(players.lm.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.problem_type = "regression"  # without this the text-classification pipeline would apply a sigmoid
    config.get_text_config().pad_token_id = None  # set below, after the embedding has a row for the pad id
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    body = f"{players.lm.base_model_prefix}."
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        prefix = f"{model.base_model_prefix}."
        weights = {prefix + name.removeprefix(body): w for name, w in weights.items() if name.startswith(body)}
        weights["score.weight"] = _stored(players.score_MH.mean(0, keepdim=True), dtype)
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"transformers has no sequence classifier that fits a base of type {config.model_type!r}: leave "
            f"'discriminator-merged' out of parts ({' '.join(str(error).split())[:200]})"
        ) from error
    if tokenizer.pad_token_id >= base_checks.embedding_rows(model):
        # The values of the new row do not matter, because padding is masked.
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def scoring_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding on the right, with a pad token under which stock clients and this library agree.

    Both then read the score at the same token. The module's docstring says which pad token is chosen.

    Raises:
        ValueError: no pad token is possible.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.padding_side = "right"  # left padding would shift positions that are counted from the start of the row
    if (token := _pad_of_the_config(base)) is not None:
        tokenizer.pad_token = token
        return tokenizer
    unsuitable = (None, *base.eos_ids, tokenizer.bos_token_id, tokenizer.unk_token_id)
    rows = base_checks.embedding_rows(base.model)
    if tokenizer.pad_token_id not in unsuitable and tokenizer.pad_token_id < rows:
        return tokenizer
    used_ids = set(tokenizer.get_vocab().values())
    extended = copy.deepcopy(tokenizer)
    extended.add_special_tokens({"pad_token": PAD_TOKEN})
    is_used = extended.pad_token_id in used_ids  # by <|pad|>, or by another token if the tokenizer's ids have gaps
    if extended.pad_token_id < rows and (not is_used or PAD_TOKEN in tokenizer.get_vocab()):
        return extended
    if (token := _token_that_ends_no_text(base)) is not None:
        tokenizer.pad_token = token
        return tokenizer
    if is_used or len(extended) != rows + 1:  # PEFT adds rows up to the tokenizer's length
        raise ValueError(
            f"the tokenizer has no token to pad with, and its ids ({len(used_ids):,}, up to {max(used_ids):,}) leave "
            f"no free row in the embedding ({rows:,} rows). Set tokenizer.pad_token to a token that ends no text"
        )
    return extended


def _pad_of_the_config(base: Base) -> str | None:
    """The pad token in the base's config; None without one, or if it is an ordinary word of the vocabulary.

    Padding with an ordinary word would turn it into a special token.
    """
    if base.pad_on_disk is None:
        return None
    special = {*base_checks.special_tokens(base.tokenizer), *base.eos_ids}
    return base.tokenizer.convert_ids_to_tokens([base.pad_on_disk])[0] if base.pad_on_disk in special else None


def _token_that_ends_no_text(base: Base) -> str | None:
    """A special token of the tokenizer with a row that ends no text; None without one.

    Preferred are, in this order: a token with "pad" in its name, a token that the chat template does not write, any
    token other than bos.
    """
    tokenizer, rows = base.tokenizer, base_checks.embedding_rows(base.model)
    special = base_checks.special_tokens(tokenizer)
    template = str(tokenizer.chat_template or "")
    ends = {*base.eos_ids, tokenizer.eos_token_id, tokenizer.unk_token_id}
    candidates = [id for id in special if id not in ends and 0 <= id < rows]

    def rank(id: int) -> tuple[bool, bool, bool, int]:
        return "pad" not in special[id].lower(), special[id] in template, id == tokenizer.bos_token_id, id

    return special[min(candidates, key=rank)] if candidates else None
