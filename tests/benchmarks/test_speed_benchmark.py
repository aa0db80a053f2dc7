"""The speed, memory and growth benchmarks, shrunken: every arm writes the same, phases sum to the step, runs go on."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from helpers import base_folder

# TRL gives transformers a setting by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import growth
    import speed

    for script in (growth, speed):  # what they silence would stay silent for the next tests
        monkeypatch.setattr(script, "quiet", lambda: None)


@pytest.fixture
def workload(tmp_path):
    import arms

    shape = arms.Shape("test", str(base_folder()), prompts=1, group=2, tokens=4, prompt_tokens=12)
    return arms.prepare(shape, tmp_path / "base")


def names():
    return ("lora_gan", "lora_gan_fresh", "lora_gan_upper", "two_models", "plain_rl")


def test_every_arm_writes_as_many_responses_of_the_same_length(workload):
    import arms

    with arms.built(names(), workload) as built:
        for _ in range(2):
            wrote = {name: arm.step() for name, arm in built.items()}
            assert set(wrote.values()) == {arms.Wrote(responses=2, mean=4.0, least=4, most=4)}, wrote


def test_trl_writes_as_many_and_its_reward_model_learns(workload):
    pytest.importorskip("trl", reason="the peer is not installed")
    import arms

    with arms.built(["trl"], workload) as built:
        arm = built["trl"]
        players = [[parameter for parameter in model.parameters() if parameter.requires_grad] for model in arm.models()]
        for _ in range(2):
            before = [[parameter.detach().clone() for parameter in its] for its in players]
            assert arm.step() == arms.Wrote(responses=2, mean=4.0, least=4, most=4)
        for its, were in zip(players, before, strict=True):
            assert any(not parameter.equal(was) for parameter, was in zip(its, were, strict=True))
    assert not arm.thread.is_alive()


def test_both_players_of_the_two_models_learn(workload):
    import arms

    with arms.built(["two_models"], workload) as built:
        arm = built["two_models"]
        before = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in arm.models()]
        arm.step()
        for model, were in zip(arm.models(), before, strict=True):
            moved = {name for name, parameter in model.named_parameters() if not parameter.equal(were[name])}
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            assert moved and moved <= trained


def test_the_discriminator_of_the_upper_layers_stands_there_alone(workload):
    import arms
    from machine import linear_layers

    with arms.built(["lora_gan_upper", "lora_gan_fresh"], workload) as built:
        sizes = {}
        for name, arm in built.items():
            body, _ = linear_layers(arm.gan.players.lm)
            sizes[name] = [dict(layer.adapters).get("discriminator", 0) for layer in body]
            assert all(dict(layer.adapters)["generator"] for layer in body)
        half = len(sizes["lora_gan_upper"]) // 2  # of two layers the upper one is the upper third
        assert not any(sizes["lora_gan_upper"][:half])
        assert sizes["lora_gan_upper"][half:] == sizes["lora_gan_fresh"][half:]


def test_phases_sum_to_the_step_and_leave_no_hook_behind(workload):
    import time

    import arms
    import phases

    with arms.built(["lora_gan"], workload) as built:
        arm = built["lora_gan"]
        arm.step()
        owners = (arm, arm.gan, arm.gan.players, arm.gan.players.lm, arm.gan.generator, arm.gan.discriminator)
        before = [set(vars(owner)) for owner in owners]
        began = time.perf_counter()
        wrote, seconds = phases.measured(arm)
        whole = time.perf_counter() - began
        assert [set(vars(owner)) for owner in owners] == before
        assert wrote.responses == 2 and sum(seconds.values()) == pytest.approx(whole, rel=0.1)
        assert all(seconds[phase] > 0 for phase in phases.PHASES)
        assert set(phases.work(arm)) == set(phases.PHASES) - {"reward", "rest"}


def test_work_counts_what_a_forward_multiplies(workload):
    """The formula against torch's own count of a forward and backward of the generator's update."""
    import arms
    import phases
    from torch.utils.flop_counter import FlopCounterMode

    with arms.built(["lora_gan"], workload) as built:
        arm = built["lora_gan"]
        gan, shape = arm.gan, workload.shape
        prompts = gan._encode(workload.prompts_at(0))
        rows = gan._sample(prompts, gan._uniforms(prompts, shape.group, "sample"))
        with FlopCounterMode(display=False) as counter, gan.players.use_adapter("generator"):
            batch = rows.batch()
            gan.players.lm_head(gan.players.hidden(batch, batch.predicting_R)).sum().backward()
        its = phases.work(arm)["generator update"]
    # Attention is masked, not causal, there; the first layer needs no gradient of its input.
    assert its.flops == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_speed_measures_once_and_reports(tmp_path, workload, monkeypatch, capsys):
    import arms
    import machine
    import speed

    monkeypatch.setattr(machine, "READ", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setitem(arms.SHAPES, "test", workload.shape)
    out = tmp_path / "speed.jsonl"
    command = ["--shapes", "test", "--arms", "lora_gan", "plain_rl", "--repeats", "2", "--out", str(out)]
    speed.main(command)
    lines = out.read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert sorted(set(kinds)) == ["phases", "rates", "step"] and kinds.count("step") == 4
    assert str(ROOT) not in out.read_text() and "/tmp" not in out.read_text()
    printed = capsys.readouterr().out
    assert "| lora_gan |" in printed and "against plain_rl" in printed and "| discriminator update |" in printed

    out.write_text("\n".join(lines[:-1]) + "\n")  # interrupted before the last
    speed.main(command)
    assert len(out.read_text().splitlines()) == len(lines)
    again = out.read_text()
    speed.main([*command, "--report"])
    assert out.read_text() == again


def test_a_shape_whose_model_is_not_there_is_left_out(tmp_path, capsys):
    import speed

    out = tmp_path / "speed.jsonl"
    speed.main(["--shapes", "stories260K", "--stories", str(tmp_path / "nowhere"), "--out", str(out), "--repeats", "1"])
    assert "stories260K is left out" in capsys.readouterr().err


def test_memory_counts_the_tensors_that_there_are(workload):
    import arms
    import memory

    with arms.built(["lora_gan", "two_models"], workload) as built:
        counted = {}
        for name, arm in built.items():
            arm.step()
            counted[name] = memory.tensors(arm)
        ours, theirs = counted["lora_gan"], counted["two_models"]
        assert ours["second_base"] == 0 and 0.4 < theirs["second_base"] / theirs["base"] < 0.6
        assert 1.9 < theirs["base"] / ours["base"] < 2.1
        assert ours["optimizers"] == pytest.approx(2 * ours["adapters"], rel=0.05)


@pytest.mark.slow
def test_memory_measures_in_processes_of_their_own(tmp_path, workload, monkeypatch, capsys):
    import arms
    import memory

    monkeypatch.setitem(arms.SHAPES, "test", dataclasses.replace(workload.shape, base="small"))
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))
    out = tmp_path / "memory.jsonl"
    command = ["--shapes", "test", "--arms", "lora_gan", "two_models", "--repeats", "1", "--micro-batch", "2"]
    memory.main([*command, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["lora_gan", "two_models"]
    assert all(line["peak"] > line["base"] + line["adapters"] + line["optimizers"] for line in lines)
    assert "| lora_gan |" in capsys.readouterr().out


def test_growth_goes_on_and_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots are drawn with it")
    import growth

    monkeypatch.setattr(growth, "PLAIN", dataclasses.replace(growth.PLAIN, prompts=1, group=2, tokens=3))
    changed = {"rank": (2, 4), "steps": (2, 4), "replay": (1, 4)}
    monkeypatch.setattr(
        growth, "AXES", {name: dataclasses.replace(growth.AXES[name], values=its) for name, its in changed.items()}
    )
    out, plot = tmp_path / "growth.jsonl", tmp_path / "growth.png"
    growth.main(["--axes", *changed, "--repeats", "1", "--out", str(out), "--plot", str(plot)])
    assert len(out.read_text().splitlines()) == 6 and plot.stat().st_size > 1000
    before = out.read_text()
    growth.main(["--axes", *changed, "--repeats", "1", "--out", str(out)])
    assert out.read_text() == before
