"""The structure of src/lora_gan: which package may import which, and how long a function may be.

Imports point one way: cli → gan → (run, export) → state → training → model → storage; rewards import storage alone.
Imports for type checkers and those inside functions count.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_gan

SOURCE = Path(lora_gan.__file__).parent
# A package may import those before it in this order.
ORDER = ("storage", "rewards", "model", "training", "state", "run", "export", "gan", "cli")
LINES = 60  # of a function, its docstring included


def modules() -> dict[str, Path]:
    """{dotted name below lora_gan: file}; a package's is its __init__.py."""
    files = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this library that a module imports, anywhere in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(filter(None, base))
            names = [f"{target}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {one if one in known else target for one in names}
    return found - {name}


def place(module: str) -> int:
    """Where a module's package stands in ORDER. Modules beside the packages stand first: every package may import them.
    What a user imports or runs stands last."""
    package = module.split(".")[0]
    if package in ("", "__main__"):
        return len(ORDER)
    return ORDER.index(package) if package in ORDER else -1


def functions() -> Iterator[tuple[str, int]]:
    """Every function with its number of lines, decorators left out."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node.end_lineno - node.lineno + 1


def test_imports_point_one_way():
    known = modules()
    upwards = []
    for name, file in known.items():
        for other in imports(name, file, known):
            if place(name) < place(other):
                upwards.append(f"{name} imports {other}")
    assert upwards == []


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {name: imports(name, file, known) for name, file in known.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_function_is_longer_than_a_screen():
    assert {name: lines for name, lines in functions() if lines > LINES} == {}


@pytest.mark.parametrize("package", [name for name in ORDER if name not in ("state", "gan")])
def test_a_package_says_what_it_is_for(package):
    tree = ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
