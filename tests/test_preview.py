"""What a dry run says before anything is trained. Oracle: counted by hand on two tiny shapes, and arrays made up."""

import re

import numpy as np
import pytest
from helpers import base_folder, small_gan
from transformers import AutoModelForCausalLM

from lora_gan import Config, preview


@pytest.mark.parametrize("again", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("architecture", "kv_width"), [("gpt2", 32), ("llama", 16)])  # llama: 2 of 4 heads of width 8
def test_memory_is_counted_as_by_hand(architecture, kv_width, packs, again):
    folder = base_folder(architecture)
    # 2 prompts × 4 responses of 6 tokens, two layers of width 32; three of the responses at a time, to one prompt
    gan = small_gan(folder, micro_batch_size=3, gradient_checkpointing=again)
    gan.players.packs = packs
    tokens, pairs = (10 + 3 * 6, 10 * 10 + 3 * 6 * 16) if packs else (3 * 16, 3 * 16 * 16)
    layer = 17 * tokens * 32 + 2.5 * 4 * pairs
    found = preview.memory(gan.players, gan.config, [4, 10])
    base = AutoModelForCausalLM.from_pretrained(folder)
    trained = sum(p.numel() for player in ("generator", "discriminator") for p in gan.players.parameters(player))
    vocabulary = base.config.vocab_size
    assert list(found.values()) == [
        4 * sum(p.numel() for p in base.parameters()),
        4 * 4 * trained,  # float32: the weight, its gradient, and AdamW's two moments
        2 * 4 * 8 * 16 * 2 * kv_width,  # keys and values of 8 rows of 10 + 6 tokens in 2 layers
        4 * (2 * tokens * 32 + layer if again else 2 * layer) + 6 * 4 * 3 * 6 * vocabulary,
    ]


def test_the_head_holds_some_logits_at_a_time_and_the_discriminator_none_but_replay(monkeypatch):
    gan = small_gan(query_rate=0.5)
    monkeypatch.setattr(type(gan.players), "tokens_at_once", 5)
    few = preview.memory(gan.players, gan.config, [10])["an update"]
    vocabulary = gan.players.base.model.config.vocab_size
    body = {n: 4 * 2 * (17 * 32 * (n // 4 * 10 + n * 6) + 10 * (n // 4 * 100 + n * 6 * 16)) for n in (8, 16)}
    assert few == body[8] + 6 * 4 * 5 * vocabulary, "four answers and four of replay are not more"
    every = small_gan()
    monkeypatch.setattr(type(every.players), "tokens_at_once", 5)
    assert preview.memory(every.players, every.config, [10])["an update"] == body[16], "eight answers, eight of replay"


def test_what_takes_turns_is_not_added_up():
    said = preview._in_words({"base": 2e6, "adapters": 1e6, "sampling": 5e6, "an update": 4e6})
    assert said.startswith("about 8 MB: base 2 MB, adapters 1 MB, sampling 5 MB")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([[1.0, np.nan], [np.nan, np.nan]], "no prompt has two answers"),
        ([[1.0, 1.0], [2.0, 2.0]], "every response is worth the same"),
        ([[1.0, 3.0], [2.0, 2.0]], r"responses 0\.500 \(standard deviation\); none for 1 of 2 prompts"),
        ([[1.0, 3.0], [2.0, np.nan]], r"responses 1\.000 \(standard deviation\)$"),
    ],
)
def test_the_spread_is_that_of_responses_to_one_prompt(rewards, said):
    (line,) = preview._verdict_on_spread(np.array(rewards))
    assert re.search(said, line), line


def test_calls_are_at_most_the_budget_and_none_where_no_reward_is_asked():
    settings = {"prompts_per_step": 2, "num_generations": 4, "query_rate": 0.5}
    assert preview.calls(Config(**settings), 10) == 40
    assert preview.calls(Config(**settings, reward_budget=25), 10) == 25
    unasked = Config(**settings, adversarial=True, disc_objective="real_vs_generated")
    assert preview.calls(unasked, 10) == 0
