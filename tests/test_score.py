"""gan.score(prompt, response) is what the discriminator says in training of a response that round-trips.

Oracle: pred_rewards of step(), computed on the generated ids. Word tokens make texts round-trip.
"""

import pytest
import torch
from helpers import PROMPTS, base_folder, differences, player_state, response_ids, rollout_of, small_gan
from transformers import AutoModelForCausalLM

PROMPT_WORDS = ["the cat", "a big red dog sat on"]


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_score_equals_the_training_view(architecture, pad):
    gan = small_gan(base_folder(architecture, pad, words=True), max_completion_length=30, num_generations=12)
    base = gan.players.base
    compared = 0
    for _ in range(3):
        sampled = rollout_of(gan, PROMPT_WORDS, 12)
        scores = gan.score([PROMPT_WORDS[i // 12] for i in range(24)], sampled.texts)
        out = gan.step(PROMPT_WORDS)
        for i, ids in enumerate(sampled.responses):
            assert out["responses"][i // 12][i % 12] == sampled.texts[i]
            if response_ids(gan, sampled.texts[i]) == ids:
                assert ids[-1] == base.eos_ids[0]
                assert scores[i] == pytest.approx(out["pred_rewards"][i // 12][i % 12], abs=1e-5)
                compared += gan.global_step > 1  # before the first update all scores are zero
    assert compared > 5


def test_score_does_not_depend_on_the_batch_and_changes_nothing():
    gan = small_gan()
    gan.step(PROMPTS[:2])
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    responses = ["", "x", "a much longer response than the rest of them", "French food"]
    together = gan.score(PROMPTS, responses)
    assert all(type(value) is float for value in together) and len(set(together)) == 4
    for prompt, response, score in zip(PROMPTS, responses, together, strict=True):
        assert gan.score(prompt, response) == pytest.approx([score], abs=1e-5)
    assert {player: player_state(gan, player) for player in before}.keys() == before.keys()
    for player, state in before.items():
        assert differences(state, player_state(gan, player)) == []
    assert gan.global_step == 1
    with pytest.raises(ValueError, match="2 prompts"):
        gan.score(PROMPTS[:2], ["x"])


@pytest.mark.parametrize("pad", ["own", "eos", "none"])
def test_the_pooled_token_is_the_one_the_page_says(pad):
    """By hand on the base alone: the last token, end-of-text included; with pad = end-of-text, the one before it."""
    base = base_folder("gpt2", pad)
    gan = small_gan(base)
    gan.discriminator.knows_unit = True
    with torch.no_grad():
        gan.players.heads_MH.normal_(generator=torch.Generator().manual_seed(1))
    ids = gan.players.base.tokenizer(PROMPTS[0])["input_ids"] + response_ids(gan, "French")
    body = AutoModelForCausalLM.from_pretrained(base).eval().transformer
    with torch.no_grad():
        hidden = body(input_ids=torch.tensor([ids])).last_hidden_state[0, -2 if pad == "eos" else -1]
    expected = float(gan.players.heads_MH.detach().mean(0) @ hidden)
    assert gan.score(PROMPTS[0], "French") == pytest.approx([expected], abs=1e-4)


def test_the_batch_size_changes_no_score():
    gan = small_gan()
    for _ in range(2):
        gan.step(PROMPTS[:2])
    pairs = PROMPTS, ["one", "", "three words long", "four"]
    whole = gan.score(*pairs)
    assert gan.score(*pairs, batch_size=3) == pytest.approx(whole, abs=1e-6) and len(set(whole)) > 1
    assert gan.score([], []) == gan.score([], [], batch_size=3) == []
