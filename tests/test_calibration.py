"""Calibration on the engine is what transformers and METHOD's formulas give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import calibration_oracle
import engines
import tiny
from calibration_oracle import Found
from oracle import LLAMA_NORMS
from steering_planes.calibration import Calibration, Options
from steering_planes.contrast import Contrast, ContrastError, read_contrast
from steering_server.calibration import Calibrated, calibrate, record

REPOSITORY = Path(__file__).parents[1]
CONTRAST = REPOSITORY / "steering_vectors/contrast_sets/sentiment.json"
SHORT = {
    "max_model_len": 512,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": engines.KV_CACHE,
}
FP32 = {"dtype": "float32", **SHORT}


def agree(found: Calibration, truth: Found, cosine: float) -> None:
    """Every candidate and basis vector, and the sites."""
    candidates = {(site.layer, site.role): c.numpy() for site, c in found.candidates.items()}
    bases = {(site.layer, site.role): b.double().numpy() for site, b in found.bases.items()}
    assert candidates.keys() == truth.candidates.keys()
    assert bases.keys() == truth.bases.keys()
    for key, candidate in candidates.items():
        assert abs(candidate @ truth.candidates[key]) >= cosine, key
    for key, basis in bases.items():
        assert np.abs((basis * truth.bases[key]).sum(1)).min() >= cosine, key


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
def truth(smollm2: Path, bundled: Contrast) -> tuple[Any, Any]:
    """Both classes' activations in transformers, fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    positive, negative = (
        calibration_oracle.activations(model, tokenizer, side, LLAMA_NORMS)
        for side in conversations(bundled)
    )
    return positive, negative


@pytest.fixture(scope="module")
def measured(smollm2: Path, bundled: Contrast) -> Calibrated:
    """The bundled set on the engine, as the bundled plane was made."""
    options = Options(planes="per_site", granularity="site")
    return calibrate(str(smollm2), bundled, name="mood", options=options, engine=FP32)


@pytest.mark.slow
def test_fp32_equals_transformers(measured: Calibrated, truth: tuple[Any, Any]) -> None:
    agree(
        measured.calibration,
        calibration_oracle.calibrate(*truth, per_site=True, by_layer=False),
        0.9999,
    )


@pytest.mark.slow
def test_activations_come_in_the_order_of_the_prompts(
    measured: Calibrated, truth: tuple[Any, Any]
) -> None:
    for side, expected in zip((measured.positive, measured.negative), truth, strict=True):
        for site, rows in side.items():
            wanted = expected[(site.layer, site.role)]
            assert np.allclose(rows.numpy(), wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.slow
def test_bf16_equals_transformers(smollm2: Path, bundled: Contrast) -> None:
    """Of the same rounded model: what bf16 does to its activations is in both."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sides = [
        calibration_oracle.activations(model, tokenizer, side, LLAMA_NORMS)
        for side in conversations(bundled)
    ]
    found = calibrate(
        str(smollm2), bundled, name="mood", engine={"dtype": "bfloat16", **SHORT}
    ).calibration
    agree(found, calibration_oracle.calibrate(*sides, per_site=False, by_layer=True), 0.999)


@pytest.mark.slow
def test_the_v2_runner_records_the_same(
    smollm2: Path, bundled: Contrast, truth: tuple[Any, Any]
) -> None:
    with engines.environment(engines.v2_environment()), engines.triton_here(True):
        recorded = record(str(smollm2), bundled, engine=FP32)
    for side, expected in zip((recorded.positive, recorded.negative), truth, strict=True):
        for site, rows in side.items():
            wanted = expected[(site.layer, site.role)]
            assert np.allclose(rows.numpy(), wanted, atol=1e-3 * np.abs(wanted).max())


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
    sides = [
        calibration_oracle.activations(model, tokenizer, side, norms) for side in conversations(few)
    ]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if workers > 1 else {}
    parallel = {"tensor_parallel_size": workers, "distributed_executor_backend": "mp"}
    options = Options(planes="per_site", granularity="site")
    with engines.environment(variables):
        found = calibrate(
            str(tmp_path / "model"),
            few,
            name="mood",
            options=options,
            engine={**FP32, **(parallel if workers > 1 else {})},
        ).calibration
    agree(found, calibration_oracle.calibrate(*sides, per_site=True, by_layer=False), 0.9999)


def test_a_prompt_longer_than_the_context_is_named(smollm2: Path, bundled: Contrast) -> None:
    long = Contrast(bundled.positive[:2], bundled.negative[:2], bundled.files)
    with pytest.raises(ContrastError, match=r"positive prompt 1: the prompt has \d+ tokens: must"):
        record(str(smollm2), long, engine={**FP32, "max_model_len": 32})
