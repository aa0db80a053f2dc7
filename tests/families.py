"""Small random bases that carry the end tokens, chat templates and config quirks of published chat models.

A family is a folder as a user downloads one: config.json, generation_config.json, safetensors, tokenizer.json and
tokenizer_config.json, with the published model's architecture, special tokens, ids that end a text, and chat template.
Weights are random (two layers, width 32), vocabularies have some hundred tokens, nothing is downloaded.

Templates come from the installed TRL package where it has them. TRL has none for Llama-2, Mistral and SmolLM2; those
three are written here from the published format.

The weights carry a fixed bias on the logits (see `_lean`): words, and the tokens that end a text, are likely. Responses
then end on their own, and most of them tokenize back to the ids that were generated.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import SMALL, _folders, reward
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lora_gan import LoraGAN

Messages = list[dict[str, str]]

WORDS = (
    "the a cat dog sat ran on under mat tree big red and then it saw new old house by river food pub French cheap "
    "Hello world Bonjour le monde town best in of serves why where blue sky rain"
).split()
PHRASES = (  # in every prompt of a template: one token per word keeps prompts short
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "system\n", "user\n", "assistant\n", "model\n", "[INST]", "[/INST]", "<<SYS>>\n", "\n<</SYS>>", "\n\n",
    "Answer briefly.",
)  # fmt: skip

USER = {"role": "user", "content": "why is the sky blue"}
SYSTEM = {"role": "system", "content": "Answer briefly."}
ASSISTANT = {"role": "assistant", "content": "the rain"}
AGAIN = {"role": "user", "content": "where is the cat"}
SINGLE: Messages = [USER]
WITH_SYSTEM: Messages = [SYSTEM, USER]
MULTI_TURN: Messages = [USER, ASSISTANT, AGAIN]
PREFIX: Messages = [USER, ASSISTANT]  # the assistant's message is continued

LLAMA2_TEMPLATE = """\
{%- set opening = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set opening.system = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- bos_token + '[INST] ' + (opening.system + message.content) | trim + ' [/INST]' -}}
{%- set opening.system = '' -%}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content | trim + ' ' + eos_token -}}
{%- else -%}
{{- raise_exception('a role must be system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""

MISTRAL_TEMPLATE = """\
{%- set start = namespace(system='', last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set start.system = message.content + '\\n\\n' -%}{%- endif -%}
{%- if message.role == 'user' -%}{%- set start.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + (start.system if loop.index0 == start.last else '') + message.content + '[/INST]' -}}
{%- elif message.role == 'assistant' -%}
{{- ' ' + message.content | trim + eos_token -}}
{%- elif message.role != 'system' -%}
{{- raise_exception('a role must be system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""

SMOLLM2_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """One published model: facts from its files, and prompts to try."""

    name: str
    architecture: str  # transformers' model type
    tokenizer: Callable[[], tuple[Tokenizer, dict[str, Any]]]  # tokenizer.json, and tokenizer_config.json's own keys
    template: str | None  # a file of TRL's chat_templates, a template, or None
    closing: str | None  # the token that the template writes after an assistant message; None without a template
    plain_closing: str  # the tokenizer's end-of-text token: closes a text that is no chat
    stops: frozenset[str]  # every token that must end generation
    bos: str | None  # the tokenizer's bos_token, whether it adds it or not
    adds_bos: bool  # whether tokenizer(text) begins with the bos token
    config_eos: tuple[str, ...]  # config.eos_token_id; one = a number, several = a list
    generation_eos: tuple[str, ...]  # generation_config.eos_token_id, likewise
    pad: str | None = None  # the tokenizer's pad_token
    config_pad: str | None = None  # config.pad_token_id
    generation: Mapping[str, Any] = field(default_factory=dict)  # the rest of generation_config.json
    config: Mapping[str, Any] = field(default_factory=dict)  # the rest of config.json that matters here
    spare_rows: int = 0  # rows of the embedding that no token has
    template_kwargs: tuple[Mapping[str, Any], ...] = ({},)  # variants to try
    chat_prompts: tuple[Messages, ...] = (SINGLE, WITH_SYSTEM, MULTI_TURN, PREFIX)
    plain_prompts: tuple[str, ...] = ("the cat sat on", "Hello world", "a big red dog ran under the old tree")

    @property
    def has_template(self) -> bool:
        return self.template is not None

    @property
    def chat_template(self) -> str | None:
        if self.template is None or not self.template.endswith(".jinja"):
            return self.template
        folder = importlib.resources.files("trl") / "chat_templates"
        return (folder / self.template).read_text(encoding="utf-8")


# --- tokenizers -----------------------------------------------------------------------------------------------------

CORPUS = [*(f" {word}" for word in WORDS), *WORDS, *PHRASES] * 2  # twice: a pair must occur twice to be merged


def _special(*tokens: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(token, **{"special": True, "normalized": False, **options}) for token in tokens]


def _byte_level(specials: list[AddedToken], *, first: bool, split: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Byte-level BPE. The special tokens have the first ids of the vocabulary, or those after it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=5000, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    vocabulary, merges = _trained(trained)
    if first:
        vocabulary = [*(token.content for token in specials), *vocabulary]
    tokenizer = Tokenizer(models.BPE(_numbered(vocabulary), merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(specials)
    return tokenizer


def _metaspace(specials: list[AddedToken], more: list[AddedToken] = (), *, prefix: str | None) -> Tokenizer:
    """SentencePiece-like BPE: spaces become ▁, and a character without a token becomes byte tokens.

    Args:
        specials: tokens with the first ids.
        more: tokens with the ids after the vocabulary.
        prefix: where ▁ is put in front: "normalizer" = of every piece between special tokens (Llama-2 and Phi-3),
            "first" = of the whole text (Mistral v0.3), None = nowhere (Gemma). Decoding strips it.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=5000, min_frequency=2, show_progress=False))
    vocabulary, merges = _trained(trained)
    taken = [token.content for token in specials]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [*taken, *bytes_, *(token for token in vocabulary if token not in taken)]
    tokenizer = Tokenizer(
        models.BPE(_numbered(vocabulary), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix is None:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        decoder.append(decoders.Strip(" ", 1, 0))
        if prefix == "normalizer":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(decoder)
    tokenizer.add_tokens([*specials, *more])
    return tokenizer


def _trained(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _begins_with(tokenizer: Tokenizer, bos: str) -> TemplateProcessing:
    return TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])


def _llama3(eos: str) -> tuple[Tokenizer, dict[str, Any]]:
    """meta-llama/Llama-3.1-8B-Instruct, tokenizer.json: 256 special tokens after the vocabulary, bos by the
    post-processor; tokenizer_config.json: no pad token, clean_up_tokenization_spaces true."""
    specials = [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    ]  # fmt: skip
    by_three = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # Qwen's, but digits in groups
    assert by_three != PRETOKENIZE_REGEX
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(by_three), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level(_special(*specials), first=False, split=split)
    tokenizer.post_processor = Processors([ByteLevel(trim_offsets=True), _begins_with(tokenizer, "<|begin_of_text|>")])
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": eos,
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def _llama2() -> tuple[Tokenizer, dict[str, Any]]:
    """meta-llama/Llama-2-7b-chat-hf, tokenizer_config.json: LlamaTokenizer, legacy false, adds bos, no pad token."""
    tokenizer = _metaspace(_special("<unk>", "<s>", "</s>"), prefix="normalizer")
    tokenizer.post_processor = _begins_with(tokenizer, "<s>")
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
    }  # fmt: skip


def _gemma3() -> tuple[Tokenizer, dict[str, Any]]:
    """google/gemma-3-1b-it, tokenizer.json: <pad> 0, <eos> 1, <bos> 2, <start_of_turn> 105, <end_of_turn> 106; no space
    before a text. tokenizer_config.json: eos_token <eos>, which is not the end of a turn."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    specials += [f"<unused{i}>" for i in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = _metaspace(_special(*specials), prefix=None)
    tokenizer.post_processor = _begins_with(tokenizer, "<bos>")
    return tokenizer, {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False, "use_default_system_prompt": False,
    }  # fmt: skip


def _qwen(eos: str, *, thinks: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """Qwen/Qwen2.5-0.5B-Instruct and Qwen/Qwen3-0.6B, tokenizer_config.json: no bos token, pad token <|endoftext|>;
    <tool_call>, and <think> of Qwen3, are added tokens that are not special."""
    specials = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>")
    plain = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]
    plain += ["<tool_response>", "</tool_response>", "<think>", "</think>"] if thinks else []
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = _byte_level([*specials, *_special(*plain, special=False)], first=False, split=split)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    return tokenizer, {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": eos, "unk_token": None,
        "add_bos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "errors": "replace", "split_special_tokens": False,
    }  # fmt: skip


def _phi3() -> tuple[Tokenizer, dict[str, Any]]:
    """microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json: eos_token and pad_token <|endoftext|>, bos not added;
    the tokens of the chat format swallow white space to their right, "\\n" too; </s> is not special."""
    rstrip = [
        "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>", "<|system|>",
        "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
    ]  # fmt: skip
    first = [*_special("<unk>", "<s>"), *_special("</s>", special=False, rstrip=True)]
    more = [*_special("<|endoftext|>"), *_special(*rstrip, rstrip=True)]
    tokenizer = _metaspace(first, more, prefix="normalizer")
    tokenizer.post_processor = TemplateProcessing(single="$A")
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>",
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
        "padding_side": "left", "use_default_system_prompt": False,
    }  # fmt: skip


def _mistral() -> tuple[Tokenizer, dict[str, Any]]:
    """mistralai/Mistral-7B-Instruct-v0.3, tokenizer.json: [INST] and [/INST] are control tokens with ids 3 and 4;
    tokenizer_config.json: LlamaTokenizer, adds bos, no pad token."""
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    tokenizer = _metaspace(_special(*specials), prefix="first")
    tokenizer.post_processor = _begins_with(tokenizer, "<s>")
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False,
    }  # fmt: skip


def _smollm2() -> tuple[Tokenizer, dict[str, Any]]:
    """HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json: bos_token <|im_start|>, which nothing adds; eos_token
    and pad_token <|im_end|>. Special tokens have the first ids."""
    specials = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>")
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = _byte_level(specials, first=True, split=split)
    return tokenizer, {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }  # fmt: skip


# --- the families ---------------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
QWEN_SAMPLED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # ids 128001, 128008, 128009
THINKING = ({}, {"enable_thinking": False}, {"enable_thinking": True})

_ALL = (
    # meta-llama/Llama-3.1-8B-Instruct and Llama-3.2-1B-Instruct: config.json and generation_config.json list three ids,
    # the end of a turn last; tokenizer and template both write the bos token; no pad token anywhere.
    Family(
        "llama-3", "llama", lambda: _llama3("<|eot_id|>"), "llama3_1.jinja", "<|eot_id|>", "<|eot_id|>",
        frozenset(LLAMA3_ENDS), "<|begin_of_text|>", True, LLAMA3_ENDS, LLAMA3_ENDS, generation=SAMPLED,
    ),
    # meta-llama/Llama-3.1-8B: the base model has no chat template, and ends texts by <|end_of_text|>.
    Family(
        "llama-3-base", "llama", lambda: _llama3("<|end_of_text|>"), None, None, "<|end_of_text|>",
        frozenset({"<|end_of_text|>"}), "<|begin_of_text|>", True, ("<|end_of_text|>",), ("<|end_of_text|>",),
        generation=SAMPLED, chat_prompts=(),
    ),
    # meta-llama/Llama-2-7b-chat-hf: generation_config.json has pad_token_id 0, which is <unk>; the tokenizer has none.
    Family(
        "llama-2", "llama", _llama2, LLAMA2_TEMPLATE, "</s>", "</s>", frozenset({"</s>"}), "<s>", True,
        ("</s>",), ("</s>",), generation=SAMPLED | {"pad_token_id": 0},
    ),
    # google/gemma-3-1b-it: config.json and generation_config.json have eos_token_id [1, 106]; the tokenizer says 1.
    Family(
        "gemma-3", "gemma3_text", _gemma3, "gemma3.jinja", "<end_of_turn>", "<eos>",
        frozenset({"<eos>", "<end_of_turn>"}), "<bos>", True, ("<eos>", "<end_of_turn>"), ("<eos>", "<end_of_turn>"),
        pad="<pad>", config_pad="<pad>", generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
        config={
            "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
        },
    ),
    # Qwen/Qwen2.5-0.5B-Instruct: generation_config.json lists <|im_end|> and <|endoftext|>, config.json the first; the
    # embedding has 151,936 rows for 151,665 tokens; bos_token_id of both configs is <|endoftext|>.
    Family(
        "qwen2.5", "qwen2", lambda: _qwen("<|im_end|>"), "qwen2_5.jinja", "<|im_end|>", "<|im_end|>",
        frozenset({"<|im_end|>", "<|endoftext|>"}), None, False, ("<|im_end|>",), ("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>", generation=QWEN_SAMPLED | {"repetition_penalty": 1.1, "pad_token_id": "<|endoftext|>"},
        config={"tie_word_embeddings": True}, spare_rows=27,
    ),
    # Qwen/Qwen2.5-0.5B: the base model ships the chat template, which closes a message by <|im_end|>, while all of
    # tokenizer, config.json and generation_config.json say <|endoftext|>.
    Family(
        "qwen2.5-base", "qwen2", lambda: _qwen("<|endoftext|>"), "qwen2_5.jinja", "<|im_end|>", "<|endoftext|>",
        frozenset({"<|im_end|>", "<|endoftext|>"}), None, False, ("<|endoftext|>",), ("<|endoftext|>",),
        pad="<|endoftext|>", generation={"do_sample": False}, config={"tie_word_embeddings": True}, spare_rows=27,
    ),
    # Qwen/Qwen3-0.6B: ends as Qwen2.5; enable_thinking=False writes an empty <think> block into the prompt.
    Family(
        "qwen3", "qwen3", lambda: _qwen("<|im_end|>", thinks=True), "qwen3.jinja", "<|im_end|>", "<|im_end|>",
        frozenset({"<|im_end|>", "<|endoftext|>"}), None, False, ("<|im_end|>",), ("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>", generation=QWEN_SAMPLED | {"pad_token_id": "<|endoftext|>"},
        config={"head_dim": 8, "tie_word_embeddings": True}, spare_rows=19, template_kwargs=THINKING,
    ),
    # microsoft/Phi-3-mini-4k-instruct: generation_config.json lists <|endoftext|>, <|assistant|> and <|end|> (32000,
    # 32001, 32007); config.json and the tokenizer say <|endoftext|>. Between messages the template closes by <|end|>,
    # and after the last one adds the tokenizer's eos token.
    Family(
        "phi-3", "phi3", _phi3, "phi3.jinja", "<|end|>", "<|endoftext|>",
        frozenset({"<|endoftext|>", "<|assistant|>", "<|end|>"}), "<s>", False, ("<|endoftext|>",),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"), pad="<|endoftext|>", config_pad="<|endoftext|>",
        generation={"pad_token_id": "<|endoftext|>"}, config={"sliding_window": 2047, "tie_word_embeddings": False},
    ),
    # mistralai/Mistral-7B-Instruct-v0.3: one id ends everything; no pad token anywhere.
    Family(
        "mistral", "mistral", _mistral, MISTRAL_TEMPLATE, "</s>", "</s>", frozenset({"</s>"}), "<s>", True,
        ("</s>",), ("</s>",), config={"sliding_window": None, "tie_word_embeddings": False},
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct: end of turn = end of text = pad token, in every file.
    Family(
        "smollm2", "llama", _smollm2, SMOLLM2_TEMPLATE, "<|im_end|>", "<|im_end|>", frozenset({"<|im_end|>"}),
        "<|im_start|>", False, ("<|im_end|>",), ("<|im_end|>",), pad="<|im_end|>", config_pad="<|im_end|>",
        generation={"pad_token_id": "<|im_end|>"}, config={"tie_word_embeddings": True},
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
CHAT_FAMILIES = [family.name for family in _ALL if family.has_template]


# --- folders --------------------------------------------------------------------------------------------------------


@functools.cache
def family_folder(name: str) -> Path:
    """The base's folder, as a user has it. It is made once per test session."""
    family = FAMILIES[name]
    tokenizer, own = family.tokenizer()
    folder = _folders() / f"family-{name}"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {
            key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    own = {"added_tokens_decoder": added, "model_max_length": 4096, **own, "pad_token": family.pad}
    if family.pad is None:
        del own["pad_token"]
    if family.has_template:
        own["chat_template"] = family.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(own, indent=2), encoding="utf-8")
    _model(family, tokenizer).save_pretrained(folder)
    return folder


def family_gan(name: str, **settings: Any) -> LoraGAN:
    """A LoraGAN on a family's base, with helpers' quick settings, room for a response to end, and `reward`."""
    if not {"reward", "reward_funcs"} & settings.keys():
        settings["reward"] = reward
    return LoraGAN(family_folder(name), **{**SMALL, "max_completion_length": 24, **settings})


def _model(family: Family, tokenizer: Tokenizer) -> PreTrainedModel:
    def number(tokens: tuple[str, ...]) -> int | list[int]:
        ids = [tokenizer.token_to_id(token) for token in tokens]
        return ids if len(ids) > 1 else ids[0]

    bos = family.bos or "<|endoftext|>"  # Qwen's configs name one, although its tokenizer has none
    config = AutoConfig.for_model(
        family.architecture,
        **{
            "vocab_size": tokenizer.get_vocab_size() + family.spare_rows, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25,
            "max_position_embeddings": 256, "bos_token_id": tokenizer.token_to_id(bos),
            "eos_token_id": number(family.config_eos),
            "pad_token_id": family.config_pad and tokenizer.token_to_id(family.config_pad), **family.config,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            _lean(model, *_bias(family, tokenizer, config.vocab_size))
    generation = dict(family.generation)
    if isinstance(generation.get("pad_token_id"), str):
        generation["pad_token_id"] = tokenizer.token_to_id(generation["pad_token_id"])
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=number(family.generation_eos), **generation
    )
    return model


def _bias(family: Family, tokenizer: Tokenizer, rows: int) -> tuple[torch.Tensor, list[int]]:
    """The bias of each token's logit, [V], and the ids of the tokens that end a text.

    Words are likely. Each token that ends a text gets a useful share of the probability.
    """
    bias = torch.full((rows,), -7.0)
    added = tokenizer.get_added_tokens_decoder()
    bias[list(added)] = -11.0
    bias[tokenizer.get_vocab_size() :] = -11.0
    space = "▁" if "▁" in tokenizer.get_vocab() else "Ġ"
    words = [tokenizer.token_to_id(f"{space}{word}") for word in WORDS]
    assert None not in words, "each word is one token"
    bias[words] = 0.0
    likely = math.log(len(words))  # as likely as all words together
    for number, token in added.items():
        if not token.special and token.content in ("<think>", "</think>", "<tool_call>"):
            bias[number] = -1.0
    for token in family.stops:
        bias[tokenizer.token_to_id(token)] = likely + math.log(0.05)
    for token in {family.closing, family.plain_closing} - {None}:
        bias[tokenizer.token_to_id(token)] = likely + math.log(0.2)
    return bias, [tokenizer.token_to_id(token) for token in family.stops]


@torch.no_grad()
def _lean(model: PreTrainedModel, bias_V: torch.Tensor, ends: list[int]) -> None:
    """Set weights so that `bias_V` is roughly added to the logits. The model stays a stock model.

    The first coordinate of the residual stream is the same for all tokens: each embedding holds `level` there, and no
    layer writes to it. The last norm scales this coordinate to `strength` on average, and the output layer multiplies
    it by the bias. With tied embeddings the input embedding holds the bias too, which is small beside `level`.

    Args:
        ends: ids whose logits depend less on the text than those of words, so that each one is drawn often.
    """
    level, strength = 4.0, 12.0
    body = model.get_decoder()
    for layer in body.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head[ends] *= 0.3
    embedding[:, 0] = level
    head[:, 0] = bias_V / strength + (level if head is embedding else 0)
    ids = torch.randint(len(bias_V), (8, 24), generator=torch.Generator().manual_seed(0))
    one = 1.0 if model.config.model_type.startswith("gemma") else 0.0  # its norms scale by 1 + weight
    body.norm.weight[0] = 1 - one
    average = body(input_ids=ids).last_hidden_state[..., 0].mean()
    body.norm.weight[0] = strength / average - one
    # What is left of the rows of `ends` moves their average logit: correct it.
    found_V = model(input_ids=ids).logits.mean((0, 1))
    head[ends, 0] += ((bias_V - found_V + found_V.mean() - bias_V.mean()) / strength)[ends]
