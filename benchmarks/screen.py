"""Offline screen on a real base: how well a head on frozen features ranks the responses to a prompt.

    python benchmarks/screen.py collect --task facts --out runs/screen     # once: samples, features, true rewards
    python benchmarks/screen.py compare --task facts --out runs/screen     # minutes: features and depths, with noise
    python benchmarks/screen.py worth   --task facts --out runs/screen     # minutes: the mixed reward

`collect` samples responses from the base, and from plain RLOO after 64 and 128 calls. `compare` fits heads on some
labels, and measures them on other prompts. `worth` plays 16 steps of 4 prompts × 8 responses with one known group, and
prints the squared signal-to-noise ratio of the advantages, in units of one response with an exact reward. A variant
that loses here is not worth a run of training.

# P = prompts, K = responses per prompt, H = hidden size, N = labelled responses
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_tasks import Reward, load
from scipy.stats import rankdata

from lora_gan import LoraGAN, data, randomness
from lora_gan.training import estimate
from lora_gan.training.probe import Probe

DEPTHS = (1 / 3, 2 / 3, 1)  # of the layers after which hidden states are read
SETTINGS: dict[str, Any] = {
    "max_completion_length": 32, "num_generations": 8, "prompts_per_step": 1, "learning_rate": 5e-4, "beta": 0.003,
    "reward_signal": "true", "log_completions": False,
}  # fmt: skip


def collect(arguments: argparse.Namespace) -> None:
    task = load(arguments.task, seed=0, options={"split": "validation", "train": 1000, "heldout": arguments.prompts})
    reward = Reward("exact", task.score, seed=0, sigma=task.sigma)
    gan = LoraGAN(task.model, reward=reward, seed=0, output_dir=str(arguments.out), **SETTINGS)
    for calls in arguments.calls:
        while gan.reward_calls < calls:
            batch = data.take(task.train, 1, seed=0, position=gan.position)
            gan._step(batch, True, False)
            gan.position += 1
        rows = [row for row in task.heldout for _ in range(arguments.samples)]
        texts, features, prefixes, edges = [], [], [], [0]
        for row in task.heldout:
            encoded = gan._encode([row])
            rollout = gan._sample(encoded, gan._uniforms(encoded, arguments.samples, "screen"))
            states = hidden_states(gan, rollout)
            texts += rollout.texts
            features.append(np.stack([[s[:, -1], s.mean(1)] for s in states]).transpose(2, 0, 1, 3))
            prefixes += [s[-2].astype(np.float16) for s in states]
            edges += [edges[-1] + s.shape[1] for s in states]
        true = np.array(task.score(texts, [row.target for row in rows])).reshape(-1, arguments.samples)
        arguments.out.mkdir(parents=True, exist_ok=True)
        features_PK = np.concatenate([f.transpose(1, 0, 2, 3) for f in features])
        np.savez(
            arguments.out / f"{arguments.task}-{calls}.npz", true=true, features=features_PK.astype(np.float32),
            prefixes=np.concatenate(prefixes), edges=np.array(edges),
        )  # fmt: skip
        spread = true.std(1, ddof=1).mean()
        print(f"{arguments.task} after {calls} calls: mean {true.mean():.3f}, spread within {spread:.3f}: {texts[0]!r}")


@torch.no_grad()
def hidden_states(gan: LoraGAN, rollout: Any) -> list[np.ndarray]:
    """The base's hidden states of each response's tokens at each of DEPTHS, [depths, T, H] per response."""
    batch = rollout.batch()
    batch = gan.players.batch(rollout.prompts, rollout.responses, rollout.group_B, packs=False)
    with gan.players.use_adapter("base"):
        output = gan.players.lm(input_ids=batch.ids, **batch.inputs, use_cache=False, output_hidden_states=True)
    layers = [round(depth * (len(output.hidden_states) - 1)) for depth in DEPTHS]
    stacked = torch.stack([output.hidden_states[layer].flatten(0, 1)[batch.response_R] for layer in layers])
    rows = batch.row_R.cpu().numpy()
    return [stacked[:, rows == i].cpu().numpy() for i in range(len(rollout))]


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> None:
    for calls in arguments.calls:
        with np.load(arguments.out / f"{arguments.task}-{calls}.npz") as stored:
            true_PK, features = stored["true"], stored["features"]
        features = features.reshape(*true_PK.shape, len(DEPTHS), 2, -1)
        spread = true_PK.std(1, ddof=1).mean()
        print(f"\n{arguments.task} after {calls} calls: mean {true_PK.mean():.3f}, spread within {spread:.3f}")
        print("depth  pooling  labels  noise  correlation within  share of the gap closed by the pick of 8")
        for (layer, depth), (pooling, pooled) in product(enumerate(DEPTHS), enumerate(("last", "mean"))):
            for labels, noise in product((32, 64, 128, 256), (0.0, 2.0)):
                trials = [
                    trial(features[:, :, layer, pooling], true_PK, labels, noise * spread, seed, arguments.ridge)
                    for seed in range(20)
                ]
                rank, gap = np.mean(trials, axis=0)
                print(f"{depth:5.2f}  {pooled:7}  {labels:6d}  {noise:5.1f}  {rank:18.3f}  {gap:10.3f}")


def trial(
    features: np.ndarray, true_PK: np.ndarray, labels: int, noise: float, seed: int, ridge: float
) -> tuple[float, float]:
    """Fit a head on whole groups of 8 of some prompts, and measure it on 8 responses to each of the other prompts."""
    draws = randomness.generator(seed, labels, "screen")
    order = draws.permutation(len(true_PK))
    prompts, others = order[: max(1, labels // 8)], order[len(order) // 2 :]
    told = true_PK[prompts, :8] + noise * draws.normal(size=(len(prompts), 8))
    head = fit(features[prompts, :8], told, ridge)
    predicted_PK = features[others, 8:] @ head
    return rank_correlation(predicted_PK, true_PK[others, 8:]), gap_closed(predicted_PK, true_PK[others, 8:])


def fit(features_PKH: np.ndarray, told_PK: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression of centred rewards on centred features, in the dual form."""
    centred_PKH = (features_PKH - features_PKH.mean(1, keepdims=True)).astype(np.float64)
    centred = centred_PKH.reshape(-1, features_PKH.shape[-1])
    target = (told_PK - told_PK.mean(1, keepdims=True)).ravel()
    gram = centred @ centred.T
    weight = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), target)
    return centred.T @ weight


def rank_correlation(predicted_PK: np.ndarray, true_PK: np.ndarray) -> float:
    ranks = [rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (predicted_PK, true_PK)]
    return float((ranks[0] * ranks[1]).sum() / np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))


def gap_closed(predicted_PK: np.ndarray, true_PK: np.ndarray) -> float:
    """(true reward of the pick − mean) / (best − mean), over all prompts."""
    picked = true_PK[np.arange(len(true_PK)), predicted_PK.argmax(1)].mean()
    return float((picked - true_PK.mean()) / (true_PK.max(1).mean() - true_PK.mean()))


# --- what a step is worth ---------------------------------------------------------------------------------------------


def worth(arguments: argparse.Namespace) -> None:
    print("task   calls  noise  labels    RLOO on the known group  mixed reward  trust in step 2, 4, 8, 16")
    for calls, noise, shuffled in product(arguments.calls, (0.0, 2.0), (False, True)):
        with np.load(arguments.out / f"{arguments.task}-{calls}.npz") as stored:
            true_PK, features = stored["true"], stored["features"]
        features = features.reshape(*true_PK.shape, len(DEPTHS), 2, -1)[:, :, 1, 1]
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        runs = [steps_worth(features, true_PK, noise, shuffled, seed) for seed in range(20)]
        rloo, mixed, trust = (np.mean([run[i] for run in runs], axis=0) for i in range(3))
        print(
            f"{arguments.task}  {calls:5d}  {noise:5.1f}  {'shuffled' if shuffled else 'true':8}  "
            f"{rloo.mean():23.1f}  {mixed.mean():12.1f}  {np.round(trust[[1, 3, 7, 15]], 2)}"
        )


def steps_worth(
    features: np.ndarray, true_PK: np.ndarray, noise: float, shuffled: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Worth of RLOO and of the mixed reward, and the trust, in each of 16 steps. Shuffled: the probe's labels are."""
    rng, probe = randomness.generator(seed, 0, "screen"), Probe()
    order, group_B = rng.permutation(len(true_PK)), np.repeat(np.arange(4), 8)
    variance, spread = true_PK.var(1, ddof=1).mean(), true_PK.std(1, ddof=1).mean()
    results = []
    for step in range(16):
        chosen = np.ix_(order[4 * step : 4 * step + 4], rng.permutation(true_PK.shape[1])[:8])
        exact_B = estimate.centered_within_groups(true_PK[chosen].ravel(), group_B)
        told_B = np.where(group_B == 0, exact_B + noise * spread * rng.normal(size=32), np.nan)
        labels_B = told_B.copy()
        if shuffled:
            labels_B[:8] = rng.permutation(labels_B[:8])
        probe.learn(features[chosen].reshape(32, -1), labels_B, group_B)
        predicted_B = probe.predict(features[chosen].reshape(32, -1)) / probe.amplitude
        rloo_B = np.where(group_B == 0, np.nan_to_num(told_B - told_B[:8].mean()), 0.0)
        mixed_B = probe.trust * estimate.centered_within_groups(predicted_B, group_B) + (1 - probe.trust) * rloo_B
        products = [(a_B @ exact_B, a_B @ a_B) for a_B in (rloo_B, mixed_B)]
        results.append([*(p * abs(p) / max(s, 1e-12) / variance for p, s in products), probe.trust])
    rloo, mixed, trust = np.array(results).T
    return rloo, mixed, trust


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("collect", "compare", "worth"))
    parser.add_argument("--task", default="facts", choices=("facts", "constraints", "tiny"))
    parser.add_argument("--out", type=Path, default=Path("runs/screen"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calls", type=int, nargs="+", default=[0, 64, 128])
    parser.add_argument("--ridge", type=float, default=1.0, help="in units of a centred feature vector's mean square")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"collect": collect, "compare": compare, "worth": worth}[arguments.action](arguments)


if __name__ == "__main__":
    main()
