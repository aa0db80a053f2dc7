"""`lora-gan train --resume`: a run's folder that was moved, and changes of data and settings. Used by `cli`.

data.json in the run's folder holds a digest of the rows. The digest is not in train.yaml, because every line of
train.yaml is an option.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config
from ..settings import Mark, marked
from ..storage.json_lines import write_json
from ..wording import counted, shortened
from .options import SETTINGS_FILE, kept_options

DATA_FILE = "data.json"


def in_moved_folder(values: Mapping[str, Any], file: Path, *, folder_is_given: bool) -> tuple[dict[str, Any], str]:
    """The options of a resumed run, corrected if the run's folder was moved.

    A moved run continues in the folder that now holds its train.yaml and its checkpoints. Paths into the old folder
    change to the new folder, too.

    Args:
        values: the options, with those of train.yaml.
        file: the file that --config named.
        folder_is_given: whether --output_dir is on the command line. Then nothing changes.

    Returns:
        The options, and a line for the user; the line is empty if the run was not moved.
    """
    here = file.resolve().parent
    named = kept_options(here).get("output_dir") if file.name == SETTINGS_FILE else None
    holds_run = any(here.glob("step-*/manifest.json"))
    if folder_is_given or not holds_run or not isinstance(named, str) or Path(named).resolve() == here:
        return dict(values), ""
    with_paths = ("model", "data", "eval_data", "reward", "init_adapter")
    moved = {name: moved_paths(value, named, here) if name in with_paths else value for name, value in values.items()}
    notice = f"The run was moved: it continues in {here}, not in {named}, which {SETTINGS_FILE} names."
    return moved | {"output_dir": str(here)}, notice


def moved_paths(value: Any, old: str, new: Path) -> Any:
    """A value in which paths into the old folder point into the new folder, if the file is there."""
    if isinstance(value, Mapping):
        return {name: moved_paths(item, old, new) for name, item in value.items()}
    if isinstance(value, list):
        return [moved_paths(item, old, new) for item in value]
    if isinstance(value, str) and value.startswith(f"{old.rstrip('/')}/"):
        there = new / value[len(old.rstrip("/")) + 1 :]
        file = Path(str(there).rpartition(":")[0] or there)  # a reward is FILE.py:FUNCTION
        return str(there) if there.exists() or file.is_file() else value
    return value


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """A line per changed setting that affects training; `before` and `now` as from `Config.to_dict()`."""
    silent = marked(Config, Mark.SILENT)
    return [
        f"{name} has changed: {_shown(before[name])} up to step {step}, {_shown(value)} from now on."
        for name, value in now.items()
        if name in before and name not in silent and before[name] != value
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else shortened(str(value), 80)


def identity(source: str, rows: Any) -> dict[str, Any]:
    """Values that identify a data set: its name (a file's full path), and the number and the digest of its rows.

    The digest does not depend on the path or the format of the file. Streamed rows have neither number nor digest; if
    they come from one file, the file's size in bytes identifies them.
    """
    path = Path(source)
    named = {"source": str(path.resolve()) if path.exists() else source}
    if isinstance(rows, Sequence):
        return named | {"rows": len(rows), "digest": _digest(rows)}
    return named | ({"bytes": path.stat().st_size} if path.is_file() else {})


def _digest(rows: Sequence[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        values = [row.prompt, row.target, row.target_messages, row.columns]
        # Objects that JSON cannot hold, such as pictures, count by their type alone.
        digest.update(json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
    return digest.hexdigest()


def keep_identities(folder: Path, identities: Mapping[str, Any]) -> None:
    """Write {option: identity of its rows} for a later resume."""
    write_json(folder / DATA_FILE, identities)


def kept_identities(folder: Path) -> dict[str, Any]:
    """The identities that `keep_identities` wrote; empty if the file is missing or unreadable."""
    try:
        kept = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool) -> list[str]:
    """A line per data set that has changed.

    Args:
        before, now: {"data": identity, "eval_data": identity or None}.
        allowed: whether the run may continue with other training data.

    Raises:
        ValueError: the training data has changed, and `allowed` is False.
    """
    lines = []
    for name in ("data", "eval_data"):
        old, new = before.get(name), now.get(name)
        if name not in before or _same(old, new):
            continue
        change = f"{name} has changed: {_described(old)} up to here, {_described(new)} from now on"
        if name == "data" and not allowed:
            raise ValueError(
                f"{change}. Add --allow_other_data to continue with the new data (at the same position as in the old "
                "rows), or give the old data"
            )
        lines.append(f"{change}.")
    return lines


def _same(old: Any, new: Any) -> bool:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return old == new
    if "digest" in old and "digest" in new:
        return old["digest"] == new["digest"]
    if "bytes" in old and "bytes" in new and old["bytes"] != new["bytes"]:
        return False
    return old.get("source") == new.get("source")


def _described(known: Any) -> str:
    if not isinstance(known, dict):
        return "none"
    count = known.get("rows")
    rows = f" ({counted(count, 'row')})" if isinstance(count, int) else ""
    return f"{known.get('source')}{rows}"


def adapter_arguments(run: Path, given: Mapping[str, Any], kl_reference: str | None) -> tuple[dict[str, Any], str]:
    """The arguments of LoraGAN for the generator's adapter of a resumed run.

    The checkpoint holds the adapter, so the folder that the run started from is not needed.

    Args:
        run: the folder of the run.
        given: init_adapter and peft_config from the command line.
        kl_reference: the setting from now on.

    Returns:
        The arguments, and a line about an init_adapter that is ignored; the line is empty if none is.

    Raises:
        ValueError: init_adapter is given but the run started without one, or the KL is to be measured to an adapter
            that the checkpoint does not hold.
    """
    from ..storage import checkpoint
    from . import trainer_state  # imports PyTorch, which takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the resume warns about checkpoints that it skips
        step = checkpoint.find(run, None)
    before, now = trainer_state.init_adapter_of(step), given["init_adapter"]
    kept = trainer_state.generator_arguments(step, kl_reference)
    if before is None:
        if now is not None:
            raise ValueError(
                f"init_adapter={now} can only be set when a run starts, and the run in {run} started without one: "
                "leave init_adapter out to resume, or start a new run in another output_dir"
            )
        return dict(given), ""
    if "init_adapter" not in kept and kl_reference == "init_adapter":
        raise ValueError(
            f"kl_reference=init_adapter cannot be set for the run in {run}: its KL is to the base, and its checkpoints "
            "hold no other reference. Leave kl_reference out, or start a new run in another output_dir"
        )
    other = now is not None and Path(now).name != Path(before).name
    notice = f"init_adapter has changed: the run started from {before}, and {now} is not read."
    return kept, notice if other else ""
