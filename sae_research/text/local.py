"""A user's own text files: .txt (one document each), .jsonl, .csv, .tsv and .parquet (one document a row).

Nothing is guessed: a cell of a .csv or .tsv file is the text that stands there (`007`, `1.0`, `NA`, `null`, `2024-01-01`), a
value of a .jsonl or .parquet file is what its type says. A row with an empty cell where a value is needed is left out, and
that is said.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet", ".tsv")
SUFFIXES = (".txt", *TABLE_SUFFIXES)
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LARGEST_FIELD = 2**31 - 1
"""Characters of a cell: the csv module's own limit of 131,072 is less than a book."""

Row = tuple[Any, ...]


def looks_local(name: str) -> bool:
    """True where `name` can only be a path: hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", *SUFFIXES))


def local_files(path: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The readable files at `path` (a file, or a folder searched to any depth), sorted; hidden ones left out.

    Raises `UserError` if there are none.
    """
    if path.is_file():
        files = [path] if path.suffix in suffixes else []
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in suffixes
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    if not files:
        raise UserError(f"{path}: no readable file; known are {', '.join(suffixes)}")
    return files


def local_fingerprint(path: Path) -> dict[str, str]:
    """SHA-256 of each readable file by its path below `path`."""
    root = path if path.is_dir() else path.parent
    return {file.relative_to(root).as_posix(): file_sha256(file) for file in local_files(path)}


def read_rows(file: Path, columns: Sequence[str], left_out: list[int] | None = None) -> Iterator[Row]:
    """The values of `columns`, row by row, in file order; a .txt file is one row with its whole text.

    Rows without a value in one of the columns are left out: a line on stderr says how many, once, and `left_out` gets their
    numbers. Raises `UserError` for a column that is missing and for a file that cannot be parsed or decoded.
    """
    yield from (row for _, row in numbered_rows(file, columns, left_out))


def numbered_rows(file: Path, columns: Sequence[str], left_out: list[int] | None = None) -> Iterator[tuple[int, Row]]:
    """(number, values) of what `read_rows` yields. Rows count from 1, without a header; a .jsonl file's are its lines."""
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(file.suffix, _read_csv)
    missing = [] if left_out is None else left_out
    before = len(missing)
    for number, row in reader(file, columns):
        if any(_missing(value) for value in row):
            missing.append(number)
        else:
            yield number, row
    if len(missing) > before:
        _say_left_out(file, tuple(columns), tuple(missing[before:]))


@cache
def _say_left_out(file: Path, columns: tuple[str, ...], rows: tuple[int, ...]) -> None:
    """Once a process: a corpus is read several times."""
    print(
        f"{file}: {len(rows):,} rows left out, a cell of {' or '.join(map(repr, columns))} is empty there: {listed(rows)}",
        file=sys.stderr,
        flush=True,
    )


def listed(items: Iterable[Any], most: int = 5) -> str:
    """The first few items, each cut to 40 characters, and how many more there are: for messages."""
    found = [str(item) for item in items]
    shown = [item if len(item) <= 40 else item[:39] + "…" for item in found[:most]]
    return ", ".join(shown) + (f" and {len(found) - most:,} more" if len(found) > most else "")


def as_text(value: Any, where: str) -> str:
    """`value` if it is text that tokenizers accept. Raises `UserError` naming `where` it was found if not."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {listed([repr(value)])}, which is no text; name another column (text.column_name)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half a character, {value[error.start]!r} in {value[:40]!r}; write the file anew as UTF-8"
        ) from None
    return value


def as_label(value: Any, where: str) -> str:
    """The class that a cell names. A text is itself; a number that is stored as one is its value, so that a column of whole
    numbers that a gap turned into floats names the same classes. Raises `UserError` naming `where` for lists and bytes."""
    if isinstance(value, str):
        return as_text(value, where)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (list, dict, bytes)):
        raise UserError(f"{where} holds {listed([repr(value)])}, which names no class; give texts or numbers")
    return str(value)


def check_columns(where: str, wanted: Sequence[str], available: Sequence[str]) -> None:
    """Raises `UserError` naming the columns there are when one of `wanted` is not among them, or is there twice."""
    missing = [name for name in wanted if name not in available]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}; available: {listed(available, 20) or 'none'}")
    twice = [name for name in wanted if list(available).count(name) > 1]
    if twice:
        raise UserError(f"{where}: {list(available).count(twice[0])} columns are called {twice[0]!r}; rename all but one")


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _decoded(data: bytes, where: str, first: bool = True) -> str:
    """UTF-8, without the mark (BOM) that some editors put at the beginning. Raises `UserError`."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert it first") from None


def _read_txt(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    if len(columns) != 1:
        raise UserError(f"{file}: a .txt file has no columns, but {', '.join(columns)} are needed")
    text = _decoded(file.read_bytes(), str(file))
    yield 1, (text.replace("\r\n", "\n").replace("\r", "\n"),)


def _read_jsonl(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            text = _decoded(line, where, number == 1)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists without end
                why = error.msg if isinstance(error, json.JSONDecodeError) else listed([error])
                raise UserError(f"{where}: not valid JSON ({why})") from None
            if not isinstance(row, dict):
                raise UserError(f'{where}: expected an object such as {{"text": "..."}}')
            check_columns(where, columns, list(row))
            yield number, tuple(row[name] for name in columns)


def _read_csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_LARGEST_FIELD)
    # bytes that are no UTF-8 become half characters first, so that the row they stand in can be named
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = (row for row in csv.reader(lines, delimiter=_DELIMITERS[file.suffix], strict=True) if row)
        try:
            header = next(rows, None)
            if header is None:
                raise UserError(f"{file}: the file is empty")
            _check_utf8(header, f"{file}, header")
            check_columns(str(file), columns, header)
            places = [header.index(name) for name in columns]
            for number, row in enumerate(rows, 1):
                if any(row[len(header) :]):
                    raise UserError(
                        f"{file}, row {number}: {len(row)} cells, the header names {len(header)} columns; put a "
                        "text that holds the delimiter in double quotes"
                    )
                values = tuple(row[place] if place < len(row) else None for place in places)
                _check_utf8(values, f"{file}, row {number}")
                yield number, values
        except csv.Error as error:
            raise UserError(f"{file}: not a valid {file.suffix[1:].upper()} file ({error})") from None


def _check_utf8(values: Iterable[str | None], where: str) -> None:
    for value in values:
        if value and not value.isascii():
            _decoded(value.encode("utf-8", "surrogateescape"), where, first=False)


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:  # of pages that were written with one
            check_columns(str(file), columns, table.schema_arrow.names)
            for batch in table.iter_batches(columns=list(columns)):
                rows = zip(*(_values(batch.column(name), str(file)) for name in columns), strict=True)
                yield from enumerate(rows, number + 1)
                number += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # which of them depends on the place that changed
        raise UserError(f"{file}: not a valid Parquet file ({' '.join(str(error).split())[:200]})") from None


def _values(column: pa.Array, where: str) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for row, value in enumerate(column, 1):
            try:
                value.as_py()
            except UnicodeDecodeError:
                raise UserError(f"{where}: not UTF-8 text in row {row} of a block; write the file anew as UTF-8") from None
        raise
