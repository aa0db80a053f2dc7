"""The model card of an exported part: README.md with the hub's metadata.

The text is in `model_card.md.jinja`, and `facts` collects the facts about the run. Unknown facts are left out: for
example the data of a run without fit(), or a licence that the user did not give.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from ..config import Config
from ..model import fetch, named_bases
from ..model.base import Base
from ..model.base_checks import embedding_rows
from ..model.endings import ids_of
from ..model.pretrained import hub_id
from ..run import evaluation
from ..settings import Mark, marked
from ..version import __version__
from .facts import RunFacts

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"


def card(run: RunFacts, part: str, *, name: str, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
    """README.md of one part, from `model_card.md.jinja`.

    Args:
        run: facts about the run.
        part: an entry of `exporting.PARTS`.
        name: the name in the card's code: a hub id, or the part's folder.
        tokenizer: the tokenizer that is saved with the part.
    """
    data = Path(run.data or "")
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "peft"))
    return ModelCard.from_template(
        _metadata(run, part),
        template_path=str(TEMPLATE),
        run=run,
        config=run.config,
        part=part,
        base_name=_base_name(run.base),
        origin=_origin(run.base),
        start=None if run.init_adapter is None else _start_name(run.init_adapter),
        data_name=data.name if data.is_absolute() else run.data or "",
        code=_code(run, part, name, tokenizer),
        evaluated=list(dict.fromkeys(name for line in run.evaluations for name in line if name != "step")),
        evaluation=evaluation.table(run.evaluation) if run.evaluation else "",
        rows=max((len(result.get("samples", ())) for result in run.evaluation.values()), default=0),
        settings=_settings(run.config),
        versions=f"lora-gan {__version__}, {libraries}",
    )


def _metadata(run: RunFacts, part: str) -> ModelCardData:
    adapter, generator = not part.endswith("-merged"), part.startswith("generator")
    tags = ["lora-gan", *(["lora"] if adapter else []), *([] if generator else ["reward-model"])]
    task = "text-generation" if generator else "text-classification"
    results = _results(run, task) if generator else []
    return ModelCardData(
        base_model=hub_id(run.base.path),
        datasets=[run.data] if run.data and hub_id(run.data) else None,
        eval_results=results or None,
        license=run.license,
        library_name="peft" if adapter else "transformers",
        model_name=f"{_base_name(run.base)}, {part}" if results else None,
        pipeline_tag=task,
        tags=tags,
    )


def _results(run: RunFacts, task: str) -> list[EvalResult]:
    """Means of the generator's evaluation. Evaluations with other names may belong to other models."""
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
        if value["mean"] is not None and metric != "pred_reward"  # predictions are not results
    ]


def _code(run: RunFacts, part: str, name: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Values in the card's code: the class to load, how prompts are tokenized, which tokens end and pad texts."""
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
        "base_is_local": hub_id(base.path) is None,
    }


def _token(base: Base, id: int) -> str:
    return f"`{base.tokenizer.convert_ids_to_tokens(id)}`"


def _not_in_training(base: Base, adapter: bool) -> str:
    """Arguments of generate(), if the base's generation config differs from sampling in training."""
    generation = base.model.generation_config
    arguments = []
    if getattr(generation, "repetition_penalty", None) not in (None, 1.0):
        arguments.append("repetition_penalty=1.0")
    # A merged model has all stop ids in its own generation config.
    if adapter and set(base.eos_ids) - set(ids_of(generation.eos_token_id)):
        arguments.append(f"eos_token_id={list(base.eos_ids)}")
    return "".join(f", {argument}" for argument in arguments)


def _base_name(base: Base) -> str:
    """The hub id, or the last part of a local path. Paths of the user's machine stay private."""
    return hub_id(base.path) or Path(base.name).name or base.model.config.model_type


def _origin(base: Base) -> str:
    """The source of a base with a name in this library; "" for other bases."""
    if base.name in fetch.BASES:
        return f", from `lora-gan fetch {base.name}`"
    return ", which ships with lora-gan" if base.name in named_bases.NAMES else ""


def _start_name(folder: str) -> str:
    """The name of an adapter's folder, without its parent folders."""
    path = Path(folder)
    return path.parent.name if path.name == "generator" else path.name


def _settings(config: Config) -> str:
    unlisted = marked(config, Mark.UNLISTED)
    kept = {name: value for name, value in config.to_dict().items() if name not in unlisted}
    return json.dumps(kept, indent=2, ensure_ascii=False)
