"""docs/reference/: the pages that tools/reference.py writes are those of the code as it is."""

import re
from pathlib import Path

import pytest
from helpers import load_script

from lora_gan.cli import main as cli

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "reference.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="tools/ is not part of this copy")


def _script():
    return load_script(SCRIPT)


@pytest.mark.parametrize("page", ["settings.md", "api.md"])
def test_a_page_is_what_the_code_says(page):
    script = _script()
    written = (script.PAGES / page).read_text(encoding="utf-8")
    assert written == script.page(page), "run: python tools/reference.py"


def test_the_page_of_the_command_line_has_every_option():
    """Options alone: argparse lays its help out differently from one version of Python to the next."""
    text = (_script().PAGES / "command-line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## lora-gan (\S+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE))
    commands = next(action for action in cli._parser()._actions if action.dest == "command")._name_parser_map
    assert set(sections) == set(commands)
    for name, command in commands.items():
        listed = [action for action in command._actions if action.help != "==SUPPRESS=="]
        options = {option for action in listed for option in action.option_strings if option.startswith("--")}
        shown = set(re.findall(r"--[\w.-]*[\w+]", sections[name]))
        missing = {option for option in options if option not in shown} - {"--help"}
        assert not missing, f"{name}: {sorted(missing)}; run: python tools/reference.py"
