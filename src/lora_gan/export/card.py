"""The card of an exported part: README.md with the hub's metadata, made from the run.

The text is in `model_card.md.jinja`; this module gathers the facts. A card says only what the run knows: it leaves out
the data of a run that was stepped by hand, for example, and names a licence only where the user gives one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..config import Config
from ..model import fetch, named_bases
from ..model.base import Base
from ..model.base_checks import embedding_rows
from ..model.encoding import Encoder
from ..model.endings import ids_of
from ..model.players import Players
from ..rewards.budget import Budget
from ..run import evaluation
from ..run.options import kept_options
from ..storage.json_lines import read_lines
from ..training.discriminator import Discriminator

# Settings that say nothing of the weights, or may hold a token; and those that `peft_config=` may have overruled.
NOT_SHOWN = (
    "output_dir", "weights_format", "save_steps", "save_total_limit", "logging_steps", "log_completions",
    "log_completions_steps", "completions_steps", "num_completions_to_print", "report_to", "run_name", "project",
    "device", "model_init_kwargs",
    "lora_r", "lora_alpha", "target_modules", "disc_lora_r", "disc_lora_alpha", "disc_target_modules",
)  # fmt: skip
TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
COUNTS = ("step", "seconds")  # told elsewhere in the card, or of no interest in it; so are all counts of reward calls


class Trained(Protocol):
    """What an export reads of a LoraGAN."""

    config: Config
    players: Players
    discriminator: Discriminator
    budget: Budget
    global_step: int
    prompt_kinds: set[str]
    init_adapter: str | None
    reward_weights: list[float] | None

    @property
    def reward_names(self) -> list[str]: ...


@dataclass(frozen=True)
class Run:
    """What is known of how the players came to be."""

    base: Base
    encoder: Encoder
    config: Config
    prompt_kinds: frozenset[str]  # of the prompts trained on: "messages", "texts"
    steps: int
    calls: str  # of the true reward, by purpose
    adapters: dict[str, PeftConfig]  # of each player
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
    def of(cls, gan: Trained, judged: dict[str, Any] | None, license: str | None = None) -> Run:
        metrics = _last_metrics(gan)
        options = kept_options(Path(gan.config.output_dir)) if metrics else {}
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


def _last_metrics(gan: Trained) -> dict[str, float]:
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
    if last["step"] == gan.global_step and last["reward_calls"] != gan.budget.counts["training"]:
        return {}
    numbers = {name: value for name, value in last.items() if isinstance(value, (int, float))}
    return {name: n for name, n in numbers.items() if name not in COUNTS and not name.startswith("reward_calls")}


def _evaluations(gan: Trained, of_this_run: bool) -> list[dict[str, float]]:
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


def _reward(gan: Trained, options: dict[str, Any], metrics: dict[str, float]) -> str | None:
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


def card(run: Run, part: str, *, name: str, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
    """README.md of one part, from `model_card.md.jinja`.

    Args:
        run: the facts.
        part: a name of `export.PARTS`.
        name: what the code in the card loads: a hub id, or the part's folder.
        tokenizer: the one that is saved beside it.
    """
    return ModelCard.from_template(
        _metadata(run, part),
        template_path=str(TEMPLATE),
        run=run,
        config=run.config,
        part=part,
        base_name=_base_name(run.base),
        origin=_origin(run.base),
        start=None if run.init_adapter is None else _start_name(run.init_adapter),
        data_name=_data_name(run.data or ""),
        code=_code(run, part, name, tokenizer),
        evaluated=list(dict.fromkeys(name for line in run.evaluations for name in line if name != "step")),
        evaluation=evaluation.table(run.evaluation) if run.evaluation else "",
        rows=max((len(result.get("samples", ())) for result in run.evaluation.values()), default=0),
        settings=_settings(run.config),
        versions=_versions(),
    )


def _metadata(run: Run, part: str) -> ModelCardData:
    adapter, generator = not part.endswith("-merged"), part.startswith("generator")
    tags = ["lora-gan", *(["lora"] if adapter else []), *([] if generator else ["reward-model"])]
    task = "text-generation" if generator else "text-classification"
    results = _results(run, task) if generator else []
    return ModelCardData(
        base_model=_hub_id(run.base.path),
        datasets=[run.data] if run.data and _hub_id(run.data) else None,
        eval_results=results or None,
        license=run.license,
        library_name="peft" if adapter else "transformers",
        model_name=f"{_base_name(run.base)}, {part}" if results else None,
        pipeline_tag=task,
        tags=tags,
    )


def _results(run: Run, task: str) -> list[EvalResult]:
    """Means of the evaluation of the generator. Evaluations by other names may be of other models."""
    judged = run.evaluation.get("generator", {"metrics": {}})
    return [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=f"{len(judged.get('samples', ()))} prompts of the maker",
            metric_type=metric,
            metric_value=value["mean"],
        )
        for metric, value in judged["metrics"].items()
        if value["mean"] is not None and metric != "pred_reward"  # what a discriminator says is no result
    ]


def _code(run: Run, part: str, name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the code in the card depends on: its client, how a prompt is tokenized, which tokens end and pad texts."""
    base, adapter, generator = run.base, not part.endswith("-merged"), part.startswith("generator")
    template_options = run.config.chat_template_kwargs or {}
    chat = {"add_generation_prompt": True, "return_dict": True, **template_options}
    chats = run.encoder.has_template and run.prompt_kinds != {"texts"}
    end = base.endings.chat_id(template_options) if chats else base.endings.text_id
    text = tokenizer("a")["input_ids"]
    pad = tokenizer.pad_token_id
    return {
        "client": ("AutoPeftModelFor" if adapter else "AutoModelFor")
        + ("CausalLM" if generator else "SequenceClassification"),
        "source": repr(name),
        "chats": chats,
        "chat_options": ", ".join(f"{option}={value!r}" for option, value in chat.items()),
        "generate_options": _not_in_training(base, adapter),
        "end": end,
        "end_token": _token(base, end),
        "text_end": base.endings.text_id,
        "text_end_token": _token(base, base.endings.text_id),
        "tokenizer_begins_texts": text[:1] == [tokenizer.bos_token_id],
        "tokenizer_ends_texts": bool(text) and text[-1] in base.eos_ids,
        "pad_id": pad,
        "pad_is_unknown": pad != base.pad_on_disk,
        "pad_is_new": pad is not None and pad >= embedding_rows(base.model),
        "pad_ends_texts": pad in base.eos_ids,
        "base_is_local": _hub_id(base.path) is None,
    }


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


def _origin(base: Base) -> str:
    """Where a base that has a name of this library's comes from."""
    if base.name not in named_bases.NAMES:
        return ""
    if base.name in fetch.BASES:
        return f", which `lora-gan fetch {base.name}` brings"
    return ", which ships with lora-gan"


def _start_name(folder: str) -> str:
    """An adapter's folder without the folders it lay in."""
    path = Path(folder)
    return path.parent.name if path.name == "generator" else path.name


def _data_name(data: str) -> str:
    return Path(data).name if Path(data).is_absolute() else data


def _settings(config: Config) -> str:
    kept = {name: value for name, value in config.to_dict().items() if name not in NOT_SHOWN}
    return json.dumps(kept, indent=2, ensure_ascii=False)


def _versions() -> str:
    return f"lora-gan {__version__}, " + ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft")
    )
