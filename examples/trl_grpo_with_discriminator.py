"""A discriminator as the reward of TRL's GRPOTrainer: no further call of the true reward.

    pip install "lora-gan" trl
    python examples/trl_grpo_with_discriminator.py

1. LoRA-GAN trains both players for some steps on a true reward, here the share of the target's words in the response.
2. `export` writes the discriminator as a stock sequence classifier.
3. GRPOTrainer trains its own adapter on the same base. The reward is that classifier: the function `discriminator`
   tokenizes prompt and response as LoRA-GAN does.

Two other ways have the weight 0 and are logged for comparison. `gan_score` calls the LoraGAN itself, and gives the same
scores. The third way passes the classifier as a model, and gives slightly different scores. GRPOTrainer joins prompt
and completion as text, where a space can be lost. It also leaves out the end-of-text token, at which the discriminator
gives its score.

The defaults run offline on the base that ships, in about a minute on a CPU; so few steps show the wiring, not a result.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from lora_gan import LoraGAN, tiny


def share_of_words(response: str, target: str) -> float:
    """The true reward: how much of the target the response has, in [0, 1]."""
    wanted = set(target.lower().split())
    return len(wanted & set(response.lower().split())) / len(wanted)


def scorer(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[str], list[str]], list[float]]:
    """The classifier's score of each response, read as in training: both tokenized apart, end-of-text at the end.

    Needs transformers alone, as the model card shows it.
    """

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        rows = [
            tokenizer(prompt)["input_ids"]
            + tokenizer(completion, add_special_tokens=False)["input_ids"]
            + [tokenizer.eos_token_id]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(classifier.device)
        with torch.no_grad():
            return classifier(**batch).logits[:, 0].tolist()

    return score


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base: a hub id, a folder, or the one that ships")
    parser.add_argument("--gan_steps", type=int, default=20, help="steps of LoRA-GAN on the true reward")
    parser.add_argument("--max_steps", type=int, default=10, help="steps of GRPOTrainer on the discriminator")
    parser.add_argument("--num_generations", type=int, default=8, help="responses to a prompt, of both")
    parser.add_argument("--max_completion_length", type=int, default=24, help="tokens of a response, of both")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of both")
    parser.add_argument("--output_dir", help="where the export goes; left out: a folder that is gone afterwards")
    given = parser.parse_args(arguments)
    shared = dict(
        num_generations=given.num_generations,
        max_completion_length=given.max_completion_length,
        learning_rate=given.learning_rate,
    )
    rows = tiny.pairs("train", 256)

    with tempfile.TemporaryDirectory() as folder:
        gan = LoraGAN(given.model, reward=share_of_words, output_dir=f"{folder}/run", **shared)
        gan.fit(rows, steps=given.gan_steps)
        exported = gan.export(given.output_dir or f"{folder}/export", parts=("discriminator-merged",))
        reward_model = exported / "discriminator-merged"
        classifier = AutoModelForSequenceClassification.from_pretrained(reward_model).eval().to(gan.players.device)
        tokenizer = AutoTokenizer.from_pretrained(reward_model)
        score = scorer(classifier, tokenizer)

        def discriminator(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return score(prompts, completions)

        def gan_score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return gan.score(prompts, completions)

        trainer = GRPOTrainer(
            model=str(tiny.PATH) if given.model == "tiny" else given.model,
            reward_funcs=[discriminator, gan_score, str(reward_model)],
            args=GRPOConfig(
                output_dir=f"{folder}/grpo",
                max_steps=given.max_steps,
                per_device_train_batch_size=4 * given.num_generations,
                reward_weights=[1.0, 0.0, 0.0],
                model_init_kwargs={"dtype": "float32"},
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **shared,
            ),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()

    names = ("discriminator", "gan_score", "discriminator-merged")
    print("mean reward per step, by", ", ".join(names))
    for line in trainer.state.log_history:
        if "reward" in line:
            print(f"{line['step']:4d}", *(f"{line[f'rewards/{name}/mean']:9.4f}" for name in names))
    return trainer


if __name__ == "__main__":
    main()
