"""The golden run: losses over 50 steps in each mode, as they were before anything was made quicker.

A change that only makes the library quicker or smaller keeps every one of these numbers to rounding. One that means to
change them writes them anew, and says in the CHANGELOG why:

    python tests/test_golden.py

Rates are small, so that rounding stays rounding over 50 steps: AdamW turns a gradient near zero into a step of full
size either way, and a token that falls on the other side of a uniform number changes all that follows. For the same
reason no mode has the gate: equal responses of a group are ranked by the rounding of their predictions; and one has a
seed of its own, since with the others' a uniform number lay 3e-9 beside the edge of a token.
"""

import json
import math
import sys
from pathlib import Path

import pytest
from helpers import PROMPTS, TARGETS, base_folder, reward, small_gan

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
STEPS = 50
NUMBERS = ("gen_loss", "disc_loss", "pred_reward", "true_reward", "kl", "gen_grad_norm", "disc_grad_norm")

MODES: dict[str, dict] = {
    "corrected": {},
    "corrected, a quarter asked": {"query_rate": 0.25, "query_design": "uniform"},
    "predicted": {"adversarial": True, "query_rate": 0.5},
    "straight-through": {"adversarial": True, "gradient_path": "straight_through"},
    "clipped": {"num_iterations": 2},
    "micro-batches": {"micro_batch_size": 3},
    "imitation": {"imitation_weight": 0.5, "imitation_warmup_steps": 5},
    "temperature": {"temperature": 0.7},
    "fresh alone": {"disc_updates": 1, "disc_replay_groups": 0},
    "real against generated": {"adversarial": True, "disc_objective": "real_vs_generated", "seed": 6},
    "without KL": {"beta": 0.0},
}
BASES = [("gpt2", "own"), ("gpt2", "eos"), ("llama", "own"), ("qwen2", "none")]
CASES = [(*BASES[0], mode) for mode in MODES] + [(*base, mode) for base in BASES[1:] for mode in list(MODES)[:3]]


def losses(architecture: str, pad: str, mode: str) -> dict[str, list[float | None]]:
    """What each of NUMBERS was in each step; prompts of different lengths, so that rows are padded."""
    gan = small_gan(
        base_folder(architecture, pad), reward=reward,
        **{"learning_rate": 1e-4, "disc_learning_rate": 1e-4, "seed": 5, **MODES[mode]},
    )  # fmt: skip
    records = []
    for step in range(STEPS):
        places = [step % 4, (step + 1 + step // 4) % 4]
        prompts, targets = [PROMPTS[i] for i in places], [TARGETS[i] for i in places]
        # Where nothing is predicted yet, an adversarial generator's first gradient is rounding alone: it waits.
        records.append(gan.step(prompts, targets, train_gen=step > 0))
    found: dict[str, list[float | None]] = {}
    for name in NUMBERS:
        values = [record.get(name) for record in records]
        found[name] = [value[0] if isinstance(value, list) else value for value in values]
    return found


def key(architecture: str, pad: str, mode: str) -> str:
    return f"{architecture}, pad {pad}: {mode}"


QUICK = (*CASES[:4], *(case for case in CASES if case[2] == "fresh alone"), CASES[-3])


@pytest.mark.parametrize(
    ("architecture", "pad", "mode"),
    [pytest.param(*case, id=key(*case), marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
@pytest.mark.filterwarnings("ignore:step .* the discriminator is no better than chance")
def test_a_golden_run_is_unchanged_to_rounding(architecture, pad, mode):
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[key(architecture, pad, mode)]
    found = losses(architecture, pad, mode)
    for name in NUMBERS:
        one, other = ([math.nan if value is None else value for value in of[name]] for of in (found, expected))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), name


if __name__ == "__main__":
    golden = {key(*case): losses(*case) for case in CASES}
    rounded = {
        case: {name: [value and float(f"{value:.7g}") for value in values] for name, values in numbers.items()}
        for case, numbers in golden.items()
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = ",\n".join(
        f"{json.dumps(case)}: {{\n"
        + ",\n".join(f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in numbers.items())
        + "}"
        for case, numbers in rounded.items()
    )
    GOLDEN.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{len(golden)} runs of {STEPS} steps written to {GOLDEN}", file=sys.stderr)
