"""Checkpoints: the layout, bitwise resume, and what is refused.

Oracle: a run that was never interrupted. The other run is saved half-way and continued in a new process, with another
PYTHONHASHSEED and other global random states; weights, optimizers, replay and every output must be bitwise equal.
"""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    PROMPTS,
    TARGETS,
    base_folder,
    copies,
    differences,
    player_state,
    python,
    read_json,
    reward,
    sign,
    small_gan,
)
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import save_file

from lora_gan import LoraGAN
from lora_gan.training import guard

pytestmark = [
    # What some of VARIANTS tell, in a fixture too.
    pytest.mark.filterwarnings("ignore:num_generations=1"),
    pytest.mark.filterwarnings("ignore:step .* calls of reward_budget are spent"),
]

ROWS = [{"prompt": f"{PROMPTS[i % 4]} {i}", "target": TARGETS[i % 4]} for i in range(8)]

VARIANTS = {
    "step": {},
    "fit": {},
    "query rate": {"query_rate": 0.5},
    "straight-through": {"query_rate": 0.5, "gradient_path": "straight_through"},
    "groups of one": {"num_generations": 1},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 8, "disc_updates": 3},
    "warm-up": {"imitation_warmup_steps": 4, "imitation_weight": 0.5},
    "normalized": {"multi_objective_aggregation": "normalize_then_sum", "query_rate": 0.5},
    "small replay": {"disc_replay_groups": 4, "micro_batch_size": 3},
    "predicted": {"adversarial": True},
    "mixed": {"reward_signal": "mixed", "query_rate": 0.5, "num_generations": 3},
    "budget": {"reward_budget": 20, "query_rate": 0.5, "query_design": "uniform"},
    "clipped": {"num_iterations": 2, "micro_batch_size": 3, "kl_target": 0.5},
    "imitation": {"imitation_weight": 0.5},
    "real against generated": {"adversarial": True, "disc_objective": "real_vs_generated"},
    "rollback": {"on_exploit": "rollback"},
}


def advance(gan, variant, first, last):
    """Steps first … last − 1 of a variant's run; their records."""
    if variant == "fit":
        return gan.fit(ROWS, steps=last - first, progress=False)
    records = []
    with pytest.MonkeyPatch.context() as patch:
        if variant == "rollback":  # so that the monitor keeps a generator within these few steps
            patch.setattr(guard, "WINDOW", 2)
        for step in range(first, last):
            if step % 3 == 2:
                records.append(gan.step(PROMPTS[step % 4], TARGETS[step % 4]))
            else:
                records.append(gan.step(PROMPTS[step % 2 :: 2], TARGETS[step % 2 :: 2]))
    return records


def everything(gan):
    return {
        "generator": player_state(gan, "generator"),
        "discriminator": player_state(gan, "discriminator"),
        "counters": [gan.global_step, gan.position, gan.reward_calls],
        "scales": gan.reward_scales.state_dict(),
        "monitor": gan.monitor.state_dict(),
        "beta": gan.generator.beta_scale,
    }


def continue_all(folder):
    """Run in the new process: load every variant's third step, go on to the sixth, and note all of it."""
    torch.set_num_threads(1)
    for other_state in (lambda: random.seed(99), lambda: np.random.seed(98), lambda: torch.manual_seed(97)):
        other_state()
    for number, variant in enumerate(VARIANTS):
        gan = LoraGAN.from_checkpoint(Path(folder) / str(number), reward=reward)
        records = advance(gan, variant, 3, 6)
        torch.save({"records": records, "everything": everything(gan)}, Path(folder) / f"{number}.continued")


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """Where the new process left the second halves of all variants."""
    folder = tmp_path_factory.mktemp("resume")
    for number, (variant, settings) in enumerate(VARIANTS.items()):
        gan = small_gan(**settings, output_dir=str(folder / str(number)))
        advance(gan, variant, 0, 3)
        gan.save_checkpoint()
    python("import sys, test_checkpoint; test_checkpoint.continue_all(sys.argv[1])", str(folder), hash_seed=777)
    return folder


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=list(VARIANTS))
def test_a_new_process_continues_to_the_bit(continued, number, tmp_path):
    variant, settings = list(VARIANTS.items())[number]
    gan = small_gan(**settings, output_dir=str(tmp_path))
    at_start = copies(gan.players.parameters("generator") + gan.players.parameters("discriminator"))
    records = advance(gan, variant, 0, 6)
    other = torch.load(continued / f"{number}.continued", weights_only=True)
    assert differences(records[3:], other["records"]) == []
    assert differences(everything(gan), other["everything"]) == []
    now = gan.players.parameters("generator") + gan.players.parameters("discriminator")
    assert not any(torch.equal(a, b) for a, b in zip(at_start, now, strict=True)), "a weight never moved"
    assert len(gan.discriminator.replay) > 0


def test_going_back_in_the_same_object_forgets_what_came_after(tmp_path):
    gan = small_gan(query_rate=0.5, num_generations=2, output_dir=str(tmp_path))
    advance(gan, "step", 0, 2)
    gan.save_checkpoint()
    first = advance(gan, "step", 2, 4), everything(gan)
    gan.load_checkpoint(step=2)
    second = advance(gan, "step", 2, 4), everything(gan)
    assert differences(first, second) == []


def test_saving_changes_nothing_in_memory(tmp_path):
    gan = small_gan()
    advance(gan, "step", 0, 2)
    before = everything(gan)
    gan.save_checkpoint(ckpt_dir=tmp_path)
    assert differences(before, everything(gan)) == []


# --- layout -----------------------------------------------------------------------------------------------------------

SIX = [
    f"{player}/{file}"
    for player in ("generator", "discriminator")
    for file in ("adapter_config.json", "adapter_model.bin", "optimizer.pt")
]


@pytest.mark.parametrize("training", [(True, True), (True, False), (False, True), (False, False)])
def test_the_six_files_exist_whoever_trained(training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gan = small_gan()
    gan.step(PROMPTS[0], TARGETS[0], *training)
    folder = gan.save_checkpoint(step=100)
    assert folder.resolve() == tmp_path / "checkpoints" / "step-100", "the folder users were promised"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(SIX) <= files
    assert [path.name for path in folder.parent.glob("[!.]*")] == ["step-100"], "nothing half-written is left"
    gan.load_checkpoint(step=100)


@pytest.mark.parametrize("file", [*SIX, "trainer_state.json"])
@pytest.mark.filterwarnings("ignore:the checkpoint of step 2 is skipped")
def test_an_incomplete_folder_is_skipped(file, tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    gan.step(PROMPTS[0])
    gan.save_checkpoint()
    complete = everything(gan)
    gan.step(PROMPTS[1])
    (gan.save_checkpoint() / file).unlink()
    gan.load_checkpoint()
    assert differences(complete, everything(gan)) == []
    assert LoraGAN.from_checkpoint(tmp_path, reward=reward).global_step == 1
    with pytest.raises(ValueError, match="1"):
        gan.load_checkpoint(step=2)


@pytest.mark.parametrize("fails_at", [1, 3, 4])
def test_a_save_that_breaks_off_leaves_the_old_one_whole(fails_at, tmp_path, monkeypatch):
    gan = small_gan(output_dir=str(tmp_path))
    gan.step(PROMPTS[0])
    gan.save_checkpoint(step=1)
    saved = everything(gan)
    gan.step(PROMPTS[1])
    calls, real = [], torch.save

    def breaking(*arguments, **options):
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError("no space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(torch, "save", breaking)
        gan.save_checkpoint(step=1)
    assert LoraGAN.from_checkpoint(tmp_path, reward=reward).global_step == 1
    gan.load_checkpoint(step=1)
    assert differences(saved, everything(gan)) == []


def test_save_steps_and_save_total_limit(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "all"), save_steps=2)
    gan.fit(ROWS, steps=5, progress=False)
    assert sorted(path.name for path in (tmp_path / "all").glob("step-*")) == ["step-2", "step-4", "step-5"]
    gan = small_gan(output_dir=str(tmp_path / "two"), save_steps=1, save_total_limit=2)
    gan.fit(ROWS, steps=11, progress=False)
    # By number, not by name: step-9 comes before step-10.
    assert sorted(path.name for path in (tmp_path / "two").glob("step-*")) == ["step-10", "step-11"]


def test_without_save_steps_fit_saves_at_the_end_only(tmp_path):
    """As the comment beside the setting says."""
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=2, progress=False)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-2"]


# --- finding ----------------------------------------------------------------------------------------------------------


def test_from_checkpoint_of_a_run_and_of_one_step(tmp_path):
    gan = small_gan(output_dir=str(tmp_path / "run"), query_rate=0.5, learning_rate=3e-3)
    for step in range(11):
        gan.step(PROMPTS[step % 4])
        if step in (8, 9, 10):
            gan.save_checkpoint()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    newest = LoraGAN.from_checkpoint(tmp_path / "moved", reward=reward)
    assert newest.global_step == 11, "the newest by number, not by name"
    assert differences(everything(gan), everything(newest)) == []
    assert newest.config.query_rate == 0.5 and newest.config.learning_rate == 3e-3
    assert Path(newest.config.output_dir) == tmp_path / "moved"
    older = LoraGAN.from_checkpoint(tmp_path / "moved" / "step-9", reward=reward, query_rate=1.0)
    assert older.global_step == 9 and older.config.query_rate == 1.0


def test_a_missing_step_names_those_that_are_there(tmp_path):
    gan = small_gan(output_dir=str(tmp_path))
    for step in (3, 12):
        gan.save_checkpoint(step=step)
    with pytest.raises(ValueError, match="3, 12"):
        gan.load_checkpoint(step=4)
    with pytest.raises(ValueError):
        gan.load_checkpoint(ckpt_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError):
        LoraGAN.from_checkpoint(tmp_path / "nowhere", reward=reward)


def test_a_base_that_is_not_on_this_machine_is_not_fetched(tmp_path):
    folder = small_gan(output_dir=str(tmp_path)).save_checkpoint(step=1)
    state = read_json(folder / "trainer_state.json")
    text = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(text.replace(state["base"]["path"], "a-stranger/model"))
    sign(folder)
    with pytest.raises(ValueError, match="model="):
        LoraGAN.from_checkpoint(folder, reward=reward)
    assert LoraGAN.from_checkpoint(folder, base_folder(), reward=reward).global_step == 0


# --- refusing ---------------------------------------------------------------------------------------------------------


def other_base(folder):
    return small_gan(base_folder(seed=1)).save_checkpoint(step=1, ckpt_dir=folder)


def other_rank(folder):
    return small_gan(lora_r=2).save_checkpoint(step=1, ckpt_dir=folder)


def other_disc_rank(folder):
    return small_gan(disc_lora_r=2).save_checkpoint(step=1, ckpt_dir=folder)


def other_layers(folder):
    own = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"])
    return small_gan(peft_config=own, lora_r=16, lora_alpha=32).save_checkpoint(step=1, ckpt_dir=folder)


def spoiled(file, change):
    def make(folder):
        gan = small_gan()
        gan.step(PROMPTS[0])
        step = gan.save_checkpoint(step=1, ckpt_dir=folder)
        change(step / file)
        return step

    make.__name__ = f"{change.__name__} {file}"
    return make


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def of_the_other_player(file):
    other = {"generator": "discriminator", "discriminator": "generator"}[file.parent.name]
    shutil.copy(file.parents[1] / other / file.name, file)


def not_safetensors(file):
    file.unlink()
    (file.parent / "adapter_model.safetensors").write_bytes(b"not safetensors")


REFUSED = [
    other_base, other_rank, other_disc_rank, other_layers,
    spoiled("trainer_state.json", cut),
    spoiled("generator/adapter_model.bin", cut),
    spoiled("generator/optimizer.pt", emptied),
    spoiled("discriminator/adapter_model.bin", cut),
    spoiled("discriminator/adapter_model.bin", of_the_other_player),
    spoiled("discriminator/adapter_model.bin", not_safetensors),
    spoiled("discriminator/optimizer.pt", cut),
    spoiled("discriminator/optimizer.pt", of_the_other_player),
    spoiled("generator/optimizer.pt", of_the_other_player),
    spoiled("discriminator/state.safetensors", cut),
    spoiled("discriminator/state.json", cut),
    spoiled("generator/monitor.json", emptied),
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_does_not_fit_is_refused_and_memory_unchanged(make, tmp_path):
    make(tmp_path)
    gan = small_gan()
    gan.step(PROMPTS[0], TARGETS[0])
    before = everything(gan)
    with pytest.raises(ValueError):
        gan.load_checkpoint(step=1, ckpt_dir=tmp_path)
    assert differences(before, everything(gan)) == []


class Payload:
    """Unpickled carelessly, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "file", ["generator/adapter_model.bin", "generator/optimizer.pt", "discriminator/optimizer.pt"]
)
def test_a_pickle_with_a_payload_is_refused_and_not_executed(file, tmp_path):
    folder = small_gan(output_dir=str(tmp_path / "run")).save_checkpoint(step=1)
    (folder / "discriminator" / "state.json").unlink()  # an earlier version's state.pt is read in its place
    marker = tmp_path / "executed"
    torch.save({"weights": Payload(marker)}, folder / file)
    gan = small_gan(output_dir=str(tmp_path / "run"))
    swap = gan.load_generator if file.startswith("generator") else gan.load_discriminator
    for attempt in (lambda: gan.load_checkpoint(step=1), lambda: swap(folder)):
        with pytest.raises(ValueError):
            attempt()
        assert not marker.exists()
    torch.load(folder / file, weights_only=False)
    assert marker.exists(), "the payload is harmless: the test shows nothing"


# --- swapping one player ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A checkpoint of another run, and the run's own state."""
    gan = small_gan(seed=5)
    for _ in range(3):
        gan.step(PROMPTS[:2], TARGETS[:2])
    return gan.save_checkpoint(ckpt_dir=tmp_path_factory.mktemp("other")), everything(gan), gan.score("a", "b")


@pytest.mark.parametrize("whole", [True, False], ids=["step folder", "player folder"])
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_swapping_one_player_leaves_the_other_bitwise(player, whole, two_runs):
    folder, theirs, their_score = two_runs
    other = {"generator": "discriminator", "discriminator": "generator"}[player]
    gan = small_gan()
    for _ in range(2):
        gan.step(PROMPTS[:2], TARGETS[:2])
    before = everything(gan)
    getattr(gan, f"load_{player}")(folder if whole else folder / player)
    after = everything(gan)
    assert differences(before[other], after[other]) == []
    for what in ("parameters", "optimizer") + (("rest",) if player == "discriminator" else ()):
        assert differences(theirs[player][what], after[player][what]) == []
        assert differences(before[player][what], after[player][what]) != []
    if player == "discriminator":
        assert gan.score("a", "b") == their_score
    gan.step(PROMPTS[:2], TARGETS[:2])  # and both still learn
    assert differences(after[player]["parameters"], player_state(gan, player)["parameters"]) != []


def test_a_generator_saved_by_stock_peft_loads(two_runs, tmp_path):
    """Without an optimizer of ours: it begins anew."""
    folder, theirs, _ = two_runs
    AutoPeftModelForCausalLM.from_pretrained(folder / "generator").save_pretrained(tmp_path)
    gan = small_gan()
    gan.step(PROMPTS[0])
    gan.load_generator(tmp_path)
    assert differences(theirs["generator"]["parameters"], player_state(gan, "generator")["parameters"]) == []
    assert gan.generator.optimizer.state_dict()["optimizer"]["state"] == {}


def test_a_discriminator_without_our_state_scores_as_it_did(two_runs, tmp_path):
    folder, _, their_score = two_runs
    shutil.copytree(folder / "discriminator", tmp_path / "d")
    (tmp_path / "d" / "state.json").unlink()
    (tmp_path / "d" / "state.safetensors").unlink()
    gan = small_gan()
    gan.step(PROMPTS[0])
    gan.load_discriminator(tmp_path / "d")
    assert gan.score("a", "b") == pytest.approx(their_score, abs=1e-5)
    assert len(gan.discriminator.replay) == 0
    fresh = gan.step(PROMPTS[0])["pred_rewards"]
    assert all(np.isfinite(fresh))


def test_swapping_in_what_does_not_fit_changes_nothing(tmp_path):
    rank = other_disc_rank(tmp_path / "a")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    gan = small_gan()
    gan.step(PROMPTS[0])
    before = everything(gan)
    for load, path in (
        (gan.load_discriminator, rank), (gan.load_generator, tmp_path),
        (gan.load_generator, tmp_path / "nowhere"), (gan.load_generator, rank / "discriminator"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            load(path)
        assert differences(before, everything(gan)) == []


def test_several_updates_a_step_are_one_step_of_the_schedule():
    """Warm-up and end are counted in steps, whatever a step makes of them."""
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 6}
    once, twice = (small_gan(num_iterations=n, disc_updates=n, **settings) for n in (1, 2))
    rates = [[its.step(PROMPTS[:2])["gen_learning_rate"] for _ in range(6)] for its in (once, twice)]
    assert rates[0] == pytest.approx(rates[1]) and rates[0][-1] > 0


@pytest.mark.parametrize(("before", "after"), [("cosine", "constant"), ("constant", "cosine"), ("cosine", "linear")])
def test_a_run_goes_on_with_the_schedule_that_is_set(tmp_path, before, after):
    """Warming up by one schedule and going on by another; oracle: a run that had the second one all along."""
    schedules = {
        name: {"lr_scheduler_type": name, "warmup_steps": 2 * (name != "constant"), "max_steps": 8}
        for name in ("cosine", "constant", "linear")
    }
    saved = small_gan(**schedules[before], output_dir=str(tmp_path))
    gan, oracle = (small_gan(**schedules[after], output_dir=str(tmp_path)) for _ in range(2))
    for step in range(3):
        for its in (saved, oracle):
            its.step(PROMPTS[step : step + 2])
    path = saved.save_checkpoint()
    gan.load_checkpoint()
    generator_alone = small_gan(**schedules[after])
    generator_alone.load_generator(path)
    expected = [oracle.step(PROMPTS[:2]) for _ in range(2)]
    for its, players in ((gan, ("gen", "disc")), (generator_alone, ("gen",))):
        found = [its.step(PROMPTS[:2]) for _ in range(2)]
        for player in players:
            rates = [[record[f"{player}_learning_rate"] for record in records] for records in (found, expected)]
            assert rates[0] == pytest.approx(rates[1]) and rates[0][0] > 0
