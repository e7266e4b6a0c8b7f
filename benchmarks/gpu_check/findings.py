"""What a step finds: printed, and kept in a file, as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKS = {True: "PASS", False: "FAIL", None: "----"}


class Findings:
    """The findings of one step. A run that is cut off at any point has told what it could.

    Args:
        step: its name.
        file: takes one JSON object a line.
        limit: seconds that the step may take.
    """

    def __init__(self, step: str, file: Path, limit: float) -> None:
        self.step, self.held, self.failed = step, False, False
        self._file = file
        self._end = time.monotonic() + limit

    def left(self) -> float:
        """Seconds until the step's limit."""
        return self._end - time.monotonic()

    def tell(self, **values: Any) -> None:
        """A measurement."""
        with self._file.open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")

    def verdict(self, claim: str, holds: bool | None, figure: object) -> None:
        """A claim, whether it holds (None: it was not put to the test), and the figure."""
        self.held |= holds is True
        self.failed |= holds is False
        print(f"{MARKS[holds]}  {self.step}: {claim}: {figure}", flush=True)
        self.tell(claim=claim, holds=holds, figure=str(figure))


def read(file: Path) -> list[Mapping[str, Any]]:
    """All that was found, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
