"""docs/compatibility.md names tests that exist, and leaves no cell open."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs/compatibility.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and "---" not in line
]
CELLS = [(row[0], cell) for row in ROWS if row[1:] != ["V1", "V2"] for cell in row[1:]]


@pytest.mark.parametrize(("feature", "cell"), CELLS)
def test_a_cell_is_tested_refused_or_says_why_not(feature: str, cell: str) -> None:
    kind, _, rest = cell.partition(": ")
    assert kind in ("tested", "tested, interpreted", "refused", "untested")
    assert rest
    named = re.findall(r"`(tests/[^`:]+)::(\w+)`", rest)
    assert named or kind == "untested"
    for file, test in named:
        tree = ast.parse((REPOSITORY / file).read_text())
        assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (
            f"{file}::{test}"
        )


def test_every_row_has_both_runners() -> None:
    assert len(ROWS) > 30
    assert all(len(row) == 3 for row in ROWS)
