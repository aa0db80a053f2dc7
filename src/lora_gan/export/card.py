"""The card of an exported part: README.md with the hub's metadata, made from the run.

It says what the run knows and nothing else: what is not known (the data of a run that was stepped by hand, an
evaluation that nobody made) is left out, and the licence is named only where the user gives one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..model import fetch, named_bases
from ..model.base import Base
from ..model.base_checks import embedding_rows
from ..model.encoding import Encoder
from ..model.endings import ids_of
from ..run import evaluation
from ..run.options import kept_options
from ..settings import Mark, marked
from ..storage.json_lines import read_lines
from ..version import __version__

if TYPE_CHECKING:
    from ..gan import LoraGAN

COUNTS = ("step", "seconds")  # told elsewhere in the card, or of no interest in it; so are all counts of reward calls


@dataclass(frozen=True)
class Run:
    """What is known of how the players came to be."""

    base: Base
    encoder: Encoder
    config: Config
    prompt_kinds: frozenset[str]  # of the prompts trained on: "messages", "texts"
    steps: int
    calls: str  # of the true reward, by purpose
    adapters: dict[str, LoraConfig]  # of each player
    scores: bool  # whether the discriminator's heads have learned anything
    reward: str | None  # the true reward
    data: str | None  # what the prompts were
    metrics: dict[str, float]  # the last line of metrics.jsonl
    evaluation: dict[str, dict[str, Any]]  # name -> what gan.evaluate() returned
    evaluations: list[dict[str, float]]  # fit()'s own, the first and the last, with their steps
    init_adapter: str | None  # the adapter that the generator started from
    kl_is_to_adapter: bool  # whether the KL is measured to that adapter; else to the base
    license: str | None  # its id on the hub

    @classmethod
    def of(cls, gan: LoraGAN, judged: dict[str, Any] | None, license: str | None = None) -> Run:
        metrics = _last_metrics(gan)
        options = _options(gan) if metrics else {}
        judged = {} if judged is None else {"generator": judged} if "metrics" in judged else judged
        if not all(isinstance(result, dict) and "metrics" in result for result in judged.values()):
            raise ValueError("evaluation= must be what gan.evaluate() returned, or several of these by name")
        return cls(
            base=gan.players.base,
            encoder=gan.players.encoder,
            config=gan.config,
            prompt_kinds=frozenset(gan.prompt_kinds),
            steps=gan.global_step,
            calls=gan.budget.in_words(),
            adapters=gan.players.peft.peft_config,
            scores=bool(gan.players.heads_MH.any()),
            reward=_reward(gan, options, metrics),
            data=options.get("data"),
            metrics=metrics,
            evaluation=judged,
            evaluations=_evaluations(gan, bool(metrics)),
            init_adapter=gan.init_adapter,
            kl_is_to_adapter=gan.players.has_reference,
            license=license,
        )


def _last_metrics(gan: LoraGAN) -> dict[str, float]:
    """The numbers logged last before these weights, empty where the folder has none, or those of another run."""
    file = Path(gan.config.output_dir) / "metrics.jsonl"
    if not file.is_file():
        return {}
    first = gan.global_step - gan.config.logging_steps + 1
    lines = [
        line for line in read_lines(file) if first <= line.get("step", 0) <= gan.global_step and "reward_calls" in line
    ]
    if not lines:
        return {}
    last = lines[-1]
    if last["step"] == gan.global_step and last["reward_calls"] != gan.reward_calls:
        return {}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    return {name: n for name, n in numbers.items() if name not in COUNTS and not name.startswith("reward_calls")}


def _evaluations(gan: LoraGAN, of_this_run: bool) -> list[dict[str, float]]:
    """The first and the last evaluation that fit() logged up to these weights, by metric; none of another run.

    Args:
        of_this_run: whether the lines of training in metrics.jsonl are this run's.
    """
    file = Path(gan.config.output_dir) / "metrics.jsonl"
    if not file.is_file() or not gan.global_step:
        return []
    lines = [
        {
            name: value
            for name, value in line.items()
            if name == "step" or (name.startswith("eval_") and isinstance(value, int | float))
        }
        for line in read_lines(file)
        if isinstance(line.get("step"), int) and line["step"] <= gan.global_step
    ]
    lines = [line for line in lines if len(line) > 1]
    if not lines or not (of_this_run or lines[-1]["step"] == gan.global_step):
        return []
    return lines if len(lines) == 1 else [lines[0], lines[-1]]


def _options(gan: LoraGAN) -> dict[str, Any]:
    """What `lora-gan train` was called with, where it was."""
    return kept_options(Path(gan.config.output_dir))


def _reward(gan: LoraGAN, options: dict[str, Any], metrics: dict[str, float]) -> str | None:
    """The reward the run was given, else the one it logged, else one that is set here.

    The default is no sign of anything: a run that was opened from a checkpoint has it, whatever it was trained on.
    """
    if "reward" in options:
        return _reward_text(options["reward"])
    logged = [found[1] for name in metrics if (found := re.fullmatch("rewards/(.+)/mean", name))]
    here = gan.reward_names
    if not set(logged) <= set(here):
        return _reward_text(logged)
    if here == ["cosine"] and not logged:
        return None
    weights = (gan.reward_weights if len(here) > 1 else None) or [1] * len(here)
    return _reward_text([{"name": name, "weight": w} for name, w in zip(here, weights, strict=True)])


COSINE = "`cosine`: similarity of sentence embeddings of response and target (all-MiniLM-L6-v2)"


def _reward_text(reward: Any) -> str:
    """A reward as the command line names it, and its weight. Not its other options: a key may be among them."""
    if isinstance(reward, list):
        return ", ".join(map(_reward_text, reward))
    if isinstance(reward, dict):
        weight = reward.get("weight", 1)
        return _reward_text(reward.get("name", "")) + (f" × {weight:g}" if weight != 1 else "")
    if reward == "cosine":
        return COSINE
    file, colon, function = str(reward).rpartition(":")
    return f"`{Path(file).name}:{function}`" if colon else f"`{reward}`"  # whose folder it lay in is no one's business


# --- the card


def card(run: Run, part: str, *, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """README.md of one part.

    Args:
        run: the facts.
        part: a name of `export.PARTS`.
        name: what the code in the card loads: a hub id, or the part's folder.
        tokenizer: the one that is saved beside it.
    """
    sections = [
        f"# {_base_name(run.base)}: {part.replace('-', ', ')}",
        _what(run, part),
        f"## How to load it\n\n{_loading(run, part, name, tokenizer)}",
        f"## How it was trained\n\n{_training(run, part)}",
    ]
    if run.metrics:
        rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in run.metrics.items())
        sections.append(
            "## The last metrics that were logged\n\nOf one step, as lora-gan's docs/metrics.md explains them.\n\n"
            f"| metric | value |\n| --- | --- |\n{rows}"
        )
    if run.evaluations:
        sections.append(f"## Evaluations during the run\n\n{_own_evaluations(run.evaluations)}")
    if run.evaluation:
        rows = max(len(result.get("samples", ())) for result in run.evaluation.values())
        sections.append(
            f"## Evaluation\n\nOn {rows} rows: mean and 95 % bootstrap interval over rows.\n\n"
            f"```text\n{evaluation.table(run.evaluation)}\n```"
        )
    sections += [
        f"## Limits\n\n{_limits(run, part)}",
        f"## Licence\n\n{_licence(run)} What was made of the base is bound by the base's licence, too.",
        f"## All settings\n\n<details><summary>lora_gan.Config</summary>\n\n```json\n{_settings(run.config)}\n```\n"
        f"\n</details>\n\nMade with {_versions()}.",
    ]
    return f"---\n{_metadata(run, part).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(run: Run, part: str) -> ModelCardData:
    adapter, generator = not part.endswith("-merged"), part.startswith("generator")
    tags = ["lora-gan", *(["lora"] if adapter else []), *([] if generator else ["reward-model"])]
    return ModelCardData(
        base_model=_hub_id(run.base.path),
        datasets=[run.data] if run.data and _hub_id(run.data) else None,
        license=run.license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if generator else "text-classification",
        tags=tags,
    )


def _hub_id(path: str) -> str | None:
    """The name on the hub; what lies in a folder has none: its path is absolute, and the hub accepts no such name."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return None
    return path


def _base_name(base: Base) -> str:
    """As short as it can be told: whose folders a local base lay in is no one's business."""
    return _hub_id(base.path) or Path(base.name).name or base.model.config.model_type


def _what(run: Run, part: str) -> str:
    base = f"`{_base_name(run.base)}`"
    text = {
        "generator": f"A LoRA adapter on {base}, trained to write responses that a reward function rates high.",
        "generator-merged": f"{base} with a LoRA adapter merged in, trained to write responses that a reward function "
        "rates high.",
        "discriminator": f"A LoRA adapter with a score head on {base}, trained to predict the reward of a response.",
        "discriminator-merged": f"A reward model: {base} with a LoRA adapter merged in and one output, trained to "
        "predict the reward of a response.",
    }[part]
    return (
        f"{text} It comes from LoRA-GAN (`lora-gan`): two adapters on one frozen base, a generator and a discriminator "
        "that learns the generator's reward while it trains."
    )


GENERATE = """
tokenizer = AutoTokenizer.from_pretrained({name!r})
inputs = {inputs}
sampling = dict(do_sample=True, temperature={temperature}, top_p={top_p}, top_k=0)  # as in training
tokens = model.generate(**inputs, max_new_tokens={length}, **sampling{ends})
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
SCORE = """
tokenizer = AutoTokenizer.from_pretrained({name!r})
END = {end}  # {token}: closes every response that was not cut, as in training

def score(prompts, responses):
    rows = [
        {tokens} + tokenizer(response, add_special_tokens=False)["input_ids"] + [END]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    batch = tokenizer.pad({{"input_ids": rows}}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].tolist()

print(score([{prompt}], ["a response"]))
"""
CHAT = """

A prompt that is plain text is tokenized by `tokenizer(prompt)` instead, and {end} ({token}) closes a response to it."""
AS_MESSAGES = """

A prompt that is plain text was sent as one user message in training: give `[{"role": "user", "content": prompt}]`."""
TRL = """

As a reward of [TRL](https://huggingface.co/docs/trl)'s trainers:

```python
def reward(prompts, completions, **columns):
    return score(prompts, {completions})

trainer = GRPOTrainer(..., reward_funcs=reward)
```

`reward_funcs=model, reward_processing_classes=tokenizer` is taken as well, but is not the same: GRPOTrainer tokenizes
prompt and completion as one text, in which tokens may differ where the two meet{lacking}."""


def _loading(run: Run, part: str, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Code for stock clients, and what to know of it."""
    base, adapter, generator = run.base, not part.endswith("-merged"), part.startswith("generator")
    client = "AutoPeftModelFor" if adapter else "AutoModelFor"
    client += "CausalLM" if generator else "SequenceClassification"
    labels = ", num_labels=1" if adapter and not generator else ""
    lines = [
        *([] if generator else ["import torch"]),
        *([f"from peft import {client}", "from transformers import AutoTokenizer"] if adapter else []),
        *([] if adapter else [f"from transformers import {client}, AutoTokenizer"]),
        "",
        f"model = {client}.from_pretrained({name!r}{labels}).eval()",
    ]
    if labels and base.pad_on_disk != tokenizer.pad_token_id:
        lines.append(f"model.config.pad_token_id = {tokenizer.pad_token_id}  # batches need one that closes no text")

    template_options = run.config.chat_template_kwargs or {}
    chat = {"add_generation_prompt": True, "return_dict": True, **template_options}
    options = ", ".join(f"{option}={value!r}" for option, value in chat.items())
    text = tokenizer("a")["input_ids"]
    chats = run.encoder.has_template and run.prompt_kinds != {"texts"}
    end = base.endings.chat_id(template_options) if chats else base.endings.text_id
    if chats:
        prompt = '[{"role": "user", "content": "a prompt"}]'
        inputs = f'tokenizer.apply_chat_template({prompt}, {options}, return_tensors="pt")'
        tokens = f'tokenizer.apply_chat_template(prompt, {options})["input_ids"]'
    else:
        prompt = '"a prompt"'
        inputs = f'tokenizer({prompt}, return_tensors="pt")'
        tokens = 'tokenizer(prompt)["input_ids"]'
        if text and text[-1] in base.eos_ids:
            tokens += "[:-1]"  # a tokenizer that ends every text
    if generator:
        config = run.config
        code = GENERATE.format(
            name=name, inputs=inputs, length=config.max_completion_length, temperature=config.temperature,
            top_p=config.top_p, ends=_not_in_training(base, adapter),
        )  # fmt: skip
    else:
        code = SCORE.format(name=name, tokens=tokens, prompt=prompt, end=end, token=_token(base, end))
    said = "```python\n" + "\n".join(lines) + code + "```"
    if chats and run.config.apply_chat_template:
        said += AS_MESSAGES
    elif chats:
        said += CHAT.format(end=base.endings.text_id, token=_token(base, base.endings.text_id))
    if part == "discriminator-merged":
        lacking = []
        if text[:1] == [tokenizer.bos_token_id]:
            lacking.append("the token that begins texts")
        if tokenizer.pad_token_id not in base.eos_ids:
            lacking.append("the end-of-text token, at which the score is read")
        completions = 'completions if isinstance(completions[0], str) else [c[-1]["content"] for c in completions]'
        said += TRL.format(
            completions=completions if chats else "completions",
            lacking=f", without {' and without '.join(lacking)}" if lacking else "",
        )
    if adapter and not generator and tokenizer.pad_token_id >= embedding_rows(base.model):
        said += (
            "\n\nThe pad token has no row in the base's embedding. PEFT adds the row when it opens this folder. To a "
            "base that you load yourself, add it with `base.resize_token_embeddings(len(tokenizer))`."
        )
    if adapter and _hub_id(base.path) is None:
        kind = "" if generator else ", a base loaded by `AutoModelForSequenceClassification` with `num_labels=1`"
        said += (
            "\n\nThe adapter names its base by a folder of the machine it was trained on. Elsewhere, load the base "
            f"yourself and put the adapter on it: `PeftModel.from_pretrained(base, ...)`{kind}."
        )
    return said


def _token(base: Base, id: int) -> str:
    return f"`{base.tokenizer.convert_ids_to_tokens(id)}`"


def _not_in_training(base: Base, adapter: bool) -> str:
    """Arguments of generate() that the base's own generation config would answer otherwise than in training."""
    generation = base.model.generation_config
    said = []
    if getattr(generation, "repetition_penalty", None) not in (None, 1.0):
        said.append("repetition_penalty=1.0")
    if adapter and set(base.eos_ids) - set(ids_of(generation.eos_token_id)):  # a merged model brings its own
        said.append(f"eos_token_id={list(base.eos_ids)}")
    return "".join(f", {argument}" for argument in said)


def _training(run: Run, part: str) -> str:
    config = run.config
    signal = config.signal(config.adversarial)
    if not config.reward_weight:
        learns = "imitation of target texts"
    else:
        learns = {
            "true": "the true reward",
            "predicted": "the reward that the discriminator predicts",
            "corrected": "the true reward"
            if config.query_rate == 1 and config.reward_budget is None
            else "the predicted reward, corrected by the true "
            f"one where it was asked for (a share of {config.query_rate:g} of the responses)",
        }[signal]
        learns += {"policy_gradient": ", by policy gradient (RLOO)", "straight_through": ", straight through it"}[
            config.gradient_path
        ]
        if config.imitation_weight:
            learns += f"; imitation of target texts at weight {config.imitation_weight:g}"
    start = None if run.init_adapter is None else _start_name(run.init_adapter)
    ships = ""
    if run.base.name in named_bases.NAMES:
        bring = run.base.name in fetch.BASES
        ships = f", which `lora-gan fetch {run.base.name}` brings" if bring else ", which ships with lora-gan"
    rows = {
        "base": f"`{_base_name(run.base)}`{ships}, in {str(run.base.model.dtype).removeprefix('torch.')}",
        "adapter": _adapter(run.adapters[part.removesuffix("-merged")]),
        "true reward": run.reward,
        "data": None if run.data is None else f"`{_data_name(run.data)}`",
        "steps": f"{run.steps:,}",
        "reward calls": run.calls,
        "the generator was set to learn from": learns,
        "responses to a prompt": f"{config.num_generations}, of up to {config.max_completion_length} tokens, at "
        f"temperature {config.temperature:g}",
        "the generator started from": None if start is None else f"the adapter `{start}`",
        "KL to that adapter" if run.kl_is_to_adapter else "KL to the base": f"weight {config.beta:g}",
        "seed": str(config.seed),
    }
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)


def _adapter(lora: LoraConfig) -> str:
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    return f"{kind}, r {lora.r}, alpha {lora.lora_alpha}, on " + ", ".join(f"`{name}`" for name in targets)


def _start_name(folder: str) -> str:
    """An adapter's folder without the folders it lay in."""
    path = Path(folder)
    return path.parent.name if path.name == "generator" else path.name


def _own_evaluations(lines: list[dict[str, float]]) -> str:
    """The run's first and last evaluation, a column each."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "step"))
    heads = ["before training" if line["step"] == 0 else f"step {line['step']:,}" for line in lines]
    table = [["metric", *heads], ["---"] * (len(heads) + 1)]
    table += [
        [name.removeprefix("eval_"), *(f"{line[name]:.6g}" if name in line else "–" for line in lines)]
        for name in names
    ]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"Means over the held-out rows of the run, one sampled response per row.\n\n{rows}"


def _licence(run: Run) -> str:
    if run.license is None:
        return "None was given with this export: its maker has to add one (`license:` in the metadata)."
    return f"`{run.license}`, as its maker says."


def _data_name(data: str) -> str:
    return Path(data).name if Path(data).is_absolute() else data


def _limits(run: Run, part: str) -> str:
    if part.startswith("generator"):
        lines = [
            "It was made to please one reward. A model can learn to please a reward without writing better: judge it "
            "by something else too."
        ]
    else:
        lines = [
            "It learned from one generator's responses to the prompts of one run; of other texts it knows nothing.",
            "Its numbers are in the units of the true reward, without calibration.",
        ]
        if not run.scores:
            lines.insert(0, "**It was not trained**: it scores every text 0.")
    if not run.steps:
        start = "is the one that it started from" if run.init_adapter else "changes nothing yet"
        lines.insert(0, f"No step was taken: the adapter {start}.")
    if not (run.evaluation or run.evaluations):
        lines.append("No evaluation on held-out prompts was given with this export.")
    return "\n".join(f"- {line}" for line in lines)


def _settings(config: Config) -> str:
    unlisted = marked(config, Mark.UNLISTED)
    kept = {name: value for name, value in config.to_dict().items() if name not in unlisted}
    return json.dumps(kept, indent=2, ensure_ascii=False)


def _versions() -> str:
    return f"lora-gan {__version__}, " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft")
    )
