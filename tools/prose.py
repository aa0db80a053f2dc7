"""Lists sentences in docs, docstrings, comments and messages that are hard to read. `make lint` runs it.

    python tools/prose.py             every text of the project
    python tools/prose.py docs/ src/lora_gan/gan.py

Two checks: words and forms that CONTRIBUTING.md ("How we write") excludes, each with what to write instead, and
sentences of more than 35 words. tools/prose_allowed.txt lists the sentences that stay, each with its reason. An entry
that matches nothing is an error, too, so that the list stays short.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
ALLOWED = Path(__file__).with_name("prose_allowed.txt")
GENERATED = ("api.md", "settings.md", "command-line.md")  # from docstrings, which are checked
MOST_WORDS = 35
FEWEST_WORDS = 4  # shorter string literals are names, keys and formats

_THINGS = (
    "steps?|tokens?|prompts?|responses?|groups?|rows?|layers?|labels?|updates?|calls?|seconds?|nats?|bytes?|numbers?"
)
# (what to look for, what to write instead)
FORMS = [
    (r"\bnought\b", "zero"),
    (r"\b(anew|afresh)\b", "again"),
    (r"\bto the bit\b", "bitwise"),
    (r"\b(whose|whom|whoever)\b", "name the thing; split the sentence"),
    (r"\b(most|some|all|each|one|none|both|any|half|many|\d+) of them\b", "name the things"),
    (rf"\b({_THINGS}) an? ({_THINGS})\b", "per"),
    (r"\b(beside|besides)\b", "next to, compared with, in addition to, in parallel with"),
    (r"\bat once\b", "immediately, or at the same time"),
    (r"\b(goes|go|going|went|gone) on\b", "continue"),
    (r"\bbut for\b", "except for"),
    (r"\balike\b", "equal, or in the same way"),
    (r"\bnobody\b", "no user, no caller: name who"),
    (r"\bin (its|their) midst\b", "in the middle of"),
    (r"\b(is|are|was|were|be|been|being) (told|said)\b", "reported, logged, printed, stated"),
    (r"\b(must|can|cannot|could|to) bear\b", "be safe for, support"),
    (
        r"\b(thereof|therein|thereby|thereafter|wherein|whereby|whence|hence|hitherto)\b",
        "a plain connection, or a new sentence",
    ),
    (r"\b(keen|eager(?!ly))\b(?! attention)", "a name that says what the setting does"),
    (r"\bfor want of\b", "without"),
    (r"\bno (more|less|longer|shorter|fewer) than\b", "at most, at least"),
    (r"\bas it came out\b", "leave it out"),
    (r"\bunder way\b", "running, in progress"),
    (r"\b(stands|stand) (there|here|in|beside|under|together|on)\b", "is, are"),
    (r"(?<![/\w])\b(lies|lie) (in|there|here|on|under|beside|within)\b", "is, are"),
]
# Forms that open a sentence.
OPENINGS = [
    (
        r"What (?!if\b|to\b)[^?]*\b(is|are|was|were|gets|stays|costs|reaches)\b[^?]*[.:;]$",
        "start with the subject: 'The X that ...'",
    ),
    (r"(Nor|Neither|Never|Only then|Not until|Nothing but)\b", "start with the subject"),
    (r"Of (a|an|the|each|every|several|these|those|all|what|its)\b", "start with the subject"),
    (r"Whatever|Wherever", "start with the subject"),
    (r"(To|From|By|With|In|On) (that|this|these|which) (belongs?|comes?|goes|go|is|are)\b", "start with the subject"),
]
PRONOUNS = re.compile(r"\b(it|its|what|them|whose)\b", re.IGNORECASE)
MOST_PRONOUNS = 3  # in one sentence


@dataclass(frozen=True)
class Text:
    """One block of prose: a paragraph, a table cell, a docstring's paragraph, a comment, a message."""

    path: Path
    line: int
    words: str


@dataclass(frozen=True)
class Finding:
    text: Text
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text.path}:{self.text.line}: {self.advice}\n    {self.sentence}"


def texts_of(path: Path) -> Iterator[Text]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(path, source)
    else:
        yield from _markdown(path, source)


def _markdown(path: Path, source: str) -> Iterator[Text]:
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type != "inline":
            continue
        line = (token.map[0] if token.map else 0) + 1
        plain = "".join(
            "CODE" if child.type == "code_inline" else " " if child.type == "softbreak" else child.content
            for child in token.children or []
            if child.type not in ("html_inline", "image")
        )
        yield Text(path, line, plain)


def _python(path: Path, source: str) -> Iterator[Text]:
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.add(id(first.value))
                yield from _paragraphs(path, first.lineno, ast.get_docstring(node) or "")
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            words = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inside:
            words = node.value
        else:
            continue
        if len(words.split()) >= FEWEST_WORDS:
            yield from _paragraphs(path, node.lineno, words)
    yield from _comments(path, source)


def _comments(path: Path, source: str) -> Iterator[Text]:
    """Comments on consecutive lines are one text."""
    start, words, last, joins = 0, "", -1, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = token.line.lstrip().startswith("#")
        if line != last + 1 or not words or not (alone and joins):
            if words:
                yield Text(path, start, words)
            start, words = line, ""
        words, last, joins = f"{words} {token.string.lstrip('#: ')}", line, alone
    if words:
        yield Text(path, start, words)


def _paragraphs(path: Path, line: int, text: str) -> Iterator[Text]:
    """A docstring's paragraphs and list items; indented code and tables of values are left out."""
    block: list[str] = []
    start = line
    for offset, row in enumerate([*text.splitlines(), ""]):
        fresh = not row.strip() or re.match(r"\s*([-*•]|\d+\.|[\w*`, ]{1,40}:)(\s|$)", row)
        if fresh and block:
            words = " ".join(block)
            if not re.match(r"(>>>|\$|lora-gan |python |pip )", words):
                yield Text(path, start, words)
            block = []
        if row.strip():
            if not block:
                start = line + offset
            block.append(row.strip())


def sentences(words: str) -> list[str]:
    plain = re.sub(r"``?[^`]*``?", "CODE", " ".join(words.split()))
    plain = re.sub(r"\b(e\.g|i\.e|cf|vs|al|Fig|Eq|approx|etc|No)\.", r"\1", plain)
    return [part.strip() for part in re.split(r"(?<=[.!?])[)\"']?\s+(?=[A-Z`\"(*\d])", plain) if part.strip()]


def findings_of(text: Text) -> Iterator[Finding]:
    for sentence in sentences(text.words):
        for form, advice in FORMS:
            if found := re.search(form, sentence, re.IGNORECASE):
                yield Finding(text, sentence, f"“{found.group()}”: {advice}")
        for form, advice in OPENINGS:
            if re.match(form, sentence):
                yield Finding(text, sentence, f"“{' '.join(sentence.split()[:3])} …”: {advice}")
        count = len(re.findall(r"[\w’'-]*\w", sentence))
        if count > MOST_WORDS:
            yield Finding(text, sentence, f"{count} words: at most {MOST_WORDS}; split the sentence")
        if len(PRONOUNS.findall(sentence)) > MOST_PRONOUNS:
            yield Finding(text, sentence, f"more than {MOST_PRONOUNS} times it/its/what/them: name the things")


def _files(arguments: list[str]) -> list[Path]:
    named = [Path(argument) for argument in arguments] or [
        ROOT / name for name in ("src", "docs", "examples", "tools", "benchmarks")
    ]
    if not arguments:
        named += sorted(ROOT.glob("*.md"))
    found = []
    for path in named:
        found += [path] if path.is_file() else sorted(file for end in ("*.py", "*.md") for file in path.rglob(end))
    return [path for path in found if path.resolve() != Path(__file__).resolve() and path.name not in GENERATED]


def _allowed() -> list[tuple[str, str]]:
    """Of each line `PATH | TEXT | REASON`: sentences of this file that contain this text stay."""
    lines = ALLOWED.read_text(encoding="utf-8").splitlines()
    return [(path.strip(), text.strip()) for path, text, _ in (line.split(" | ") for line in lines if line.strip())]


def main(arguments: list[str]) -> int:
    allowed, used, count = _allowed(), set(), 0
    for path in _files(arguments):
        name = str(path.resolve().relative_to(ROOT))
        for finding in (finding for text in texts_of(path) for finding in findings_of(text)):
            match = next((entry for entry in allowed if entry[0] == name and entry[1] in finding.sentence), None)
            if match is None:
                count += 1
                print(finding)
            else:
                used.add(match)
    unused = [] if arguments else [entry for entry in allowed if entry not in used]
    for path_name, text in unused:
        print(f"{ALLOWED.name}: {path_name} has no finding with “{text}”: remove the entry")
    if count or unused:
        print(f"{count} findings. CONTRIBUTING.md, “How we write”, has the rules.")
    return int(bool(count or unused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
