"""What users rely on stays: public names and their signatures, settings and defaults, metrics, command-line options.

The oracle is golden/public.json, written before the modules were sorted into packages. New things may be added to the
library without a change of that file. A thing that is taken away on purpose is taken out of it too:

    python tests/test_public_names.py
"""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import lora_gan
from lora_gan import LoraGAN, rewards, tiny
from lora_gan.cli import main as cli

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).parent / "golden" / "public.json"


def found() -> dict[str, dict[str, Any]]:
    """{kind: {name: what it is}} of today."""
    methods = {name: value for name, value in inspect.getmembers(LoraGAN) if not name.startswith("_")}
    kinds = {
        "lora_gan": dict.fromkeys(lora_gan.__all__, ""),
        "lora_gan.rewards": dict.fromkeys(rewards.__all__, ""),
        "LoraGAN": {
            name: ", ".join(inspect.signature(value).parameters) if callable(value) else "property"
            for name, value in {**methods, "LoraGAN": LoraGAN}.items()
        },
        "lora_gan.tiny": {name: "" for name in ("PATH", "pairs") if hasattr(tiny, name)},
        "settings": {field.name: repr(field.default) for field in fields(lora_gan.Config)},
        "metrics": dict.fromkeys(documented_metrics(), ""),
    }
    subcommands = next(action for action in cli._parser()._actions if action.dest == "command")
    for command, parser in subcommands._name_parser_map.items():
        listed = [action for action in parser._actions if action.help != "==SUPPRESS=="]  # not the removed settings
        options = {option for action in listed for option in action.option_strings}
        kinds[f"options of {command}"] = dict.fromkeys(sorted(options), "")
    return kinds


def documented_metrics() -> list[str]:
    file = ROOT / "docs" / "reference" / "metrics.md"
    rows = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return sorted({name for row in rows for name in re.findall(r"`([\w/<>]+)`", row.split("|")[1])})


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="docs/ is not part of this copy")
@pytest.mark.parametrize("kind", json.loads(LIST.read_text(encoding="utf-8")) if LIST.exists() else [])
def test_what_users_rely_on_is_there(kind):
    before, now = json.loads(LIST.read_text(encoding="utf-8"))[kind], found()[kind]
    assert {name: now.get(name, "gone") for name in before} == before


if __name__ == "__main__":
    LIST.write_text(json.dumps(found(), indent=1) + "\n", encoding="utf-8")
