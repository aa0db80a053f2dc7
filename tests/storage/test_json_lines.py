"""Files of JSON Lines: what a run that goes on keeps, and that it reads the file once."""

import json
from pathlib import Path

from helpers import PROMPTS, small_gan

from lora_gan.storage.json_lines import JsonLines, rewritten, write_json, write_lines

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


def test_every_line_is_seen_and_the_later_ones_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\nhalf a li')
    seen = []
    with JsonLines(path, after=2, see=seen.append) as lines:
        assert [line["step"] for line in seen] == [1, 2, 3] and [line["step"] for line in lines.kept] == [1, 2]
        lines.write({"step": 3, "again": True})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3, "again": True},
    ]  # fmt: skip


def test_a_file_that_is_written_anew_takes_more_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("old\n")
    with rewritten(path, [{"a": "é"}]) as file:
        assert path.read_text(encoding="utf-8") == '{"a": "é"}\n'
        file.write("more\n")
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\nmore\n'


def test_small_files_hold_what_they_were_given(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None]})
    write_lines(tmp_path / "b.jsonl", [{"a": 1}, {"b": "ü"}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None]}
    assert (tmp_path / "b.jsonl").read_text("utf-8").splitlines() == ['{"a": 1}', '{"b": "ü"}']


def test_a_resume_reads_the_metrics_once(tmp_path, monkeypatch):
    small_gan(output_dir=str(tmp_path)).fit(ROWS, steps=2, progress=False)
    gan = small_gan(output_dir=str(tmp_path))
    gan.load_checkpoint()
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    gan.fit(ROWS, steps=1, progress=False)
    assert read.count("metrics.jsonl") == 1
