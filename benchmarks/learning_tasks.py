"""Tasks of the learning benchmark: prompts, the true reward with and without noise, and unrelated metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lora_gan import LoraGAN, randomness, tiny
from lora_gan.data import Row
from lora_gan.messages import completion_text
from lora_gan.rewards import CosineReward, chrf, exact_match
from lora_gan.tiny import drawing

Judge = Callable[[Sequence[str], Sequence[str | None]], list[float]]  # responses, targets -> one number per response
REWARDS = ("exact", "noisy", "thumbs", "human")
RATER = 20  # ratings in a row by one rater
SPLITS = {"heldout": "test", "validation": "validation"}  # names in tiny -> names in benchmarks/e2e.py


@dataclass(frozen=True)
class Task:
    """Rows for training and evaluation, the reward, and metrics that the reward does not see."""

    model: str
    train: list[Row]
    heldout: list[Row]
    score: Judge  # the true reward, without noise
    judges: dict[str, Judge]  # tables call the first one "second metric"
    sigma: float  # noise of about three times the spread within a group
    samples: int = 1  # responses per held-out prompt; their metrics are averaged
    base_logprob: bool = False  # whether the log-probability under the base is one of the metrics


class Reward:
    """The true reward as the players see it, in TRL's form. Counts its calls, and adds noise for the noisy kinds.

    `human` is like cleaned human ratings (Novikova et al.): a heavy-tailed residual of 1.8 times the spread within a
    group, and an offset per rater. The offset makes the whole noise about 3.5 times the spread, as in raw ratings.

    Noise is a function of the run's seed and the call's number. Rewards therefore do not depend on the time of the
    call, and no two calls share their noise.
    """

    __name__ = "true"

    def __init__(self, kind: str, score: Judge, *, seed: int, sigma: float) -> None:
        if kind not in REWARDS:
            raise ValueError(f"there is no reward {kind!r}: there are {', '.join(REWARDS)}")
        self.kind, self.score, self.seed, self.sigma = kind, score, seed, sigma
        self.calls = 0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], target: Sequence[str | None] | None = None, **_: Any
    ) -> list[float]:
        completions = [completion_text(completion) for completion in completions]  # of chat prompts they are messages
        exact = self.score(completions, [None] * len(completions) if target is None else target)
        told = [self._told(value, self.calls + i) for i, value in enumerate(exact)]
        self.calls += len(exact)
        return told

    def _told(self, value: float, call: int) -> float:
        if self.kind == "exact":
            return value
        draws = randomness.generator(self.seed, call, self.kind)
        if self.kind == "noisy":
            return value + self.sigma * float(draws.normal())
        if self.kind == "human":
            rater = randomness.generator(self.seed, call // RATER, "rater")
            residual = float(draws.standard_t(4)) / 2**0.5  # variance 1
            return value + self.sigma * (0.6 * residual + float(rater.normal()))
        return float(draws.random() < np.clip(value, 0, 1))


class Memo:
    """Calls a metric once per response and target, because the same short texts occur many times."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.known: dict[tuple[str, str | None], float] = {}

    def __call__(self, responses: Sequence[str], targets: Sequence[str | None]) -> list[float]:
        pairs = list(zip(responses, targets, strict=True))
        new = list(dict.fromkeys(pair for pair in pairs if pair not in self.known))
        if new:
            answers = self.judge(*map(list, zip(*new, strict=True)))
            self.known |= zip(new, map(float, answers), strict=True)
        return [self.known[pair] for pair in pairs]


def each(judge: Callable[[str, str | None], float], scale: float = 1.0) -> Judge:
    return lambda responses, targets: [scale * judge(*pair) for pair in zip(responses, targets, strict=True)]


def load(name: str, *, seed: int, options: dict[str, Any], e2e: dict[str, str] | None = None) -> Task:
    """A task by name, with the training prompts of this run's seed. `e2e` is the result of `prepare_e2e`."""
    compare = {"chrf": Memo(each(chrf, 100.0)), "exact": each(exact_match)}
    if name == "e2e":
        if e2e is None:
            raise ValueError("the task e2e needs --model and --data")
        return _e2e(e2e, options, compare)
    if name in ("facts", "constraints"):
        return _real(name, seed, options)
    train = [Row(**row) for row in tiny.pairs("train", options["train"], seed=seed)]
    heldout = [Row(**row) for row in tiny.pairs(options["split"], options["heldout"], seed=0)]
    if name == "tiny":
        return Task("tiny", train, heldout, Memo(CosineReward().batch), compare, sigma=0.9)
    if name == "style":
        train, heldout = ([Row(row.prompt) for row in rows] for rows in (train, heldout))
        return Task("tiny", train, heldout, Memo(denial_classifier()), {"rule": each(denies)}, sigma=0.9)
    raise ValueError(f"there is no task {name!r}: there are tiny, e2e, style, facts, constraints")


def _real(name: str, seed: int, options: dict[str, Any]) -> Task:
    """The tasks on SmolLM2. Sigma is three times the spread of the base's rewards within a group: 0.10 and 0.23."""
    import real_tasks

    split, count, held_out = options["split"], options["train"], options["heldout"]
    if name == "facts":
        return Task(
            real_tasks.MODEL, real_tasks.facts("train", count, seed=seed), real_tasks.facts(split, held_out),
            Memo(each(real_tasks.chrf_to_any)),
            {"cosine": Memo(real_tasks.cosine_to_first), "slots": each(real_tasks.coverage)}, sigma=0.3, samples=2,
        )  # fmt: skip
    return Task(
        real_tasks.MODEL, real_tasks.constraints("train", min(count, 1000), seed=seed),
        real_tasks.constraints(split, held_out), Memo(each(real_tasks.graded)), {"strict": each(real_tasks.strict)},
        sigma=0.7, samples=2, base_logprob=True,
    )  # fmt: skip


# --- style: a negated French sentence --------------------------------------------------------------------------------

DENIAL = re.compile(r"\b(?:ne |n')(?:y )?\S+ (?:pas|jamais)\b", re.IGNORECASE)


def french(count: int, split: str = "train", seed: int = 7) -> list[str]:
    return [sentence.fr for sentence in islice(drawing.sentences(split, seed), count)]


def denial_classifier(count: int = 6000) -> Judge:
    """P(a negated French sentence) by logistic regression on character n-grams, trained on tiny's own sentences.

    The other class has other French sentences and English sentences, negated or not. Fragments of a sentence can get a
    high score, so this reward needs a second metric.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    sentences = list(islice(drawing.sentences("train", 7), count))
    texts = [sentence.fr for sentence in sentences] + [sentence.en for sentence in sentences[: count // 2]]
    labels = [bool(DENIAL.search(text)) for text in texts]
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, min_df=5)
    model = make_pipeline(grams, LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")).fit(texts, labels)
    return lambda responses, targets: model.predict_proba(list(responses))[:, 1].tolist()


_vocabulary: set[str] = set()


def denies(response: str, target: str | None = None) -> float:
    """1 for a response that looks like one whole negated French sentence, else 0. The rule does not use the classifier.

    The rule requires a capital letter, 4 to 16 words of tiny's French, no word twice in a row, and exactly one
    "ne … pas" or "ne … jamais".
    """
    if not _vocabulary:
        _vocabulary.update(word.lower() for text in french(30_000) for word in re.findall(r"\w+", text))
    response = response.strip()
    words = re.findall(r"\w+", response.lower())
    whole = response[:1].isupper() and 4 <= len(words) <= 16 and set(words) <= _vocabulary
    once = len(DENIAL.findall(response)) == 1 and sum(words.count(word) for word in ("pas", "jamais")) == 1
    return float(whole and once and all(a != b for a, b in zip(words, words[1:], strict=False)))


# --- E2E: one shared warm-up ------------------------------------------------------------------------------------------


def prepare_e2e(model: str, data: Path, runs: Path, *, steps: int = 1000, prompts_per_step: int = 16) -> dict[str, str]:
    """Train the story model to describe restaurants by imitation, as benchmarks/e2e.py does. This is done once.

    The warm-up's adapter is merged into its base. Runs start from this model, and the KL keeps them near it, not near
    stories.
    """
    import e2e

    folder = runs / "e2e-warm-up"
    merged = folder / "warm" / "generator-merged"
    if not (merged / "config.json").exists():
        warm = LoraGAN(
            model, seed=0, output_dir=str(folder / "steps"), prompts_per_step=prompts_per_step, num_generations=8,
            max_completion_length=96, imitation_weight=1.0, reward_weight=0.0, learning_rate=5e-3,
            lr_scheduler_type="cosine", warmup_steps=min(50, steps // 2), max_steps=steps, beta=0.0,
            save_steps=100, save_total_limit=1, logging_steps=20, log_completions=False,
        )  # fmt: skip
        if (folder / "steps").exists():
            from lora_gan.storage.checkpoint import complete

            if complete(folder / "steps"):
                warm.load_checkpoint()
        warm.fit(e2e.split(data, 160, 160)["train"], train_disc=False)
        warm.export(folder / "warm", parts=("generator-merged",))
    return {"model": str(merged), "data": str(data)}


def _e2e(where: dict[str, str], options: dict[str, Any], compare: dict[str, Judge]) -> Task:
    import e2e

    parts = e2e.split(Path(where["data"]), 160, 160)
    held = [Row(**row) for row in parts[SPLITS[options["split"]]]][: options["heldout"]]
    train = [Row(**row) for row in parts["train"]]
    return Task(where["model"], train, held, Memo(CosineReward().batch), compare, sigma=0.3)
