"""The options of `lora-gan train`, as train.yaml in the run's folder. --config reads this file to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..model.named_bases import NAMES

SETTINGS_FILE = "train.yaml"  # in the run's folder, next to the checkpoints


def keep_options(folder: Path, options: dict[str, Any]) -> Path:
    """Write the run's options to train.yaml in its folder, with full paths, and return the file's path."""
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
    """A reward as on the command line, with full paths of its files."""
    if isinstance(reward, list):
        return [with_full_paths(one) for one in reward]
    if isinstance(reward, dict):
        paths = {name: value for name, value in reward.items() if name in ("log", "cache") and isinstance(value, str)}
        paths = {name: str(Path(value).resolve()) for name, value in paths.items()}
        return reward | paths | ({"name": with_full_paths(reward["name"])} if "name" in reward else {})
    file, colon, function = reward.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and Path(file).is_file() else reward


def kept_options(folder: Path) -> dict[str, Any]:
    """The options of the run in this folder; empty if `lora-gan train` did not make the run.

    Raises:
        ValueError: train.yaml is not YAML, or holds no mapping.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} holds no options of a run: it must have one NAME: VALUE per line")
    return options
