"""Checks of a base when it is opened: weights, numbers, vocabulary, context. Each refusal is one line.

`base.load_base` calls these on the loaded model and tokenizer, before any adapter is made.
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
    """Refuse a model whose weights are on the meta device: made without memory, or offloaded.

    Raises:
        ValueError: it names the first such tensor.
    """
    for name, tensor in lm.named_parameters():
        if tensor.is_meta:
            raise ValueError(
                f"this {type(lm).__name__} has no weights: {name} is on the meta device, so it was never loaded, or it "
                "is offloaded; load the base with from_pretrained, on one device"
            )


def require_matching(mismatched: Collection[Any], name: str) -> None:
    """Refuse a base whose config asks for other shapes than its files hold: such tensors would be random.

    Args:
        mismatched: transformers' loading info, (name, shape in the file, shape by the config) of each such tensor.
        name: what the user called the base.

    Raises:
        ValueError: it names the first such tensor and both shapes.
    """
    for tensor, stored, wanted in sorted(mismatched, key=lambda entry: str(entry[0])):
        raise ValueError(
            f"the files of the base {name!r} do not fit its config.json: {tensor} is {tuple(stored)} in the file and "
            f"{tuple(wanted)} by the config ({len(mismatched)} tensors differ): get both from one source"
        )


def require_complete(lm: PreTrainedModel, missing: Collection[str], called: str, note: str = "") -> None:
    """Refuse a base whose files lack tensors.

    Args:
        missing: their names, as transformers' loading info has them.
        called: what was opened, for the message.
        note: the end of the message.

    Raises:
        ValueError: it names the first such tensor.
    """
    if missing:
        raise ValueError(
            f"{called} does not hold all of a {type(lm).__name__}: {min(missing)} is missing "
            f"({len(missing)} tensors in all){note}"
        )


@contextmanager
def explaining_failure(called: str) -> Iterator[None]:
    """Errors inside the block, a forward on a few tokens, say that this base cannot be run; out of memory stays."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code
        remedy = "; its tensors must be on one device and of one dtype" if isinstance(error, RuntimeError) else ""
        raise ValueError(
            f"{called} cannot be the base: its forward fails on a few tokens ({type(error).__name__}: "
            f"{error_line(error)}){remedy}"
        ) from error


def require_floating(lm: PreTrainedModel) -> None:
    """Refuse float64, which the adapters and score heads are not computed in.

    Raises:
        ValueError: it says how to convert the model.
    """
    if lm.dtype not in (torch.float32, torch.bfloat16, torch.float16) and getattr(lm, "hf_quantizer", None) is None:
        raise ValueError(
            f"this {type(lm).__name__} is in {_name(lm.dtype)}, and a base is in float32, bfloat16 or float16: convert "
            "it with model.to(torch.float32)"
        )


def require_finite(lm: PreTrainedModel, logits: Tensor, called: str) -> None:
    """Refuse a base whose logits hold NaN or +∞ on a few ordinary tokens. −∞ forbids a token, and passes.

    Args:
        logits: of any shape, from a forward of the base alone.
        called: the base's name, for the message.

    Raises:
        ValueError: it names the dtype, and the first weight that is not finite.
    """
    if not (logits.isnan() | (logits == torch.inf)).any():
        return
    weights = {name: tensor for name, tensor in lm.state_dict().items() if tensor.is_floating_point()}
    broken = [name for name, tensor in weights.items() if not tensor.float().isfinite().all()]
    found = "its weights are"
    if broken:
        found = f"NaN or infinite numbers are in {len(broken)} of its {len(weights)} tensors, first in {broken[0]}"
    raise ValueError(
        f"{called} cannot be the base in {_name(lm.dtype)}: its logits are not finite on a few tokens, and "
        f"{found}. Load it with dtype='bfloat16' or dtype='float32', which overflow "
        "later than float16. If that does not help, the file is damaged: get it again"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- vocabulary -------------------------------------------------------------------------------------------------------


def embedding_weight(lm: PreTrainedModel) -> Tensor:
    return cast(Tensor, lm.get_input_embeddings().weight)


def embedding_rows(lm: PreTrainedModel) -> int:
    """Token ids that the base can read: 0 to this, exclusive."""
    return len(embedding_weight(lm))


def pad_with_a_row(pad_id: int | None, rows: int) -> int | None:
    """A config's pad id, None where the embedding has no row for it: then it stands in no text."""
    return pad_id if pad_id is not None and 0 <= pad_id < rows else None


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids by token; empty where the tokenizer has no list of its tokens, as one of bytes."""
    try:
        return tokenizer.get_vocab()
    except NotImplementedError:
        return {}


def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that the tokenizer has a token for; empty where it has no list of them."""
    vocabulary = _vocabulary(tokenizer)
    return frozenset({*vocabulary.values(), *tokenizer.all_special_ids}) if vocabulary else frozenset()


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, AddedToken]:
    """Tokens beside the vocabulary proper, by id; empty for backends that have a method that raises in its place."""
    added = tokenizer.added_tokens_decoder
    return added if isinstance(added, Mapping) else {}


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id: those with a role, and those that were added as special."""
    tokens = {id: str(token) for id, token in added_tokens(tokenizer).items() if token.special}
    ids = cast(list[int | None], tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens))
    with_a_role = zip(ids, tokenizer.all_special_tokens, strict=True)
    return tokens | {id: token for id, token in with_a_role if id is not None}


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no transformers tokenizer.

    Raises:
        ValueError: it names the type; for a processor, it says where its tokenizer is.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inside = getattr(tokenizer, "tokenizer", None)
        hint = ", give its .tokenizer" if isinstance(inside, PreTrainedTokenizerBase) else ""
        raise ValueError(
            f"processing_class= is a {type(tokenizer).__name__}: it must be a transformers tokenizer{hint}"
        )


def fitted_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int, called: str) -> PreTrainedTokenizerBase:
    """The tokenizer, if every token that it can make of a text has a row in the embedding.

    A special token that no text needs may lack its row: one that was added to the tokenizer alone, that does not end,
    begin or stand in for texts, and that neither the tokenizer nor the chat template writes. A pad token is the common
    case. A copy of the tokenizer without these tokens is returned then, so that a text which happens to hold their
    words is read as other text is.

    Args:
        rows: of the base's input embedding.
        called: the base's name, for the message.

    Raises:
        ValueError: a token of the vocabulary has no row; it names both sizes and the first such token.
    """
    vocabulary = _vocabulary(tokenizer)
    if vocabulary and set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {called} knows no words, only special tokens: the files of its vocabulary are missing; "
            "save it whole with tokenizer.save_pretrained()"
        )
    outside = {token: id for token, id in vocabulary.items() if id >= rows}
    needed = _needed_ids(tokenizer, outside) if outside else {}
    if needed:
        first, size = min(needed), max(vocabulary.values()) + 1
        token = tokenizer.convert_ids_to_tokens(first)
        raise ValueError(
            f"the tokenizer does not fit {called}: its ids go up to {size - 1:,} ({size:,} in all), the base's "
            f"embedding has {rows:,} rows, and {token!r} (id {first}, {needed[first]}) has none ({len(needed)} such "
            f"tokens). Call model.resize_token_embeddings({size}) and save the base before it is "
            "opened here, or give the tokenizer that belongs to the base"
        )
    return _without(tokenizer, outside) if outside else tokenizer


def _needed_ids(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int]) -> dict[int, str]:
    """Ids that a text can be tokenized into or ends with, as far as they are outside, each with the reason."""
    needed: dict[int, str] = {}
    added = added_tokens(tokenizer)
    proper = _proper_vocabulary(tokenizer)
    templates = tokenizer.chat_template or ""
    template = "\n".join(map(str, templates.values())) if isinstance(templates, dict) else str(templates)
    role_of = {str(token): role for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    written = {id for text in ("", "a") for id in tokenizer(text, verbose=False)["input_ids"]}
    for token, id in outside.items():
        role = role_of.get(token)
        if id not in added or token in proper:
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


def _proper_vocabulary(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The vocabulary without added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return set(backend.get_vocab(with_added_tokens=False))
    return {token for token, id in tokenizer.get_vocab().items() if id < tokenizer.vocab_size}


def _without(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that does not know these added tokens; the tokenizer itself if it has no such copy."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return tokenizer
    kept = copy.deepcopy(tokenizer)
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str) and token in outside:
            setattr(kept, role, None)
            kept.init_kwargs[role] = None  # what save_pretrained writes: without it some classes add their own again
    kept.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if token not in outside]
    for name in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        kept.init_kwargs.pop(name, None)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in outside]
    content["padding"] = None
    kept._tokenizer = Tokenizer.from_str(json.dumps(content))
    return kept
