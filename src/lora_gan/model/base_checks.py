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
from tokenizers import Tokenizer
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
def explaining_pad_id(config: Any) -> Iterator[None]:
    """Inside the block, torch's refusal of a pad id beyond the embedding says which setting of the config it is."""
    try:
        yield
    except AssertionError as error:
        text = config.get_text_config()
        pad_id, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if pad_id is None or rows is None or pad_with_a_row(pad_id, rows) is not None:
            raise
        raise ValueError(
            f"its config.json says pad_token_id={pad_id}, and its embedding has {rows:,} rows (vocab_size), 0 to "
            f"{rows - 1:,}: set pad_token_id to null there"
        ) from error


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
    """Refuse a base whose logits hold NaN or +∞ on a few ordinary tokens, and say why. −∞ forbids a token, and passes.

    Args:
        logits: of any shape, from a forward of the base alone.
        called: the base's name, for the message.

    Raises:
        ValueError: weights that are not finite, by the first tensor's name; else an overflow, by its dtype.
    """
    if not (logits.isnan() | (logits == torch.inf)).any():
        return
    kind = _name(lm.dtype)
    largest = f"{torch.finfo(lm.dtype).max:.3g}" if lm.dtype.is_floating_point else "few"
    wider = {"float16": "dtype='bfloat16' or dtype='float32'", "bfloat16": "dtype='float32'"}.get(kind)
    broken = [
        (name, tensor) for name, tensor in lm.state_dict().items()
        if tensor.is_floating_point() and not _all_finite(tensor)
    ]  # fmt: skip
    if broken:
        name, tensor = broken[0]
        what = f"{called} cannot be the base: its weights are not finite, {name} holds "
        count = f"({len(broken)} of its tensors hold such numbers)"
        # A cast to float16 makes infinities of numbers above 65,504; it never makes NaN.
        if kind == "float16" and not any(tensor.isnan().any() for _, tensor in broken):
            raise ValueError(
                f"{what}infinite numbers {count}. Either it overflows, since {kind} holds numbers up to {largest}: "
                f"load it with {wider}; or, if it says the same there, the file is damaged"
            )
        values = "NaN" if tensor.isnan().any() else "infinite numbers"
        raise ValueError(f"{what}{values} {count}. The file is damaged, or was saved from a broken run: get it again")
    remedy = f"load it with {wider}" if wider else "its weights are out of proportion: get the file again"
    raise ValueError(
        f"{called} cannot be the base in {kind}: its weights are finite, but its logits are not, it overflows ({kind} "
        f"holds numbers up to {largest}): {remedy}"
    )


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())  # not made for float8


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


def token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that the tokenizer has a token for; empty where it has no list of them."""
    try:
        return frozenset({*tokenizer.get_vocab().values(), *tokenizer.all_special_ids})
    except NotImplementedError:
        return frozenset()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id: those with a role, and those that were added as special."""
    added = tokenizer.added_tokens_decoder  # of some backends no mapping, but a method that raises
    tokens = {id: str(token) for id, token in added.items() if token.special} if isinstance(added, Mapping) else {}
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
    try:
        vocabulary = tokenizer.get_vocab()
    except NotImplementedError:  # a tokenizer without a list of tokens, as of bytes
        vocabulary = {}
    if vocabulary and set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {called} knows no words, only special tokens: the files of its vocabulary are missing; "
            "save it whole with tokenizer.save_pretrained()"
        )
    outside = {token: id for token, id in vocabulary.items() if id >= rows}
    needed = _needed_ids(tokenizer, outside)
    if needed:
        first, size = min(needed), max([*vocabulary.values(), 0]) + 1
        sizes = f"its ids go up to {size - 1:,} ({size:,} in all), the base's embedding has {rows:,} rows"
        why = needed[first]
        token = tokenizer.convert_ids_to_tokens(first)
        raise ValueError(
            f"the tokenizer does not fit {called}: {sizes}, and {token!r} (id {first}, {why}) has none "
            f"({len(needed)} such tokens). Call model.resize_token_embeddings({size}) and save the base before it is "
            "opened here, or give the tokenizer that belongs to the base"
        )
    return _without(tokenizer, outside) if outside else tokenizer


def _needed_ids(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int]) -> dict[int, str]:
    """Ids that a text can be tokenized into or ends with, as far as they are outside, each with the reason."""
    if not outside:
        return {}
    needed: dict[int, str] = {}
    added = tokenizer.added_tokens_decoder if isinstance(tokenizer.added_tokens_decoder, Mapping) else {}
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
