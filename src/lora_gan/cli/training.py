"""`lora-gan train`: from its options to a run, and what it prints.

Everything heavy is imported inside the functions: most mistakes are in the data, and are told before imports that take
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
from ..run.resuming import changed_settings, identity, keep_identities, kept_identities, moved_paths, changed_data
from ..storage.json_lines import read_lines

if TYPE_CHECKING:
    from ..data import Row, Stream
    from ..gan import LoraGAN
    from .preview import Preview


def run(config: Config, options: dict[str, Any]) -> None:
    """Train, or try the next step.

    Args:
        config: the settings.
        options: the other parameters of `commands.train`, by name.

    Raises:
        ValueError: an option that is not accepted, or data or a reward that cannot be used.
    """
    folder, resume, dry_run = Path(config.output_dir), options["resume"], options["dry_run"]
    if config.eval_steps and options["eval_data"] is None:
        raise ValueError(f"--eval_steps {config.eval_steps} needs rows to judge on: give --eval_data")
    _require_room(folder, resume=resume, dry_run=dry_run)
    from ..rewards import named

    rewards = named.from_specs(options["reward"])
    rows, held_out, identities = _data(config, options)
    if resume:
        _say(*changed_data(kept_identities(folder), identities, allowed=options["allow_other_data"]))
    gan = _opened(config, options, *rewards)
    rows = gan.check_rows(rows)
    if held_out is not None:
        held_out = gan.check_held_out(held_out, rows)
    steps = gan.steps_left(rows)
    if steps == 0:
        raise ValueError(f"the run is at its end, step {gan.global_step}: set a larger --max_steps to go on")
    preview = _preview(gan, rows, held_out, steps)
    print(preview.describe(dry_run=dry_run), flush=True)
    func: Any
    for func in rewards[0]:
        if getattr(func, "interactive", False) and func.log is None:
            func.keep(folder / "ratings.jsonl")  # what a person said, in a dry run too, is not asked again
    if dry_run:
        from ..gan import NO_GROUP

        if config.num_generations == 1:
            warnings.warn(NO_GROUP, stacklevel=1)
        for paragraph in preview.dry_run():
            print(paragraph, flush=True)
        return
    _fit(gan, rows, held_out, {**options, **config.to_file()}, identities)
    _say_result(gan, folder)


def _data(config: Config, options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The rows to train on, the held-out ones or None, and what identifies both."""
    from ..data import read_rows

    data, eval_data = options["data"], options["eval_data"]
    read = partial(read_rows, prompt_column=config.prompt_column, target_column=config.target_column)
    rows = read(data, split=options["split"], streaming=options["streaming"])
    held_out = read(eval_data, split="test") if eval_data else None
    return rows, held_out, {"data": identity(data, rows), "eval_data": eval_data and identity(eval_data, held_out)}


def _opened(config: Config, options: dict[str, Any], reward_funcs: list[Any], reward_weights: list[float]) -> LoraGAN:
    """The LoraGAN: new, or from the newest checkpoint, with a line for each thing that is not as before."""
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
        generator, said = adapter_arguments(folder, generator, config.kl_reference)
        _say(said)
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
    )
    if resume:
        gan.load_checkpoint()
        _say_if_other_reward(folder, options["reward"])
        before = settings_of(folder / f"step-{gan.global_step}")
        _say(*changed_settings(before, config.to_file(), gan.global_step))
    return gan


def _preview(gan: LoraGAN, rows: list[Row] | Stream, held_out: list[Row] | None, steps: int) -> Preview:
    """What the run's next steps would do."""
    from .. import data
    from .preview import Preview

    first = data.take(rows, gan.config.prompts_per_step, seed=gan.config.seed, position=gan.position)
    total = None if isinstance(rows, data.Stream) else len(rows)
    columns, judged = data.column_names(rows), 0 if held_out is None else len(held_out)
    return Preview(gan, first, steps=steps, total=total, held_out=judged, columns=columns)


def _fit(
    gan: LoraGAN,
    rows: list[Row] | Stream,
    held_out: list[Row] | None,
    options: dict[str, Any],
    identities: dict[str, Any],
) -> None:
    """Train. Options and identities are kept with the first step: what fails before leaves nothing."""
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
            # A row or a reward that is not as it must be would end the resumed run at the same place.
            first = "when that is mended, " if isinstance(stop, ValueError | RuntimeError) else ""
            saved = "" if isinstance(stop, KeyboardInterrupt | SystemExit) else f"step {gan.global_step} is saved; "
            go_on = f"{saved}{first}go on with: lora-gan train --config {folder / SETTINGS_FILE} --resume"
            stop.args = ("; ".join(filter(None, [str(stop), go_on])),)
        raise
    finally:
        if gan.global_step > before:
            _draw(gan, folder)


def _say_result(gan: LoraGAN, folder: Path) -> None:
    from ..storage.checkpoint import complete

    names = ("metrics.jsonl", "completions.jsonl", "training.png")
    files = [name for name in names if (folder / name).is_file() and (folder / name).stat().st_size]
    kept = ", ".join(path.name for path in complete(folder))
    print(
        f"{gan.ending}. True-reward calls: {gan.budget.in_words()}.\n"
        f"{_judged(folder)}In {folder}: {kept}, {', '.join(files)}. The newest step is used by:\n"
        f"  lora-gan generate --checkpoint {folder} --prompt TEXT --best_of 8\n"
        f"  lora-gan eval --checkpoint {folder} --data HELD_OUT_FILE\n"
        f"  lora-gan export --checkpoint {folder} --output_dir FOLDER"
    )


def _judged(folder: Path) -> str:
    """The run's evaluations, as a line; empty without any."""
    name = "eval_true_reward"
    values = [
        f"{line[name]:.3f} (step {line['step']})" for line in read_lines(folder / "metrics.jsonl") if name in line
    ]
    shown = values if len(values) <= 8 else [*values[:2], "…", *values[-5:]]
    return f"Held-out reward: {', '.join(shown)}.\n" if values else ""


def _draw(gan: LoraGAN, folder: Path) -> None:
    """training.png of a run, however it ended. What goes wrong here hides nothing that ended the run."""
    from ..run.plots import plot_run

    try:
        plot_run(folder / "metrics.jsonl", folder / "training.png", title=gan.config.run_name)
    except Exception as error:
        warnings.warn(f"training.png could not be drawn: {error}", stacklevel=2)


def _require_room(folder: Path, *, resume: bool, dry_run: bool) -> None:
    """A new run beside an older one's checkpoints would mix the two."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a folder")
    older = sorted(folder.glob("step-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if older and not (resume or dry_run):
        raise ValueError(
            f"{folder} holds {older[-1].parent.name} of another run: go on with it by --resume, or give this run "
            "another --output_dir"
        )


def _say(*lines: str) -> None:
    for line in filter(None, lines):
        print(line, file=sys.stderr)


def _say_if_other_reward(folder: Path, reward: Any) -> None:
    """A discriminator that learned one reward begins by predicting it for another."""
    kept = kept_options(folder)
    before = moved_paths(kept.get("reward"), str(kept.get("output_dir")), folder.resolve())
    if before is not None and before != with_full_paths(reward):
        _say(f"The reward has changed: {before} up to here, {reward} from now on.")


def _constructed(kind: str, name: str, fields: dict[str, Any] | None) -> Any:
    """An object of a class in peft or transformers, from its fields; None without any."""
    if fields is None:
        return None
    library, _, called = kind.partition(".")
    try:
        return getattr(importlib.import_module(library), called)(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={fields!r} is not accepted by {called}: {error}") from error
