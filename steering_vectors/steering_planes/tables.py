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
    files, key = _files(str(location))
    try:
        rows = tuple(row for file in files for row in _read(file, key))
    except OSError as error:
        raise ContrastError(f"{error.filename or location}: {error.strerror or error}") from None
    if not rows:
        raise ContrastError(f"{location}: holds no prompts")
    return Table(rows, files)


# Data sets on the Hub.

_SHARD = r"-(\d{5})-of-(\d{5})(?:-\w+)?"


def _files(location: str) -> tuple[tuple[Path, ...], str | None]:
    """A location's files; and of a JSON object that holds several arrays, which one is meant."""
    if not location.startswith(SCHEME):
        return (Path(location),), None
    address, _, split = location.removeprefix(SCHEME).partition(":")
    try:
        parsed = Address.parse(SCHEME + address)
        # Of a repository, no text beside the data: requirements.txt is none of it.
        found = parsed.download(
            [parsed.path]
            if Path(parsed.path).suffix.lower() in _READERS
            else [f"*{suffix}" for suffix in _READERS if suffix != ".txt"]
        )
    except PlaneError as error:
        raise ContrastError(str(error)) from None
    if found.is_file():
        return (found,), split or None
    there = sorted(
        file
        for file in found.rglob("*")
        if file.suffix.lower() in _READERS and file.suffix.lower() != ".txt" and file.is_file()
    )
    files = [file for file in there if not split or _is_of(file.relative_to(found), split)]
    if not files and split == "train" and len(there) == 1:
        files = there  # the name of what is not split
    names = ", ".join(str(file.relative_to(found)) for file in (files or there)[:12])
    if len({_unsharded(file) for file in files}) != 1:
        rule = "name a split, or one file" if files else f"no file is of the split {split!r}"
        raise ContrastError(f"{location}: {rule}: there are {names or 'no data files'}")
    shards = [re.search(_SHARD, file.stem) for file in files]
    wanted = max((int(shard[2]) for shard in shards if shard), default=len(files))
    if len(files) != wanted:
        raise ContrastError(f"{location}: {len(files)} of {wanted} files are there: {names}")
    return tuple(files), None


def _is_of(name: Path, split: str) -> bool:
    """`train` is `train.jsonl`, `x-train.csv`, `data/train-00000-of-00002.parquet` and
    `train/0000.parquet`, and not `train_sft.jsonl`."""
    stem = rf"(?:.*[-.])?{re.escape(split)}(?:{_SHARD})?"
    return split in name.parts[:-1] or re.fullmatch(stem, name.stem) is not None


def _unsharded(file: Path) -> str:
    return str(file.parent / re.sub(rf"{_SHARD}$|^\d+$", "", file.stem)) + file.suffix


# Files.


def _read(file: Path, key: str | None) -> Iterator[Row]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise ContrastError(f"{file}: is of no known kind: must end in one of {known}")
    return _read_json(file, key) if reader is _read_json else reader(file)


def _read_json(file: Path, key: str | None = None) -> Iterator[Row]:
    try:
        value = json.loads(_text(file))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ContrastError(f"{file}: must be JSON: {_said(error)}") from None
        yield from _read_jsonl(file)  # under another name
        return
    except (ValueError, RecursionError) as error:
        raise ContrastError(f"{file}: must be JSON: {_said(error)}") from None
    name, rows = _array(file, value, key)
    for number, row in enumerate(rows, 1):
        yield Row(row, f"{file}: {name}item {number}")


def _array(file: Path, value: Any, key: str | None) -> tuple[str, list[Any]]:
    """The rows, and under which name they stand."""
    if isinstance(value, list):
        return "", value
    arrays = (
        {k: v for k, v in value.items() if isinstance(v, list)} if isinstance(value, dict) else {}
    )
    # One array among other things may be anything: a prompt's tags.
    only = next(iter(arrays)) if len(arrays) == 1 == len(value) else None
    wanted = key or ("train" if "train" in arrays else only)
    if wanted not in arrays:
        rule = (
            f"must be an array of rows, or an object with one: it has {', '.join(arrays) or 'none'}"
        )
        raise ContrastError(f"{file}: {rule}" + (f", and no {key!r}" if key else ""))
    return f"{wanted} ", arrays[wanted]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered, blank ones left out. Not splitlines, which ends a line at U+2028, too."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        try:
            yield Row(json.loads(line), f"{file}:{number}")
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"{file}:{number}: must be JSON: {_said(error)}") from None


def _read_csv(file: Path) -> Iterator[Row]:
    return iter(_csv_rows(file, delimiter=","))


def _read_tsv(file: Path) -> Iterator[Row]:
    try:
        return iter(_csv_rows(file, delimiter="\t"))
    except ContrastError:
        # Written without quoting: a quote is a quote.
        return iter(_csv_rows(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _csv_rows(file: Path, **dialect: Any) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # A quoted cell may hold lines of its own. Strictly: a stray quote would swallow rows.
    text = io.StringIO(_text(file), newline="")
    reader = csv.DictReader(text, strict=True, **dialect)
    rows = []
    try:
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise ContrastError(
                    f"{where}: has more cells than the {len(row) - 1} of the header"
                )
            rows.append(Row({k: cell for k, cell in row.items() if cell is not None}, where))
    except csv.Error as error:
        raise ContrastError(f"{file}:{reader.line_num}: must be CSV: {_said(error)}") from None
    return rows


def _read_text(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
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
    ".tsv": _read_tsv,
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
