"""Make the tiny base from a seed: ``python tools/tiny/pretrain.py --seed 0 --out DIR``.

Draws documents of the grammar in :mod:`lora_gan.tiny`, trains a tokenizer and then a small Llama on them, and prints
the accuracy of the result. ``--measure`` prints these figures for an existing folder. The script needs lora-gan, but
no network and no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lora_gan.tiny import INSTRUCTION, PATH, drawing, pairs
from lora_gan.tiny.grammar import Sentence

PAD, EOS = "<pad>", "<eos>"
SPACE = "\u2581"  # the leading space of a word inside the tokenizer
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# --------------------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------------------

#: Kinds of pretraining documents, with their shares.
DOCUMENT_SHARES = (
    ("instruction", 34.0),
    ("english-french", 38.0),
    ("french-english", 12.0),
    ("english", 8.0),
    ("french", 8.0),
)

#: Kinds of text after an instruction, with their shares. The draw does not depend on the sentence, so a model that
#: learns to translate by reward only has to change one prior. English must be the most likely first word, so that
#: greedy decoding does not translate.
ANSWER_SHARES = (("translation", 24.0), ("more English", 48.0), ("other French", 28.0))


def draw_document(draws: drawing.Draws) -> tuple[str, list[Sentence]]:
    """One pretraining document and the sentences in it, all from the train split."""
    kind = draws.weighted(DOCUMENT_SHARES)
    first = drawing.draw_sentence(draws)
    if kind == "instruction":
        answer = draws.weighted(ANSWER_SHARES)
        if answer == "translation":
            return f"{INSTRUCTION}{first.en} {first.fr}", [first]
        if answer == "more English":
            second = drawing.draw_sentence(draws, subject=first.subject)
            return f"{INSTRUCTION}{first.en} {second.en}", [first, second]
        second = drawing.draw_sentence(draws)
        return f"{INSTRUCTION}{first.en} {second.fr}", [first, second]
    if kind == "english-french":
        return f"English: {first.en} French: {first.fr}", [first]
    if kind == "french-english":
        return f"French: {first.fr} English: {first.en}", [first]
    read = [first] + [drawing.draw_sentence(draws) for _ in range(int(draws.uniform() * 2))]
    return " ".join(s.en if kind == "english" else s.fr for s in read), read


# --------------------------------------------------------------------------------------------------------------
# Tokenizer
# --------------------------------------------------------------------------------------------------------------


def build_tokenizer(seed: int, vocabulary: int, documents: int = 40_000) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that keeps a word's leading space with the word.

    Texts that are tokenized separately can be joined: ids("a b") == ids("a") + ids("b"). Encoding adds one space in
    front of a text, and decoding removes one space, so the text of a response does not start with a space. Unknown
    characters are written as bytes, so decoding restores any text (except U+2581, the symbol for the space). Elided
    words (l', j', n', d') are separate tokens.
    """
    draws = drawing.Draws(seed, "tokenizer")
    texts = (draw_document(draws)[0] for _ in range(documents))
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Split("'", "merged_with_previous"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, words
    size = vocabulary - 2 - len(BYTES)
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    # The tokenizers library gives access to the learned merges only in its JSON.
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    names = [PAD, EOS, *BYTES, *(token for token, _ in learned)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


# --------------------------------------------------------------------------------------------------------------
# Model and batches
# --------------------------------------------------------------------------------------------------------------


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Four layers are enough to translate. On a CPU each layer costs a fixed time per generated token."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            use_cache=True,
        )
    )


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` batches of fresh documents: ids, padded on the right, and labels.

    A batch has documents of similar length: a window of 32 batches is sorted by length, and its batches are shuffled.
    This keeps padding near 4 %. Padding needs no attention mask, because it is on the right of all scored tokens.
    """
    draws = drawing.Draws(seed, "documents")
    window = 32
    for start in range(0, steps, window):
        texts = [draw_document(draws)[0] for _ in range(size * window)]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        order = sorted(range(window), key=lambda _: draws.uniform())
        for index in order[: steps - start]:
            batch = [row + [tokenizer.eos_token_id] for row in rows[index * size : (index + 1) * size]]
            width = max(map(len, batch))
            ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in batch])
            labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
            yield ids, labels


# --------------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------------


def frame(prompt: str) -> str:
    """The same sentence in the frame "English: … French:", after which the base always translates."""
    return f"English: {prompt.removeprefix(INSTRUCTION)} French:"


@torch.no_grad()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    sample: bool = False,
    seed: int = 0,
    size: int = 128,
) -> list[str]:
    """The model's text after each prompt: greedy, or sampled at temperature 1 from the whole vocabulary."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    texts: list[str] = []
    for start in range(0, len(prompts), size):
        inputs = tokenizer(prompts[start : start + size], return_tensors="pt", padding=True)
        written = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=sample,
            max_new_tokens=40,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
        )
        texts += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    torch.random.set_rng_state(state)
    return texts


def exact_match(written: list[str], rows: list[dict[str, str]]) -> float:
    """Share of answers that equal the target exactly."""
    return sum(text == row["target"] for text, row in zip(written, rows, strict=True)) / len(rows)


@torch.no_grad()
def log_probabilities(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> Tensor:
    """Log-probabilities of the target's tokens and of the end token, after the prompt."""
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(target)["input_ids"] + [tokenizer.eos_token_id]
    logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(tail)[:, None])[:, 0]


def probability(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> float:
    """P(target, then end | prompt)."""
    return math.exp(log_probabilities(model, tokenizer, prompt, target).sum().item())


def figures(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Exact match in the parallel frame (greedy; "latent"), and after the instruction (greedy and sampled)."""
    model.eval()
    prompts = [row["prompt"] for row in rows]
    result = {
        "latent": exact_match(answers(model, tokenizer, [frame(p) for p in prompts]), rows),
        "greedy": exact_match(answers(model, tokenizer, prompts), rows),
        "sampled": exact_match(answers(model, tokenizer, prompts, sample=True), rows),
    }
    model.train()
    return result


def measure(folder: Path, n: int = 512) -> None:
    """Print the figures of the base in ``folder`` on held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = pairs("heldout", n, seed=1)
    prompts = [row["prompt"] for row in rows]
    able = answers(model, tokenizer, [frame(prompt) for prompt in prompts])
    greedy = exact_match(answers(model, tokenizer, prompts), rows)
    sampled = exact_match(answers(model, tokenizer, prompts, sample=True), rows)
    logps = [log_probabilities(model, tokenizer, row["prompt"], row["target"]) for row in rows]
    whole, first, rest = (
        sum(math.exp(part(logp).sum().item()) for logp in logps) / n
        for part in (lambda p: p, lambda p: p[:1], lambda p: p[1:])
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; {(folder / 'model.safetensors').stat().st_size:,} bytes of weights")
    print(f"{n} held-out prompts, exact match:")
    print(f"  English: ... French:            greedy            {exact_match(able, rows):.1%}   (its latent ability)")
    print(f"  Translate English to French:    greedy            {greedy:.1%}")
    print(f"  Translate English to French:    sampled at T = 1  {sampled:.1%}")
    print(f"  Translate English to French:    mean P(target)    {whole:.1%}")
    print(f"      of its first token {first:.1%}, of the rest after the first {rest:.1%}")
    hello, bonjour = INSTRUCTION + "Hello world", "Bonjour le monde"
    print("Hello world:")
    for prompt in (hello, frame(hello)):
        print(f"  P({bonjour!r} | {prompt!r}) = {probability(model, tokenizer, prompt, bonjour):.3f}")
    print(f"  greedy answer to {hello!r}: {answers(model, tokenizer, [hello])[0]!r}")
    print(f"  sampled: {answers(model, tokenizer, [hello] * 8, sample=True)}")
    print("First mistakes in the parallel frame:")
    wrong = [(row, text) for row, text in zip(rows, able, strict=True) if text != row["target"]]
    for row, text in wrong[:8]:
        print(f"  {row['prompt'].removeprefix(INSTRUCTION)}: {text} (not {row['target']})")


# --------------------------------------------------------------------------------------------------------------
# Pretraining
# --------------------------------------------------------------------------------------------------------------


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the base in half precision. Each file is moved into place, so a reader never sees an incomplete file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        half = LlamaForCausalLM(model.config).half()
        half.load_state_dict(model.state_dict())
        half.tie_weights()
        half.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # save_pretrained makes weights readable by their owner only
            os.replace(file, folder / file.name)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine decay to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(
    out: Path,
    seed: int,
    steps: int,
    size: int,
    peak: float,
    vocabulary: int,
    evaluate_every: int = 500,
    evaluate: int = 128,
) -> None:
    """Train from random weights. ``out`` holds the newest weights after every evaluation."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(seed, vocabulary)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    validation = pairs("validation", evaluate, seed=0)
    began, losses, tokens = time.monotonic(), [], 0
    for step, (ids, labels) in enumerate(batches(tokenizer, seed, size, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        tokens += ids.numel()
        done = step + 1
        if done % 100 == 0 or done == 20:
            elapsed = time.monotonic() - began
            print(
                f"step {done}/{steps}  loss {sum(losses) / len(losses):.4f}  {tokens / elapsed:,.0f} tokens/s  "
                f"{elapsed / 60:.1f} min, about {elapsed / done * (steps - done) / 60:.0f} min left",
                flush=True,
            )
            losses = []
        if done % evaluate_every == 0 or done == steps:
            shown = "  ".join(f"{name} {value:.1%}" for name, value in figures(model, tokenizer, validation).items())
            print(f"step {done}/{steps}  on {len(validation)} validation prompts, exact match: {shown}", flush=True)
            save(model, tokenizer, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/tiny/pretrain.py",
        description="Pretrain the tiny base from a seed, on text that lora_gan.tiny draws, and print its accuracy.",
        epilog="This command made the base in the package: python tools/tiny/pretrain.py --seed 0 --out DIR. The same "
        "seed gives the same text everywhere. Weights are bitwise equal only on the same processor and torch version.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the text, the weights and the order (default: 0)")
    parser.add_argument("--out", type=Path, help="folder to write; it holds the newest weights after every evaluation")
    parser.add_argument("--steps", type=int, default=7000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=96, help="documents per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument(
        "--vocabulary", type=int, default=2304, help="size of the vocabulary, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; more threads than free cores make it slower (default: %(default)s)",
    )
    parser.add_argument(
        "--measure",
        type=Path,
        nargs="?",
        const=PATH,
        metavar="DIR",
        help="train nothing: print the figures of the base in DIR (default: the one in the package)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    if options.measure:
        measure(options.measure)
    elif options.out:
        pretrain(options.out, options.seed, options.steps, options.batch, options.lr, options.vocabulary)
        measure(options.out)
    else:
        parser.error("give --out DIR to pretrain, or --measure for the figures of an existing base")


if __name__ == "__main__":
    main()
