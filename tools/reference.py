"""Writes the pages of docs/reference/ that come from the code: settings, command line, API.

    python tools/reference.py

tests/test_reference.py fails if a page differs from what this script would write.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import docstring_parser

from lora_gan import Config, LoraGAN, rewards, tiny
from lora_gan.cli import main as cli
from lora_gan.settings import Group, Mark, bounds, group, marked, plain_type, units

PAGES = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/reference.py. Edit the docstrings and annotations in src/lora_gan instead. -->\n"
WIDTH = "100"  # columns of the command line's help


def settings_page() -> str:
    helps = {item.args[1]: item.description or "" for item in docstring_parser.parse_from_object(Config).params}
    first = marked(Config, Mark.FIRST)
    lines = [
        "# Settings",
        "",
        NOTE,
        "Keyword arguments of `LoraGAN(...)`, options of `lora-gan train`, keys of a configuration file, and fields of",
        "`lora_gan.Config`. A wrong value raises a `ValueError` with the accepted values. The settings in **bold**",
        "matter first.",
    ]
    for part in Group:
        lines += [
            "",
            f"## {part.value[0].upper()}{part.value[1:]}",
            "",
            "| setting | type and range | unit | default | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        for field in fields(Config):
            if group(field) is part:
                name = f"**`{field.name}`**" if field.name in first else f"`{field.name}`"
                default = "" if field.default is MISSING else f"`{field.default!r}`"
                unit = ", ".join(unit for unit in units(field) if unit != "none") or "–"
                kind = ", ".join([f"`{_type(plain_type(field))}`", *bounds(field)])
                lines.append(f"| {name} | {_cell(kind)} | {unit} | {_cell(default)} | {_cell(helps[field.name])} |")
    return "\n".join(lines) + "\n"


def _type(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(_type(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
    return text.replace("typing.", "").replace("NoneType", "None")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def command_line_page() -> str:
    os.environ["COLUMNS"] = WIDTH
    parser = cli._parser()
    commands = next(action for action in parser._actions if action.dest == "command")._name_parser_map
    lines = [
        "# Command line",
        "",
        NOTE,
        "`lora-gan COMMAND --help` prints these texts.",
        "",
        "```text",
        parser.format_help().rstrip(),
        "```",
    ]
    for name, command in commands.items():
        lines += ["", f"## lora-gan {name}", "", "```text", command.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    lines = ["# API", "", NOTE, "The public names. Everything else may change between versions."]
    lines += ["", "## lora_gan.LoraGAN", "", *_described(LoraGAN, "LoraGAN")]
    for name, member in inspect.getmembers(LoraGAN):
        if not name.startswith("_") and (callable(member) or isinstance(member, property)) and inspect.getdoc(member):
            lines += ["", f"### LoraGAN.{name}", "", *_described(member, name)]
    lines += ["", "## lora_gan.Config", "", "The settings as a frozen dataclass: [settings](settings.md)."]
    lines += ["", "## lora_gan.rewards", "", "[Rewards](rewards.md) explains how each is used."]
    for name in sorted(rewards.__all__):
        lines += ["", f"### rewards.{name}", "", *_described(getattr(rewards, name), name)]
    lines += ["", "## lora_gan.tiny", "", "### tiny.pairs", "", *_described(tiny.pairs, "pairs")]
    return "\n".join(lines) + "\n"


def _described(thing: Any, name: str) -> Iterator[str]:
    if isinstance(thing, types.GenericAlias):
        yield f"`{thing}`"
        return
    if callable(thing) and not (isinstance(thing, type) and issubclass(thing, Exception)):
        yield from ("```text", f"{name}{_signature(thing)}", "```", "")
    parsed = docstring_parser.parse(inspect.getdoc(thing) or "", style=docstring_parser.DocstringStyle.GOOGLE)
    for text in (parsed.short_description, parsed.long_description):
        if text:
            yield from (text, "")
    if parsed.params:
        yield from ("| argument | meaning |", "| --- | --- |")
        for item in parsed.params:
            yield f"| `{item.arg_name}` | {_cell(item.description or '')} |"
        yield ""
    if parsed.returns and parsed.returns.description:
        yield from (f"**Returns** {' '.join(parsed.returns.description.split())}", "")
    for error in parsed.raises:
        yield from (f"**Raises** `{error.type_name}`: {' '.join((error.description or '').split())}", "")


def _signature(thing: Any) -> str:
    parameters = inspect.signature(thing).parameters.values()
    shown = [
        re.sub(r" object at 0x\w+", "", str(parameter.replace(annotation=inspect.Parameter.empty)))
        for parameter in parameters
        if parameter.name != "self"
    ]
    stars = [
        i
        for i, parameter in enumerate(p for p in parameters if p.name != "self")
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    if stars and not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        shown.insert(stars[0], "*")
    return f"({', '.join(shown)})"


WRITERS = {"settings.md": settings_page, "command-line.md": command_line_page, "api.md": api_page}


def page(name: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", WRITERS[name]())


if __name__ == "__main__":
    for name in WRITERS:
        (PAGES / name).write_text(page(name), encoding="utf-8")
