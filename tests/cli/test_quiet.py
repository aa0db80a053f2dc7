"""The commands print their own lines: no library's message that a user can do nothing about."""

import logging
import os
import subprocess
import sys

import pytest
from helpers import base_folder

from lora_gan.cli import notices


def test_only_what_no_user_can_act_on_is_silenced(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with notices.one_line_each():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "no")
        logger.warning("this will lead to slow inference")
        logging.getLogger("bitsandbytes.nn.modules").warning("set bnb_4bit_compute_dtype")
    assert [record.getMessage() for record in caplog.records] == [
        "this will lead to slow inference",
        "set bnb_4bit_compute_dtype",
    ]
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community")
    assert len(caplog.records) == 3, "after a command all is as before"


@pytest.mark.slow
def test_a_run_says_nothing_on_stderr_but_its_own_lines(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,target\nthe cat,le chat\nthe dog,le chien\n")
    options = ["--model", str(base_folder()), "--data", "pairs.csv", "--reward", "length", "--max_steps", "1"]
    commands = (
        ["train", *options, "--max_completion_length", "6", "--output_dir", "run"],
        ["generate", "--checkpoint", "run", "--prompt", "the cat"],
        ["score", "--checkpoint", "run", "--prompt", "the cat", "--response", "le chat"],
        ["eval", "--checkpoint", "run", "--data", "pairs.csv"],
        ["export", "--checkpoint", "run", "--output_dir", "exported"],
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "lora_gan", *command],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        strange = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "lora-gan: warning: "))]
        assert strange == [], f"{command[0]} printed {strange}"
