"""Sampling: the decode loop against an uncached, unbatched one written here on stock PEFT, token for token.

Oracles: a full forward of a stock model for every token, and the inverse of its distribution function in NumPy at the
same uniform numbers; transformers' generate() for greedy decoding; softmax for frequencies; a NumPy nucleus for top_p.
Where a uniform number falls within 1e-6 of an edge of the distribution function, rounding decides: such a row is
compared up to there.
"""

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, base_folder, random_model, rollout_of, small_gan, word_tokenizer
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from lora_gan.model import sampling

# Word tokens, 25 in all: many responses end early.
MANY = [
    "the cat",
    "a",
    "then it saw the big red",
    "old house by a tree",
    "mat",
    "the cat sat on the mat and then a dog ran",
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def trained(request, tmp_path_factory):
    """A LoraGAN whose generator has moved, whose texts end by either of two ids; and the stock model of the same."""
    folder = base_folder(request.param, "own", words=True, eos_ids=2)
    # The tokenizer as it was made: for Qwen2's folders transformers takes a class of its own, which knows no words.
    gan = small_gan(folder, learning_rate=1e-2, processing_class=word_tokenizer("own"))
    for _ in range(3):
        gan.step(MANY[:2])
    folder = gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("run"))
    return gan, AutoPeftModelForCausalLM.from_pretrained(folder / "generator").eval()


def nucleus(probs, top_p):
    """Keep the most probable tokens until their probabilities reach top_p, the one that reaches it included."""
    keep, total = np.zeros(len(probs), dtype=bool), 0.0
    for token in np.argsort(-probs, kind="stable"):
        keep[token] = True
        total += probs[token]
        if total >= top_p:
            break
    return np.where(keep, probs, 0.0)


def reference_decode(model, prompt, uniforms, eos_ids, temperature=1.0, top_p=1.0):
    """One response: a full forward for every token, nothing cached; and whether it broke off at a tie."""
    response = []
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, -1].double().numpy()
        probs = np.exp(logits / temperature - (logits / temperature).max())
        probs = nucleus(probs / probs.sum(), top_p)
        cdf = np.cumsum(probs) / probs.sum()
        if np.abs(cdf - uniform).min() < 1e-6:
            return response, True
        response.append(int(np.argmax(cdf > uniform)))
        if response[-1] in eos_ids:
            break
    return response, False


def draw(gan, prompts, count=3, length=14, *, step=5, **options):
    return rollout_of(gan, prompts, count, step=step, length=length, **options)


# --- the decode loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.6, 1.0)])
def test_equals_an_uncached_unbatched_decode_token_for_token(trained, temperature, top_p):
    gan, stock = trained
    prompts, count, length = gan._encode(MANY), 4, 16
    uniforms = sampling.keyed_uniforms(prompts, count, length, seed=0, step=5, purpose="sample")
    sampled = draw(gan, MANY, count, length, temperature=temperature, top_p=top_p)
    ours, ties, ends = sampled.responses, 0, set()
    for row, response in enumerate(ours):
        expected, tie = reference_decode(
            stock, prompts[row // count], uniforms[row].numpy(), gan.players.base.eos_ids, temperature, top_p
        )
        assert (response[: len(expected)] if tie else response) == expected, f"row {row}"
        ties += tie
        ends.add(response[-1] if len(response) < length else None)
        assert sampled.texts[row] == gan.players.base.tokenizer.decode(response, skip_special_tokens=True)
    assert ties <= 2
    assert list(sampled.group_B) == [j for j in range(len(MANY)) for _ in range(count)]
    assert ends == {None, *gan.players.base.eos_ids}, "every way to end, and not to, in one batch"


def test_several_ids_end_a_text(trained):
    gan, _ = trained
    first, second = gan.players.base.eos_ids
    ended = {first: 0, second: 0}
    for response in draw(gan, MANY, 32, 30, temperature=1.3).responses:
        assert not {first, second} & set(response[:-1]), "a response went on after its end"
        if response[-1] in ended:
            ended[response[-1]] += 1
    assert min(ended.values()) > 0


def test_prompts_and_responses_are_in_group_order(trained):
    gan, _ = trained
    prompts = gan._encode(MANY)
    sampled = draw(gan, MANY, 2)
    for row in range(len(sampled)):
        assert sampled.prompts == prompts and sampled.group_B[row] == row // 2
        assert sampled.lengths_B[row] == len(sampled.responses[row]) >= 1
    some = sampled.rows(np.array([3, 0]))
    assert some.responses == [sampled.responses[i] for i in (3, 0)]
    assert some.texts == [sampled.texts[3], sampled.texts[0]] and list(some.group_B) == [1, 0]


def test_a_response_does_not_depend_on_what_else_is_in_the_batch(trained):
    gan, _ = trained
    together = dict(zip(MANY, np.array_split(np.array(draw(gan, MANY).texts, dtype=object), len(MANY)), strict=True))
    assert len({text for texts in together.values() for text in texts}) > len(MANY)
    for order in (MANY[::-1], MANY[2:4], MANY[:1], [MANY[3], MANY[3], MANY[0], MANY[3]]):
        sampled = np.array_split(np.array(draw(gan, order).texts, dtype=object), len(order))
        seen = set()
        for prompt, texts in zip(order, sampled, strict=True):
            if prompt not in seen:
                assert list(texts) == list(together[prompt])
            else:
                assert list(texts) != list(together[prompt]), "a prompt that stands there twice is answered twice"
            seen.add(prompt)
    for count in (1, 2, 5):
        sampled = np.array_split(np.array(draw(gan, MANY, count).texts, dtype=object), len(MANY))
        for prompt, texts in zip(MANY, sampled, strict=True):
            shared = min(count, 3)
            assert list(texts[:shared]) == list(together[prompt][:shared])
    shorter = draw(gan, MANY, length=5)
    for a, b in zip(shorter.responses, draw(gan, MANY).responses, strict=True):
        assert a == b[:5]


def test_rows_that_ended_leave_without_a_trace():
    """Word tokens end often: the batch is halved again and again. Each row alone never shares a batch."""
    gan = small_gan(base_folder("llama", words=True, eos_ids=2))
    prompts, length = ["the cat", "a big red dog sat on", "then"], 40
    sampled = draw(gan, prompts, 8, length)
    lengths = sampled.lengths_B
    assert len(set(lengths)) > 4 and lengths.min() < 6 < 12 < lengths.max()
    encoded = gan._encode(prompts, length)
    uniforms = sampling.keyed_uniforms(encoded, 8, length, seed=0, step=5, purpose="sample")
    for row, response in enumerate(sampled.responses):
        with gan.players.use_adapter("generator"):
            alone = sampling.sample(
                gan.players, [encoded[row // 8]], uniforms[row : row + 1], decode=gan.players.encoder.decode
            )
        assert alone.responses == [response]


def test_greedy_equals_generate(trained):
    gan, stock = trained
    sampled = draw(gan, MANY, 1, 20, temperature=0)
    for ids, response in zip(gan._encode(MANY), sampled.responses, strict=True):
        theirs = stock.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=20, eos_token_id=list(gan.players.base.eos_ids), pad_token_id=gan.players.base.pad_id,
        )[0, len(ids) :].tolist()  # fmt: skip
        assert response == theirs
    assert gan.generate(MANY, temperature=0, max_completion_length=20) == sampled.texts


def test_the_reference_samples_as_the_base_does(trained):
    gan, _ = trained
    base = AutoModelForCausalLM.from_pretrained(gan.players.base.path).eval()
    prompts = gan._encode(MANY[:3])
    uniforms = sampling.keyed_uniforms(prompts, 2, 10, seed=0, step=5, purpose="sample")
    sampled = draw(gan, MANY[:3], 2, 10, player="reference").responses
    for row, response in enumerate(sampled):
        expected, tie = reference_decode(base, prompts[row // 2], uniforms[row].numpy(), gan.players.base.eos_ids)
        assert response == expected and not tie
    assert sampled != draw(gan, MANY[:3], 2, 10).responses


# --- one token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature):
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1)) * 2
    draws = 200_000
    uniforms = torch.from_numpy(np.random.default_rng(3).random(draws))
    tokens = sampling.choose(logits.expand(draws, -1), uniforms, temperature, 1.0).numpy()
    scaled = logits.double().numpy() / temperature
    probs = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    counts = np.bincount(tokens, minlength=7)
    chi_square = ((counts - draws * probs) ** 2 / (draws * probs)).sum()
    assert chi_square < 27.9, "probability 1e-4 with 6 degrees of freedom"


def test_even_uniforms_hit_each_token_by_its_probability_exactly():
    """Inverse transform: of n evenly spaced numbers each token gets n · p to within one."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(2)) * 3
    n = 10_000
    tokens = sampling.choose(logits.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n, 1.0, 1.0)
    probs = logits.double().softmax(-1)
    assert (torch.bincount(tokens, minlength=11) - n * probs).abs().max() <= 1
    assert torch.equal(tokens, tokens.sort().values)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95, 0.999])
def test_top_p_is_the_nucleus(top_p):
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(40, 30)) * 2
    n = 500
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row in logits:
        probs = nucleus(np.exp(row) / np.exp(row).sum(), top_p)
        tokens = sampling.choose(torch.tensor(row).float().expand(n, -1), uniforms, 1.0, top_p)
        counts = np.bincount(tokens.numpy(), minlength=30)
        assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(probs))
        assert np.abs(counts - n * probs / probs.sum()).max() <= 1.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_never_choose_what_has_no_probability(uniform):
    logits = torch.tensor(
        [[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf], [-torch.inf, -torch.inf, 3.0, -200.0, -torch.inf]]
    )
    expected = [[1, 3], [2, 2]]
    tokens = sampling.choose(logits, torch.full((2,), uniform, dtype=torch.float64), 1.0, 1.0)
    assert tokens.tolist() == [expected[0][uniform > 0], expected[1][uniform > 0]]


def test_a_tail_of_unlikely_tokens_is_sampled_token_by_token():
    """20,000 tokens of probability 1e-9 behind a likely one: in float32 the distribution function would stand still
    for sixty of them, and then jump."""
    logits = torch.full((1, 20_001), float(np.log(1e-9 / (1 - 2e-5))))
    logits[0, 0] = 0.0
    uniforms = 1 - 1e-5 + torch.arange(200, dtype=torch.float64) * 1e-9
    tokens = sampling.choose(logits.expand(200, -1), uniforms, 1.0, 1.0)
    steps = tokens.diff()
    assert steps.min() >= 0 and steps.max() <= 2 and (tokens[-1] - tokens[0] - 199).abs() < 5
    assert (tokens - 10_000).abs().max() < 500


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_prompts_that_are_empty_or_too_long_raise(trained):
    gan, _ = trained
    base = gan.players.base
    if base.tokenizer("")["input_ids"] == []:
        with pytest.raises(ValueError, match="empty|no tokens"):
            gan.generate("")
    with pytest.raises(ValueError, match="96"):
        gan.generate("the " * 91)
    room = base.context - len(base.tokenizer(MANY[0])["input_ids"])
    assert len(gan.generate(MANY[0], max_completion_length=room)) == 1, "exactly what fits, fits"
    with pytest.raises(ValueError, match="shorten"):
        gan.generate(MANY[0], max_completion_length=room + 1)
    with pytest.raises(ValueError):
        gan.score(MANY[0], "cat " * 95)


def test_a_context_of_sixteen_is_filled_to_the_last_place():
    tokenizer = word_tokenizer("own")
    model = random_model("gpt2", len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, context=16)
    gan = small_gan(model, processing_class=tokenizer, max_completion_length=10)
    out = gan.step(["the cat sat on the mat", "a"])
    assert np.isfinite(out["gen_loss"])


def test_no_prompts_and_best_of():
    gan = small_gan(base_folder(words=True))
    assert gan.generate([]) == [] and gan.score([], []) == []
    with pytest.raises(ValueError, match="best_of"):
        gan.generate("the cat", best_of=0)
    gan.step(["the cat", "a dog"])
    best = gan.generate(["the cat", "a dog"], best_of=6, seed=3)
    sampled = draw_generate(gan, ["the cat", "a dog"], 6, seed=3)
    predicted = gan.discriminator.predict(sampled).mean(0).reshape(2, 6)
    assert best == [sampled.texts[int(predicted[0].argmax())], sampled.texts[6 + int(predicted[1].argmax())]]
    assert gan.generate("the cat", seed=3) == gan.generate(["the cat"], seed=3)
    assert gan.generate(["the cat"] * 1, seed=3) != gan.generate(["the cat"], seed=4)


def draw_generate(gan, prompts, count, **options):
    return rollout_of(gan, prompts, count, "generate", **options)
