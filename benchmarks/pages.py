"""Pages of the documentation that are made of records, by the templates beside this file; tables of records in others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_text
from sae_research.runtime.formatting import markdown_table


def rendered(template: str, **values: Any) -> str:
    """A template's text. Raises `jinja2.UndefinedError` for a value that it asks for and does not get."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(values, table=table)


def table(rows: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A Markdown table, its header the first row; all columns are words where `left` does not say how many."""
    return markdown_table(rows[0], rows[1:], len(rows[0]) if left is None else left)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page. Raises `UserError` where a mark is missing."""
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise UserError(f"{page}: the marks {begin} and {end} are missing")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")
