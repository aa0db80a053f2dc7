"""The benchmark of the guard: simulated streams, and the summary of its runs."""

import numpy as np
import pytest
from helpers import ROOT, load_script

from lora_gan.storage.json_lines import append_line


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script(ROOT / "benchmarks" / "guard.py")


def test_streams_prints_shares_and_delays(guard, capsys):
    guard.streams(40, 80)
    lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split()[-1]) for line in lines[1 : 1 + len(guard.STREAMS)]]
    assert all(0 <= share <= 0.3 for share in shares) and "2.0" in lines[-1]


def test_the_report_counts_alarms_and_disjoint_pairs(guard, tmp_path, capsys):
    """Two runs end below their peak: one alarm after 40 steps (160 pairs), one after 60 (240 pairs)."""
    for seed, alarm in enumerate((90, 110, None)):
        line = {
            "kind": "exploited", "seed": seed, "peak": 0.8, "end": 0.5 if alarm else 0.79, "held_out": 0.5,
            "alarms": [], "test_alarm": alarm, "peak_step": 50,
        }  # fmt: skip
        append_line(tmp_path / "guard.jsonl", line)
    guard.report(tmp_path / "guard.jsonl")
    out = capsys.readouterr().out
    assert "2 end 0.1 or more below their peak; 2 of them raise the alarm, 1 within 200 disjoint pairs" in out


def test_a_fall_is_found_after_it_began(guard):
    assert guard.first_alarm(np.r_[np.ones(30), np.zeros(20)]) > 30
    assert guard.first_alarm(np.ones(50)) is None
