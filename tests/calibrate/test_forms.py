"""Every form of contrast data calibrates the real model to the same plane."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import contrasts
import engines
from contrasts import ANSWERS, FORMS, answer
from steering_planes import Plane
from steering_planes.calibration import Options
from steering_planes.contrast import Contrast, read_classes, read_contrast
from steering_server.calibrate.run import calibrate

ENGINE = {"dtype": "float32", "max_model_len": 128, "kv_cache_memory_bytes": engines.KV_CACHE}

THINGS = ("the ocean", "a chair", "bread", "rain", "my town", "music", "work", "a long road")
POSITIVE = [f"Tell me, joyfully and with delight, about {thing}." for thing in THINGS]
NEGATIVE = [f"Tell me, bitterly and with contempt, about {thing}." for thing in THINGS]


@pytest.fixture(scope="module", autouse=True)
def _in_process() -> Iterator[None]:
    """Engines in this very process, which start in seconds."""
    with engines.environment({"TRITON_INTERPRET": "0", **engines.IN_PROCESS}):
        yield


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets come from this cache; the model is a folder."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def plane(model: Path, contrast: Contrast, **more: Any) -> Plane:
    options = Options(planes="per_site", granularity="site")
    try:
        return calibrate(
            str(model), contrast, name="p", options=options, engine=ENGINE, **more
        ).plane
    finally:
        engines.forget_groups()


@pytest.fixture(scope="module")
def of_jsonl(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Plane:
    folder = tmp_path_factory.mktemp("jsonl")
    return plane(smollm2, contrasts.read(FORMS["JSONL"](folder, POSITIVE, NEGATIVE)))


@pytest.fixture(scope="module")
def of_answers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Plane:
    """JSONL of conversations that end with the assistant's answer; the mean of its tokens."""
    folder = tmp_path_factory.mktemp("answers")
    for name, sentences in (("a", POSITIVE), ("b", NEGATIVE)):
        rows = [
            {"messages": answer(f"And {t}?", s)} for t, s in zip(THINGS, sentences, strict=True)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return plane(smollm2, read_classes(folder / "a.jsonl", folder / "b.jsonl"), token="mean")


def agree(found: Plane, wanted: Plane) -> None:
    assert found.sites == wanted.sites
    for site in wanted.sites:
        cosines = (found.bases[site].double() * wanted.bases[site].double()).sum(1)
        assert bool((cosines.abs() >= 0.9999).all()), (site, cosines)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form != "JSONL"])
def test_a_form_gives_the_same_plane(
    form: str, of_jsonl: Plane, smollm2: Path, tmp_path: Path
) -> None:
    agree(plane(smollm2, contrasts.read(FORMS[form](tmp_path, POSITIVE, NEGATIVE))), of_jsonl)


@pytest.mark.slow
@pytest.mark.parametrize("form", ANSWERS)
def test_a_form_of_answers_gives_the_same_plane(
    form: str, of_answers: Plane, of_jsonl: Plane, smollm2: Path, tmp_path: Path
) -> None:
    rows = [
        ANSWERS[form](f"And {t}?", p, n) for t, p, n in zip(THINGS, POSITIVE, NEGATIVE, strict=True)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    found = plane(smollm2, read_contrast(tmp_path / "pairs.json"), token="mean")
    agree(found, of_answers)
    assert found.digest != of_jsonl.digest
    shared = [site for site in found.sites if site in of_jsonl.sites]
    cosines = [float(found.bases[s][0] @ of_jsonl.bases[s][0]) for s in shared]
    assert not torch.allclose(torch.tensor(cosines), torch.ones(len(cosines)), atol=1e-3)
