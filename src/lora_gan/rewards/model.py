"""Rewards by a sequence-classification model: a reward model, toxicity, style; and entailment by a source text.

Both take a hub id or a folder, are of TRL's form, f(prompts, completions, **columns) -> list, and open their model when
the first score is asked for. A score does not depend, but for rounding, on what else is in the batch.

    Classifier("OpenAssistant/reward-model-deberta-v3-large-v2", reads="pair")       # human preference
    Classifier("unitary/toxic-bert", label="toxic", lower_is_better=True)            # toxicity
    Entailment("cross-encoder/nli-deberta-v3-base", premise="source")                # factuality
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ..messages import completion_text
from .calling import RewardUnavailable
from .loading import local_folder, undisturbed
from .signatures import GIVEN

Reads = Literal["response", "pair", "text", "chat"]
Output = Literal["probability", "logit"]
Encoded = dict[str, list[int]]  # a row as the tokenizer returns it: input_ids and so on


@dataclass(eq=False)
class _SequenceClassifier:
    """One output of a sequence-classification model, as a list of floats; opened at the first call."""

    model: str | Path
    _: KW_ONLY
    label: str | int | None = None
    device: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    model_init_kwargs: Mapping[str, Any] | None = None
    usual_labels: ClassVar[tuple[str, ...]] = ()  # where no label is given

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self._lm: Any = None
        self._said_long = False
        self._tokenizer: Any = None

    def _open(self) -> None:
        if self._lm is None:
            with undisturbed():
                lm, self._tokenizer = _open(self.model, self.device, dict(self.model_init_kwargs or {}))
            self._index = self._label_index(lm.config)
            self._lm = lm

    def _label_index(self, config: Any) -> int:
        """The number of the label given by name or number; the only one where there is one and none is given."""
        labels = {int(i): str(name) for i, name in config.id2label.items()}
        wanted = self.usual_labels if self.label is None else (self.label,)
        if not wanted and len(labels) == 1:
            return 0
        folded = [str(label).casefold() for label in wanted]
        exact = [i for i, name in labels.items() if i in wanted or name in wanted]
        matches = exact or [i for i, name in labels.items() if name.casefold() in folded]
        if isinstance(self.label, bool) or len(matches) != 1:
            said = f"has no label {wanted[0]!r}" if wanted else "has several labels"
            listed = ", ".join(f"{name!r} ({i})" for i, name in labels.items())
            raise ValueError(f"{self.model} {said}; say label=, one of {listed}")
        return matches[0]

    @property
    def _limit(self) -> int | None:
        """Most tokens the model reads; None where neither it nor its tokenizer names a limit."""
        from ..context import context_of

        context = context_of(self._lm.config.get_text_config())
        limits = (self.max_length, self._tokenizer.model_max_length, context)
        known = [limit for limit in limits if limit is not None and 0 < limit < 10**9]  # "no limit" is 10**30
        return min(known) if known else None

    def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None, side: str, special: bool) -> list[Encoded]:
        """Inputs of each row, without padding; one that is too long loses tokens at `side`, which is said once."""
        self._tokenizer.truncation_side = side
        options = {"add_special_tokens": special, "verbose": False}
        texts, pairs = list(texts), None if pairs is None else list(pairs)
        encoded = self._tokenizer(texts, pairs, **options)
        limit = self._limit
        long = 0 if limit is None else sum(len(ids) > limit for ids in encoded["input_ids"])
        if long:
            if not self._said_long:
                end = "beginning" if side == "left" else "end"
                warnings.warn(
                    f"{long} of {len(texts)} texts are longer than the {limit} tokens that {self.model} reads, and "
                    f"were cut at their {end}; further ones will be, without a word",
                    stacklevel=4,
                )
            self._said_long = True
            encoded = self._tokenizer(texts, pairs, truncation=True, max_length=limit, **options)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
        return [row if row["input_ids"] else self._nothing(row) for row in rows]

    def _nothing(self, row: Encoded) -> Encoded:
        """A row without tokens reads as the end-of-text token: a model has to read something."""
        id = self._tokenizer.eos_token_id
        if id is None:
            raise ValueError(f"an empty text has no tokens, and the tokenizer of {self.model} no end-of-text token")
        return {name: [{"input_ids": id, "attention_mask": 1}.get(name, 0)] for name in row}

    def _logits(self, rows: list[Encoded]) -> list[list[float]]:
        """Every label's logit, for each row."""
        import torch
        from transformers import DataCollatorWithPadding

        # Padded on the right, causal and absolute positions alike are those of the row alone. Decoders pool the last
        # token that is not config.pad_token_id: pad with that, and without one not at all.
        pad = self._lm.config.get_text_config().pad_token_id
        size = self.batch_size if pad is not None else 1
        self._tokenizer.pad_token_id, self._tokenizer.padding_side = pad, "right"
        batch_of = DataCollatorWithPadding(self._tokenizer, padding=size > 1)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # little padding
        logits: dict[int, list[float]] = {}
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            batch = batch_of([rows[i] for i in chosen])
            inputs = {name: values.to(self._lm.device) for name, values in batch.items()}
            with torch.no_grad():
                output = self._lm(**inputs).logits.float().cpu()
            logits.update(zip(chosen, output.tolist(), strict=True))
        return [logits[i] for i in range(len(rows))]

    def _scores(self, rows: list[Encoded], output: Output) -> list[float]:
        """The chosen label's logit, or its probability: sigmoid for several labels at once, else softmax."""
        import torch

        logits = torch.tensor(self._logits(rows), dtype=torch.float64)
        if output == "probability":
            several = self._lm.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if several else logits.softmax(-1)
        return logits[:, self._index].tolist()


@dataclass(eq=False)
class Classifier(_SequenceClassifier):
    """A label of a sequence-classification model, for each response.

    With one output (reward models have one) the score is its logit. With several it is the probability of `label`:
    softmax, or sigmoid where the model's config says multi_label_classification, as stock pipelines do.

    Args:
        model: a hub id or a folder. A model without a trained classification head is refused.
        label: name or number of the label; needed where there are several outputs.
        reads: "response" alone; "pair": prompt and response as a pair of texts; "text": prompt + response as one text;
            "chat": both through the tokenizer's chat template, as most reward models of the last years want it.
        output: "probability", or "logit", of `label`; a model with one output gives its logit in any case.
        lower_is_better: the score is minus the value, as for toxicity.
        device: "cpu", "cuda", "cuda:1", ...; None = the GPU where there is one.
        batch_size: rows read at once.
        max_length: most tokens read, prompt included; None = what the model can. What is longer is cut, with a
            warning the first time: a response alone at its end, a pair in the longer of the two, text and chat at the
            beginning.
        model_init_kwargs: passed on to from_pretrained, such as {"trust_remote_code": True}. Without a dtype there, it
            is bfloat16 on a GPU that has it, else float32.
    """

    label: str | int | None = None
    reads: Reads = "response"
    output: Output = "probability"
    lower_is_better: bool = False

    __name__ = "classifier"  # what logs call this part of a sum of rewards

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("reads", Reads), ("output", Output)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not accepted: it must be one of {', '.join(get_args(kind))}"
                )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score completion i, an answer to prompt i; texts, or chat messages.

        Raises:
            ValueError: there is no such label, or `reads` does not fit the prompts or the tokenizer.
            RewardUnavailable: the model cannot be found or opened, or has no classification head.
        """
        if not completions:
            return []
        self._open()
        several = self._lm.config.num_labels > 1
        values = self._scores(self._inputs(prompts, completions), self.output if several else "logit")
        return [-value for value in values] if self.lower_is_better else values

    def _inputs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Encoded]:
        responses = [completion_text(completion) for completion in completions]
        if self.reads == "response":
            return self._encode(responses, None, "right", True)
        if self.reads == "chat":
            return self._encode(self._conversations(prompts, responses), None, "left", False)
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"reads={self.reads!r} takes prompts that are text; for chat messages reads='chat'")
        if self.reads == "pair":
            return self._encode(prompts, responses, "right", True)
        return self._encode([p + r for p, r in zip(prompts, responses, strict=True)], None, "left", True)

    def _conversations(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[str]:
        if not self._tokenizer.chat_template:
            raise ValueError(f"reads='chat', but the tokenizer of {self.model} has no chat template; 'pair' or 'text'")
        before = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        return [
            self._tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
            for messages, response in zip(before, responses, strict=True)
        ]


@dataclass(eq=False)
class Entailment(_SequenceClassifier):
    """The probability that a source text entails the response, in [0, 1], by a text-pair (NLI) classifier.

    Reads (premise, response), the longer of the two cut where both do not fit. A row without a premise
    scores None: it does not apply.

    Args:
        model: a hub id or a folder.
        premise: the column that holds the source text; "prompt" takes the prompt.
        label: name or number of the label that says "entailed"; None finds it by name.
        device, batch_size, max_length, model_init_kwargs: as for `Classifier`.
    """

    premise: str = "source"

    __name__ = "entailment"
    usual_labels = ("entailment", "entailed", "entails")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completion i by its premise.

        Raises:
            ValueError: there is no such column or label, or a premise is not text.
            RewardUnavailable: the model cannot be found or opened, or has no classification head.
        """
        if self.premise != "prompt" and self.premise not in columns:
            raise ValueError(
                f"there is no column {self.premise!r} to take the premise from; the columns: "
                f"{', '.join(['prompt', *(name for name in columns if name not in GIVEN)])} (premise= names another)"
            )
        premises = list(prompts if self.premise == "prompt" else columns[self.premise])
        for premise in premises:
            if not (premise is None or isinstance(premise, str)):
                raise ValueError(f"a premise must be text, or None, not {type(premise).__name__}: {premise!r:.60}")
        scores: list[float | None] = [None] * len(premises)
        known = [i for i, premise in enumerate(premises) if premise is not None]
        if known:
            self._open()
            responses = [completion_text(completions[i]) for i in known]
            inputs = self._encode([premises[i] for i in known], responses, "right", True)
            for i, score in zip(known, self._scores(inputs, "probability"), strict=True):
                scores[i] = score
        return scores


def _open(model: str | Path, device: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its tokenizer; RewardUnavailable where there is none to be had."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(local_folder(model, "sequence-classification") or model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    options = {"dtype": torch.bfloat16 if on_gpu else torch.float32, **options}
    shared = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    try:
        lm, loading = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    except Exception as error:
        raise RewardUnavailable(
            f"cannot open {source} as a sequence-classification model: it must be a folder with the model and its "
            f"tokenizer, or a hub id that can be reached or is cached ({error})"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise RewardUnavailable(
            f"{source} is not a trained sequence-classification model: its weights lack {', '.join(missing[:3])}, "
            "which would be random numbers"
        )
    if not {"device_map", "quantization_config"} & options.keys():  # with these it stands where it should already
        lm = lm.to(device)
    return lm.eval().requires_grad_(False), tokenizer
