"""What a run leaves: adapters and merged models that stock PEFT and transformers open, each with its card.

    FOLDER/
      generator/              LoRA adapter                AutoPeftModelForCausalLM
      generator-merged/       causal language model       AutoModelForCausalLM
      discriminator/          LoRA adapter, score head    AutoPeftModelForSequenceClassification, num_labels=1
      discriminator-merged/   sequence classifier         AutoModelForSequenceClassification: a reward model
      export.json             what was exported; a folder that has it may be replaced by a later export

Weights are safetensors. The LoraGAN in memory is only read: nothing of it is merged, cast or moved.

A classifier pools the last token that is not its pad token, so the pad token decides what it reads. Where the base's
config names a special token, it stays, and the tokenizer beside the classifier pads with it. Where the config names
none, stock transformers refuses batches, and the classifier gets a pad token that closes no text. It is the first of:

1. the tokenizer's own pad token, unless that also ends texts, begins texts or stands for unknown words;
2. a new `<|pad|>`, in a row of the embedding that no token uses;
3. where every row is used: a special token that the tokenizer has and that ends no text (a reserved one, or the one
   that begins texts), so that the adapter opens on the base as it is;
4. a new `<|pad|>` in one more row, where the tokenizer has no such token. PEFT adds the row when it opens the adapter.
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
    """Write the players for stock PEFT and transformers; a reader sees the whole folder or nothing.

    Args:
        state: whose players, as they are now, are written.
        folder: what to write; it must not exist yet, be empty, or be a former export, which is then replaced.
        parts: which of "generator", "generator-merged", "discriminator", "discriminator-merged".
        dtype: of the merged weights: float32, bfloat16, float16; None: what the base is in here, so that the merged
            models say what was trained. Merging is computed in float32 and rounded once.
        evaluation: what gan.evaluate() returned, or several of these by name, for the cards. The means of one that has
            no name, or the name "generator", stand in the metadata of the generator's cards too.
        license: its id on the hub, such as "apache-2.0", for the cards; None: the cards name none.
        push_to_hub: a name on the hub, "user/name": each part is uploaded as a model of its own, "user/name-PART".
        private: whether repositories that are made for it are private.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown part, dtype or licence, a folder that holds something else, a quantized base to be
            merged, a base without a sequence classifier in transformers, no token for the hub; a part that could not be
            made, by name.
        OSError: a part that could not be written, by name. Whatever failed, the folder is as it was before.
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
    with durable.replacing(final) as writing, state.discriminator.ema_scope():
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
    """Upload an export: each part is a model repository of its own, "user/name-PART"; returns their addresses.

    A repository each, not folders of one: a hub id is then all that from_pretrained, PEFT and TRL's reward_funcs need.

    Raises:
        ValueError: the folder is no export, the name is none the hub accepts, there is no token, or the hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the HTTP library the hub's client happens to use

    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not an export: it has no {MANIFEST}; make one by gan.export(folder)")
    _require_hub(name)
    addresses, api = [], HfApi()
    for part in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["parts"]:
        repo = f"{name}-{part}"
        try:
            # What the hub names is what it has: a name without a user becomes the user's.
            made = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            api.upload_folder(
                folder_path=folder / part, repo_id=made.repo_id, repo_type="model", commit_message=f"Upload {part}"
            )
        except (HTTPError, OSError) as error:
            raise ValueError(
                f"{repo} could not be uploaded: {error}. The export is complete in {folder}; upload it again by "
                f"lora_gan.export.exporting.push({str(folder)!r}, {name!r})"
            ) from error
        addresses.append(str(made))
    return addresses


# --- what is asked of the arguments


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
    """Only what an export wrote is ever removed."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to export to")
    there = {path.name for path in folder.iterdir()}
    foreign = sorted(there - {*PARTS, MANIFEST})
    if foreign or (there and MANIFEST not in there):
        what = f"{foreign[0]!r}, which no export wrote" if foreign else f"no {MANIFEST}, which every export has"
        raise ValueError(f"{folder} is not empty, and holds {what}: give a folder that is new, empty or an export")


def _require_mergeable(players: Players) -> None:
    if getattr(players.lm, "hf_quantizer", None) is not None:
        raise ValueError(
            "a quantized base is not merged with an adapter, its weights would be rounded twice: export "
            "parts=('generator', 'discriminator'), or open the checkpoint on the unquantized base first "
            "(LoraGAN.from_checkpoint(path, model=...))"
        )


def _require_hub(name: str) -> None:
    """Asked before anything is computed."""
    from huggingface_hub import get_token

    if any(hub_id(f"{name}-{part}") is None for part in PARTS):
        raise ValueError(
            f"push_to_hub={name!r} is not accepted: it must be USER/NAME, of letters, digits, '-', '_' and '.', short "
            f"enough that the hub takes NAME-{PARTS[-1]}, of at most 96 characters"
        )
    if not get_token():
        raise ValueError("there is no token for the hub: log in by `hf auth login`, or set HF_TOKEN")


# --- the parts


@contextmanager
def _exporting(part: str) -> Iterator[None]:
    """Errors inside the block name the part; a full disk stays an OSError, and memory that ran out what it was."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"while the part {part!r} was exported")
        raise
    except OSError as error:
        raise OSError(f"the part {part!r} could not be exported: {error}") from error
    except Exception as error:  # of transformers, PEFT, safetensors or tokenizers: no two are of one kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the part {part!r} could not be exported: {reason}") from error


def _write(players: Players, part: str, folder: Path, dtype: torch.dtype) -> PreTrainedTokenizerBase:
    """One part's weights, config and tokenizer; returns the tokenizer."""
    folder.mkdir(parents=True)
    player: Player = "generator" if part.startswith("generator") else "discriminator"
    tokenizer = players.base.tokenizer if player == "generator" else scoring_tokenizer(players.base)
    if part == player:
        save_adapter(players, player, folder, "safetensors")
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
    """The base's weights with one player's adapter added, under the base's own names, on the CPU.

    Layer by layer on copies, so that at most one more base is in memory, and none on the GPU. PEFT's own merging works
    in place, from which unmerging does not come back to the same bits.
    """
    layers: dict[str, Any] = {
        name: module for name, module in players.lm.named_modules() if isinstance(module, BaseTunerLayer)
    }
    inside = tuple(f"{name}." for name in layers)
    weights = {name: tensor for name, tensor in players.lm.state_dict().items() if not name.startswith(inside)}
    weights = {name: _stored(tensor, dtype) for name, tensor in weights.items()}
    for name, layer in layers.items():
        if name.startswith(inside):
            continue  # several adapters on one module, as on the fused weights of experts, wrap each other
        part = copy.deepcopy(layer).float()
        while isinstance(part, LoraLayer):
            part.merge(adapter_names=[player])
            part = part.base_layer
        weights |= {f"{name}.{key}": _stored(tensor, dtype) for key, tensor in part.state_dict().items()}
    return weights


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _causal_lm(players: Players, weights: dict[str, Tensor]) -> PreTrainedModel:
    config, generation = copy.deepcopy(players.lm.config), copy.deepcopy(players.lm.generation_config)
    rows = base_checks.embedding_rows(players.lm)
    for holder in (config.get_text_config(), generation):  # stock opens no model whose pad id has no row
        if holder is not None:
            holder.pad_token_id = base_checks.pad_with_a_row(holder.pad_token_id, rows)
    with torch.device("meta"):  # its weights are those given: none of its own is made first
        model = type(players.lm)(config)
    model.load_state_dict(weights, assign=True)
    # Stock generate() asks nobody else where to stop.
    stops = list(dict.fromkeys([*ids_of(generation.eos_token_id), *players.base.eos_ids]))
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config = generation
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None:
        if torch.equal(head.weight, base_checks.embedding_weight(model)):
            model.tie_weights()
        else:  # an adapter on one of the two has parted them
            model.config.tie_word_embeddings = False
    return model


def _classifier(players: Players, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A stock sequence classifier with one output, the predicted reward."""
    config = copy.deepcopy(players.lm.config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.problem_type = "regression"  # without it the text-classification pipeline would show a sigmoid
    config.get_text_config().pad_token_id = None  # set below, when the embedding has a row for it
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    body = f"{players.lm.base_model_prefix}."
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        ours = {name.removeprefix(body): tensor for name, tensor in weights.items() if name.startswith(body)}
        weights = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in ours.items()}
        weights["score.weight"] = _stored(players.score_MH.mean(0, keepdim=True), dtype)
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"transformers has no sequence classifier that fits a base of the kind {config.model_type!r}: leave "
            f"'discriminator-merged' out of parts ({' '.join(str(error).split())[:200]})"
        ) from error
    if tokenizer.pad_token_id >= base_checks.embedding_rows(model):
        # Its row is never read: padding is masked.
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def scoring_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding on the right with a token under which stock pools what the discriminator pools.

    The module's docstring says which token that is.
    """
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.padding_side = "right"  # where positions are counted from the row's begin, left padding would shift them
    if (token := _pad_of_the_config(base)) is not None:
        tokenizer.pad_token = token
        return tokenizer
    taken = (None, *base.eos_ids, tokenizer.bos_token_id, tokenizer.unk_token_id)
    rows = base_checks.embedding_rows(base.model)
    if tokenizer.pad_token_id not in taken and tokenizer.pad_token_id < rows:
        return tokenizer
    known = set(tokenizer.get_vocab().values())
    new = copy.deepcopy(tokenizer)
    new.add_special_tokens({"pad_token": PAD_TOKEN})
    is_there = new.pad_token_id in known  # under this name, or under another: the tokenizer's ids may have gaps
    if new.pad_token_id < rows and (not is_there or PAD_TOKEN in tokenizer.get_vocab()):
        return new
    if (token := _token_that_closes_no_text(base)) is not None:
        tokenizer.pad_token = token
        return tokenizer
    if is_there or len(new) != rows + 1:  # PEFT adds rows up to the tokenizer's length
        raise ValueError(
            f"the tokenizer has no token to pad with, and its ids ({len(known):,}, up to {max(known):,}) leave no room "
            f"for a new one beside the embedding's {rows:,} rows: set tokenizer.pad_token to a token that ends no text"
        )
    return new


def _pad_of_the_config(base: Base) -> str | None:
    """The pad token that the base's config names; None where it names none, or a word of the vocabulary, of which a
    tokenizer that pads with it would make a special token."""
    if base.pad_on_disk is None:
        return None
    special = {*base_checks.special_tokens(base.tokenizer), *base.eos_ids}
    return base.tokenizer.convert_ids_to_tokens([base.pad_on_disk])[0] if base.pad_on_disk in special else None


def _token_that_closes_no_text(base: Base) -> str | None:
    """A special token of the tokenizer that ends no text and has a row: by choice one that is called a pad, then one
    that no chat template writes, then any but the one that begins texts."""
    tokenizer, rows = base.tokenizer, base_checks.embedding_rows(base.model)
    special = base_checks.special_tokens(tokenizer)
    template = str(tokenizer.chat_template or "")
    ends = {*base.eos_ids, tokenizer.eos_token_id, tokenizer.unk_token_id}
    candidates = [id for id in special if id not in ends and 0 <= id < rows]

    def unsuited(id: int) -> tuple[bool, bool, bool, int]:
        return "pad" not in special[id].lower(), special[id] in template, id == tokenizer.bos_token_id, id

    return special[min(candidates, key=unsuited)] if candidates else None
