"""Wrong inputs: each gets one clear error that names the value, before anything has changed or been paid for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import PROMPTS, base_folder, differences, player_state, reward, small_gan
from peft import LoraConfig

from lora_gan import Config, LoraGAN
from lora_gan.model.adapter_files import adapter_state
from lora_gan.training.generator import PolicyLosses

SOURCE = Path(__file__).parents[1] / "src"


def test_an_adapter_saved_under_another_alpha_is_refused(tmp_path):
    """Tensors alone would fit, and mean something else."""
    small_gan().save_checkpoint(step=1, ckpt_dir=tmp_path)
    disc = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    other = small_gan(lora_alpha=16, disc_peft_config=disc, disc_lora_r=Config.disc_lora_r)
    before = player_state(other, "generator")
    for load in (
        lambda: other.load_checkpoint(1, tmp_path),
        lambda: other.load_generator(tmp_path / "step-1"),
        lambda: other.load_discriminator(tmp_path / "step-1"),
    ):
        with pytest.raises(ValueError, match="lora_alpha=8"):
            load()
    assert differences(before, player_state(other, "generator")) == []


def test_an_unknown_player_is_refused():
    with pytest.raises(ValueError, match="generatr"):
        small_gan().generate("the cat", player="generatr")


def test_a_missing_target_for_the_default_reward_is_named_before_sampling():
    gan = LoraGAN(base_folder(), max_completion_length=4)
    with pytest.raises(ValueError, match=r"'the dog'.*target_text"):
        gan.step(["the cat", "the dog"], ["le chat", None])
    assert (gan.global_step, gan.reward_calls) == (0, 0)
    out = gan.step("the cat", adversarial=True, train_disc=False)  # nothing is asked here
    assert out["true_reward"] is None and out["response"] is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"reward_funcs": reward},
        {"reward_weights": [1.0]},
        {"reward_funcs": [lambda **_: []], "reward_weights": [1.0, 2.0]},
    ],
)
def test_rewards_that_do_not_go_together(arguments):
    with pytest.raises(ValueError, match="reward_"):
        LoraGAN(base_folder(), **arguments)


def test_the_reward_assigned_last_is_meant():
    gan = small_gan(reward_funcs=[lambda prompts, **_: [1.0] * len(prompts)])
    assert gan.step(PROMPTS[0])["true_reward"] == 1.0
    gan.compute_reward = lambda response, target: 2.0
    assert gan.step(PROMPTS[0])["true_reward"] == 2.0


def test_nothing_to_learn_from():
    with pytest.raises(ValueError, match="reward_weight=0"):
        small_gan(reward_weight=0.0).step(PROMPTS[0])


def test_a_gradient_that_is_not_finite_changes_nothing():
    gan = small_gan()
    gan.step(PROMPTS[:2])
    before = player_state(gan, "generator")
    with torch.no_grad():
        kept = gan.players.heads_MH[0, 0].item()
    gan.generator._reinforce = lambda *_: (
        (gan.players.parameters("generator")[0].sum() * float("nan")).backward()
        or PolicyLosses(0.0, 0.0, torch.zeros(1))
    )
    assert gan.step(PROMPTS[:2], train_disc=False)["gen_skipped"] == 1
    before["optimizer"]["skipped"] = 1
    assert differences(before, player_state(gan, "generator")) == []
    assert gan.players.heads_MH[0, 0].item() == kept


@pytest.mark.parametrize(
    "options", [{"top_p": 0}, {"temperature": -1}, {"max_completion_length": 0}, {"best_of": 1.5}, {"best_of": 0}]
)
def test_generation_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        small_gan().generate("the cat", **options)


def test_evaluation_does_not_depend_on_the_batch_size():
    gan = small_gan()
    rows = [{"prompt": "the cat", "target": "x"}] * 3 + [{"prompt": "a dog", "target": "y"}]
    runs = [gan.evaluate(rows, batch_size=size)["samples"] for size in (1, 4)]
    assert [s["response"] for s in runs[0]] == [s["response"] for s in runs[1]]
    assert len({s["response"] for s in runs[0]}) > 2  # equal prompts are told apart all the same


def test_score_checks_every_pair_for_itself():
    gan = small_gan(base_folder("gpt2"))
    context = gan.players.base.context
    long_prompt, long_response = "a" * (context - 5), "b" * (context - 5)
    assert len(gan.score([long_prompt, "a"], ["b", long_response])) == 2
    gan.score("a", "b" * (context - 1))  # all places used: no room for the end, as when sampling ran to its limit
    with pytest.raises(ValueError, match="do not fit"):
        gan.score(long_prompt, long_response)


def test_columns_may_bear_any_name(tmp_path):
    seen = []

    def total(prompts, completions, **columns):
        seen.append(sorted(columns))
        return [float(len(completion)) for completion in completions]

    rows = [{"prompt": prompt, "adversarial": 1, "train_gen": "yes"} for prompt in PROMPTS[:2]]
    small_gan(reward_funcs=[total], output_dir=str(tmp_path)).fit(rows, steps=1, progress=False)
    assert {"adversarial", "train_gen"} <= set(seen[0])


def test_a_step_that_raised_takes_its_rows_again(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.compute_reward = lambda response, target: 1 / 0
    with pytest.raises(ValueError):
        gan.fit([{"prompt": prompt} for prompt in PROMPTS], steps=1, progress=False)
    assert gan.position == 0


@pytest.mark.parametrize("dataset", [["text"], [{"prompt": "a", "target": 3}], [{"text": "a"}], []])
def test_datasets_that_are_none(dataset):
    with pytest.raises(ValueError):
        small_gan().fit(dataset, steps=1)


def test_an_adapter_of_another_trainer_brings_no_optimizer(tmp_path):
    gan = small_gan()
    gan.step(PROMPTS[:2])
    gan.save_checkpoint(step=1, ckpt_dir=tmp_path)
    folder = tmp_path / "step-1" / "generator"
    torch.save({"state": {}, "param_groups": [{"params": []}]}, folder / "optimizer.pt")
    (folder.parent / "manifest.json").unlink()  # which another trainer's adapter has none of
    gan.load_generator(folder)
    assert gan.generator.optimizer.adamw.state_dict()["state"] == {}
    assert adapter_state(gan.players, "generator").keys() == torch.load(folder / "adapter_model.bin").keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--heldout", "none"], "--heldout"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--discriminator", "sometimes"], "sometimes"),
        (["demo", "--output-dir", "a-file/below"], "a-file"),
        (["demo-chat", "--steps", "0"], "--steps"),
        (["demo-chat", "--discriminator", "off"], "--discriminator"),
        ([], "COMMAND"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, words, tmp_path):
    (tmp_path / "a-file").touch()
    run = subprocess.run(
        [sys.executable, "-m", "lora_gan", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    assert run.returncode == 2
    assert words in run.stderr and "Traceback" not in run.stderr
