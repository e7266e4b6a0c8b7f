"""Five thousand broken files: each is read soundly, or refused in one line, within a second."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import contrasts
import published
import tiny
from mutations import alter, mutated
from steering_planes import Plane, PlaneError, orthonormality_error
from steering_planes.formats import import_plane
from steering_planes.tables import ContrastError

PLANES, OURS, CONTRASTS = 3300, 500, 1200

LONGEST = 1.0
"""Seconds of this process; and ten of the clock, on a machine that has more to do."""


@pytest.fixture(autouse=True)
def _no_code_runs() -> Iterator[None]:
    """What a pickle would reach for is seen while files are read."""
    ran: list[str] = []

    def audit(event: str, args: Any) -> None:
        if active and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            ran.append(event)

    active = True
    sys.addaudithook(audit)
    yield
    active = False
    assert not ran


def spoil(source: Path, copy: Path, rng: random.Random) -> None:
    """A copy of a folder with one of its files broken: its bytes, or one value in it."""
    shutil.copytree(source, copy)
    file = rng.choice(sorted(f for f in copy.rglob("*") if f.is_file() and not f.is_symlink()))
    if rng.random() < 0.5 or not alter(file, rng):
        file.write_bytes(mutated(file.read_bytes(), rng))


def timed(attempt: Any, refusal: type[Exception]) -> Any:
    """What an attempt gives, or None if it was refused in one line; in time."""
    started, clock = time.process_time(), time.monotonic()
    found, said = None, ""
    try:
        found = attempt()
    except refusal as error:
        said = str(error)
    assert said.isprintable()  # and so in one line
    assert time.process_time() - started < LONGEST
    assert time.monotonic() - clock < 10 * LONGEST
    return found


def test_published_planes_and_vectors(tmp_path: Path) -> None:
    rng = random.Random(13)
    tiny.make("llama", tmp_path / "model")
    sources = {}
    for number, write in enumerate(published.PUBLISHED.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        sources[folder] = write(folder)
    told = {"name": "p", "base_model": str(tmp_path / "model")}
    outcomes: Counter[str] = Counter()
    for folder, source in sources.items():  # whole, all are read; and what is lazy is loaded
        assert import_plane(source.sources, **told, **source.told), folder
    for _ in range(PLANES):
        folder, source = rng.choice(list(sources.items()))
        copy = tmp_path / "copy"
        spoil(folder, copy, rng)
        paths = [copy / path.relative_to(folder) for path in source.sources]
        plane = timed(lambda: import_plane(paths, **told, **source.told), PlaneError)  # noqa: B023
        if plane is not None:
            for basis in plane.bases.values():
                assert bool(basis.isfinite().all())
                assert orthonormality_error(basis) <= 1e-6
        outcomes["read" if plane else "refused"] += 1
        shutil.rmtree(copy)
    assert outcomes["refused"] > PLANES / 2


def test_planes_of_our_own(tmp_path: Path) -> None:
    rng = random.Random(14)
    whole = published.PUBLISHED["assistant axis, capping"]
    tiny.make("llama", tmp_path / "model")
    (tmp_path / "source").mkdir()
    source = whole(tmp_path / "source")
    made = import_plane(source.sources, name="p", base_model=str(tmp_path / "model"), **source.told)
    made.save(tmp_path / "plane")
    refused = 0
    for _ in range(OURS):
        spoil(tmp_path / "plane", tmp_path / "copy", rng)
        found = timed(lambda: Plane.load(tmp_path / "copy"), PlaneError)
        # A digest covers every bit that steers.
        assert found is None or found.digest == made.digest
        refused += found is None
        shutil.rmtree(tmp_path / "copy")
    assert refused > OURS / 2


def test_contrast_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    rng = random.Random(15)
    positive = [f"say {i}, please" for i in range(8)]
    negative = [f"never “{i}”" for i in range(8)]
    forms: dict[Path, contrasts.Form] = {}
    for number, write in enumerate(contrasts.FORMS.values()):
        if write is contrasts.on_the_hub:
            continue  # its files are Parquet, as another form's
        folder = tmp_path / str(number)
        folder.mkdir()
        forms[folder] = write(folder, positive, negative)
        contrasts.read(forms[folder])
    outcomes: Counter[str] = Counter()
    for _ in range(CONTRASTS):
        folder, form = rng.choice(list(forms.items()))
        copy = tmp_path / "copy"
        spoil(folder, copy, rng)
        files = tuple(copy / Path(file).relative_to(folder) for file in form.files)
        there = contrasts.Form(files, form.told)
        found = timed(lambda: contrasts.read(there), ContrastError)  # noqa: B023
        if found is not None:
            for example in (*found.positive, *found.negative):
                assert example.prompt.strip()
        outcomes["read" if found else "refused"] += 1
        shutil.rmtree(copy)
    assert outcomes["refused"] > CONTRASTS / 5, outcomes
