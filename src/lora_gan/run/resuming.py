"""`lora-gan train --resume`: a run's folder that was moved, and what differs from before. Used by `cli` and `commands`.

data.json, beside train.yaml in the run's folder, holds a digest of the rows. It is not part of train.yaml, because
every line there is an option.
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
    """The options of a resumed run, whose train.yaml may lie in another folder than the one that it names.

    The run goes on in the folder where its train.yaml and its checkpoints lie. Files that were in the run's folder are
    looked for there, too.

    Args:
        values: the options, train.yaml's included.
        file: what --config named.
        folder_is_given: whether --output_dir stands on the command line, which then wins.

    Returns:
        The options, and one line that says what happened; empty where the run was not moved.
    """
    here = file.resolve().parent
    named = kept_options(here).get("output_dir") if file.name == SETTINGS_FILE else None
    holds_run = any(here.glob("step-*/manifest.json"))
    if folder_is_given or not holds_run or not isinstance(named, str) or Path(named).resolve() == here:
        return dict(values), ""
    with_paths = ("model", "data", "eval_data", "reward", "init_adapter")
    moved = {name: moved_paths(value, named, here) if name in with_paths else value for name, value in values.items()}
    said = f"The run was moved: it goes on in {here}, not in {named}, which {SETTINGS_FILE} names."
    return moved | {"output_dir": str(here)}, said


def moved_paths(value: Any, old: str, new: Path) -> Any:
    """A value with each path in the old folder that is now in the new one."""
    if isinstance(value, Mapping):
        return {name: moved_paths(part, old, new) for name, part in value.items()}
    if isinstance(value, list):
        return [moved_paths(part, old, new) for part in value]
    if isinstance(value, str) and value.startswith(f"{old.rstrip('/')}/"):
        there = new / value[len(old.rstrip("/")) + 1 :]
        file = Path(str(there).rpartition(":")[0] or there)  # a reward is FILE.py:FUNCTION
        return str(there) if there.exists() or file.is_file() else value
    return value


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """A line per setting that changes what is learned and differs, both given as `Config.to_dict()` gives them."""
    silent = marked(Config, Mark.SILENT)
    return [
        f"{name} is another one than before: {_shown(before[name])} up to step {step}, {_shown(value)} from now on."
        for name, value in now.items()
        if name in before and name not in silent and before[name] != value
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else shortened(str(value), 80)


def identity(source: str, rows: Any) -> dict[str, Any]:
    """What identifies a data set: its name (a file by its full path), and the number and the digest of its rows.

    A digest of the rows does not depend on the place or the format of the file. Streamed rows have neither number nor
    digest: their size stands in its place where they come from one file.
    """
    path = Path(source)
    known: dict[str, Any] = {"source": str(path.resolve()) if path.exists() else source}
    if isinstance(rows, Sequence):
        return known | {"rows": len(rows), "digest": _digest(rows)}
    return known | ({"bytes": path.stat().st_size} if path.is_file() else {})


def _digest(rows: Sequence[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        values = [row.prompt, row.target, row.target_messages, row.columns]
        # Objects that JSON does not know, such as pictures, count by their kind alone.
        digest.update(json.dumps(values, sort_keys=True, default=lambda value: type(value).__name__).encode() + b"\n")
    return digest.hexdigest()


def keep_identities(folder: Path, identities: Mapping[str, Any]) -> None:
    """Write {option: identity of its rows} for a later resume."""
    write_json(folder / DATA_FILE, identities)


def kept_identities(folder: Path) -> dict[str, Any]:
    """What `keep_identities` wrote; empty where there is none that can be read."""
    try:
        kept = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def say_if_other_data(before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool) -> list[str]:
    """A line per data set that is another one than before.

    Args:
        before, now: {"data": identity, "eval_data": identity or None}.
        allowed: whether the run may go on with other training data.

    Raises:
        ValueError: the training data is another one, and that is not allowed.
    """
    lines = []
    for name in ("data", "eval_data"):
        old, new = before.get(name), now.get(name)
        if name not in before or _same(old, new):
            continue
        said = f"{name} is another one than before: {_described(old)} up to here, {_described(new)} from now on"
        if name == "data" and not allowed:
            raise ValueError(
                f"{said}. Add --allow_other_data to go on with it (the position in the old rows is then counted in the "
                "new ones), or give the old data"
            )
        lines.append(f"{said}.")
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
    """The arguments that describe the generator's adapter of a run that goes on. The checkpoint holds the adapter, so
    the folder that the run started from may be gone.

    Args:
        run: the folder of the run.
        given: init_adapter and peft_config, as the command line has them.
        kl_reference: the setting from now on.

    Returns:
        The arguments, and one line that says what is not read; empty where there is nothing to say.

    Raises:
        ValueError: the run was started without an adapter, or the checkpoint has none that the KL could be measured to.
    """
    from ..storage import checkpoint
    from . import trainer_state  # here, because it takes long: PyTorch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the resume itself tells of checkpoints that it skips
        step = checkpoint.find(run, None)
    before, now = trainer_state.init_adapter_of(step), given["init_adapter"]
    kept = trainer_state.generator_arguments(step, kl_reference)
    if before is None:
        if now is not None:
            raise ValueError(
                f"init_adapter={now} is where a run starts, and the run in {run} started without one: leave it out to "
                "go on, or start a new run in another output_dir"
            )
        return dict(given), ""
    if "init_adapter" not in kept and kl_reference == "init_adapter":
        raise ValueError(
            f"kl_reference=init_adapter cannot be set for the run in {run}: its KL is to the base, and its checkpoints "
            "hold no other reference. Leave kl_reference out, or start a new run in another output_dir"
        )
    other = now is not None and Path(now).name != Path(before).name
    said = f"init_adapter is another one than before: the run started from {before}, and {now} is not read."
    return kept, said if other else ""
