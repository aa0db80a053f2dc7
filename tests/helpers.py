"""What the tests of the core share: tiny random bases with real tokenizers, made on this machine, and rewards.

A base is a folder as a user's would be (config, safetensors, tokenizer.json). Its weights come from a fixed seed, wide
enough that logits differ clearly; nothing is fetched.
"""

import atexit
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lora_gan import LoraGAN
from lora_gan.data import Row
from lora_gan.model.tokens import pad
from lora_gan.storage import durable
from lora_gan.training import estimate
from lora_gan.training.experience import Experience
from lora_gan.training.plan import StepPlan

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("gpt2", "llama", "qwen2")
PADS = ("own", "eos", "none")  # the pad token: one of its own, the end-of-text token, or no pad token at all

EOS, PAD, BOS, OTHER_EOS = "<|endoftext|>", "<|pad|>", "<|begin|>", "<|stop|>"
WORDS = "the a cat dog sat ran on under mat tree big red and then it saw new old house by".split()
SENTENCES = [
    "Translate English to French: Hello world",
    "The cat sat on the mat and then it ran under the old tree.",
    "name[The Mill], food[French], area[riverside]",
    "A cheap pub by the river serves French food.",
]
PROMPTS = ["Hello world", "The cat sat on", "food[French]", "A pub by the river serves the best of food"]
TARGETS = ["Bonjour le monde", "the mat", "French food", "in town"]


# --- a process that dies ----------------------------------------------------------------------------------------------


class Gone(BaseException):
    """Raised where a process dies: nothing is saved any more."""


@contextmanager
def dies() -> Iterator[None]:
    """The block dies by `Gone`. The next run begins when no thread of the dead one writes a checkpoint any more."""
    with pytest.raises(Gone):
        yield
    for thread in threading.enumerate():
        if thread.name == "lora-gan checkpoint":
            thread.join()


# --- bases ----------------------------------------------------------------------------------------------------------


@functools.cache
def _folders() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lora-gan-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load_script(path: Path) -> ModuleType:
    """A script outside the package, such as one of benchmarks/, as a module."""
    specification = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up here
    specification.loader.exec_module(module)
    return module


@functools.cache
def base_folder(
    architecture: str = "gpt2", pad: str = "own", *, words: bool = False, eos_ids: int = 1, seed: int = 0
) -> Path:
    """A folder with a random causal LM and its tokenizer.

    words: whole words as tokens, so that a generated text tokenizes back to what was generated.
    eos_ids: 2 = the generation config names a second id that ends a text.
    """
    tokenizer = word_tokenizer(pad) if words else byte_tokenizer(architecture, pad)
    pad_id = {"own": tokenizer.convert_tokens_to_ids(PAD), "eos": tokenizer.eos_token_id, "none": None}[pad]
    model = random_model(architecture, len(tokenizer), tokenizer.eos_token_id, pad_id, seed=seed)
    if eos_ids == 2:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(OTHER_EOS)]
    folder = _folders() / f"{architecture}-{pad}-{'words' if words else 'bytes'}-{eos_ids}-{seed}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_model(
    architecture: str, vocabulary: int, eos_id: int, pad_id: int | None, *, seed: int = 0, context: int = 96, **changes
):
    """Two layers of width 32, dropout as the architecture's habit is (GPT-2 has 0.1, which must stay off)."""
    ids = {"vocab_size": vocabulary, "eos_token_id": eos_id, "pad_token_id": pad_id, "bos_token_id": None}
    if architecture == "gpt2":
        config = GPT2Config(**{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context} | ids | changes)
    else:
        kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture]
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": context,
            "tie_word_embeddings": architecture == "qwen2",
        }  # fmt: skip
        config = kind(**sizes | ids | changes)
    config.initializer_range = 0.25
    kind = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():  # biases and norms too: a base with zero biases would hide a bias that is lost
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def byte_tokenizer(architecture: str, pad: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, some merges, the special tokens. Llama's begins every text with a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[EOS, PAD, BOS, OTHER_EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _finish(tokenizer, pad, bos=architecture == "llama")


def word_tokenizer(pad: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([EOS, PAD, BOS, OTHER_EOS, "<|unk|>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finish(tokenizer, pad, bos=False, unk_token="<|unk|>")


def _finish(tokenizer: Tokenizer, pad: str, *, bos: bool, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([EOS, PAD, BOS, OTHER_EOS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
        tokens["bos_token"] = BOS
    if pad != "none":
        tokens["pad_token"] = PAD if pad == "own" else EOS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, additional_special_tokens=[OTHER_EOS], **tokens
    )


# --- runs -----------------------------------------------------------------------------------------------------------


def reward(response: str, target: str | None = None) -> float:
    """A deterministic reward with spread and hardly a tie; it knows nothing of any model."""
    return (sum(map(ord, response)) % 97) / 97 + 0.05 * len(response)


SMALL = {  # settings that make a step quick, and move weights far enough in a few of them to be seen
    "num_generations": 4, "max_completion_length": 6, "lora_r": 4, "lora_alpha": 8, "disc_lora_r": 4,
    "learning_rate": 5e-3, "disc_learning_rate": 5e-3, "prompts_per_step": 2,
}  # fmt: skip


def small_gan(model=None, **settings) -> LoraGAN:
    """A LoraGAN on a tiny base (GPT-2, a pad token of its own) with `reward`, unless told otherwise."""
    if not {"reward", "reward_funcs"} & settings.keys():
        settings["reward"] = reward
    return LoraGAN(base_folder() if model is None else model, **{**SMALL, **settings})


def rollout_of(gan: LoraGAN, prompts, count, purpose="sample", *, step=None, length=None, seed=None, **options):
    """The rollout that step() or generate() samples at a step: `count` responses to each prompt."""
    encoded, now = gan._encode(prompts, length), gan.global_step
    gan.global_step = now if step is None else step
    try:
        uniforms = gan._uniforms(encoded, count, purpose, length=length, seed=seed)
    finally:
        gan.global_step = now
    return gan._sample(encoded, uniforms, **options)


def logits(gan: LoraGAN, ids_BL: torch.Tensor, mask_BL: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, L, V] of the active player in one plain forward; the rows may be padded on the left."""
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    positions = gan.players.positions(mask_BL)
    return gan.players.lm(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False, **positions).logits.float()


def prompt_logits(gan: LoraGAN, prompts: list[list[int]]) -> torch.Tensor:
    """`logits` of prompts in one batch, padded on the left."""
    ids_BL, mask_BL = map(torch.from_numpy, pad(prompts, gan.players.base.pad_id, side="left"))
    return logits(gan, ids_BL, mask_BL.long())


def advantages(gan: LoraGAN, experience: Experience, signal: str) -> np.ndarray:
    """What the generator's policy gradient is weighted by, float64 [B]."""
    reward_B = gan.generator.rewards(experience, signal)
    return estimate.advantages(reward_B, experience.group_B, gan.generator.baseline.value)


def response_ids(gan: LoraGAN, text: str) -> list[int]:
    """A response to a plain prompt as the library reads it: the text's ids and the closing id."""
    return gan.players.encoder.response(text, Row("a plain prompt"))


def sign(folder: Path) -> Path:
    """Give a checkpoint that was tampered with the manifest of what it holds now, as a forger would."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != durable.MANIFEST
    }  # fmt: skip
    (folder / durable.MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    return folder


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def player_state(gan: LoraGAN, player: str) -> dict:
    """Everything of one player that a step may change, copied."""
    state = {
        "parameters": copies(gan.players.parameters(player)),
        "optimizer": _copied((gan.generator if player == "generator" else gan.discriminator).optimizer.state_dict()),
    }
    if player == "discriminator":
        state["rest"] = _copied(gan.discriminator.state_dict())
    else:
        state["rest"] = [asdict(kept) for kept in (gan.generator.baseline, gan.generator.spread)]
    return state


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def differences(a, b, where: str = "") -> list[str]:
    """Where two nested values differ: tensors bitwise, the rest by == and type. Empty = equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [f"{where}: tensors differ"]
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} against {type(b).__name__}"]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} against {len(b)} entries"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a!r} against {b!r}"]


def python(code: str, *arguments: str, hash_seed: int = 12345, timeout: int = 300) -> str:
    """Run code in a new Python with this source tree and these tests on its path; its standard output."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONHASHSEED": str(hash_seed),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def play(gan: LoraGAN, rows: list[Row], *, asks: bool = True, learns: bool = False) -> Experience:
    """A step's responses and rewards on these rows, and nothing learned from them yet.

    Args:
        asks: whether true rewards are asked.
        learns: whether the discriminator's update comes next and begins from the predictions' forward.
    """
    plan = StepPlan(
        signal="corrected",
        train_gen=True,
        train_disc=learns,
        imitation_weight=0.0,
        reinforces=True,
        asks=asks,
        predicts=True,
        straight_through=False,
        learns_to_predict=learns,
    )
    return gan._play(rows, plan)
