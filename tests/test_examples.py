"""Every file in examples/ runs offline, on the base that ships or on its chat model, and does what it says."""

import io
import json
from pathlib import Path

import pytest
import torch
from counting_server import CountingServer, chat_completion
from families import family_folder
from helpers import PROMPTS, ROOT, TARGETS, base_folder, load_script, small_gan
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.data import Row
from lora_gan.export.exporting import export

# TRL 1.16 uses names that transformers 5.23 has renamed.
TRLS_OWN = r"ignore:`gradient_checkpointing\w*` is deprecated:FutureWarning"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(name):
    return load_script(ROOT / "examples" / f"{name}.py")


def test_each_example_is_run_here():
    tested = Path(__file__).read_text()
    assert EXAMPLES and all(f'load("{name}")' in tested for name in EXAMPLES)


def test_own_reward(tmp_path, capsys):
    example = load("own_reward")
    assert example.shared_words("Le chat rit", "le chat dort") == pytest.approx(2 / 3)
    assert example.short_enough(["p"] * 3, ["a b", "a b c", "a"], [2, 2, None]) == [1.0, 0.0, None]
    records = example.main(["--steps", "2", "--output_dir", str(tmp_path)])
    for record in records:
        parts = [record[name] for name in record if name.startswith("rewards/")]
        assert len(parts) >= 2, "both rewards are logged by name"
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(" -> ")[0] for line in out] == [repr(row["prompt"]) for row in example.ROWS]


def test_human_reward(tmp_path):
    """A person who says 7 and 3.5 in turn; started again, nothing is asked twice."""
    example = load("human_reward")
    terminal = io.StringIO("7\n3,5\n" * 8 + "s\n" * 64)
    gan = example.main(["--steps", "1", "--output_dir", str(tmp_path)], stdin=terminal, stdout=io.StringIO())
    ratings = (tmp_path / "ratings.jsonl").read_text().splitlines()
    assert gan.reward_calls == 16 and 1 < len(ratings) <= 16
    assert {json.loads(line)["rating"] for line in ratings} <= {7.0, 3.5, None}
    example.main(["--steps", "1", "--output_dir", str(tmp_path)], stdin=io.StringIO(""), stdout=io.StringIO())
    assert (tmp_path / "ratings.jsonl").read_text().splitlines() == ratings


def test_chat_rows(tmp_path, capsys):
    """On a tiny random base with SmolLM2's chat template: what it is asked, compared with the stock template."""
    example = load("chat_rows")
    assert example.right_and_brief("Paris", "Paris") == 1.0 > example.right_and_brief("It is paris.", "Paris") == 0.8
    assert example.right_and_brief("one two three four five six Paris", "Paris") == 0.5
    assert example.right_and_brief("Lyon", "Paris") == 0.0
    folder = family_folder("smollm2")
    gan = example.main(["--model", str(folder), "--steps", "1", "--output_dir", str(tmp_path)])
    questions = [row["messages"][1]["content"] for row in example.ROWS]
    assert [line.partition(" -> ")[0] for line in capsys.readouterr().out.splitlines()] == questions
    samples = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {sample["target"] for sample in samples} <= set(example.CAPITALS.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample in samples:
        assert [message["role"] for message in sample["prompt"]] == ["system", "user"]
        expected = tokenizer.apply_chat_template(sample["prompt"], add_generation_prompt=True)["input_ids"]
        assert gan.players.encoder.prompt(Row(sample["prompt"])) == expected


def test_judge(tmp_path, capsys):
    """A stub on the loopback interface that scores by the length of the message; a second start asks nothing again."""
    pytest.importorskip("openai", reason="openai is absent: the extra `judge` brings it")
    example = load("judge")
    asked = []

    def answer(body):
        asked.append(body["messages"][0]["content"])
        return chat_completion(f'{{"score": {len(asked[-1]) % 11}}}', prompt_tokens=100, completion_tokens=10)

    server = CountingServer(answer)
    arguments = ["--base_url", f"{server.url}/v1", "--judge", "grader", "--price", "2", "8", "--steps", "2"]
    try:
        usage = example.main([*arguments, "--output_dir", str(tmp_path)]).usage
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / "judge.jsonl").write_bytes((tmp_path / "judge.jsonl").read_bytes())
        again = example.main([*arguments, "--output_dir", str(tmp_path / "again")]).usage
    finally:
        server.close()
    assert 0 < usage["requests"] == len(asked) == server.requests <= 16, "8 responses in each of 2 steps"
    assert all(
        "correct French translation" in message and "Translate English to French" in message for message in asked
    )
    assert usage["cost"] == pytest.approx(len(asked) * (100 * 2 + 10 * 8) / 1e6)
    assert again["requests"] == 0 and again["cached"] == 16
    assert f"{len(asked)} requests, {usage['cached']} answers from judge.jsonl" in capsys.readouterr().out


@pytest.mark.slow
def test_smollm2_end_to_end(smollm2, tmp_path, capsys):
    example = load("smollm2_end_to_end")
    assert (
        example.brief("") == 0.0 and example.brief("Paris") == 1.0 and example.brief("a b c d") == pytest.approx(0.95)
    )
    arguments = ["--steps", "1", "--held_out", "2", "--output_dir", str(tmp_path / "run")]
    made = example.main([*arguments, "--export_dir", str(tmp_path / "out")])
    assert made["gan"].reward_calls == 8 and set(made["evaluations"]) == {"base", "generator", "best of 4"}
    for evaluation in made["evaluations"].values():
        rewards = [example.brief(sample["response"]) for sample in evaluation["samples"]]
        assert evaluation["metrics"]["true_reward"]["mean"] == pytest.approx(sum(rewards) / 2)
    assert "Portugal" in (out := capsys.readouterr().out) and repr(made["answer"]) in out
    merged = tmp_path / "out" / "generator-merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": "What is the capital of Portugal?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(merged).generate(**inputs, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(stock[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == made["answer"]


@pytest.mark.slow
@pytest.mark.filterwarnings(TRLS_OWN)
def test_trl_grpo_with_discriminator(tmp_path, capsys):
    """What GRPOTrainer logs as the reward of the exported classifier is gan.score of the same completions."""
    pytest.importorskip("trl", reason="the example needs TRL")
    example = load("trl_grpo_with_discriminator")
    small = ["--gan_steps", "4", "--max_steps", "3", "--num_generations", "4", "--max_completion_length", "12"]
    trainer = example.main([*small, "--output_dir", str(tmp_path / "export")])
    history = [line for line in trainer.state.log_history if "reward" in line]
    assert len(history) == 3
    by = {name: torch.tensor(rewards) for name, rewards in trainer._logs["rewards"].items()}
    assert by["discriminator"].std() > 1e-2, "rewards that are all alike show nothing"
    assert (by["discriminator"] - by["gan_score"]).abs().max() < 1e-5
    for line in history:
        assert line["rewards/discriminator/mean"] == pytest.approx(line["rewards/gan_score/mean"], abs=1e-5)
        assert line["reward"] == pytest.approx(line["rewards/discriminator/mean"], abs=1e-5)
    # Handed over as a model it says something else on this base, as the example's own text warns.
    assert (by["discriminator-merged"] - by["gan_score"]).abs().max() > 1e-2
    assert len(capsys.readouterr().out.splitlines()) >= 4
    assert any(weight.abs().sum() > 0 for name, weight in trainer.model.named_parameters() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.filterwarnings(TRLS_OWN)
def test_a_classifier_handed_to_trl_as_a_model_says_gan_score_where_the_tokens_are_the_same(tmp_path):
    """With pad = end-of-text, GPT-2's habit, the score is read before the end: TRL's missing end token changes nothing.

    Rows whose joined text has other tokens than prompt and response apart are left out of the comparison.
    """
    pytest.importorskip("trl", reason="what is shown is TRL's reading")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder = base_folder("gpt2", "eos")
    gan = small_gan(folder)
    for _ in range(4):
        gan.step(PROMPTS[:2], TARGETS[:2])
    export(gan, tmp_path / "export", parts=("discriminator-merged",))
    pairs = []

    def gan_score(prompts, completions, **_):
        pairs.extend(zip(prompts, completions, strict=True))
        return gan.score(prompts, completions)

    config = GRPOConfig(
        output_dir=str(tmp_path / "grpo"), max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, model_init_kwargs={"dtype": "float32"}, bf16=False, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=[str(tmp_path / "export" / "discriminator-merged"), gan_score],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    trainer.train()
    theirs, ours = (torch.tensor(trainer._logs["rewards"][name]) for name in ("discriminator-merged", "gan_score"))
    tokenizer = gan.players.base.tokenizer
    same = [
        tokenizer(prompt + text)["input_ids"] == tokenizer(prompt)["input_ids"] + tokenizer(text)["input_ids"]
        for prompt, text in pairs[-len(ours) :]  # TRL keeps the last step's
    ]
    assert len(same) == 8 and sum(same) >= 4 and ours.std() > 1e-2
    assert (theirs - ours)[torch.tensor(same)].abs().max() < 1e-5
