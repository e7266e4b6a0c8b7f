"""Published planes and vectors, imported and served, steer as transformers does with hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engines
import published
import tiny
import traffic
from oracle import Oracle, Turn
from steering_planes.formats import import_plane
from traffic import Ask

REFERENCE = Path(__file__).parents[3] / "shared/reference"


def test_every_layout_steers_in_one_engine(tmp_path: Path) -> None:
    """All of them at once; what a plane's default is, a request that only names it gets."""
    model = tiny.make("llama", tmp_path / "tiny")
    oracle = Oracle(model, tiny.PRE)
    planes, asks = {}, []
    prompt = [5 + 3 * i for i in range(24)]
    for number, (layout, write) in enumerate(published.PUBLISHED.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = write(folder)
        plane = import_plane(
            source.sources, name="p", base_model=str(tmp_path / "tiny"), **source.told
        )
        plane.save(folder / "plane")
        planes[f"p{number}"] = folder / "plane"
        config = plane.config
        capped = config.default_mode == "cap"
        mode = "cap" if capped else "rotate_to"
        turn = Turn(folder / "plane", 0.0 if capped else 90.0, mode, config.gate,
                    strength=1.0 if capped else None)  # fmt: skip
        fields = {"steering_plane": f"p{number}"}
        if not capped:
            fields |= {"steering_angle": 90, "steering_mode": "rotate_to"}
        asks.append(Ask(prompt, [turn], fields, tokens=6))
        assert capped == (layout == "assistant axis, capping")
    asks.append(Ask(prompt, [], None, tokens=6))
    starting = engines.start(
        tmp_path / "tiny",
        planes,
        in_process=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        steering={"skip_proof": True},
    )
    for engine in starting:
        replies = traffic.send(engine, asks)
    for ask, reply in zip(asks, replies, strict=True):
        traffic.check(oracle, ask, reply)
    firsts = [round(reply.choices[0].logprobs[0], 3) for reply in replies]
    assert all(first != firsts[-1] for first in firsts[:-1])


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.exists(), reason="the published artifacts are not in a clone")
@pytest.mark.parametrize(
    ("name", "architecture", "layers"),
    [
        ("Llama-3.2-1B-Instruct", "llama", 16),
        ("Qwen2.5-7B-Instruct", "qwen2", 28),
        ("gemma-2-2b-it", "gemma2", 26),
    ],
)
def test_an_imported_plane_steers_as_transformers_does(
    name: str, architecture: str, layers: int, tmp_path: Path
) -> None:
    plane = import_plane(
        [REFERENCE / f"calibration_{name}"],
        name="refusal",
        model_type=architecture,
        num_layers=layers,
    )
    plane.save(tmp_path / "refusal")
    # vLLM's Qwen2 takes no head size that is not hidden_size / heads.
    shape: dict[str, Any] = {
        "hidden_size": plane.config.hidden_size,
        "num_attention_heads": plane.config.hidden_size // 128,
        "head_dim": 128,
        "num_hidden_layers": layers,
        "intermediate_size": 64,
    }
    model = tiny.make(architecture, tmp_path / name, **shape)
    oracle = Oracle(model, tiny.ARCHITECTURES[architecture].norms)
    steerings = [
        [Turn(tmp_path / "refusal", angle, mode)]
        for angle, mode in ((180, "rotate_by"), (90, "rotate_to"))
    ]
    prompt = [5 + 3 * i for i in range(40)]
    planes = {"refusal": tmp_path / "refusal"}
    asks = [Ask(prompt, t, traffic.fields(t, planes), tokens=8) for t in (*steerings, [])]
    starting = engines.start(
        tmp_path / name, planes, in_process=True, skip_tokenizer_init=True, max_model_len=128
    )
    for engine in starting:
        replies = traffic.send(engine, asks)
    for ask, reply in zip(asks, replies, strict=True):
        traffic.check(oracle, ask, reply)
    firsts = {round(reply.choices[0].logprobs[0], 3) for reply in replies}
    assert len(firsts) == 3
