"""What the field's own libraries make and do, and what becomes of it here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import tiny
from steering_planes import Site
from steering_planes.formats import import_plane

REPOSITORY = Path(__file__).parents[3]
PYTHON = REPOSITORY / ".venv-vectors/bin/python"
"""An environment of their own (`make test-slow` makes it): their NumPy is not vLLM's."""


@pytest.mark.slow
def test_their_vectors_do_here_what_they_do_there(smollm2: Path, tmp_path: Path) -> None:
    """Trained, saved and applied by repeng and steering-vectors themselves, layer by layer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tiny.make("llama", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    script = REPOSITORY / "tests/support/vector_libraries.py"
    run = subprocess.run(
        [PYTHON, script, tmp_path / "model", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    effects = torch.load(tmp_path / "effects.pt", weights_only=True)
    for library, file in (("repeng", "repeng.gguf"), ("steering_vectors", "steering_vectors.pt")):
        sites = "2-3" if library == "repeng" else "1-3"
        plane = import_plane(
            [tmp_path / file], name="p", base_model=str(tmp_path / "model"), sites=sites
        )
        assert len(effects[library]) == len(plane.sites) // 2
        for site, effect in effects[library].items():
            b1 = plane.bases[Site.parse(site)][0].double()
            cosine = torch.nn.functional.cosine_similarity(b1, effect, dim=0)
            assert float(cosine) >= 1 - 1e-6, (library, site)
