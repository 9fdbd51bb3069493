"""Numbers, amounts, times and tables as text: one way each, for messages, reports and files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

ABSENT = "–"
"""Stands where there is no value."""


def number(value: float | None) -> str:
    """At most three decimals for ordinary sizes, two significant digits for small ones.

    >>> number(0.70712), number(12.345), number(331.0), number(0.00041), number(-0.02), number(None)
    ('0.707', '12.3', '331', '0.00041', '-0.020', '–')
    """
    if value is None:
        return ABSENT
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.01 else f"{value:.2g}"


def signed(value: float) -> str:
    """A difference: `number` with its sign.

    >>> signed(0.0831), signed(-12.3), signed(0.0)
    ('+0.083', '−12.3', '0')
    """
    return ("+" if value > 0 else "") + number(value).replace("-", "−")


def with_interval(value: float | None, bounds: Sequence[float] | None) -> str:
    """0.763 [0.751, 0.774]; the value alone where there is no interval."""
    return number(value) + ("" if bounds is None else f" [{number(bounds[0])}, {number(bounds[1])}]")


def percent(share: float) -> str:
    """A share of one as a percentage of three significant digits: 0.0123 -> `1.23 %`."""
    return f"{100 * share:.3g} %"


def amount(value: float) -> str:
    """A whole number, from 100,000 on to three significant digits.

    >>> amount(8128), amount(300_000), amount(999_999), amount(2e9)
    ('8,128', '300k', '1M', '2B')
    """
    rounded = float(f"{value:.3g}")
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(rounded) >= size:
            return f"{rounded / min(size, 1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:,.0f}"


def counted(amount: int, noun: str) -> str:
    """`1 source`, `2,000 sources`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def gigabytes(n_bytes: float) -> str:
    """Of 1e9 bytes, three significant digits."""
    return f"{n_bytes / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """The two largest of hours, minutes and seconds.

    >>> duration(41.7), duration(754), duration(7300)
    ('41 s', '12 min 34 s', '2 h 1 min')
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def text_table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Aligned text for a terminal. rows: the header is the first; the first `left` columns are words, the others numbers."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are words, the others numbers."""
    ruler = [":--" if place < left else "--:" for place in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ruler, *body))


def csv_text(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A table as the text of a .csv file; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *body])
    return buffer.getvalue()


def tsv_text(header: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A table as the text of a .tsv file, nothing quoted; None is an empty cell. No cell may hold a tab or line break."""
    rows = [["" if cell is None else str(cell) for cell in row] for row in (header, *body)]
    return "".join("\t".join(row) + "\n" for row in rows)
