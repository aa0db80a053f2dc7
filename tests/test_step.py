"""step(): what it returns, who learns, what it asks, what it refuses.

Oracles: the interface as documented; copies of both players taken before a step (bitwise); predictions recomputed
before the step; plain RLOO by a run without discriminator, and supervised fine-tuning by a loop written here on stock
PEFT, AdamW and clipping (bitwise equal).
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    ARCHITECTURES,
    BOS,
    EOS,
    OTHER_EOS,
    PAD,
    PROMPTS,
    SMALL,
    TARGETS,
    base_folder,
    copies,
    differences,
    player_state,
    response_ids,
    reward,
    rollout_of,
    small_gan,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan import Config, LoraGAN, rewards
from lora_gan.model.adapter_files import adapter_state

FIRST_SIX = ["prompt", "response", "true_reward", "disc_loss", "pred_reward", "gen_loss"]


# --- what it returns --------------------------------------------------------------------------------------------------


def plain(value) -> bool:
    if type(value) in (list, tuple):
        return type(value) is list and all(map(plain, value))
    return value is None or type(value) in (str, float, int, bool)


def test_one_prompt_returns_the_first_sampled_response():
    out = small_gan().step(prompt=PROMPTS[0], target_text=TARGETS[0], train_gen=True, train_disc=True)
    assert list(out)[:6] == FIRST_SIX
    assert out["prompt"] == PROMPTS[0]
    for name, kind in zip(FIRST_SIX, (str, str, float, float, float, float), strict=True):
        assert type(out[name]) is kind, name
    assert all(map(plain, out.values())), {name: type(value) for name, value in out.items() if not plain(value)}
    for one, many in (("response", "responses"), ("true_reward", "true_rewards"), ("pred_reward", "pred_rewards")):
        assert len(out[many]) == SMALL["num_generations"] and out[one] == out[many][0]
    assert out["true_rewards"] == [reward(response) for response in out["responses"]]
    assert out["reward_mean"] == pytest.approx(np.mean(out["true_rewards"]))
    assert len(set(out["responses"])) > 1, "a group of one response repeated"
    assert json.loads(json.dumps(out)) == out


@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_prompts_return_lists(count):
    gan = small_gan()
    gan.step(PROMPTS[0])
    out = gan.step(PROMPTS[:count], TARGETS[:count])
    assert list(out)[:6] == FIRST_SIX and out["prompt"] == PROMPTS[:count]
    for one, many, kind in (
        ("response", "responses", str), ("true_reward", "true_rewards", float), ("pred_reward", "pred_rewards", float),
    ):  # fmt: skip
        assert [len(group) for group in out[many]] == [SMALL["num_generations"]] * count
        assert out[one] == [group[0] for group in out[many]]
        assert all(type(value) is kind for value in out[one])
    assert all(map(plain, out.values()))
    assert out["true_rewards"] == [[reward(response) for response in group] for group in out["responses"]]
    assert out["reward_mean"] == pytest.approx(np.mean(out["true_rewards"]))
    assert type(out["disc_loss"]) is float and type(out["gen_loss"]) is float


def test_batch_and_single_are_the_same_step():
    """The same prompt alone, and as a list of one: the same learning and the same numbers."""
    one, many = small_gan(), small_gan()
    a, b = one.step(PROMPTS[0], TARGETS[0]), many.step([PROMPTS[0]], [TARGETS[0]])
    lists = {"prompt", "response", "true_reward", "pred_reward", "responses", "true_rewards", "pred_rewards"}
    assert {name: [value] if name in lists else value for name, value in a.items()} == b
    for player in ("generator", "discriminator"):
        assert differences(player_state(one, player), player_state(many, player)) == []


def test_what_was_not_asked_is_none():
    asked = []

    def counting(response, target):
        asked.append(response)
        return reward(response)

    gan = small_gan(query_rate=0.25, query_design="uniform", num_generations=8, reward=counting)
    for _ in range(3):
        asked.clear()
        out = gan.step(PROMPTS[:2])
        answers = [value for group in out["true_rewards"] for value in group]
        assert sum(value is not None for value in answers) == len(asked) == out["asked"] == 4, "a quarter of 16"
        assert all(sum(value is not None for value in group) == 2 for group in out["true_rewards"]), "its share a group"
        told = [
            (text, value)
            for texts, values in zip(out["responses"], out["true_rewards"], strict=True)
            for text, value in zip(texts, values, strict=True)
            if value is not None
        ]
        assert [text for text, _ in told] == asked and all(value == reward(text) for text, value in told)
        assert out["reward_mean"] == pytest.approx(np.mean([value for _, value in told]))
        assert all(type(value) is float for group in out["pred_rewards"] for value in group)
    assert gan.reward_calls == out["reward_calls"] == 12


@pytest.mark.filterwarnings("ignore:num_generations=1")
def test_a_group_of_one():
    gan = small_gan(num_generations=1)
    before = player_state(gan, "generator")
    for _ in range(2):
        out = gan.step(PROMPTS[0])
    assert len(out["responses"]) == 1 and type(out["gen_loss"]) is float and math.isfinite(out["gen_loss"])
    after = player_state(gan, "generator")
    assert differences(before["parameters"], after["parameters"]) != [], "the running mean leaves something to learn"
    assert gan.generator.baseline.weight > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_response_has_neither_prompt_nor_special_tokens(architecture):
    gan = small_gan(
        base_folder(architecture, "own", eos_ids=2), max_completion_length=40, num_generations=16, temperature=1.5
    )
    ended = 0
    for step in range(3):
        out = gan.step(PROMPTS[step])
        for text in out["responses"]:
            assert PROMPTS[step] not in text
            assert not any(token in text for token in (EOS, PAD, BOS, OTHER_EOS, "<|"))
        ended += out["completion_length"] < 40
    assert ended == 3, "no response ended: no special token was there to be left out"


def test_pred_reward_is_fresh():
    """What the discriminator says of these responses before this step's training, not after it."""
    gan = small_gan(base_folder(words=True), learning_rate=1e-4)
    gan.step(["the cat", "a dog"])
    prompts = ["the cat", "a dog"]
    sampled = rollout_of(gan, prompts, SMALL["num_generations"])
    before = gan.discriminator.predict(sampled).mean(0).reshape(2, -1)
    out = gan.step(prompts)
    after = gan.discriminator.predict(sampled).mean(0).reshape(2, -1)
    assert out["pred_rewards"] == before.tolist()
    assert np.abs(after - before).max() > 1e-3


# --- who learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [None, True, False])
@pytest.mark.parametrize("train_disc", [True, False])
@pytest.mark.parametrize("train_gen", [True, False])
def test_who_moves(train_gen, train_disc, adversarial):
    gan = small_gan(imitation_weight=0.1)
    gan.step(PROMPTS[:2], TARGETS[:2])
    before = {player: player_state(gan, player) for player in ("generator", "discriminator")}
    out = gan.step(PROMPTS[1:3], TARGETS[1:3], train_gen, train_disc, adversarial=adversarial)
    for player, trained, loss in (("generator", train_gen, "gen_loss"), ("discriminator", train_disc, "disc_loss")):
        found = differences(before[player], player_state(gan, player))
        if trained:
            assert all(not torch.equal(a, b) for a, b in zip(
                before[player]["parameters"], gan.players.parameters(player), strict=True
            )), player  # fmt: skip
            assert type(out[loss]) is float
        else:
            assert found == [], player
            assert out[loss] is None
    assert all(parameter.grad is None for parameter in gan.players.peft.parameters()), "a gradient was left behind"
    assert out["step"] == gan.global_step == 2
    assert all(map(plain, out.values()))


def test_adversarial_asks_the_true_reward_only_to_train_the_discriminator():
    asked = []

    def counting(response, target):
        asked.append(response)
        return reward(response)

    gan = small_gan(reward=counting)
    gan.step(PROMPTS[0], train_disc=False, adversarial=True)
    assert asked == []
    out = gan.step(PROMPTS[0], train_disc=False, adversarial=True)
    assert out["true_reward"] is None and out["true_rewards"] == [None] * 4 and out["reward_mean"] is None
    gan.step(PROMPTS[0], train_disc=True, adversarial=True)
    assert len(asked) == SMALL["num_generations"]
    gan.step(PROMPTS[0], train_disc=False, adversarial=False)
    assert len(asked) == 2 * SMALL["num_generations"]


def test_the_signal_is_what_was_asked_for():
    """With the true and the predicted reward opposed, the two modes must learn opposite things."""

    def update_of(adversarial):
        gan = small_gan(beta=0.0, num_generations=8)
        gan.step(PROMPTS[:2], train_gen=False)
        sampled = rollout_of(gan, PROMPTS[:1], 8)
        opposed = dict(zip(sampled.texts, -gan.discriminator.rank(sampled), strict=True))
        assert len(opposed) == 8
        gan.compute_reward = lambda response, target: opposed[response]
        before = copies(gan.players.parameters("generator"))
        gan.step(PROMPTS[0], train_disc=False, adversarial=adversarial)
        return torch.cat(
            [(b - a).flatten() for a, b in zip(before, gan.players.parameters("generator"), strict=True)]
        ).detach()

    predicted, true = update_of(True), update_of(False)
    assert torch.equal(update_of(None), true), "the corrected reward at query rate 1 is the true one"
    assert torch.nn.functional.cosine_similarity(predicted, true, dim=0) < -0.99


# --- the true reward --------------------------------------------------------------------------------------------------


def test_three_ways_to_give_the_reward():
    def length(response, target):
        return float(len(response)) + (0.5 if target == TARGETS[0] else 0.0)

    class Mine(LoraGAN):
        def compute_reward(self, response, target):
            return length(response, target)

    assigned = small_gan()
    assigned.compute_reward = length
    outs = [gan.step(PROMPTS[:2], TARGETS[:2]) for gan in (
        small_gan(reward=length), assigned, Mine(base_folder(), **SMALL)
    )]  # fmt: skip
    names = [{name.split("/")[1] for name in out if name.startswith("rewards/")} for out in outs]
    assert names == [{"length"}, {"length"}, {"compute_reward"}]
    alike = [{name: value for name, value in out.items() if not name.startswith("rewards/")} for out in outs]
    assert alike[0] == alike[1] == alike[2]
    assert outs[0]["true_rewards"][0] == [len(response) + 0.5 for response in outs[0]["responses"][0]]
    assert outs[0]["true_rewards"][1] == [len(response) for response in outs[0]["responses"][1]]


def test_reward_funcs_in_trls_form():
    seen = []

    def length(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    def bonus(prompts, completions, bonus, **columns):
        seen.append((prompts, completions, bonus, columns))
        return [None if b is None else float(b) for b in bonus]

    gan = small_gan(reward_funcs=[length, bonus], reward_weights=[0.5, 2.0])
    out = gan.step(PROMPTS[:2], TARGETS[:2], bonus=[10, None])
    assert out["true_rewards"] == [
        [0.5 * len(text) + 20 for text in out["responses"][0]],
        [0.5 * len(text) for text in out["responses"][1]],
    ]
    prompts, completions, given, columns = seen[0]
    assert prompts == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4 and given == [10] * 4 + [None] * 4
    assert completions == out["responses"][0] + out["responses"][1]
    assert columns["target"] == [TARGETS[0]] * 4 + [TARGETS[1]] * 4
    assert out["rewards/bonus"] == 10.0
    assert out["rewards/length"] == pytest.approx(np.mean([len(text) for text in completions]))
    single = gan.step(PROMPTS[0], bonus=3)
    assert single["true_rewards"] == [0.5 * len(text) + 6 for text in single["responses"]]


@pytest.mark.filterwarnings("ignore:the reward .* answered for none of the step's")
def test_an_unanswered_reward_is_none_and_learning_goes_on():
    gan = small_gan(reward=lambda response, target: None if len(response) % 2 else reward(response), num_generations=8)
    out = gan.step(PROMPTS[:2])
    answers = [value for group in out["true_rewards"] for value in group]
    texts = [text for group in out["responses"] for text in group]
    assert [value is None for value in answers] == [bool(len(text) % 2) for text in texts]
    assert 0 < out["unanswered"] == sum(value is None for value in answers) < 16
    none = small_gan(reward=lambda response, target: None)
    out = none.step(PROMPTS[0])
    assert out["disc_loss"] is None and math.isfinite(out["gen_loss"]) and out["reward_mean"] is None


def test_no_target_where_the_reward_needs_none():
    gan = small_gan(reward=lambda response, target: 1.0 if target is None else 0.0)
    assert gan.step(PROMPTS[0])["true_rewards"] == [1.0] * 4
    assert gan.step(PROMPTS[:2], [None, TARGETS[1]])["true_rewards"] == [[1.0] * 4, [0.0] * 4]


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"adversarial": True, "reward_signal": "true"},
        {"adversarial": False, "reward_signal": "predicted"},
        {"adversarial": False, "query_rate": 0.5},
        {"reward_signal": "true", "query_rate": 0.5},
        {"reward_signal": "true", "gradient_path": "straight_through"},
        {"adversarial": False, "gradient_path": "straight_through"},
        {"query_rate": 0.0}, {"query_rate": 1.5}, {"temperature": 0.0}, {"num_generations": 0},
        {"learning_rate": float("nan")}, {"beta": -1.0}, {"gradient_path": "reinforce"}, {"adversarial": "yes"},
        {"gradient_checkpointing": "false"},
        {"num_generations": 2.5}, {"beta": float("inf")}, {"learning_rate": float("inf")}, {"seed": "one"},
        {"lr_scheduler_type": "zigzag"},
        {"leanring_rate": 1e-3},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_contradict_each_other_or_make_no_sense_raise(settings):
    with pytest.raises(ValueError):
        small_gan(**settings)


def test_an_unknown_setting_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="learning_rate"):
        small_gan(leanring_rate=1e-3)


@pytest.mark.parametrize(
    ("settings", "arguments", "options"),
    [
        ({"query_rate": 0.5}, (PROMPTS[0],), {"adversarial": False}),
        ({"gradient_path": "straight_through"}, (PROMPTS[0],), {"adversarial": False}),
        ({"reward_signal": "predicted"}, (PROMPTS[0],), {"adversarial": False}),
        ({}, ("",), {}),
        ({}, ([],), {}),
        ({}, ([PROMPTS[0], 3],), {}),
        ({}, (PROMPTS[:2], TARGETS[:1]), {}),
        ({}, (PROMPTS[:2], TARGETS[0]), {}),
        ({}, (PROMPTS[0], TARGETS[:1]), {}),
        ({}, (PROMPTS[:2],), {"column": [1]}),
        ({}, ("word " * 200,), {}),
        ({"imitation_weight": 1.0}, (PROMPTS[0],), {}),
        ({"imitation_weight": 1.0}, (PROMPTS[:2], [TARGETS[0], None]), {}),
        ({"imitation_warmup_steps": 2}, (PROMPTS[0],), {}),
        ({"reward": lambda response, target: "good"}, (PROMPTS[0],), {}),
        ({"reward": lambda response, target: float("nan")}, (PROMPTS[0],), {}),
        ({"reward": lambda response, target: 1 / 0}, (PROMPTS[0],), {}),
    ],
)
def test_a_refused_step_raises_and_leaves_no_trace(settings, arguments, options):
    """Whatever was wrong, the next step is that of a run in which the refused one never was."""
    gan, undisturbed = small_gan(**settings), small_gan(**settings)
    with pytest.raises(ValueError):
        gan.step(*arguments, **options)
    for each in (gan, undisturbed):
        each.compute_reward = reward
    a, b = gan.step(PROMPTS[:2], TARGETS[:2]), undisturbed.step(PROMPTS[:2], TARGETS[:2])
    for player in ("generator", "discriminator"):
        assert differences(player_state(undisturbed, player), player_state(gan, player)) == []
    a.pop("reward_calls"), b.pop("reward_calls")  # a call that failed may count
    assert a == b


def test_a_missing_target_is_told_before_the_reward_is_asked():
    """True rewards are costly: none is spent on a step that cannot be finished."""
    asked = []
    gan = small_gan(imitation_weight=1.0, reward=lambda response, target: asked.append(response) or 0.0)
    with pytest.raises(ValueError, match="target_text"):
        gan.step(PROMPTS[0])
    assert asked == []


def test_reward_and_reward_funcs_together_raise():
    with pytest.raises(ValueError, match="reward_funcs"):
        LoraGAN(base_folder(), reward=reward, reward_funcs=[lambda **_: []])


def test_a_bad_reward_is_named():
    def strange(response, target):
        return "very good"

    with pytest.raises(rewards.RewardError, match="strange"):
        small_gan(reward=strange).step(PROMPTS[0])


# --- what it reduces to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"disc_updates": 5}, {"num_generations": 1}], ids=str)
@pytest.mark.filterwarnings("ignore:num_generations=1")
def test_query_rate_one_is_exactly_plain_rloo(settings):
    """The defaults, discriminator and all, against a run in which no discriminator ever learns or is listened to."""
    whole = small_gan(**settings)
    plain_rloo = small_gan(adversarial=False, **{**settings, "disc_updates": 1})
    for step in range(4):
        prompts = PROMPTS[step % 2 : step % 2 + 3]
        a, b = whole.step(prompts), plain_rloo.step(prompts, train_disc=False)
        assert a["responses"] == b["responses"] and a["gen_loss"] == b["gen_loss"]
    assert differences(player_state(whole, "generator"), player_state(plain_rloo, "generator")) == []
    assert differences(player_state(whole, "discriminator"), player_state(plain_rloo, "discriminator")) != []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_weight_zero_is_exactly_supervised_fine_tuning(architecture):
    """Against a loop on stock PEFT: cross-entropy on target and end, mean over tokens, AdamW, clipping at 1."""
    base, rate = base_folder(architecture, "own"), 5e-3
    gan = small_gan(base, reward_weight=0.0, imitation_weight=1.0, learning_rate=rate, max_completion_length=24)

    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(
            r=SMALL["lora_r"], lora_alpha=SMALL["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    ).eval()
    start = {
        name.replace(".weight", ".default.weight"): w for name, w in adapter_state(gan.players, "generator").items()
    }
    assert {name for name, p in stock.named_parameters() if p.requires_grad} == set(start)
    stock.load_state_dict({name: weight.detach().clone() for name, weight in start.items()}, strict=False)
    trained = [parameter for parameter in stock.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)

    for step in range(6):
        prompt, target = PROMPTS[step % 4], TARGETS[step % 4]
        out = gan.step(prompt, target, train_disc=False)
        assert out["response"] is None and out["true_reward"] is None

        prompt_ids = tokenizer(prompt)["input_ids"]
        target_ids = tokenizer(target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        logits = stock(
            input_ids=torch.tensor([prompt_ids + target_ids]), logits_to_keep=len(target_ids) + 1, use_cache=False
        ).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target_ids))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert out["gen_loss"] == pytest.approx(loss.item(), abs=1e-6)

    for ours, theirs in zip(gan.players.parameters("generator"), trained, strict=True):
        assert (ours - theirs).abs().max() < 1e-2 * rate, "to rounding: the same sums, in another order"
    assert not any(
        torch.equal(a, b) for a, b in zip(trained, small_gan(base).players.parameters("generator"), strict=True)
    )


def test_imitation_of_a_batch_is_the_mean_of_its_rows():
    """Left-padded rows of different length against stock cross-entropy on each row alone."""
    gan = small_gan(imitation_weight=1.0, reward_weight=0.0, max_completion_length=24)
    losses = []
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        ids, answer = gan._encode([prompt])[0], response_ids(gan, target)
        with torch.no_grad(), gan.players.use_adapter("reference"):
            logits = gan.players.lm(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
    out = gan.step(PROMPTS, TARGETS, train_disc=False)
    assert out["imitation_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_config_is_frozen_and_round_trips_through_json():
    config = Config(query_rate=0.5, report_to=["wandb"], seed=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4


def test_a_config_object_and_settings_by_name_are_the_same():
    named = small_gan(seed=7, query_rate=0.5)
    given = LoraGAN(base_folder(), Config(**SMALL, seed=3), reward=reward, seed=7, query_rate=0.5)
    assert named.config == given.config and named.step(PROMPTS[0]) == given.step(PROMPTS[0])


def test_where_nothing_is_predicted_yet_an_adversarial_generator_stays_where_it_is():
    """AdamW would make a step of full size of a gradient that is rounding alone."""
    gan = small_gan(adversarial=True, query_rate=0.5)
    before = copies(gan.players.parameters("generator"))
    first = gan.step(PROMPTS[:2], TARGETS[:2])
    assert first["gen_grad_norm"] == 0 and first["kl"] == 0
    assert all(map(torch.equal, before, gan.players.parameters("generator")))
    assert gan.step(PROMPTS[:2], TARGETS[:2])["gen_grad_norm"] > 0


@pytest.mark.parametrize("gradient_path", ["policy_gradient", "straight_through"])
def test_micro_batches_change_nothing_but_rounding(gradient_path):
    whole = small_gan(gradient_path=gradient_path, imitation_weight=0.1)
    parts = small_gan(gradient_path=gradient_path, imitation_weight=0.1, micro_batch_size=3)
    for _ in range(2):
        a, b = whole.step(PROMPTS[:3], TARGETS[:3]), parts.step(PROMPTS[:3], TARGETS[:3])
    assert a["responses"] == b["responses"]
    for name, value in a.items():
        if type(value) is float:
            assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_reward_that_answers_nothing_warns():
    gan = small_gan(reward=lambda response, target: None)
    with pytest.warns(UserWarning, match="answered for none of the step's 4 responses"):
        out = gan.step(PROMPTS[0])
    assert out["reward_mean"] is None and out["true_rewards"] == [None] * 4
