"""Memory of a step on bases of 0.1 B, 1 B and 8 B parameters, computed from bases of one and two layers.

    python benchmarks/sizes.py --out docs/results/sizes.jsonl

The bases have random weights and the published widths. `lora-gan train --dry-run` computes its memory from the same
function (lora_gan.cli.footprint). Every term is linear in the number of layers, so two small bases give the whole one.
Nothing is trained, and nothing of this size is measured here: docs/performance.md compares the function with runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lora_gan import LoraGAN, tiny
from lora_gan.cli.footprint import Lengths, Memory, device_memory

# Published widths: HuggingFaceTB/SmolLM2-135M-Instruct, meta-llama/Llama-3.2-1B, meta-llama/Llama-3.1-8B.
SHAPES = {
    "0.1 B": {
        "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1 B": {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8 B": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
PROMPT, RESPONSE = 128, 128  # tokens
MICRO_BATCHES: tuple[tuple[int | None, bool], ...] = ((None, False), (4, False), (4, True))  # size, checkpointing


def memory_of(shape: str, layers: int, dtype: str) -> list[Memory]:
    """The step's memory with each of MICRO_BATCHES, on a base of so many layers."""
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers}, max_position_embeddings=2048)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    found = []
    gan = LoraGAN(model, processing_class=tokenizer, max_completion_length=RESPONSE, reward=lambda response: 0.0)
    for size, checkpointing in MICRO_BATCHES:
        settings = gan.config.__class__.from_dict(
            gan.config.to_dict() | {"micro_batch_size": size, "gradient_checkpointing": checkpointing}
        )
        found.append(device_memory(gan.players, settings, Lengths.at_most(PROMPT, RESPONSE)))
    return found


def extrapolated(one: dict[str, float], two: dict[str, float], layers: int) -> dict[str, float]:
    return {name: value + (layers - 1) * (two[name] - value) for name, value in one.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base")
    parser.add_argument("--out", type=Path, help="JSON Lines to write")
    given = parser.parse_args()
    lines = []
    for shape in given.shapes:
        one, two = memory_of(shape, 1, given.dtype), memory_of(shape, 2, given.dtype)
        for (size, checkpointing), first, second in zip(MICRO_BATCHES, one, two, strict=True):
            layers = SHAPES[shape]["num_hidden_layers"]
            memory = Memory(
                extrapolated(first.always, second.always, layers), extrapolated(first.in_turn, second.in_turn, layers)
            )
            line = {
                "shape": shape, "dtype": given.dtype, "micro_batch_size": size, "gradient_checkpointing": checkpointing,
                "prompt": PROMPT, "response": RESPONSE, "gib": round(memory.total / 2**30, 2),
                "terms_gib": {k: round(v / 2**30, 3) for k, v in (memory.always | memory.in_turn).items()},
            }  # fmt: skip
            lines.append(json.dumps(line))
            print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
