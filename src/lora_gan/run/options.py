"""What `lora-gan train` was called with, as train.yaml in the run's folder: --config takes it to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..model.named_bases import NAMES

SETTINGS_FILE = "train.yaml"  # the run's options, beside its checkpoints: what --config takes to go on


def keep_options(folder: Path, options: dict[str, Any]) -> Path:
    """Write the run's options where --config finds them again; files in them by their full path."""
    kept = {name: value for name, value in options.items() if name not in ("resume", "allow_other_data", "dry_run")}
    for name in ("model", "data", "eval_data", "init_adapter"):
        if kept.get(name) and kept[name] not in NAMES and Path(kept[name]).exists():
            kept[name] = str(Path(kept[name]).resolve())
    kept["output_dir"] = str(folder.resolve())
    kept["reward"] = with_full_paths(kept["reward"])
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")
    return folder / SETTINGS_FILE


def with_full_paths(reward: Any) -> Any:
    """A reward as the command line names it, its files by their full path."""
    if isinstance(reward, list):
        return [with_full_paths(part) for part in reward]
    if isinstance(reward, dict):
        files = {
            name: str(Path(reward[name]).resolve()) for name in ("log", "cache") if isinstance(reward.get(name), str)
        }
        return reward | files | ({"name": with_full_paths(reward["name"])} if "name" in reward else {})
    file, colon, function = reward.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and Path(file).is_file() else reward


def kept_options(folder: Path) -> dict[str, Any]:
    """The options of the run in this folder; empty where it was not made by `lora-gan train`."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} does not hold a run's options, as NAME: VALUE")
    return options
