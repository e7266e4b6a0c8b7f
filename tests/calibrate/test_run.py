"""Calibration on the engine is what transformers and METHOD's formulas give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import calibration_oracle
import engines
import tiny
from calibration_oracle import Array, Found, Key
from oracle import LLAMA_NORMS
from steering_planes.calibration import Calibration, Options
from steering_planes.contrast import Contrast, read_contrast
from steering_planes.tables import ContrastError
from steering_server.calibrate.record import record
from steering_server.calibrate.run import Calibrated, calibrate

REPOSITORY = Path(__file__).parents[2]
CONTRAST = REPOSITORY / "steering_vectors/contrast_sets/sentiment.json"
FP32 = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": engines.KV_CACHE,
}
BUNDLED = Options(planes="per_site", granularity="site")

Sides = tuple[dict[Key, Array], dict[Key, Array]]
"""Activations of the positive class and of the negative one."""


def agree(found: Calibration, truth: Found, cosine: float) -> None:
    """Every candidate and basis vector, the sites, and the classes' means at them."""
    candidates = {(site.layer, site.role): c.numpy() for site, c in found.candidates.items()}
    bases = {(site.layer, site.role): b.double().numpy() for site, b in found.bases.items()}
    assert candidates.keys() == truth.candidates.keys()
    assert bases.keys() == truth.bases.keys()
    for key, candidate in candidates.items():
        assert abs(candidate @ truth.candidates[key]) >= cosine, key
    for key, basis in bases.items():
        assert np.abs((basis * truth.bases[key]).sum(1)).min() >= cosine, key
    for site, of in found.means.items():
        key = (site.layer, site.role)
        off = 1e-3 * truth.rho[key]
        assert np.abs(np.array([of.positive, of.negative]) - truth.means[key]).max() <= off, key
        assert of.rho == pytest.approx(truth.rho[key], abs=off), key


def in_order(measured: Calibrated, truth: Sides) -> None:
    """Each prompt's activations are its own."""
    for side, expected in zip((measured.positive, measured.negative), truth, strict=True):
        for site, rows in side.items():
            wanted = expected[(site.layer, site.role)]
            assert np.allclose(rows.numpy(), wanted, atol=1e-4 * np.abs(wanted).max()), site


def transformers_activations(model: Path, contrast: Contrast, dtype: torch.dtype) -> Sides:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    positive, negative = (
        calibration_oracle.activations(loaded, tokenizer, side, LLAMA_NORMS)
        for side in conversations(contrast)
    )
    return positive, negative


def found_by_transformers(sides: Sides) -> Found:
    """As the bundled plane was made."""
    return calibration_oracle.calibrate(*sides, per_site=True, by_layer=False)


def conversations(contrast: Contrast) -> list[list[Any]]:
    return [[e.conversation for e in side] for side in (contrast.positive, contrast.negative)]


@pytest.fixture(scope="module", autouse=True)
def _without_triton() -> Iterator[None]:
    """V1 asks for no Triton, whatever this process's kernel tests do."""
    with engines.environment({"TRITON_INTERPRET": "0"}):
        yield


@pytest.fixture(scope="module")
def bundled() -> Contrast:
    return read_contrast(CONTRAST)


@pytest.fixture(scope="module")
def truth(smollm2: Path, bundled: Contrast) -> Sides:
    return transformers_activations(smollm2, bundled, torch.float32)


@pytest.fixture(scope="module")
def rounded(smollm2: Path, bundled: Contrast) -> Sides:
    return transformers_activations(smollm2, bundled, torch.bfloat16)


@pytest.fixture(scope="module")
def measured(smollm2: Path, bundled: Contrast) -> Calibrated:
    """The bundled set on the engine, as the bundled plane was made."""
    return calibrate(str(smollm2), bundled, name="mood", options=BUNDLED, engine=FP32)


@pytest.fixture(scope="module")
def measured_bf16(smollm2: Path, bundled: Contrast) -> Calibrated:
    engine = {**FP32, "dtype": "bfloat16"}
    return calibrate(str(smollm2), bundled, name="mood", options=BUNDLED, engine=engine)


@pytest.mark.slow
def test_fp32_equals_transformers(measured: Calibrated, truth: Sides) -> None:
    agree(measured.calibration, found_by_transformers(truth), 0.9999)
    in_order(measured, truth)


@pytest.mark.slow
def test_fp32_equals_transformers_on_the_v2_runner(
    smollm2: Path, bundled: Contrast, truth: Sides
) -> None:
    with engines.environment(engines.v2_environment()), engines.triton_here(True):
        measured = calibrate(str(smollm2), bundled, name="mood", options=BUNDLED, engine=FP32)
    agree(measured.calibration, found_by_transformers(truth), 0.9999)
    in_order(measured, truth)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    reason="bf16 moves an early candidate, a small difference of large activations, by up to "
    "|cos| 0.93, and decides the weakest sites otherwise (19 here, 22 others there)",
)
def test_bf16_equals_transformers(measured_bf16: Calibrated, rounded: Sides) -> None:
    agree(measured_bf16.calibration, found_by_transformers(rounded), 0.999)


@pytest.mark.slow
def test_bf16_is_as_near_to_fp32_as_transformers_is(
    measured_bf16: Calibrated, rounded: Sides, truth: Sides
) -> None:
    exact = found_by_transformers(truth).candidates
    theirs = found_by_transformers(rounded).candidates
    ours = {(s.layer, s.role): c.numpy() for s, c in measured_bf16.calibration.candidates.items()}

    def away(candidates: Mapping[Any, Any]) -> float:
        cosines = [abs(candidates[key] @ exact[key]) for key in exact]
        return float(np.mean(np.arccos(np.minimum(cosines, 1))))

    assert away(ours) <= 1.05 * away(theirs)


@pytest.mark.parametrize(
    ("name", "workers"), [("qwen2", 1), pytest.param("gemma2", 2, marks=pytest.mark.slow)]
)
def test_tiny_models_equal_transformers(
    name: str, workers: int, bundled: Contrast, smollm2: Path, tmp_path: Path
) -> None:
    """Random models behind SmolLM2's tokenizer; one of them on two workers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = tiny.make(name, tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    few = Contrast(bundled.positive[:16], bundled.negative[:16], bundled.files)
    norms = tiny.ARCHITECTURES[name].norms
    positive, negative = (
        calibration_oracle.activations(model, tokenizer, side, norms) for side in conversations(few)
    )
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if workers > 1 else {}
    parallel = {"tensor_parallel_size": workers, "distributed_executor_backend": "mp"}
    with engines.environment(variables):
        measured = calibrate(
            str(tmp_path / "model"),
            few,
            name="mood",
            options=BUNDLED,
            engine={**FP32, **(parallel if workers > 1 else {})},
        )
    agree(measured.calibration, found_by_transformers((positive, negative)), 0.9999)
    in_order(measured, (positive, negative))


def test_a_prompt_longer_than_the_context_is_named(smollm2: Path, bundled: Contrast) -> None:
    long = Contrast(bundled.positive[:2], bundled.negative[:2], bundled.files)
    with pytest.raises(ContrastError, match=r"positive prompt 1: the prompt has \d+ tokens: must"):
        record(str(smollm2), long, engine={**FP32, "max_model_len": 32})
