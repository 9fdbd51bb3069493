"""Pages of the documentation that are made of records."""

from __future__ import annotations

import html

import pytest
from jinja2 import UndefinedError

from benchmarks.packaged_page import escaped
from benchmarks.pages import rendered, table


def test_a_cell_shows_a_text_as_it_is() -> None:
    text = "a|b <|endoftext|> #1 & [[x]] *y* `z` \\ $5"
    assert html.unescape(escaped(text)) == text and not set("|<>[]*`\\$") & set(escaped(text))


def test_a_table_has_its_header_first() -> None:
    rows = [["recipe", "value"], ["`top_k`", "0.8"]]
    assert table(rows) == "| recipe | value |\n| :-- | :-- |\n| `top_k` | 0.8 |"
    assert table(rows, left=1).splitlines()[1] == "| :-- | --: |"


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        rendered("study.md.j2")
