"""A user's own text files: .txt (one document each), .jsonl, .csv and .parquet (one document a row)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sae_research.errors import UserError
from sae_research.store import file_sha256, project_root

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
SUFFIXES = (".txt", *TABLE_SUFFIXES)
CSV_CHUNK_ROWS = 10_000


def find_local(name: str) -> Path | None:
    """The file or folder that `name` means, or None if there is none.

    A relative path counts from the working directory, then from the project's folder: in a queued experiment
    these differ, and data that Git ignores lies only in the latter.
    """
    path = Path(name).expanduser()
    for candidate in (path, project_root() / path):
        if candidate.exists():
            return candidate
    return None


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
        files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file()
                       and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise UserError(f"{path}: no readable file; known are {', '.join(suffixes)}")
    return files


def local_fingerprint(path: Path) -> dict[str, str]:
    """SHA-256 of each readable file by its path below `path`."""
    root = path if path.is_dir() else path.parent
    return {file.relative_to(root).as_posix(): file_sha256(file) for file in local_files(path)}


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of `columns`, row by row, in file order; a .txt file is one row with its whole text.

    Rows without a value in one of the columns are left out. Raises `UserError` for a column that is missing
    and for a file that cannot be parsed or decoded.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        for row in readers[file.suffix](file, columns):
            if not any(_missing(value) for value in row):
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from None


def as_text(value: Any, where: str) -> str:
    """`value` if it is text that tokenizers accept. Raises `UserError` naming `where` it was found if not."""
    if not isinstance(value, str):
        raise UserError(f"{where} holds {value!r}, which is no text; name another column (text.column_name)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character, {value[error.start]!r} in {value[:40]!r}; "
                        "write the file anew as UTF-8") from None
    return value


def check_columns(where: str, wanted: Sequence[str], available: Sequence[str]) -> None:
    """Raises `UserError` naming the columns there are when one of `wanted` is not among them."""
    missing = [name for name in wanted if name not in available]
    if missing:
        names = ", ".join(map(str, available)) or "none"
        raise UserError(f"{where}: no column {missing[0]!r}; available: {names}")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # pandas' empty cell


def _read_txt(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    if len(columns) != 1:
        raise UserError(f"{file}: a .txt file has no columns, but {', '.join(columns)} are needed")
    yield (file.read_text(encoding="utf-8"),)


def _read_jsonl(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: expected an object such as {{\"text\": \"...\"}}")
            check_columns(f"{file}, line {number}", columns, list(row))
            yield tuple(row[name] for name in columns)


def _read_csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        check_columns(str(file), columns, list(pd.read_csv(file, nrows=0).columns))
        # the first column is the text: never let a text such as "1984" or "NA" become a number or a gap
        chunks = pd.read_csv(file, usecols=list(columns), dtype={columns[0]: str}, keep_default_na=False,
                             na_values={name: [""] for name in columns}, chunksize=CSV_CHUNK_ROWS)
        for chunk in chunks:
            yield from zip(*(chunk[name].tolist() for name in columns), strict=True)
    except pd.errors.EmptyDataError:
        raise UserError(f"{file}: the file is empty") from None
    except pd.errors.ParserError as error:
        raise UserError(f"{file}: not a valid CSV file ({' '.join(str(error).split())})") from None


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: not a valid Parquet file ({' '.join(str(error).split())})") from None
    with table:
        check_columns(str(file), columns, table.schema_arrow.names)
        for batch in table.iter_batches(columns=list(columns)):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
