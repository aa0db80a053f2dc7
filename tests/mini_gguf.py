"""GGUF files of small random models, written with the package `gguf` as llama.cpp's converter lays them out."""

import json
from pathlib import Path

import gguf
import numpy as np
from helpers import EOS, byte_tokenizer
from test_bases import model_of


def small_model(architecture: str, **changes):
    """A random llama, qwen2 or qwen3 of two layers, and a byte-level tokenizer."""
    tokenizer = byte_tokenizer("gpt2", "own")
    if architecture == "qwen3":
        changes = {"head_dim": 128} | changes  # what every Qwen3 has: transformers does not read it from the file
    return model_of(architecture, len(tokenizer), tokenizer.pad_token_id, **changes), tokenizer


def write_gguf(path: Path, model, tokenizer, *, without="", extra=None, pre="gpt-2", **settings) -> Path:
    """The model in float32; tokenizer=None writes none.

    without: a tensor of this GGUF name is left out.
    extra: {name: array} of further tensors.
    settings: further metadata, by the key with its dots as two underscores; `architecture=` is what the file claims.
    """
    config = model.config
    name = settings.pop("architecture", config.model_type)
    writer = gguf.GGUFWriter(path, name)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, pre)
    for key, value in settings.items():
        writer.add_key_value(key.replace("__", "."), value, _kind(value))
    for tensor, data in _tensors(model):
        if tensor != without:
            writer.add_tensor(tensor, data)
    for tensor, data in (extra or {}).items():
        writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kind(value) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32


def _tensors(model):
    """(GGUF name, array) of each weight. Llama's query and key rows are interleaved, as llama.cpp rotates them."""
    config = model.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, kind = name.rpartition(".")
        data = tensor.float().numpy()
        if config.model_type == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            halves = data.reshape(heads, 2, len(data) // heads // 2, *data.shape[1:])
            data = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))
        yield f"{names.get_name(module)}.{kind}", data


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, pre: str) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"] for token in content["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids(EOS))
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
