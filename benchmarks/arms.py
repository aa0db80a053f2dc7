"""What the speed and memory benchmarks compare: one training step over the same base, prompts and response length.

- `lora_gan`: this library's defaults. The true reward of every response is queried.
- `lora_gan_fresh`: as lora_gan, with one discriminator update per step, on this step's responses only.
- `lora_gan_upper`: as lora_gan_fresh, with the discriminator's adapter on the upper third of the layers only.
- `lora_gan_checkpointed`: the defaults with gradient_checkpointing.
- `plain_rl`: this library with train_disc=False and adversarial=False, that is RLOO on the true reward only.
- `two_models`: a literal implementation with plain transformers and PEFT. It has two separate bases with an adapter
  each, and processes one response at a time.
- `trl`: TRL's GRPOTrainer with PEFT, and a separate reward model with its own adapter.
- `trl_checkpointed`: as trl, with gradient checkpointing, which is TRL's default.

One `step()` of each arm is one training step over exactly `prompts × group` responses of exactly `tokens` tokens. All
arms use AdamW, LoRA of the same rank on the same layers, the same learning rates, temperature and KL weight, and no
dropout. They share one deterministic reward, which takes almost no time.

Every response has the same length because no text can end. The base that each arm loads (`prepare`) has an
end-of-text id beyond its vocabulary. So no arm pays for suppressing the end, and none stops early.

# B = responses of a step, T = tokens of a response, V = vocabulary
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from lora_gan import LoraGAN, tiny
from lora_gan.config import Config
from lora_gan.model.players import Base

DEFAULTS = Config()
NEVER = "<|never|>"  # the end-of-text token, which no base can write
POOL = 64  # prompts; the steps take them in turn
STORIES = Path(__file__).parents[1] / "../shared/models/stories260K"


# --- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A base, and the size of one step."""

    name: str
    base: str  # "tiny", a folder, or a key of RANDOM
    prompts: int  # per step
    group: int  # responses per prompt
    tokens: int  # of each response
    prompt_tokens: int | None = None  # of each prompt; None: the lengths of the base's own pairs

    @property
    def responses(self) -> int:
        return self.prompts * self.group


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "tiny", prompts=4, group=8, tokens=16),
        Shape("stories260K", str(STORIES), prompts=4, group=8, tokens=32, prompt_tokens=16),
        Shape("gpt2", "gpt2", prompts=2, group=8, tokens=32, prompt_tokens=32),
        Shape("llama-0.5b", "llama-0.5b", prompts=2, group=8, tokens=32, prompt_tokens=32),
    )
}


def _random_gpt2() -> PreTrainedConfig:
    return GPT2Config()  # the 124 million parameters of the small GPT-2


def _random_llama() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=1280, num_hidden_layers=24, intermediate_size=3456, num_attention_heads=20, num_key_value_heads=4,
        vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip


def _random_small() -> PreTrainedConfig:
    return GPT2Config(n_embd=128, n_layer=4, n_head=4, vocab_size=2048, n_positions=1024)


def _random_mini() -> PreTrainedConfig:
    return GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512, n_positions=64)


RANDOM: dict[str, Callable[[], PreTrainedConfig]] = {  # bases made here, with random weights
    "gpt2": _random_gpt2,
    "llama-0.5b": _random_llama,
    "small": _random_small,
    "mini": _random_mini,
}


@dataclass(frozen=True)
class Workload:
    """The base, prompts and micro-batch that every arm receives."""

    shape: Shape
    folder: Path  # the base and its tokenizer, with an end of text that the base cannot write
    second: Path  # a copy, for arms with two bases: Linux would hold the pages of a shared file only once
    prompts: tuple[str, ...]
    micro_batch: int | None = None  # responses in one forward and backward of an update; None: all
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def prompts_at(self, step: int) -> list[str]:
        first = step * self.shape.prompts
        return [self.prompts[(first + i) % len(self.prompts)] for i in range(self.shape.prompts)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the library's dtype="auto" chooses."""
        return torch.bfloat16 if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def prepare(shape: Shape, folder: Path, *, seed: int = 0, micro_batch: int | None = None) -> Workload:
    """Write the base that all arms load into `folder`, and choose the prompts.

    Raises:
        FileNotFoundError: the shape's base is a folder that does not exist.
    """
    if shape.base in RANDOM:
        config = RANDOM[shape.base]()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = _word_tokenizer(config.vocab_size)
    else:
        source = tiny.PATH if shape.base == "tiny" else Path(shape.base)
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"the shape {shape.name} needs the model in {source}, which does not exist")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_special_tokens({"eos_token": NEVER})
    vocabulary = model.config.get_text_config().vocab_size
    if tokenizer.convert_tokens_to_ids(NEVER) < vocabulary:
        raise ValueError(f"the base of {shape.name} has unused rows in its vocabulary, so its texts could end")
    model.config.eos_token_id = model.config.bos_token_id = None
    model.config.pad_token_id = 0  # stock sequence classification finds the last token by it
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(0), "left"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = None, 0
    second = folder / "second"
    for where in (folder, second):
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    os.sync()  # otherwise the disk is written while the first steps are timed
    count = max(POOL // shape.prompts, 1) * shape.prompts
    return Workload(shape, folder, second, tuple(_prompts(shape, tokenizer, count, seed)), micro_batch)


def _word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per id, and the end token beyond them. A prompt of n words has n tokens."""
    ids = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([NEVER])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=NEVER, pad_token="w0", unk_token="w1")


def _prompts(shape: Shape, tokenizer: Any, count: int, seed: int) -> Iterator[str]:
    if shape.prompt_tokens is None:
        yield from (pair["prompt"] for pair in tiny.pairs("train", count, seed=seed))
        return
    draws = random.Random(seed)
    words = [f"w{i}" for i in range(1, 500)]
    if shape.base not in RANDOM:
        words = sorted({word for pair in tiny.pairs("train", 256, seed=seed) for word in pair["prompt"].split()})
    for _ in range(count):
        chosen: list[str] = []
        for _ in range(200):  # add words that fit until the length is reached; one try per word if a word is a token
            longer = [*chosen, draws.choice(words)]
            length = len(tokenizer(" ".join(longer))["input_ids"])
            if length <= shape.prompt_tokens:
                chosen = longer
            if length == shape.prompt_tokens:
                break
        if not chosen:
            raise ValueError(f"no word fits into the {shape.prompt_tokens} tokens of a prompt of {shape.name}")
        yield " ".join(chosen)


def reward(response: str) -> float:
    """The true reward of every arm: deterministic, spread evenly over [0, 1), almost no time."""
    return zlib.crc32(response.encode()) / 2**32


# --- the arms ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrote:
    """The number of responses that one step sampled, and their lengths."""

    responses: int
    mean: float  # tokens per response
    least: int
    most: int

    @classmethod
    def of(cls, lengths: list[int]) -> Wrote:
        return cls(len(lengths), sum(lengths) / len(lengths), min(lengths), max(lengths))


class Arm(Protocol):
    """One way to train, built and ready."""

    name: str
    workload: Workload
    reward: Callable[[str], float]  # called for each response; phases.py replaces it by a timed one

    def step(self) -> Wrote: ...

    def models(self) -> list[PeftModel]: ...

    def optimizers(self) -> list[torch.optim.Optimizer]: ...

    def close(self) -> None: ...


class LoraGanArm:
    """This library, through its public step()."""

    def __init__(self, name: str, workload: Workload, *, train_disc: bool = True, upper: bool = False, **settings: Any):
        self.name, self.workload, self.train_disc, self.reward = name, workload, train_disc, reward
        shape = workload.shape
        disc_peft_config = None
        if upper:
            layers = AutoConfig.from_pretrained(workload.folder).num_hidden_layers
            upper_layers = max(1, layers // 3)
            if "disc_layers" in {known.name for known in fields(Config)}:
                settings["disc_layers"] = upper_layers
            else:
                disc_peft_config = _lora(
                    layers_to_transform=list(range(layers - upper_layers, layers)),
                    target_modules=linear_names(workload.folder),
                )
        tokenizer = None
        if "endings" in {known.name for known in fields(Base)}:  # earlier commits open the folder unchanged
            # NEVER has no row in the embedding, and the library refuses such an end token: the last word replaces it.
            tokenizer = AutoTokenizer.from_pretrained(workload.folder)
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(NEVER) - 1)
        self.gan = LoraGAN(
            str(workload.folder),
            processing_class=tokenizer,
            reward=lambda response, target=None: self.reward(response),
            disc_peft_config=disc_peft_config,
            device=str(workload.device),
            prompts_per_step=shape.prompts,
            num_generations=shape.group,
            max_completion_length=shape.tokens,
            micro_batch_size=workload.micro_batch,
            **settings,
        )
        if tokenizer is not None:
            _let_nothing_end(self.gan)

    def step(self) -> Wrote:
        prompts = self.workload.prompts_at(self.gan.global_step)
        record = self.gan.step(prompts, train_disc=self.train_disc)
        return Wrote(
            sum(map(len, record["responses"])),
            record["completion_length"],
            record["completions/min_length"],
            record["completions/max_length"],
        )

    def models(self) -> list[PeftModel]:
        return [self.gan.players.peft]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.gan.generator.optimizer.adamw, self.gan.discriminator.optimizer.adamw]

    def close(self) -> None:
        pass


def _let_nothing_end(gan: LoraGAN) -> None:
    """No response can end, so every response has its full length, as in the other arms."""
    from lora_gan.model.endings import Endings

    base = gan.players.base
    beyond = base.model.get_input_embeddings().weight.shape[0]
    endless = replace(base, endings=Endings(base.tokenizer, (beyond,)))
    gan.players.base = gan.players.encoder.base = endless


class TwoModels:
    """Two bases with an adapter each: generate one response, query its reward, update each base once.

    No code of this library is used. The loss is REINFORCE with the mean of all rewards so far as the baseline. The KL
    to the reference is exact over the vocabulary, as in this library. Rows are processed one at a time, so there is no
    padding. Logits are computed for response tokens only.
    """

    name = "two_models"

    def __init__(self, workload: Workload) -> None:
        self.workload, self.reward = workload, reward
        where = {"dtype": workload.dtype}
        self.tokenizer = AutoTokenizer.from_pretrained(workload.folder)
        generator = AutoModelForCausalLM.from_pretrained(workload.folder, **where)
        discriminator = AutoModelForSequenceClassification.from_pretrained(workload.second, num_labels=1, **where)
        # eval mode: no dropout, as in the other arms; gradients are still computed
        self.generator = get_peft_model(generator, _lora(task_type="CAUSAL_LM")).to(workload.device).eval()
        self.discriminator = get_peft_model(discriminator, _lora(task_type="SEQ_CLS")).to(workload.device).eval()
        self.generator_adamw = _adamw(self.generator, DEFAULTS.learning_rate)
        self.discriminator_adamw = _adamw(self.discriminator, DEFAULTS.disc_learning_rate)
        self.taken, self.answers, self.total = 0, 0, 0.0

    def step(self) -> Wrote:
        lengths = []
        for prompt in self.workload.prompts_at(self.taken):
            prompt_1L = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(self.workload.device)
            for _ in range(self.workload.shape.group):
                row_1L = self.generate(prompt_1L)
                response = row_1L[0, prompt_1L.shape[1] :]
                true = self.reward(self.tokenizer.decode(response, skip_special_tokens=True))
                self.update_discriminator(row_1L, true)
                advantage = true - self.total / max(1, self.answers)
                self.total, self.answers = self.total + true, self.answers + 1
                self.update_generator(row_1L, len(response), advantage)
                lengths.append(len(response))
        self.taken += 1
        return Wrote.of(lengths)

    def generate(self, prompt_1L: Tensor) -> Tensor:
        return self.generator.generate(
            input_ids=prompt_1L, attention_mask=torch.ones_like(prompt_1L), do_sample=True, top_k=0, top_p=1.0,
            temperature=DEFAULTS.temperature, max_new_tokens=self.workload.shape.tokens,
        )  # fmt: skip

    def update_discriminator(self, row_1L: Tensor, true: float) -> None:
        predicted = self.discriminator(input_ids=row_1L, attention_mask=torch.ones_like(row_1L)).logits.float()
        (predicted - true).square().mean().backward()
        _update(self.discriminator_adamw)

    def update_generator(self, row_1L: Tensor, tokens: int, advantage: float) -> None:
        with torch.no_grad(), self.generator.disable_adapter():
            reference_TV = self.response_logprobs(row_1L, tokens)
        logprobs_TV = self.response_logprobs(row_1L, tokens)
        written_T1 = row_1L[0, -tokens:, None]
        kl = (logprobs_TV.exp() * (logprobs_TV - reference_TV)).sum()
        loss = DEFAULTS.beta * kl - advantage * logprobs_TV.gather(-1, written_T1).sum()
        loss.backward()
        _update(self.generator_adamw)

    def response_logprobs(self, row_1L: Tensor, tokens: int) -> Tensor:
        """Log-probabilities over the vocabulary at each position that predicts a response token, [T, V]."""
        logits = self.generator(input_ids=row_1L, use_cache=False, logits_to_keep=tokens + 1).logits[0, :-1]
        return (logits.float() / DEFAULTS.temperature).log_softmax(-1)

    def models(self) -> list[PeftModel]:
        return [self.generator, self.discriminator]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.generator_adamw, self.discriminator_adamw]

    def close(self) -> None:
        pass


class _Closed(Exception):
    """Ends the trainer's thread."""


class Trl:
    """TRL's GRPOTrainer, one step at a time, and a reward model that learns from every step's true rewards.

    The trainer runs train() in a thread that waits at the beginning of each step. `step()` lasts until the beginning of
    the next step, with logging and loading. All computing objects are created and used in this one thread: OpenMP
    gives each computing thread its own team, and teams with more threads than cores slow each other down. The reward
    model makes one update on all responses of a step, inside the reward function.
    """

    def __init__(self, name: str, workload: Workload, *, checkpointing: bool = False) -> None:
        self.name, self.workload, self.reward, self.lengths = name, workload, reward, [0]
        self.go, self.arrived, self.closed = threading.Semaphore(0), threading.Semaphore(0), False
        self.failure: BaseException | None = None
        self.threads = torch.get_num_threads()
        self.output_dir = tempfile.mkdtemp(prefix="lora-gan-benchmark-trl-")
        self.thread = threading.Thread(target=self._train, args=[checkpointing], daemon=True)
        self.thread.start()
        self._wait()

    def _build(self, checkpointing: bool) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        workload = self.workload
        self.tokenizer = AutoTokenizer.from_pretrained(workload.folder)
        scorer = AutoModelForSequenceClassification.from_pretrained(workload.second, num_labels=1, dtype=workload.dtype)
        self.scorer = get_peft_model(scorer, _lora(task_type="SEQ_CLS")).to(workload.device).eval()
        self.scorer_adamw = _adamw(self.scorer, DEFAULTS.disc_learning_rate)

        arm, shape = self, workload.shape

        class Waiting(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                arm.arrived.release()
                arm.go.acquire()
                if arm.closed:
                    raise _Closed

        micro_batch = workload.micro_batch or shape.responses
        self.trainer = GRPOTrainer(
            model=str(workload.folder),
            reward_funcs=self._score,
            args=GRPOConfig(
                output_dir=self.output_dir, max_steps=1_000_000, per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=shape.responses // micro_batch, num_generations=shape.group,
                max_completion_length=shape.tokens, temperature=DEFAULTS.temperature, beta=DEFAULTS.beta,
                learning_rate=DEFAULTS.learning_rate, lr_scheduler_type="constant", shuffle_dataset=False,
                disable_dropout=True, gradient_checkpointing=checkpointing, bf16=False, seed=0,
                use_cpu=workload.device.type == "cpu", model_init_kwargs={"dtype": workload.dtype},
                logging_steps=1_000_000, save_strategy="no", report_to="none", disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in workload.prompts]),
            processing_class=self.tokenizer,
            peft_config=_lora(task_type="CAUSAL_LM"),
            callbacks=[Waiting()],
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)

    def _train(self, checkpointing: bool) -> None:
        torch.set_num_threads(self.threads)  # a new thread does not inherit the number
        try:
            self._build(checkpointing)
            self.trainer.train()
        except _Closed:
            pass
        except BaseException as failure:
            self.failure = failure
        finally:
            self.arrived.release()

    def _wait(self) -> None:
        self.arrived.acquire()
        if self.failure is not None:
            raise RuntimeError("TRL's trainer ended") from self.failure

    def step(self) -> Wrote:
        self.go.release()
        self._wait()
        return Wrote.of(self.lengths)

    def _score(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        true = [self.reward(completion) for completion in completions]
        self.lengths = [len(ids) for ids in completion_ids]
        self.update_scorer(self.tokenizer(prompts)["input_ids"], completion_ids, true)
        return true

    def update_scorer(self, prompts: list[list[int]], responses: list[list[int]], true: list[float]) -> None:
        rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
        ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask_BL = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids_BL, mask_BL = ids_BL.to(self.workload.device), mask_BL.to(self.workload.device)
        true_B = torch.tensor(true, device=self.workload.device)
        size = self.workload.micro_batch or len(rows)
        for part in (slice(first, first + size) for first in range(0, len(rows), size)):
            predicted_B = self.scorer(input_ids=ids_BL[part], attention_mask=mask_BL[part]).logits[:, 0].float()
            ((predicted_B - true_B[part]).square().sum() / len(rows)).backward()
        _update(self.scorer_adamw)

    def models(self) -> list[PeftModel]:
        return [self.trainer.model, self.scorer]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer), self.scorer_adamw]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.go.release()
            self.thread.join(timeout=60)
            shutil.rmtree(self.output_dir, ignore_errors=True)


FRESH: Mapping[str, Any] = {"disc_updates": 1, "disc_replay_groups": 0}
ARMS: dict[str, Callable[[Workload], Arm]] = {
    "lora_gan": lambda workload: LoraGanArm("lora_gan", workload),
    "lora_gan_fresh": lambda workload: LoraGanArm("lora_gan_fresh", workload, **FRESH),
    "lora_gan_upper": lambda workload: LoraGanArm("lora_gan_upper", workload, upper=True, **FRESH),
    "lora_gan_checkpointed": lambda workload: LoraGanArm(
        "lora_gan_checkpointed", workload, gradient_checkpointing=True
    ),
    "two_models": TwoModels,
    "trl": lambda workload: Trl("trl", workload),
    "trl_checkpointed": lambda workload: Trl("trl_checkpointed", workload, checkpointing=True),
    "plain_rl": lambda workload: LoraGanArm("plain_rl", workload, train_disc=False, adversarial=False),
}
OURS = (
    "lora_gan",
    "lora_gan_fresh",
    "lora_gan_upper",
    "lora_gan_checkpointed",
)  # speed.py and memory.py print their ratios


# --- what the arms share ----------------------------------------------------------------------------------------------


def _lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": DEFAULTS.lora_r, "lora_alpha": DEFAULTS.lora_alpha, "target_modules": "all-linear"} | settings
    )


def _adamw(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)


def _update(adamw: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(adamw.param_groups[0]["params"], DEFAULTS.max_grad_norm)
    adamw.step()
    adamw.zero_grad(set_to_none=True)


def linear_names(folder: Path) -> list[str]:
    """The last names of the linear layers inside the body, as a list: PEFT does not accept a choice of layers together
    with "all-linear"."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    body = getattr(lm, lm.base_model_prefix)
    names = {name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return sorted(names)


@contextmanager
def built(names: Iterable[str], workload: Workload) -> Iterator[dict[str, Arm]]:
    """These arms, side by side in one process. They are closed and released at the end."""
    arms: dict[str, Arm] = {}
    try:
        for name in names:
            arms[name] = ARMS[name](workload)
        yield arms
    finally:
        while arms:
            arms.popitem()[1].close()


def quiet() -> None:
    """Silence the libraries' warnings about random weights and about each other. Call it before they are used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
