"""README.md, CONTRIBUTING.md and docs/: every link leads somewhere, and a test that a link names is there.

A link names a test in its text or its title: [`test_x`](../tests/test_y.py), [a claim](../tests/test_y.py "test_x").
docs/compare.md is held to more: nothing is said there of this library without a link, or of another without a source.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMPARE = ROOT / "docs" / "compare.md"

INLINE = re.compile(r"\[((?:`[^`]*`|[^\]`])*)\]\(<?([^)\s>]+)>?(?:\s+\"([^\"]*)\")?\)")
REFERENCE = re.compile(r"^\[(?!\^)([^\]]+)\]:\s*<?(\S+?)>?(?:\s+\"([^\"]*)\")?\s*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def links_of(text):
    """(text, target, title) of each link, those in blocks of code left out."""
    text = FENCED.sub("", text)
    return INLINE.findall(text) + REFERENCE.findall(text)


def within(links):
    """The links that stay in the repository, without the place in the page they may lead to."""
    for text, target, title in links:
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z][a-z0-9+.-]*:", path, flags=re.IGNORECASE):
            yield text, path, title


@functools.cache
def functions_of(file):
    return {node.name for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def named_tests(page):
    """(file, name of a test) of each link to a file of tests/ that names one."""
    for text, path, title in within(links_of(page.read_text("utf-8"))):
        file = (page.parent / path).resolve()
        if file.is_relative_to(ROOT / "tests") and file.suffix == ".py":
            for name in sorted(set(re.findall(r"\btest_\w+", f"{text} {title}")) - {file.stem}):
                yield file, name


def rows_of_comparison():
    """The cells of each row of the tables with four columns of software."""
    for line in COMPARE.read_text("utf-8").splitlines():
        if line.startswith("|") and not re.fullmatch(r"[ |:-]+", line):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) in (3, 5), f"{len(cells)} cells in {line!r}"
            if len(cells) == 5 and cells[1] != "LoRA-GAN":
                yield cells


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    for _, path, _ in within(links_of(page.read_text("utf-8"))):
        target = (page.parent / path).resolve()
        assert target.is_relative_to(ROOT), f"{path} leads out of the repository"
        assert target.exists(), f"{path} is not there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_named_test_exists(page):
    for file, name in named_tests(page):
        assert name in functions_of(file), f"{file.name} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_speak_of_nothing_outside_the_repository(page):
    assert re.findall(r"(?<![\w.])/work(?![\w-])|\.\./shared\b", page.read_text("utf-8")) == []


def test_the_comparison_names_a_test_at_each_link_into_tests():
    links = within(links_of(COMPARE.read_text("utf-8")))
    bare = [path for text, path, title in links if path.startswith("../tests/") and "test_" not in text + title]
    assert bare == [] and sum(1 for _ in named_tests(COMPARE)) > 50


def test_the_comparison_claims_nothing_without_a_link_or_a_source():
    rows = list(rows_of_comparison())
    assert len(rows) > 30
    for what, ours, *peers in rows:
        assert list(within(links_of(ours))) or re.match(r"no\b|your machine\b", ours), f"{what}: no link in {ours!r}"
        for peer in peers:
            assert "[^" in peer or "not found" in peer, f"{what}: no source in {peer!r}"


def test_the_comparisons_sources_are_all_there_and_all_used():
    text = COMPARE.read_text("utf-8")
    defined = re.findall(r"^\[\^([\w-]+)\]: ", text, flags=re.MULTILINE)
    used = re.findall(r"\[\^([\w-]+)\](?!:)", text)
    assert len(defined) == len(set(defined)) and set(defined) == set(used)


def test_the_parts_of_a_link_are_read_as_they_are_written():
    text = '[a](b.md) [`c[0]`](d.md#e) ![f](g.png "h") [i](<j.md>)\n[k]: l.md "m"\n[^n]: o\n```\n[p](q.md)\n```\n'
    assert links_of(text) == [
        ("a", "b.md", ""), ("`c[0]`", "d.md#e", ""), ("f", "g.png", "h"), ("i", "j.md", ""), ("k", "l.md", "m"),
    ]  # fmt: skip
    outside = [("", "https://x.y/z", ""), ("", "mailto:a@b", ""), ("", "#here", "")]
    assert list(within([*outside, ("", "d.md#e", "t")])) == [("", "d.md", "t")]
