"""The bundled plane is what its model card's command gives."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from servers import command
from steering_kernels import Mode, encode_row, steer
from steering_planes import Plane, Site, find_sites
from steering_planes.contrast import read_contrast
from steering_server.calibrate.chat import Chat
from steering_server.evaluation.hooks import hooked

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
    assert again.means is not None
    assert bundled.means is not None
    for site in bundled.sites:
        cosines = (again.bases[site].double() * bundled.bases[site].double()).sum(1)
        assert torch.all(cosines.abs() >= 0.999), (site, cosines)
        assert again.means[site].rho == pytest.approx(bundled.means[site].rho, rel=0.01), site


def test_adding_one_moves_the_negative_class_to_where_the_positive_one_is(smollm2: Path) -> None:
    """At each site alone, in transformers' activations of the examples that the plane is from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plane = Plane.load(SENTIMENT)
    assert plane.means is not None
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    norms = find_sites(model, plane.config.num_layers)
    contrast = read_contrast(REPOSITORY / "steering_vectors/contrast_sets/sentiment.json")
    row = torch.tensor([[encode_row(Mode.ADD, 0, 0, None, 1.0)]])
    last: dict[Site, list[Tensor]] = {site: [] for site in plane.sites}

    def record(site: Site, output: Tensor) -> None:
        last[site].append(output[0, -1])

    with torch.no_grad(), hooked({site: norms[site] for site in plane.sites}, record):
        for example in contrast.negative:
            text = Chat().text(tokenizer, example.conversation)
            model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    for site, activations in last.items():
        h, basis, means = torch.stack(activations), plane.bases[site], plane.means[site]
        classes = torch.tensor([[*means.positive, *means.negative, means.rho]])
        moved = steer(h, basis[None], classes, row.expand(len(h), -1, -1))
        before, after = (float((x @ basis[0]).double().mean()) for x in (h, moved))
        assert after - before == pytest.approx(means.rho, rel=1e-5), site
        assert before == pytest.approx(means.negative[0], abs=1e-3 * means.rho), site
        assert after == pytest.approx(means.positive[0], abs=1e-3 * means.rho), site
