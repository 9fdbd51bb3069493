"""What the documentation shows to type: commands and Python, read from its Markdown pages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from tests.helpers.dvc_project import ROOT

NEEDS = {"hub", "gpu", "endpoint", "cluster", "account"}
"""What `<!-- needs: ... -->` before a block, or in a row of a table, may say that a command takes beside this machine."""
HEADS = {
    *("make", "dvc", "sae-research", "python", "python3", "git", "ray", "wandb", "sbatch"),
    *("source", "pre-commit", "huggingface-cli", "rm", "pip", "cd"),
}
"""First words of a command."""
_MARKER = re.compile(r"<!-- needs: ([\w, ]+) -->")
_FENCE = re.compile(r"^( *)```(\w*)")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
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
    """Code in a line of text whose first word is a command's."""
    inside, lines = set[int](), (ROOT / page).read_text().split("\n")
    for block in blocks(page):
        inside |= set(range(block.line, block.line + block.text.count("\n") + 1))
    for at, line in enumerate(lines, 1):
        if at in inside:
            continue
        table = line.startswith("|") and not page.startswith(_TABLES_OF_NAMES)
        if page.startswith(_ELSEWHERE) and line.startswith("|"):
            line = line.split("|", 2)[2]  # the first column names what another tool has
        marked = _MARKER.search(line) if table else None
        for span in _SPAN.findall(line):
            theirs = page.startswith(_ELSEWHERE) and re.match(r"python \S+\.py", span)  # another tool's script
            if _head(span) in HEADS and " " in span and not theirs:
                for words in _split(span.replace("\\|", "|") if table else span):
                    needs = _needs(marked[1]) if marked else frozenset[str]()
                    yield _command(page, at, words, needs, "table" if table else "prose")


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
