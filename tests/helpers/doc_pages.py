"""What the documentation shows to type: commands and Python, read from its Markdown pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from tests.helpers.dvc_project import ROOT

NEEDS = {"hub", "gpu", "endpoint", "cluster", "account"}
"""What `<!-- needs: ... -->` may say that a command takes beside this machine: before a block, of all in it; right behind
a command in backticks, of that one; elsewhere in a row of a table, of all in it."""
APPLIED = {
    "docs/extending.md": "tests/test_extending.py",
    "docs/extending_recipes.md": "tests/training/test_extending_recipes.py",
}
"""Pages whose blocks another test puts into a copy of the project, one after the other, and then runs that."""
HEADS = {
    *("make", "dvc", "sae-research", "python", "python3", "git", "ray", "wandb", "sbatch"),
    *("source", "pre-commit", "huggingface-cli", "rm", "pip", "cd"),
}
"""First words of a command."""
_MARKER = re.compile(r"<!-- needs: ([\w, ]+) -->")
_FENCE = re.compile(r"^( *)```(\w*)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)(?: ?<!-- needs: ([\w, ]+) -->)?")
"""Code in text, which may go on in the next line, and a marker of its own."""
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")
_ELSEWHERE = "docs/moving/"
_TABLES_OF_NAMES = ("docs/reference/", _ELSEWHERE)
"""Pages whose tables say what something is, command by command: what they name is read, not run."""
_SHELLS = ("bash", "sh", "console")


class Block(NamedTuple):
    line: int
    language: str
    """Of a fence; "indented" for a block indented by four spaces."""
    text: str
    needs: frozenset[str]


class Command(NamedTuple):
    page: str
    line: int
    words: tuple[str, ...]
    variables: tuple[str, ...]
    """`NAME=value` in front."""
    needs: frozenset[str]
    place: str
    """`block`, `table` or `prose`; what stands in prose may be a command's name alone."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def text(self) -> str:
        return " ".join((*self.variables, shlex.join(self.words)))


@cache
def pages() -> tuple[str, ...]:
    """README.md, CONTRIBUTING.md and the pages of the site."""
    return ("README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    return tuple(_blocks((ROOT / page).read_text().split("\n")))


def _blocks(lines: list[str]) -> Iterator[Block]:
    needs, at, in_list = frozenset[str](), 0, False
    while at < len(lines):
        line, start = lines[at], at
        if fence := _FENCE.match(line):
            at += 1
            while lines[at].strip() != "```":
                at += 1
            yield Block(start + 2, fence[2], "\n".join(lines[start + 1 : at]), needs)
        elif line.startswith("    ") and not in_list and (start == 0 or not lines[start - 1].strip()):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            yield Block(start + 1, "indented", "\n".join(line[4:] for line in lines[start : at + 1]).rstrip(), needs)
        at += 1
        if line.strip():
            found = _MARKER.fullmatch(line.strip())
            needs = _needs(found[1]) if found else frozenset()
            in_list = bool(re.match(r" *([-*]|\d+\.) ", line)) or (in_list and line.startswith(" "))


def _needs(text: str) -> frozenset[str]:
    names = frozenset(name.strip() for name in text.split(","))
    assert names <= NEEDS, f"<!-- needs: {text} -->: known are {sorted(NEEDS)}"
    return names


@cache
def commands(page: str) -> tuple[Command, ...]:
    """All of a page, in order of blocks, then of rows and prose."""
    found: list[Command] = []
    for block in blocks(page):
        if block.language in _SHELLS or (block.language in ("indented", "text") and _head(block.text) in HEADS):
            for line, text in _whole_lines(block):
                for words in _split(text):
                    found.append(_command(page, line, words, block.needs, "block"))
                    assert found[-1].words[0] in HEADS, f"{page}:{line}: no command: {text}"
    return (*found, *_spans(page))


def _spans(page: str) -> Iterator[Command]:
    """Code in text whose first word is a command's."""
    for first, text in _texts(page):
        row = text.startswith("|")
        table = row and not page.startswith(_TABLES_OF_NAMES)
        of_row = _MARKER.search(_SPAN.sub("", text)) if row else None
        if page.startswith(_ELSEWHERE) and row:
            text = text.split("|", 2)[2]  # the first column names what another tool has
        for match in _SPAN.finditer(text):
            span = match[1].replace("\n", " ")
            theirs = page.startswith(_ELSEWHERE) and re.match(r"python \S+\.py", span)  # another tool's script
            if _head(span) in HEADS and " " in span and not theirs:
                marked = match[2] or (of_row[1] if of_row else "")
                needs = _needs(marked) if marked else frozenset[str]()
                line = first + text.count("\n", 0, match.start())
                for words in _split(span.replace("\\|", "|") if row else span):
                    yield _command(page, line, words, needs, "table" if table else "prose")


def _texts(page: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each row of a table and each paragraph outside blocks."""
    inside, lines = set[int](), (ROOT / page).read_text().split("\n")
    for block in blocks(page):
        inside |= set(range(block.line, block.line + block.text.count("\n") + 1))
    paragraph: list[str] = []
    for at, line in enumerate([*lines, ""], 1):
        ends = at in inside or not line.strip() or line.startswith("|") or _FENCE.match(line)
        if ends and paragraph:
            yield at - len(paragraph), "\n".join(paragraph)
            paragraph = []
        if line.startswith("|") and at not in inside:
            yield at, line
        elif not ends:
            paragraph.append(line)


def python(page: str) -> Iterator[Block]:
    yield from (block for block in blocks(page) if block.language == "python")


def _head(text: str) -> str:
    words = text.split()
    return next((word for word in words if not _ASSIGNMENT.fullmatch(word)), "")


def _whole_lines(block: Block) -> Iterator[tuple[int, str]]:
    """(line number, text) of a block's lines, those that end with a backslash joined with the next."""
    begun, first = "", 0
    for at, line in enumerate(block.text.split("\n"), block.line):
        first = first if begun else at
        begun += line.rstrip("\\").rstrip(" ") + " " if line.endswith("\\") else line
        if not line.endswith("\\"):
            if begun.strip():
                yield first, begun
            begun = ""


def _split(text: str) -> Iterator[list[str]]:
    """Words of each command of a line, without comments; `;` and `&&` join commands."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            assert word in (";", "&&"), f"{text}: {word} joins commands in a way that is not read here"
            if words:
                yield words
            words = []
        else:
            words.append(word)


def _command(page: str, line: int, words: list[str], needs: frozenset[str], place: str) -> Command:
    variables = []
    while words and _ASSIGNMENT.fullmatch(words[0]):
        variables.append(words.pop(0))
    return Command(page, line, tuple(words), tuple(variables), needs, place)
