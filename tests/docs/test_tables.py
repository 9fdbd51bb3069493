"""Tables in the docs are those that their programs make from their records."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import (
    cluster,
    coefficients,
    default_run,
    dictionaries,
    growth,
    model_difference,
    optional_evaluations,
    pursuit_page,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "record, page, begin, end, table",
    [
        (default_run.RECORD, default_run.PAGE, default_run.BEGIN, default_run.END, default_run.table),
        (cluster.RECORD, cluster.PAGE, cluster.BEGIN, cluster.END, cluster.table),
        (growth.RECORD, growth.PAGE, growth.BEGIN, growth.END, growth.table),
        (
            model_difference.RECORD,
            model_difference.PAGE,
            model_difference.BEGIN,
            model_difference.END,
            model_difference.table,
        ),
        (dictionaries.RECORD, dictionaries.PAGE, dictionaries.BEGIN, dictionaries.END, dictionaries.table),
        (coefficients.RECORD, coefficients.PAGE, coefficients.BEGIN, coefficients.END, coefficients.table),
        *(
            (bench.RECORD, bench.PAGE, f"<!-- {name} -->", f"<!-- end of {name} -->", partial(bench.recorded_table, name))
            for name in bench.TABLES
        ),
        *(
            (
                optional_evaluations.RECORD,
                optional_evaluations.PAGE,
                *optional_evaluations.marks(name),
                partial(optional_evaluations.table, name),
            )
            for name in optional_evaluations.SHOWN
        ),
    ],
    ids=[
        *("default_run", "cluster", "growth", "model_difference", "dictionaries", "coefficients"),
        *bench.TABLES,
        *optional_evaluations.SHOWN,
    ],
)
def test_a_table_is_that_of_its_record(record: Path, page: Path, begin: str, end: str, table: Callable[[Path], str]) -> None:
    shown = (ROOT / page).read_text().split(begin)[1].split(end)[0].strip()
    assert shown == table(ROOT / record)


def test_the_tables_of_pursuit_encoders_are_those_of_their_records(tmp_path: Path) -> None:
    page = tmp_path / "pursuit.md"
    page.write_text((ROOT / "docs/pursuit.md").read_text().replace("0.", "9."))
    pursuit_page.write_tables(page, ROOT / "docs/pursuit")
    tables = [
        re.findall(r"<!-- begin .*?<!-- end", path.read_text(), re.DOTALL) for path in (page, ROOT / "docs/pursuit.md")
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 3


def test_the_functions_of_analysis_stand_where_the_page_says() -> None:
    """Rows `module, module | function, function` of the last table of docs/analysis.md."""
    rows = re.findall(
        r"^\| (`.+) \| (`.+) \|$", (ROOT / "docs/analysis.md").read_text().split("| functions |")[1], re.MULTILINE
    )
    assert len(rows) > 4
    for modules, functions in rows:
        found = [importlib.import_module(f"sae_research.analysis.{name}") for name in re.findall(r"`([\w.]+)`", modules)]
        for function in re.findall(r"`(\w+)`", functions):
            assert any(function in vars(module) for module in found), function
