"""The bundled plane is what its model card's command gives."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from servers import command
from steering_planes import Plane

REPOSITORY = Path(__file__).parents[1]
SENTIMENT = REPOSITORY / "steering_vectors/smollm2-135m-instruct/sentiment"


def recorded() -> list[str]:
    """The words after ``steering calibrate`` in the model card."""
    (line,) = re.findall(
        r"^    steering calibrate (.*)$", (SENTIMENT / "README.md").read_text(), re.M
    )
    return shlex.split(line)


@pytest.mark.slow
def test_the_recorded_command_gives_the_same_plane(smollm2: Path, tmp_path: Path) -> None:
    words = recorded()
    # Elsewhere than in the card are the model's cache and the output.
    words[0] = str(smollm2)
    words[words.index("--output") + 1] = str(tmp_path / "sentiment")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [command("steering"), "calibrate", *words],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]

    bundled, again = Plane.load(SENTIMENT), Plane.load(tmp_path / "sentiment")
    assert again.sites == bundled.sites
    assert again.config.extraction == bundled.config.extraction
    for site in bundled.sites:
        cosines = (again.bases[site].double() * bundled.bases[site].double()).sum(1)
        assert torch.all(cosines.abs() >= 0.999), (site, cosines)
