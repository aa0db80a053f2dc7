"""benchmarks/real_tasks.py: the splits, the judges by hand, and the noise of human ratings."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
real_tasks = pytest.importorskip("real_tasks", reason="benchmarks/ is not part of this copy")
from learning_tasks import Reward  # noqa: E402

e2e = pytest.mark.skipif(not real_tasks.E2E.exists(), reason="the E2E data is not here")
MEANING = "name[The Eagle], eatType[coffee shop], customer rating[1 out of 5], familyFriendly[yes]"
TARGET = "\n".join([MEANING, "The Eagle is a coffee shop.", "The Eagle is a family friendly place."])


@e2e
def test_no_meaning_is_in_two_splits():
    splits = {name: real_tasks.facts(name, 10_000) for name in ("train", "validation", "heldout")}
    sizes = {name: len(rows) for name, rows in splits.items()}
    assert sizes == {"train": 547 - 224, "validation": 96, "heldout": 128}
    prompts = [row.prompt[0]["content"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == 547
    again = real_tasks.facts("train", 10_000, seed=1)
    assert again != splits["train"] and {str(r.prompt) for r in again} == {str(r.prompt) for r in splits["train"]}


def test_chrf_to_the_best_reference_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="chrF needs sacrebleu")
    response = "The Eagle is a coffee shop for a family."
    expected = max(sacrebleu.sentence_chrf(response, [line]).score for line in TARGET.split("\n")[1:]) / 100
    assert real_tasks.chrf_to_any(response, TARGET) == pytest.approx(expected, abs=1e-6)


def test_coverage_by_hand():
    assert real_tasks.coverage("The Eagle is a coffee shop.", TARGET) == 0.5
    assert real_tasks.coverage("The Eagle, a low rated coffee shop, welcomes families.", TARGET) == 1.0
    assert real_tasks.coverage("", TARGET) == 0.0


def test_constraints_are_graded_as_in_the_demo():
    rows = real_tasks.constraints("train", 8)
    assert all(row.target for row in rows)
    assert real_tasks.graded("Cats sleep.", "no_comma\nat_most:5") == 1.0
    assert real_tasks.strict("Cats, dogs.", "no_comma\nat_most:5") == 0.5


def test_human_ratings_have_a_residual_and_an_offset_per_rater():
    """Within one rater's ratings the noise has 0.6 sigma, over raters about 1.17 sigma."""
    sigma = 0.3
    reward = Reward("human", lambda responses, targets: [0.0] * len(responses), seed=0, sigma=sigma)
    ratings = np.array(reward([""] * 8000, ["x"] * 8000)).reshape(-1, 20)
    within = ratings.std(axis=1, ddof=1)
    assert np.sqrt((within**2).mean()) == pytest.approx(0.6 * sigma, rel=0.05)
    assert ratings.mean(axis=1).std() == pytest.approx(np.hypot(1.0, 0.6 / 20**0.5) * sigma, rel=0.12)
    again = Reward("human", lambda responses, targets: [0.0] * len(responses), seed=0, sigma=sigma)
    assert again([""] * 20, ["x"] * 20) == ratings[0].tolist()
