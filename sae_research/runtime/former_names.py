"""What names of other tools are called here: the answer to a command, file, parameter or recipe that this project lacks.

The records are `docs/moving/TOOL.json`, from which the tables of the pages beside them are made too. They lie outside the
package, because no result depends on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

FOLDER = Path(__file__).parents[2] / "docs" / "moving"
NOTHING = "–"
"""Stands in place of a new name where there is none; the note says why."""
QUOTED = re.compile(r"`([^`]+)`")
_FILE = re.compile(r"(?:\./)?[\w./{}-]*\.(?:py|sh|yaml|yml|ipynb|json|pt|txt)")
_SAME = re.compile(r"the same of (recipe )?(.+)")
_MODULE = re.compile(r"\w+(?:\.\w+)+")

Kind = Literal["command", "file", "parameter", "value", "name", "metric"]
"""value: of a recipe, architecture, evaluation or model. name: of Python."""


class Row(NamedTuple):
    """One name, or several that became the same, each in backticks."""

    old: str
    new: str
    """Names of this project in backticks; `the same of` sections, recipes or commands; or `NOTHING`."""
    note: str

    @property
    def old_names(self) -> list[str]:
        return QUOTED.findall(self.old)

    def here(self, old: str) -> str:
        """What one of the old names is here, without backticks: `core_eval.batch_size_prompts` where the row says the same
        of `core_eval`, a flag behind its command, a key of a recipe as one of `train.saes`."""
        same = _SAME.fullmatch(self.new)
        if same is None:
            return self.new.replace("`", "")
        last = old.rpartition(".")[2]
        if same[1]:
            return f"train.saes.NAME.{last}"
        return ", ".join(f"{place} {old}" if " " in place else f"{place}.{last}" for place in QUOTED.findall(same[2]))


class Table(NamedTuple):
    title: str
    kind: Kind
    rows: tuple[Row, ...]


class Tool(NamedTuple):
    """What one page is about."""

    page: str
    """Its file's name in `FOLDER`, without a suffix."""
    name: str
    tables: tuple[Table, ...]

    @property
    def place(self) -> str:
        return f"docs/moving/{self.page}.md"


@cache
def tools() -> tuple[Tool, ...]:
    """All records, by page; none where the package was installed without its documentation."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text())
        tables = [Table(one["title"], one["kind"], tuple(Row(*row) for row in one["rows"])) for one in record["tables"]]
        found.append(Tool(path.stem, record["tool"], tuple(tables)))
    return tuple(found)


def elsewhere(name: str, *kinds: Kind) -> str:
    """`; training_tokens of SAELens is train.tokens here (docs/moving/sae_lens.md)`: what follows the complaint that `name`
    is unknown. Empty for a name that no table of these kinds holds.

    A dotted parameter is also known by its last part, a command by the file it runs, a file by its name and stem.
    """
    found = _spellings()
    hits = [hit for kind in kinds or get_args(Kind) for hit in found.get((kind, name), ())]
    best = min((hit.derived for hit in hits), default=False)
    answers: dict[tuple[str, str], list[Tool]] = {}
    for hit in hits:
        if hit.derived == best and hit.tool not in answers.setdefault((hit.old, hit.answer), []):
            answers[hit.old, hit.answer].append(hit.tool)
    return "".join(
        f"; {old} of {' and '.join(tool.name for tool in of)} {answer} ({', '.join(tool.place for tool in of)})"
        for (old, answer), of in answers.items()
    )


class _Hit(NamedTuple):
    derived: bool
    """Whether the name is only part of what the table says."""
    tool: Tool
    old: str
    answer: str


@cache
def _spellings() -> dict[tuple[Kind, str], list[_Hit]]:
    found: dict[tuple[Kind, str], list[_Hit]] = {}
    for tool in tools():
        for table in tool.tables:
            for row in table.rows:
                for old in row.old_names:
                    said = f"is {row.here(old)} here"
                    if row.new == NOTHING:
                        said = f"has no counterpart here: {row.note.replace('`', '')}"
                    hit = _Hit(False, tool, old, said)
                    found.setdefault((table.kind, old), []).append(hit)
                    for part in set(_parts(table.kind, old)) - {old}:
                        found.setdefault((table.kind, part), []).append(hit._replace(derived=True))
    return found


def _parts(kind: Kind, old: str) -> Iterator[str]:
    if kind == "parameter":
        yield old.lstrip("-")
        yield old.rpartition(".")[2]
    if kind in ("command", "file"):
        for word in old.split():
            if _FILE.fullmatch(word):
                yield from (word.removeprefix("./"), Path(word).name, Path(word).stem)
            elif _MODULE.fullmatch(word):
                yield word
