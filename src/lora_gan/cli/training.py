"""`lora-gan train`: starts a run from the options, and prints the plan and the result.

Functions import slow modules in their bodies. Most errors are in the data, and are reported before imports that take
seconds.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..run.options import SETTINGS_FILE, keep_options, kept_options, with_full_paths
from ..run.resuming import changed_data, changed_settings, identity, keep_identities, kept_identities, moved_paths
from ..storage.json_lines import read_lines

if TYPE_CHECKING:
    from ..data import Row, Stream
    from ..gan import LoraGAN
    from .preview import Preview


def run(config: Config, options: dict[str, Any]) -> None:
    """Train, or with dry_run try the next step.

    Args:
        config: the settings.
        options: the other parameters of `commands.train`, by name.

    Raises:
        ValueError: an option is not accepted, or the data or the reward cannot be used.
    """
    folder, resume, dry_run = Path(config.output_dir), options["resume"], options["dry_run"]
    if config.eval_steps and options["eval_data"] is None:
        raise ValueError(f"--eval_steps {config.eval_steps} needs held-out rows: give --eval_data")
    _require_room(folder, resume=resume, dry_run=dry_run)
    from ..rewards import named

    rewards = named.from_specs(options["reward"])
    rows, held_out, identities = _data(config, options)
    if resume:
        _notify(*changed_data(kept_identities(folder), identities, allowed=options["allow_other_data"]))
    gan = _opened(config, options, *rewards)
    rows = gan.check_rows(rows)
    if held_out is not None:
        held_out = gan.check_held_out(held_out, rows)
    steps = gan.steps_left(rows)
    if steps == 0:
        raise ValueError(f"the run is at its end, step {gan.global_step}: set a larger --max_steps to continue")
    preview = _preview(gan, rows, held_out, steps)
    print(preview.describe(dry_run=dry_run), flush=True)
    func: Any
    for func in rewards[0]:
        if getattr(func, "interactive", False) and func.log is None:
            func.keep(folder / "ratings.jsonl")  # a person is not asked again about a rated response
    if dry_run:
        from ..gan import NO_GROUP

        if config.num_generations == 1:
            warnings.warn(NO_GROUP, stacklevel=1)
        for paragraph in preview.dry_run():
            print(paragraph, flush=True)
        return
    _fit(gan, rows, held_out, {**options, **config.to_file()}, identities)
    _print_result(gan, folder)


def _data(config: Config, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The training rows, the held-out rows or None, and the identities of both."""
    from ..data import read_rows

    data, eval_data = options["data"], options["eval_data"]
    read = partial(read_rows, prompt_column=config.prompt_column, target_column=config.target_column)
    rows = read(data, split=options["split"], streaming=options["streaming"])
    held_out = read(eval_data, split="test") if eval_data else None
    return rows, held_out, {"data": identity(data, rows), "eval_data": eval_data and identity(eval_data, held_out)}


def _opened(config: Config, options: dict[str, Any], reward_funcs: list[Any], reward_weights: list[float]) -> LoraGAN:
    """A new LoraGAN, or with resume one from the newest checkpoint and a printed line per change since then."""
    from ..gan import LoraGAN
    from ..run.resuming import adapter_arguments
    from ..run.tracking import trackers_of
    from ..run.trainer_state import settings_of

    trackers_of(config.report_to)
    folder, resume = Path(config.output_dir), options["resume"]
    generator = {
        "init_adapter": options["init_adapter"],
        "peft_config": _constructed("peft.LoraConfig", "peft_config", options["peft_config"]),
    }
    if resume:
        generator, notice = adapter_arguments(folder, generator, config.kl_reference)
        _notify(notice)
    gan = LoraGAN(
        options["model"],
        config,
        reward_funcs=reward_funcs,
        reward_weights=reward_weights,
        **generator,
        disc_peft_config=_constructed("peft.LoraConfig", "disc_peft_config", options["disc_peft_config"]),
        quantization_config=_constructed(
            "transformers.BitsAndBytesConfig", "quantization_config", options["quantization_config"]
        ),
        reuse_answers=options["reuse_answers"],
    )
    if resume:
        gan.load_checkpoint()
        _notify_changed_reward(folder, options["reward"])
        before = settings_of(folder / f"step-{gan.global_step}")
        _notify(*changed_settings(before, config.to_file(), gan.global_step))
    return gan


def _preview(gan: LoraGAN, rows: list[Row] | Stream, held_out: list[Row] | None, steps: int) -> Preview:
    """The preview of the run's next steps."""
    from .. import data
    from .preview import Preview

    first = data.take(rows, gan.config.prompts_per_step, seed=gan.config.seed, position=gan.position)
    total = None if isinstance(rows, data.Stream) else len(rows)
    columns, evaluated = data.column_names(rows), 0 if held_out is None else len(held_out)
    return Preview(gan, first, steps=steps, total=total, held_out=evaluated, columns=columns)


def _fit(
    gan: LoraGAN,
    rows: list[Row] | Stream,
    held_out: list[Row] | None,
    options: dict[str, Any],
    identities: dict[str, Any],
) -> None:
    """Train. The first step writes options and identities, so that a failure before it leaves no file."""
    from ..storage.checkpoint import complete

    folder, before = Path(gan.config.output_dir), gan.global_step

    def keep(record: dict[str, Any]) -> None:
        if record["step"] == before + 1:
            keep_options(folder, options)
            keep_identities(folder, identities)

    try:
        gan.fit(rows, eval_dataset=held_out, on_step=keep)
    except (KeyboardInterrupt, SystemExit, ValueError, RuntimeError) as stop:
        if gan.global_step > before and complete(folder):
            hint = f"continue with: lora-gan train --config {folder / SETTINGS_FILE} --resume"
            if isinstance(stop, ValueError | RuntimeError):  # a bad row or reward would end the resumed run, too
                hint = f"step {gan.global_step} is saved; fix the cause, then {hint}"
            stop.args = ("; ".join(filter(None, [str(stop), hint])),)
        raise
    finally:
        if gan.global_step > before:
            _plot(gan, folder)


def _print_result(gan: LoraGAN, folder: Path) -> None:
    from ..storage.checkpoint import complete

    names = ("metrics.jsonl", "completions.jsonl", "training.png")
    files = [name for name in names if (folder / name).is_file() and (folder / name).stat().st_size]
    kept = ", ".join(path.name for path in complete(folder))
    print(
        f"{gan.ending}. True-reward calls: {gan.budget.in_words()}.\n"
        f"{_evaluations(folder)}In {folder}: {kept}, {', '.join(files)}. Commands for the newest step:\n"
        f"  lora-gan generate --checkpoint {folder} --prompt TEXT --best_of 8\n"
        f"  lora-gan eval --checkpoint {folder} --data HELD_OUT_FILE\n"
        f"  lora-gan export --checkpoint {folder} --output_dir FOLDER"
    )


def _evaluations(folder: Path) -> str:
    """The held-out rewards of the run's evaluations as a line; empty without any."""
    name = "eval_true_reward"
    values = [
        f"{line[name]:.3f} (step {line['step']})" for line in read_lines(folder / "metrics.jsonl") if name in line
    ]
    shown = values if len(values) <= 8 else [*values[:2], "…", *values[-5:]]
    return f"Held-out reward: {', '.join(shown)}.\n" if values else ""


def _plot(gan: LoraGAN, folder: Path) -> None:
    """Plot training.png, however the run ended. A failure gives a warning, so that it does not hide another error."""
    from ..run.plots import plot_run

    try:
        plot_run(folder / "metrics.jsonl", folder / "training.png")
    except Exception as error:
        warnings.warn(f"training.png could not be drawn: {error}", stacklevel=2)


def _require_room(folder: Path, *, resume: bool, dry_run: bool) -> None:
    """Check that a new run does not mix its checkpoints with those of an older run.

    Raises:
        ValueError: the folder is a file, or holds checkpoints and the run is neither a resume nor a dry run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder")
    older = sorted(folder.glob("step-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if older and not (resume or dry_run):
        raise ValueError(
            f"{folder} holds {older[-1].parent.name} of another run: continue that run by --resume, or give this run "
            "another --output_dir"
        )


def _notify(*lines: str) -> None:
    """Print the lines that are not empty to stderr."""
    for line in filter(None, lines):
        print(line, file=sys.stderr)


def _notify_changed_reward(folder: Path, reward: Any) -> None:
    """Print a line if the reward has changed: the discriminator still predicts the old reward at first."""
    kept = kept_options(folder)
    before = moved_paths(kept.get("reward"), str(kept.get("output_dir")), folder.resolve())
    if before is not None and before != with_full_paths(reward):
        _notify(f"The reward has changed: {before} up to here, {reward} from now on.")


def _constructed(kind: str, name: str, fields: dict[str, Any] | None) -> Any:
    """An object of a class in peft or transformers from its fields; None without fields.

    Raises:
        ValueError: the class does not accept the fields.
    """
    if fields is None:
        return None
    library, _, class_name = kind.partition(".")
    try:
        return getattr(importlib.import_module(library), class_name)(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={fields!r} is not accepted by {class_name}: {error}") from error
