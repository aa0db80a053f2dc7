"""docs/tutorial.md, run as it stands: every command and every line of Python in it, in an empty folder.

Here its first path, on the base that ships; test_smollm2.py runs the second one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
PAIRS, CHAT = PAGE.read_text(encoding="utf-8").split("\n## A chat model\n")


def run_blocks(text, work):
    """Run each block of bash and Python in one folder; what each printed."""
    commands = work / "bin"  # what the environment of `make install` has on its path
    commands.mkdir()
    for name, module in (("python", ""), ("lora-gan", "-m lora_gan ")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    said = []
    for kind, code in re.findall(r"^```(bash|python)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        program = ["bash", "-euo", "pipefail", "-c"] if kind == "bash" else [sys.executable, "-c"]
        run = subprocess.run([*program, code], cwd=work, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, f"{code}\n{run.stdout}\n{run.stderr}"
        said.append(run.stdout)
    return said


@pytest.mark.slow
def test_the_path_of_pairs(tmp_path):
    said = run_blocks(PAIRS, tmp_path)
    assert len(said) == 8
    table, look, first, more, learned, _, stock = said[0], said[2], said[3], said[4], said[5], said[6], said[7]
    assert table.startswith("prompt,target")
    assert "a row's own target 1.000" in look and not (tmp_path / "runs" / "dry").exists()
    assert "step 40" in first and "step 60" in more
    exact = re.search(r"^true_reward +([\d.]+) \[.*?\] +([\d.]+) ", learned, flags=re.MULTILINE)
    assert exact and float(exact[1]) > float(exact[2]) + 0.1  # the generator's likeness beside the untouched base's
    generated = stock.splitlines()
    assert generated[0] == generated[1]
    assert float(generated[2]) == pytest.approx(float(generated[3]), abs=1e-5)
