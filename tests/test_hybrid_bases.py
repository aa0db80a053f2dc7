"""Hybrid and recurrent bases: the matrix of test_bases.py, and what is their own.

Oracles: those of test_bases.py; an uncached, unbatched decode for rows that repeat and leave the batch.
"""

import warnings

import pytest
from test_bases import (  # noqa: F401, collected here with the bases of this file
    HYBRIDS,
    gan_of,
    test_both_players_learn_and_the_base_stays_bitwise,
    test_layers_computed_again_in_the_backward_teach_the_same,
    test_resuming_equals_never_having_stopped,
    test_sampling_equals_an_uncached_unbatched_decode,
    test_stock_peft_opens_the_discriminator,
    test_stock_peft_opens_the_generator,
    test_straight_through_reads_the_embeddings_that_the_ids_have,
)
from test_rollout import MANY

QUICK = ("qwen3_5", "lfm2", "falcon_h1", "mamba2")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in HYBRIDS])
def trained(request, tmp_path_factory):
    """A LoraGAN after three steps, where it was saved, and its base's name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gan = gan_of(request.param, learning_rate=1e-2, disc_learning_rate=1e-2)
    for _ in range(3):
        gan.step(MANY[:2])
    return gan, gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run")), request.param
