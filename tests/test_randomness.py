"""Keyed randomness: a function of its key, of nothing else, and without a trace in the global states.

Oracles: the same draws in another process with another PYTHONHASHSEED; numpy's own Philox; copies of the global
states of random, numpy and torch.
"""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from helpers import PROMPTS, TARGETS, base_folder, copies, differences, python, small_gan

from lora_gan import data, randomness
from lora_gan.model import sampling

KEYS = [
    (0, 0, "sample"), (1, 0, "sample"), (0, 1, "sample"), (0, 0, "query"), (0, 0, "sample", 1),
    (0, 0, "sample", "1", ""), (0, 0, "sample", 1, 1), (0, 0, "sample", 11), (0, 0, "sample", b"ab", "c"),
    (0, 0, "sample", "a", "bc"), (0, 0, "sample", ""), (0, 0, "sampl", "e"), (2**63, 10**6, "é"), (10, 1, "x"),
    (1, 1, "0x"),
]  # fmt: skip


def test_equal_keys_equal_numbers_in_another_process():
    here = [randomness.uniforms(5, *key).tolist() for key in KEYS]
    here.append(list(randomness.fingerprint([3, 1, 2])))
    here.append(sampling.keyed_uniforms([[1, 2], [3], [1, 2]], 2, 3, seed=4, step=5, purpose="p").tolist())
    here.append([row.prompt for row in data.take([data.Row(str(i)) for i in range(5)], 12, seed=1, position=3)])
    code = """
import json, random, numpy, torch, test_randomness as t
random.seed(5); numpy.random.seed(6); torch.manual_seed(7)
from lora_gan import data, randomness
from lora_gan.model import sampling
there = [randomness.uniforms(5, *key).tolist() for key in t.KEYS]
there.append(list(randomness.fingerprint([3, 1, 2])))
there.append(sampling.keyed_uniforms([[1, 2], [3], [1, 2]], 2, 3, seed=4, step=5, purpose="p").tolist())
there.append([row.prompt for row in data.take([data.Row(str(i)) for i in range(5)], 12, seed=1, position=3)])
print(json.dumps(there))
"""
    assert json.loads(python(code, hash_seed=4242).splitlines()[-1]) == here


def test_different_keys_different_numbers():
    draws = [tuple(randomness.uniforms(4, *key)) for key in KEYS]
    assert len(set(draws)) == len(KEYS)


def test_a_longer_request_begins_with_the_shorter_ones_numbers():
    long = randomness.uniforms(100, 0, 7, "sample", b"prompt", 3)
    for size in (0, 1, 2, 3, 4, 5, 17, 64, 99):
        assert (randomness.uniforms(size, 0, 7, "sample", b"prompt", 3) == long[:size]).all()


def test_it_is_numpys_philox_under_the_hash_of_the_key():
    """Pinned: a changed key would change every run that is resumed."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (b"3", b"4", b"sample", b"\x00\x01", b"2"):
        digest.update(len(part).to_bytes(8, "little") + part)
    key = np.frombuffer(digest.digest(), dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key)).random(6)
    assert (randomness.uniforms(6, 3, 4, "sample", b"\x00\x01", 2) == expected).all()


def test_numbers_are_even_and_streams_uncorrelated():
    table = np.stack([randomness.uniforms(50, 0, step, "sample", i) for step in range(40) for i in range(10)])
    assert table.min() >= 0 and table.max() < 1
    assert abs(table.mean() - 0.5) < 5 * np.sqrt(1 / 12 / table.size)
    counts, _ = np.histogram(table, bins=20, range=(0, 1))
    expected = table.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50, "probability 1e-4 with 19 degrees of freedom"
    neighbours = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(table.size)


def test_rows_are_keyed_by_prompt_and_count_not_by_place():
    def draw(prompts, count=2, length=4):
        return sampling.keyed_uniforms(prompts, count, length, seed=1, step=2, purpose="s").numpy()

    a, b = [5, 6], [7]
    both = draw([a, b])
    assert (draw([b, a]) == np.concatenate([both[2:], both[:2]])).all()
    assert (draw([a]) == both[:2]).all() and (draw([a], length=2) == both[:2, :2]).all()
    twice = draw([a, b, a])
    assert (twice[:4] == both).all() and not (twice[4:] == both[:2]).any()
    assert (draw([a], count=5)[:2] == both[:2]).all()


def test_each_epoch_takes_every_row_once_and_any_position_continues():
    rows = [data.Row(str(i)) for i in range(7)]
    whole = [row.prompt for row in data.take(rows, 21, seed=3, position=0)]
    for epoch in range(3):
        assert sorted(whole[7 * epoch : 7 * epoch + 7]) == list("0123456")
    assert len({tuple(whole[7 * epoch : 7 * epoch + 7]) for epoch in range(3)}) == 3, (
        "each epoch in an order of its own"
    )
    for position in range(21):
        for count in (1, 5):
            assert [row.prompt for row in data.take(rows, count, seed=3, position=position)][: 21 - position] == whole[
                position : position + count
            ]


def global_states():
    name, keys, place, *rest = np.random.get_state()
    return {
        "random": repr(random.getstate()),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), place, *rest],
        "torch": torch.get_rng_state(),
    }


@pytest.mark.parametrize("settings", [{}, {"query_rate": 0.5, "gradient_path": "straight_through"}], ids=str)
def test_global_states_are_left_alone(settings, tmp_path):
    folder = base_folder()
    torch.manual_seed(11), np.random.seed(12), random.seed(13)
    before = global_states()
    gan = small_gan(folder, imitation_weight=0.1, output_dir=str(tmp_path), **settings)
    assert differences(before, global_states()) == [], "building"
    gan.step(PROMPTS[:2], TARGETS[:2])
    assert differences(before, global_states()) == [], "step()"
    gan.generate(PROMPTS[0], best_of=2), gan.score(PROMPTS[0], "x")
    gan.fit([{"prompt": PROMPTS[0], "target": TARGETS[0]}], steps=1, progress=False)
    gan.save_checkpoint(), gan.load_checkpoint()
    assert differences(before, global_states()) == [], "fit(), generate(), score(), checkpoints"


def test_global_states_do_not_matter():
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        gan = small_gan()
        outputs.append([copies(gan.players.parameters("generator")), gan.step(PROMPTS[:2]), gan.step(PROMPTS[0])])
    assert differences(*outputs) == []


def test_the_seed_matters():
    one, two = small_gan(seed=1), small_gan(seed=2)
    assert differences(copies(one.players.parameters("generator")), copies(two.players.parameters("generator"))) != []
    assert one.step(PROMPTS[0])["responses"] != two.step(PROMPTS[0])["responses"]
    assert one.step(PROMPTS[0])["responses"] != one.step(PROMPTS[0])["responses"], "each step draws its own"
