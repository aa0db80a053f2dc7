"""Rewards by a sequence-classification model: a reward model, toxicity, style, and entailment by a source text.

Both classes take a hub id or a folder, have TRL's form f(prompts, completions, **columns) -> list, and open their model
when they compute the first score. Except for rounding, a score does not depend on the other rows of the batch.

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
    """One output of a sequence-classification model per row. The model is opened by the first call."""

    model: str | Path
    _: KW_ONLY
    label: str | int | None = None
    device: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    model_init_kwargs: Mapping[str, Any] | None = None
    usual_labels: ClassVar[tuple[str, ...]] = ()  # searched if `label` is None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self._lm: Any = None
        self._warned_of_truncation = False
        self._tokenizer: Any = None

    def _open(self) -> None:
        if self._lm is None:
            with undisturbed():
                lm, self._tokenizer = _open(self.model, self.device, dict(self.model_init_kwargs or {}))
            self._index = self._label_index(lm.config)
            self._lm = lm

    def _label_index(self, config: Any) -> int:
        """The index of `label`, which is a name or an index. If `label` is None: of the usual or the only label."""
        labels = {int(i): str(name) for i, name in config.id2label.items()}
        wanted = self.usual_labels if self.label is None else (self.label,)
        if not wanted and len(labels) == 1:
            return 0
        folded = [str(label).casefold() for label in wanted]
        exact = [i for i, name in labels.items() if i in wanted or name in wanted]
        matches = exact or [i for i, name in labels.items() if name.casefold() in folded]
        if isinstance(self.label, bool) or len(matches) != 1:
            problem = f"has no label {wanted[0]!r}" if wanted else "has several labels"
            listed = ", ".join(f"{name!r} ({i})" for i, name in labels.items())
            raise ValueError(f"{self.model} {problem}: set label= to one of {listed}")
        return matches[0]

    @property
    def _limit(self) -> int | None:
        """Maximum number of tokens that the model reads; None if neither model nor tokenizer has a limit."""
        from ..context import context_of

        context = context_of(self._lm.config.get_text_config())
        limits = (self.max_length, self._tokenizer.model_max_length, context)
        known = [limit for limit in limits if limit is not None and 0 < limit < 10**9]  # "no limit" is 10**30
        return min(known) if known else None

    def _encode(self, texts: Sequence[str], pairs: Sequence[str] | None, side: str, special: bool) -> list[Encoded]:
        """Inputs of each row, without padding. A row that is too long is truncated at `side`, with one warning."""
        self._tokenizer.truncation_side = side
        options = {"add_special_tokens": special, "verbose": False}
        texts, pairs = list(texts), None if pairs is None else list(pairs)
        encoded = self._tokenizer(texts, pairs, **options)
        limit = self._limit
        long = 0 if limit is None else sum(len(ids) > limit for ids in encoded["input_ids"])
        if long:
            if not self._warned_of_truncation:
                end = "beginning" if side == "left" else "end"
                warnings.warn(
                    f"{long} of {len(texts)} texts are longer than the {limit} tokens that {self.model} reads, and "
                    f"were truncated at the {end}; further texts are truncated without a warning",
                    stacklevel=4,
                )
            self._warned_of_truncation = True
            encoded = self._tokenizer(texts, pairs, truncation=True, max_length=limit, **options)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
        return [row if row["input_ids"] else self._end_token(row) for row in rows]

    def _end_token(self, row: Encoded) -> Encoded:
        """The end-of-text token in place of a row without tokens, because a model needs at least one token."""
        id = self._tokenizer.eos_token_id
        if id is None:
            raise ValueError(f"an empty text has no tokens, and the tokenizer of {self.model} has no end-of-text token")
        return {name: [{"input_ids": id, "attention_mask": 1}.get(name, 0)] for name in row}

    def _logits(self, rows: list[Encoded]) -> list[list[float]]:
        """The logits of all labels, per row."""
        import torch
        from transformers import DataCollatorWithPadding

        # With padding on the right, causal masks and absolute positions are those of the row alone. Decoders pool the
        # last token that is not config.pad_token_id. So pad with this token; if there is none, do not pad.
        pad = self._lm.config.get_text_config().pad_token_id
        size = self.batch_size if pad is not None else 1
        self._tokenizer.pad_token_id, self._tokenizer.padding_side = pad, "right"
        batch_of = DataCollatorWithPadding(self._tokenizer, padding=size > 1)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # by length, for little padding
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
        """The logit or the probability of the chosen label. Multi-label models use sigmoid, others softmax."""
        import torch

        logits = torch.tensor(self._logits(rows), dtype=torch.float64)
        if output == "probability":
            is_multi_label = self._lm.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if is_multi_label else logits.softmax(-1)
        return logits[:, self._index].tolist()


@dataclass(eq=False)
class Classifier(_SequenceClassifier):
    """The value of one label of a sequence-classification model, per response.

    For a model with one output, such as a reward model, the score is its logit. For several outputs the score is the
    probability of `label`, as in stock pipelines: sigmoid if the model's config says multi_label_classification, else
    softmax.

    Args:
        model: a hub id or a folder. A model without a trained classification head is refused.
        label: name or index of the label; required if the model has several outputs.
        reads: "response": the response alone. "pair": prompt and response as a pair of texts. "text": prompt + response
            as one text. "chat": both through the tokenizer's chat template, as most recent reward models expect.
        output: "probability" or "logit" of `label`. A model with one output always gives its logit.
        lower_is_better: the score is minus the value, for example for toxicity.
        device: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one.
        batch_size: rows per forward.
        max_length: maximum number of tokens, with the prompt; None: the limit of the model. Longer texts are truncated,
            with one warning: a response alone at its end, a pair in its longer text, text and chat at the beginning.
        model_init_kwargs: arguments of from_pretrained, such as {"trust_remote_code": True}. The default dtype is
            bfloat16 on a GPU that supports it, else float32.
    """

    label: str | int | None = None
    reads: Reads = "response"
    output: Output = "probability"
    lower_is_better: bool = False

    __name__ = "classifier"  # the name in logs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("reads", Reads), ("output", Output)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not accepted: it must be one of {', '.join(get_args(kind))}"
                )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Score completion i as the response to prompt i. Both are texts or chat messages.

        Returns:
            one float per completion.

        Raises:
            ValueError: there is no such label, or `reads` is not possible for the prompts or the tokenizer.
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
                raise ValueError(f"reads={self.reads!r} needs prompts as text; for chat messages use reads='chat'")
        if self.reads == "pair":
            return self._encode(prompts, responses, "right", True)
        return self._encode([p + r for p, r in zip(prompts, responses, strict=True)], None, "left", True)

    def _conversations(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[str]:
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {self.model} has no chat template: use reads='pair' or reads='text'")
        chats = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
        return [
            self._tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], tokenize=False)
            for messages, response in zip(chats, responses, strict=True)
        ]


@dataclass(eq=False)
class Entailment(_SequenceClassifier):
    """The probability that a source text entails the response, in [0, 1], by a text-pair (NLI) classifier.

    The model reads the pair (premise, response). If the pair is too long, its longer text is truncated. The score of a
    row without a premise is None: the reward does not apply.

    Args:
        model: a hub id or a folder.
        premise: the column with the source text; "prompt": the prompt.
        label: name or index of the label for "entailed"; None: found by its name.
        device, batch_size, max_length, model_init_kwargs: as for `Classifier`.
    """

    premise: str = "source"

    __name__ = "entailment"
    usual_labels = ("entailment", "entailed", "entails")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score completion i by its premise.

        Returns:
            one float in [0, 1] per completion, or None for a row without a premise.

        Raises:
            ValueError: there is no such column or label, or a premise is not text.
            RewardUnavailable: the model cannot be found or opened, or has no classification head.
        """
        if self.premise != "prompt" and self.premise not in columns:
            raise ValueError(
                f"there is no column {self.premise!r} for the premise: set premise= to one of "
                f"{', '.join(['prompt', *(name for name in columns if name not in GIVEN)])}"
            )
        premises = list(prompts if self.premise == "prompt" else columns[self.premise])
        for premise in premises:
            if not (premise is None or isinstance(premise, str)):
                raise ValueError(f"a premise must be text or None, not {type(premise).__name__}: {premise!r:.60}")
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
    """The model in eval mode on its device, and its tokenizer. Raises RewardUnavailable if the model cannot be used."""
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
            f"tokenizer, or a hub id that is cached or can be downloaded ({error})"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise RewardUnavailable(
            f"{source} is not a trained sequence-classification model: its weights lack {', '.join(missing[:3])}. Name "
            "a model that was trained as a classifier"
        )
    if not {"device_map", "quantization_config"} & options.keys():  # with these options it is already on its device
        lm = lm.to(device)
    return lm.eval().requires_grad_(False), tokenizer
