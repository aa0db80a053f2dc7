"""Perplexity under the base, against a stock causal LM asked one row at a time, without padding."""

import math

import pytest
import torch
from helpers import PROMPTS, base_folder, small_gan
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.rewards import Perplexity, RewardError, score_parts

RESPONSES = [" and the cat sat on the mat", "x", "", " in town, by the river"]


def stock(folder, prompts, responses):
    """−log perplexity of response and end-of-text given the prompt, by the loss of a stock model."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            scores.append(-model(input_ids=torch.tensor([before + after]), labels=labels).loss.item())
    return scores


@pytest.mark.parametrize(("architecture", "pad"), [("gpt2", "own"), ("gpt2", "eos"), ("llama", "none")])
def test_perplexity_is_the_stock_models_loss(architecture, pad):
    folder = base_folder(architecture, pad)
    expected = stock(folder, PROMPTS, RESPONSES)
    assert len({round(score, 2) for score in expected}) == 4 and all(score < 0 for score in expected)
    for size in (1, 3, 16):
        perplexity = Perplexity(batch_size=size)
        perplexity.bind(small_gan(folder))
        scores = score_parts([perplexity], PROMPTS, RESPONSES, {"target": ["t"] * 4})["perplexity"]
        assert scores == pytest.approx(expected, abs=2e-5)
    assert perplexity([], []) == []


def test_it_reads_the_untouched_base_and_leaves_the_players_alone():
    gan = small_gan()
    perplexity = Perplexity()
    perplexity.bind(gan)
    before = perplexity(PROMPTS, RESPONSES)
    generated = gan.generate(PROMPTS, temperature=0)
    with torch.no_grad():  # both adapters move
        for parameter in [*gan.players.parameters("generator"), *gan.players.parameters("discriminator")]:
            parameter.add_(0.1)
    assert perplexity(PROMPTS, RESPONSES) == before
    with gan.players.use_adapter("generator"):
        assert perplexity(PROMPTS, RESPONSES) == before
        assert gan.players.active == "generator"
    assert gan.generate(PROMPTS, temperature=0) != generated
    assert all(p.grad is None for p in gan.players.peft.parameters())


def test_chat_completions_are_read_as_their_text():
    perplexity = Perplexity()
    perplexity.bind(small_gan())
    as_chat = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    assert perplexity(PROMPTS, as_chat) == perplexity(PROMPTS, RESPONSES)


def test_chat_prompts_are_read_through_the_bases_template():
    gan = small_gan(chat_template_kwargs={"mood": "kind"})
    gan.players.base.tokenizer.chat_template = (
        "{{ mood }} {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    perplexity = Perplexity()
    perplexity.bind(gan)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = stock(base_folder(), [f"kind user: {prompt}\nassistant:" for prompt in PROMPTS], RESPONSES)
    assert score_parts([perplexity], chats, RESPONSES, {})["perplexity"] == pytest.approx(expected, abs=2e-5)


def test_it_says_what_it_lacks():
    with pytest.raises(RewardError, match=r"'perplexity' raised ValueError.*has no base.*reward_funcs="):
        score_parts([Perplexity()], ["p"], ["r"], {})
    with pytest.raises(ValueError, match="batch_size is 0"):
        Perplexity(batch_size=0)
    perplexity = Perplexity()
    perplexity.bind(small_gan())
    perplexity.bind(small_gan())  # the same base again
    with pytest.raises(ValueError, match="make one Perplexity per LoraGAN"):
        perplexity.bind(small_gan(base_folder("llama")))
    with pytest.raises(ValueError, match="do not fit into this base's 96 tokens"):
        perplexity(["a"], ["xyz " * 60])
    full = "x" * 96  # all of the context's tokens: no place is left, not even for the end
    assert perplexity([full, "a"], ["", ""]) == [None, pytest.approx(perplexity(["a"], [""])[0], abs=1e-5)]


def test_a_uniform_base_has_the_vocabulary_as_its_perplexity():
    gan = small_gan()
    with torch.no_grad():
        gan.players.lm.get_output_embeddings().weight.zero_()
    perplexity = Perplexity()
    perplexity.bind(gan)
    vocabulary = gan.players.lm.get_output_embeddings().weight.shape[0]
    assert perplexity(PROMPTS, RESPONSES) == pytest.approx([-math.log(vocabulary)] * 4, abs=1e-5)
