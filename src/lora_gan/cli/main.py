"""The parser of the command line, and its messages for wrong input. `commands` has the commands.

jsonargparse reads the options. Options and their help are the parameters and docstrings of the functions in `commands`;
every setting of `Config` is an option of `train` with the same name. A YAML file for --config has lines `name: value`;
an option after --config on the command line overrides the file. Slow modules are imported when a command runs, so
`--help` is fast.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_origin

import docstring_parser
from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ..config import REMOVED, Config
from ..run.interrupts import Terminated
from ..run.resuming import in_moved_folder
from ..settings import KINDS, Group, Mark, bounds, group, kinds_of, markers, plain_type, units
from ..version import __version__
from ..wording import did_you_mean
from . import commands
from .notices import one_line_each

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": commands.demo,
    "demo-chat": commands.demo_chat,
    "fetch": commands.fetch,
    "train": commands.train,
    "generate": commands.generate,
    "score": commands.score,
    "eval": commands.evaluate,
    "export": commands.export,
}
USAGE = {"fetch": "NAME", "train": "--model MODEL --data DATA [OPTION VALUE ...]"}

UNKNOWN = re.compile(
    r"option '(?:\w+\.)?([\w-]+)' is not accepted|does not accept option '([\w-]+)'|unrecognized arguments: -+([\w-]+)",
    flags=re.IGNORECASE,
)
WRONG = re.compile(  # jsonargparse's messages about a value of the wrong type
    r"Parser key [\"'](?:\w+\.)?(\w+)[\"']: "
    r"(?:.*Given value: (.*)|Expected a .*\. Got value: (.*)|Not of type \w+: (\S+) does not .*|Not of type .*'(.*)')"
)
WORDS = {  # type -> its description in messages
    **KINDS, PositiveInt: "a whole number from 1", NonNegativeInt: "a whole number, 0 or more", list: "a list",
    bool: "true or false", NoneType: "null",
}  # fmt: skip


class Parser(ArgumentParser):
    """Reports an error in one line, with the accepted values and the command for help, and exits with code 2."""

    options: set[str] = set()  # the options of all commands
    reading: str | None = None  # the file of --config, while the parser reads this file

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command, file = self.prog.replace(" [options]", ""), Parser.reading
        Parser.reading = None
        sys.stderr.write(f"lora-gan: {f'{file}: ' if file else ''}{self._plain(message)} (see {command} --help)\n")
        sys.exit(2)

    def _plain(self, message: str) -> str:
        """The message in this library's words on one line. For an unknown option it suggests the nearest name."""
        message = " ".join(message.split()).rstrip(".")
        if wrong := WRONG.fullmatch(message):
            name, value = (group for group in wrong.groups() if group is not None)
            hint = next(getattr(action, "_typehint", action.type) for action in self._actions if action.dest == name)
            return f"--{name} {value} is not accepted: it must be {', or '.join(kinds_of(hint, WORDS))}"
        message = re.sub(r"Parser key [\"'](?:\w+\.)?(\w+)[\"']:", r"--\1:", message)
        message = re.sub("Unexpected config:.*", "it must be YAML, an option a line, as NAME: VALUE", message)
        message = message.replace("Problems parsing config:", "not YAML:").replace('in "<unicode string>", ', "")
        message = re.sub(r"unrecognized arguments: ([^-].*)", r"\1: no option; a value with spaces is quoted", message)
        if re.search(r"required: (fetch\.)?name$", message):
            return "fetch needs the name of a base, such as: lora-gan fetch smollm2"
        message = re.sub(r"(required: )(.*)", lambda m: m[1] + re.sub(r"(\w+\.)?(\w+)", r"--\2", m[2]), message)
        if wrong := UNKNOWN.search(message):
            name = next(filter(None, wrong.groups()))
            message = f"there is no option --{name}{did_you_mean(name, self.options)}"
        return message


class ConfigFile(ActionConfigFile):
    """--config; an error message about the file starts with the file's name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        Parser.reading = str(values)
        super().__call__(parser, cfg, values, option_string)
        Parser.reading = None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: the words after `lora-gan`; None: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # --dry-run and --dry_run are the same option, as in transformers' command lines. Values do not change.
    spelled = [
        re.sub(r"^--[a-z][\w-]*(?=[=.]|$)", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in arguments
    ]
    if not arguments:
        _parser().print_help(sys.stderr)
        return 2
    chosen = _parser().parse_args(spelled)
    values = chosen[chosen.command].as_dict()
    files = values.pop("config", None) or []
    try:
        if chosen.command == "train":
            if values["resume"] and files:
                given = any(word.partition("=")[0] == "--output_dir" for word in spelled)
                values, notice = in_moved_folder(values, Path(str(files[-1])), folder_is_given=given)
                if notice:
                    print(notice, file=sys.stderr)
            settings = {name: values.pop(name) for name in (*Config.__dataclass_fields__, *_removed(COMMANDS["train"]))}
            values["config"] = Config.from_dict(settings)
        with one_line_each():
            COMMANDS[chosen.command](**values)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  discards the rest of the output at exit
    except (ValueError, RuntimeError, ArithmeticError, ImportError, OSError) as error:
        if isinstance(error, OSError) and error.filename and error.strerror:
            error = OSError(f"{error.filename}: {error.strerror}")
        print(f"lora-gan: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        text = str(stop) or "stopped"
        print(f"lora-gan: {text if text.startswith('stopped') else f'stopped: {text}'}", file=sys.stderr)
        return stop.code if isinstance(stop, Terminated) else 130
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="lora-gan",
        description="Train a language model against any reward: two LoRA adapters on one frozen base.",
        epilog="lora-gan COMMAND --help lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subcommands(dest="command", required=True, metavar="COMMAND")
    for name, function in COMMANDS.items():
        summary, _, more = (function.__doc__ or "").partition("\n")
        one = Parser(
            usage=f"lora-gan {name} {USAGE.get(name, '[OPTION VALUE ...]')}",
            description=summary + more.partition("Args:")[0].rstrip(),
            allow_abbrev=False,
        )
        if name == "train":
            one.add_argument(
                "--config", action=ConfigFile, help="YAML file of options; options after --config override it"
            )
            _add_train_options(one, function)
        else:
            _add_options(one, function, as_positional=name == "fetch")
        known = [action for action in one._actions if action.help != SUPPRESS]
        Parser.options |= {option.lstrip("-") for action in known for option in action.option_strings}
        commands.add_subcommand(name, one, help=summary.rstrip("."))
    return parser


def _add_train_options(parser: Parser, function: Callable[..., Any]) -> None:
    """Add the ten most important settings, the function's parameters, and the other settings by group."""
    first = parser.add_argument_group("the settings that matter most")
    _add_options(parser.add_argument_group("the model, the data and the reward"), function)
    groups = {one: parser.add_argument_group(one.value) for one in Group}
    described = {p.arg_name: p.description for p in docstring_parser.parse_from_object(Config).params}
    for field in fields(Config):
        container = first if Mark.FIRST in markers(field) else groups[group(field)]
        kind = plain_type(field)
        facts = ["type: %(type)s", *bounds(field), *(f"unit: {unit}" for unit in units(field)), "default: %(default)s"]
        # argparse's default metavar lists all choices, which makes lines of more than 80 columns.
        metavar: dict[str, Any] = {"metavar": field.name.upper()} if get_origin(kind) is Literal else {}
        text = f"{described[field.name]} ({', '.join(facts)})"
        container.add_argument(f"--{field.name}", type=kind, default=field.default, help=text, **metavar)
    for name in _removed(function):  # `Config.from_dict` accepts the old default, and refuses another value
        parser.add_argument(f"--{name}", type=Any, default=REMOVED[name][0], help=SUPPRESS)


def _removed(function: Callable[..., Any]) -> list[str]:
    """The settings of earlier versions, which a YAML file may hold, except those that are options of the function."""
    return [name for name in REMOVED if name not in function.__annotations__]


def _add_options(container: Any, function: Callable[..., Any], *, as_positional: bool = False) -> None:
    """Add the function's parameters to a parser or a group; booleans become flags without a value."""
    flags = [name for name, hint in function.__annotations__.items() if hint in (bool, "bool")]
    container.add_function_arguments(function, as_group=False, as_positional=as_positional, skip={*flags, "config"})
    described = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    for flag in flags:
        container.add_argument(f"--{flag}", action="store_true", help=described[flag])
