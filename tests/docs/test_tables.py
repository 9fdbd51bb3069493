"""Tables in the docs are those that their programs make from their records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cluster, default_run, dictionaries, growth

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "record, page, begin, end, table",
    [
        (default_run.RECORD, default_run.PAGE, default_run.BEGIN, default_run.END, default_run.table),
        (cluster.RECORD, cluster.PAGE, cluster.BEGIN, cluster.END, cluster.table),
        (growth.RECORD, growth.PAGE, growth.BEGIN, growth.END, growth.table),
        (dictionaries.RECORD, dictionaries.PAGE, dictionaries.BEGIN, dictionaries.END, dictionaries.table),
    ],
    ids=["default_run", "cluster", "growth", "dictionaries"],
)
def test_a_table_is_that_of_its_record(record: Path, page: Path, begin: str, end: str, table: Callable[[Path], str]) -> None:
    shown = (ROOT / page).read_text().split(begin)[1].split(end)[0].strip()
    assert shown == table(ROOT / record)
