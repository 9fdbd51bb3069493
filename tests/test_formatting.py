"""Numbers, amounts, times and tables as text."""

from __future__ import annotations

import csv
import doctest

from sae_research.runtime import formatting
from sae_research.runtime.errors import did_you_mean
from sae_research.runtime.formatting import amount, counted, csv_text, duration, markdown_table, number, text_table, tsv_text


def test_the_examples_hold() -> None:
    found = doctest.testmod(formatting)
    assert found.attempted >= 4 and not found.failed


def test_numbers_read_well() -> None:
    shown = [number(value) for value in (0.7071, 12.34, 331.2, 0.00041, -0.02, 0.0, None)]
    assert shown == ["0.707", "12.3", "331", "0.00041", "-0.020", "0", "–"]
    amounts = (0, 8128, 99_949, 99_999, 300_000, 999_499, 999_999, 5e7, 2e9)
    assert [amount(value) for value in amounts] == ["0", "8,128", "99,949", "100k", "300k", "999k", "1M", "50M", "2B"]
    assert [counted(amount, "row") for amount in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [duration(seconds) for seconds in (0, 59.9, 60, 3661)] == ["0 s", "59 s", "1 min 0 s", "1 h 1 min"]


def test_tables_are_aligned() -> None:
    assert text_table([("SAE", "L0"), ("topk", "32.0"), ("a", "5")]) == "SAE     L0\ntopk  32.0\na        5"
    assert text_table([("SAE", "hook"), ("topk", "a")], left=2) == "SAE   hook\ntopk  a"
    assert markdown_table(["SAE", "L0"], [["a", "5"]]) == "| SAE | L0 |\n| :-- | --: |\n| a | 5 |"


def test_a_table_survives_its_file() -> None:
    rows = [["a, b", 'say "c"', 0.1], ["", None, 64]]
    text = csv_text(["x", "y", "z"], rows)
    assert list(csv.reader(text.splitlines())) == [["x", "y", "z"], ["a, b", 'say "c"', "0.1"], ["", "", "64"]]
    assert tsv_text(["x", "y"], [['"', None], [0.5, 2]]) == 'x\ty\n"\t\n0.5\t2\n'


def test_the_nearest_name_is_proposed_or_all_are_listed() -> None:
    assert did_you_mean("topkk", ["standard", "topk"]) == ", did you mean topk?"
    assert did_you_mean("zzz", {"topk", "standard"}) == "; known: standard, topk"
    assert did_you_mean("zzz", ["topk"], otherwise="") == ""
