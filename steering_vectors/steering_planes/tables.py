"""Rows of text data, in the forms that people have them in.

JSON (an array, or an object that holds one), JSONL, CSV and TSV, Parquet, and text, a row a line;
with a byte-order mark or without; in a file, or in a data set's repository on the Hub:
``hf://datasets/organisation/name[/path][@revision][:split]``.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering_planes.artifact import PlaneError, one_line
from steering_planes.hub import SCHEME, Address


class ContrastError(ValueError):
    """A contrast's data that can't be used, said in one line: file, place in it, and rule."""

    def __init__(self, said: str) -> None:
        super().__init__(one_line(said))


@dataclass(frozen=True)
class Row:
    """A row as JSON would have it, mostly a mapping of columns; and where it stands: "a.csv:3"."""

    value: Any
    where: str


@dataclass(frozen=True)
class Table:
    """All rows, and the files that they are from."""

    rows: tuple[Row, ...]
    files: tuple[Path, ...]


def read_table(location: str | Path) -> Table:
    """The rows of a file or of a split; raises ContrastError."""
    files = _files(str(location))
    try:
        rows = tuple(row for file in files for row in _read(file))
    except OSError as error:
        raise ContrastError(f"{error.filename or location}: {error.strerror or error}") from None
    if not rows:
        raise ContrastError(f"{location}: holds no prompts")
    return Table(rows, files)


def _files(location: str) -> tuple[Path, ...]:
    if not location.startswith(SCHEME):
        return (Path(location),)
    address, colon, split = location.removeprefix(SCHEME).partition(":")
    try:
        parsed = Address.parse(SCHEME + address)
        found = parsed.download([f"*{suffix}" for suffix in _READERS])
    except PlaneError as error:
        raise ContrastError(str(error)) from None
    if found.is_file():
        return (found,)
    files = sorted(f for f in found.rglob("*") if f.suffix.lower() in _READERS and f.is_file())
    if colon:
        files = [f for f in files if _is_of(str(f.relative_to(found)), split)]
    folders = {re.sub(r"\d+-of-\d+", "", str(f)) for f in files}
    if not files or len(folders) > 1:
        names = ", ".join(str(f.relative_to(found)) for f in files[:12])
        rule = f"name a split or a file of {names}" if files else "holds no such split, or no data"
        raise ContrastError(f"{location}: {rule}")
    return tuple(files)


def _is_of(name: str, split: str) -> bool:
    """`train` is `train.jsonl`, `data/train-00000-of-00002.parquet`, `train/0000.parquet`."""
    return re.search(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)", name) is not None


def _read(file: Path) -> Iterator[Row]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise ContrastError(f"{file}: is of no known kind: must end in one of {known}")
    return reader(file)


def _read_json(file: Path) -> Iterator[Row]:
    try:
        value = json.loads(_text(file))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ContrastError(f"{file}: must be JSON: {_said(error)}") from None
        yield from _read_jsonl(file)  # under another name
        return
    except (ValueError, RecursionError) as error:
        raise ContrastError(f"{file}: must be JSON: {_said(error)}") from None
    for place, rows in _arrays(file, value):
        for number, row in enumerate(rows, 1):
            yield Row(row, f"{file}: {place}item {number}")


def _arrays(file: Path, value: Any) -> list[tuple[str, list[Any]]]:
    if isinstance(value, list):
        return [("", value)]
    found = (
        [(key, of) for key, of in value.items() if isinstance(of, list)]
        if isinstance(value, dict)
        else []
    )
    for key, of in found:
        if key == "train" or len(found) == 1:
            return [(f"{key} ", of)]
    names = ", ".join(key for key, _ in found) or "none"
    rule = f"must be an array of rows, or an object with one: it has {names}"
    raise ContrastError(f"{file}: {rule}")


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                yield Row(json.loads(line), f"{file}:{number}")
            except (ValueError, RecursionError) as error:
                raise ContrastError(f"{file}:{number}: must be JSON: {_said(error)}") from None


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    # Not splitlines: a quoted cell may hold lines of its own.
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter)
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise ContrastError(
                    f"{where}: has more cells than the {len(row) - 1} of the header"
                )
            yield Row({key: cell for key, cell in row.items() if cell is not None}, where)
    except csv.Error as error:
        raise ContrastError(f"{file}:{reader.line_num}: must be CSV: {_said(error)}") from None


def _read_text(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            yield Row(line.strip(), f"{file}:{number}")


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table as read

    file.stat()  # an OSError of our own words
    try:
        rows = read(file).to_pylist()
    except (ArrowException, OSError, ValueError, TypeError, LookupError, MemoryError) as error:
        raise ContrastError(f"{file}: must be Parquet: {_said(error)}") from None
    for number, row in enumerate(rows, 1):
        yield Row(row, f"{file}: row {number}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _text(file: Path) -> str:
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ContrastError(f"{file}: is a Git LFS pointer, not the file itself: `git lfs pull`")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContrastError(f"{file}: must be UTF-8: byte {error.start} is not") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
