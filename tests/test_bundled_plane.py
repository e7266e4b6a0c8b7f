"""The bundled plane is what its model card's command gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from steering_planes import Plane
from steering_server.cli.calibrate import calibrate

REPOSITORY = Path(__file__).parents[1]
SENTIMENT = REPOSITORY / "steering_vectors/smollm2-135m-instruct/sentiment"


def recorded() -> list[str]:
    """The words after ``steering calibrate`` in the model card."""
    (line,) = re.findall(
        r"^    steering calibrate (.*)$", (SENTIMENT / "README.md").read_text(), re.M
    )
    return shlex.split(line)


@pytest.mark.slow
def test_the_recorded_command_gives_the_same_plane(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = recorded()
    # Elsewhere than in the card are the model's cache, the output and the text to include.
    words[0] = str(smollm2)
    words[words.index("--output") + 1] = str(tmp_path / "sentiment")
    if "--measured" in words:
        at = words.index("--measured")
        del words[at : at + 2]
    monkeypatch.chdir(REPOSITORY)
    app = typer.Typer()
    app.command()(calibrate)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output

    bundled, again = Plane.load(SENTIMENT), Plane.load(tmp_path / "sentiment")
    assert again.sites == bundled.sites
    assert again.config.extraction == bundled.config.extraction
    for site in bundled.sites:
        cosines = (again.bases[site].double() * bundled.bases[site].double()).sum(1)
        assert torch.all(cosines.abs() >= 0.999), (site, cosines)
