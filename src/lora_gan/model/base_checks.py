"""Checks of a base when it is opened: weights, logits, vocabulary. Each error message is one line.

`base.load_base` runs the checks on the loaded model and tokenizer, before it creates adapters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..wording import error_line

# --- weights and numbers ----------------------------------------------------------------------------------------------


def require_weights_here(lm: PreTrainedModel) -> None:
    """Refuse a model with weights on the meta device: created without memory, or offloaded.

    Raises:
        ValueError: it names the first such tensor.
    """
    for name, tensor in lm.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"this {type(lm).__name__} has no weights: {name} is on the meta device, so it was not loaded or it "
                "was offloaded. Load the base with from_pretrained on one device"
            )


def require_matching(mismatched: Collection[Any], name: str) -> None:
    """Refuse a base if its config and its files disagree about shapes: transformers fills such tensors randomly.

    Args:
        mismatched: (name, shape in the file, shape by the config) of each such tensor, from transformers' loading info.
        name: the base as the user named it.

    Raises:
        ValueError: it names the first such tensor and both shapes.
    """
    for tensor, stored, wanted in sorted(mismatched, key=lambda entry: str(entry[0])):
        raise ValueError(
            f"the files of the base {name!r} do not fit its config.json: {tensor} is {tuple(stored)} in the file and "
            f"{tuple(wanted)} by the config ({len(mismatched)} tensors differ): take both from the same source"
        )


def require_complete(lm: PreTrainedModel, missing: Collection[str], label: str, note: str = "") -> None:
    """Refuse a base if its files lack tensors.

    Args:
        missing: names of the missing tensors, from transformers' loading info.
        label: the file or base in the message.
        note: the end of the message.

    Raises:
        ValueError: it names the first such tensor.
    """
    if missing:
        raise ValueError(
            f"{label} does not hold all of a {type(lm).__name__}: {min(missing)} is missing "
            f"({len(missing)} tensors in all){note}"
        )


@contextmanager
def explaining_failure(label: str) -> Iterator[None]:
    """Errors of a forward inside the block become a ValueError: the base cannot be run. Out of memory stays as is."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code may raise anything
        remedy = "; its tensors must be on one device and of one dtype" if isinstance(error, RuntimeError) else ""
        raise ValueError(
            f"{label} cannot be the base: its forward fails on a few tokens ({type(error).__name__}: "
            f"{error_line(error)}){remedy}"
        ) from error


def require_floating(lm: PreTrainedModel) -> None:
    """Refuse float64: adapters and score heads do not support it.

    Raises:
        ValueError: it says how to convert the model.
    """
    if lm.dtype not in (torch.float32, torch.bfloat16, torch.float16) and getattr(lm, "hf_quantizer", None) is None:
        raise ValueError(
            f"this {type(lm).__name__} is in {_name(lm.dtype)}, but a base must be in float32, bfloat16 or float16: "
            "convert it with model.to(torch.float32)"
        )


def require_finite(lm: PreTrainedModel, logits: Tensor, label: str) -> None:
    """Refuse a base if its logits contain NaN or +∞. −∞ is accepted: it forbids a token.

    Args:
        logits: of any shape, from a forward of the base without adapters.
        label: the base's name in the message.

    Raises:
        ValueError: it names the dtype, and the first weight tensor that is not finite.
    """
    if not (logits.isnan() | (logits == torch.inf)).any():
        return
    weights = {name: tensor for name, tensor in lm.state_dict().items() if tensor.is_floating_point()}
    broken = [name for name, tensor in weights.items() if not tensor.float().isfinite().all()]
    found = "its weights are"
    if broken:
        found = f"NaN or infinite numbers are in {len(broken)} of its {len(weights)} tensors, first in {broken[0]}"
    raise ValueError(
        f"{label} cannot be the base in {_name(lm.dtype)}: its logits are not finite on a few tokens, and "
        f"{found}. Load it with dtype='bfloat16' or dtype='float32', which overflow "
        "later than float16. If that does not help, the file is damaged: download it again"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- vocabulary -------------------------------------------------------------------------------------------------------


def embedding_weight(lm: PreTrainedModel) -> Tensor:
    return cast(Tensor, lm.get_input_embeddings().weight)


def embedding_rows(lm: PreTrainedModel) -> int:
    """Rows of the input embedding. The base can read the ids from 0 up to this number, exclusive."""
    return len(embedding_weight(lm))


def pad_with_a_row(pad_id: int | None, rows: int) -> int | None:
    """A config's pad id; None if the embedding has no row for it, because no text can contain such an id."""
    return pad_id if pad_id is not None and 0 <= pad_id < rows else None


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by token; empty if the tokenizer has no list of its tokens, such as a byte tokenizer."""
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:
        return {}


def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids for which the tokenizer has a token; empty if it has no list of its tokens."""
    vocabulary = _vocabulary(tokenizer)
    return frozenset({*vocabulary.values(), *tokenizer.all_special_ids}) if vocabulary else frozenset()


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, AddedToken]:
    """Tokens that were added to the original vocabulary, by id."""
    added = tokenizer.added_tokens_decoder  # in some backends a method that raises
    return added if isinstance(added, Mapping) else {}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id: tokens with a role (bos, eos, …), and tokens that were added as special."""
    tokens = {id: str(token) for id, token in added_tokens(tokenizer).items() if token.special}
    ids = cast(list[int | None], tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    with_a_role = zip(ids, tokenizer.all_special_tokens, strict=True)
    return tokens | {id: token for id, token in with_a_role if id is not None}


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse an object that is not a transformers tokenizer.

    Raises:
        ValueError: it names the type. For a processor, it points to its tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inside = getattr(tokenizer, "tokenizer", None)
        hint = ", give its .tokenizer" if isinstance(inside, PreTrainedTokenizerBase) else ""
        raise ValueError(
            f"processing_class= is a {type(tokenizer).__name__}: it must be a transformers tokenizer{hint}"
        )


def fitted_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, label: str) -> PreTrainedTokenizerBase:
    """The tokenizer, limited to tokens with a row in the embedding.

    A special token may lack a row if no text needs the token. Such a token was added to the tokenizer alone, is not
    bos, eos or unk, and is written neither by the tokenizer nor by the chat template. The common case is a pad token.
    The result is then a copy of the tokenizer without these tokens: in a text, their names are tokenized as ordinary
    words.

    Args:
        rows: rows of the base's input embedding.
        label: the base's name in the message.

    Raises:
        ValueError: a needed token has no row. The message names both sizes and the first such token.
    """
    vocabulary = _vocabulary(tokenizer)
    if vocabulary and set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {label} knows no words, only special tokens: the files of its vocabulary are missing. "
            "Save the complete tokenizer with tokenizer.save_pretrained()"
        )
    outside = {token: id for token, id in vocabulary.items() if id >= rows}
    needed = _needed_ids(tokenizer, outside) if outside else {}
    if needed:
        first, size = min(needed), max(vocabulary.values()) + 1
        token = tokenizer.convert_ids_to_tokens(first)
        raise ValueError(
            f"the tokenizer does not fit {label}: its ids go up to {size - 1:,} ({size:,} in all), the base's "
            f"embedding has {rows:,} rows, and {token!r} (id {first}, {needed[first]}) has none ({len(needed)} such "
            f"tokens). Call model.resize_token_embeddings({size}) and save the base before you "
            "open it here, or give the tokenizer that belongs to the base"
        )
    return _without(tokenizer, outside) if outside else tokenizer


def _needed_ids(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int]) -> dict[int, str]:
    """The ids that tokenized texts can contain, among the ids without a row; each with the reason."""
    needed: dict[int, str] = {}
    added = added_tokens(tokenizer)
    original = _original_vocabulary(tokenizer)
    templates = tokenizer.chat_template or ""
    template = "\n".join(map(str, templates.values())) if isinstance(templates, dict) else str(templates)
    role_of = {str(token): role for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    written = {id for text in ("", "a") for id in tokenizer(text, verbose=False)["input_ids"]}
    for token, id in outside.items():
        role = role_of.get(token)
        if id not in added or token in original:
            needed[id] = "it is a word of the vocabulary"
        elif not added[id].special:
            needed[id] = "it was added as a word"
        elif role in ("bos_token", "eos_token", "unk_token"):
            needed[id] = f"it is the {role}"
        elif id in written:
            needed[id] = "the tokenizer writes it around texts"
        elif token in template or (role is not None and role in template):
            needed[id] = "the chat template writes it"
    return needed


def _original_vocabulary(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The vocabulary without added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return set(backend.get_vocab(with_added_tokens=False))
    return {token for token, id in tokenizer.get_vocab().items() if id < tokenizer.vocab_size}


def _without(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer without these added tokens. A tokenizer without a Rust backend is returned unchanged."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return tokenizer
    kept = copy.deepcopy(tokenizer)
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and token in outside:
            setattr(kept, role, None)
            kept.init_kwargs[role] = None  # saved by save_pretrained: otherwise some classes add their default again
    kept.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if token not in outside]
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        kept.init_kwargs.pop(name, None)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in outside]
    content["padding"] = None
    kept._tokenizer = Tokenizer.from_str(json.dumps(content))
    return kept
