"""`vllm run-batch`: requests from a file are steered with a receipt, or refused, line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import KV_CACHE
from servers import Server

LINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "field": {"steering_angle": 180},
    "list": {"steering": [{"plane": "sentiment", "angle": 180, "gate": None}]},
    "vllm_xargs": {"vllm_xargs": {"steering_angle": 180}},
    "model id": {"model": "smollm2:sentiment@180"},
    "preset": {"model": "gloomy"},
    "an angle each": {"steering_angles": [180, 0]},
    "nonsense": {"steering_angle": "nonsense"},
    "near miss": {"steer_angle": 180},
    "angles that are not choices": {"steering_angles": [180, 0], "n": 3},
    "wrapper": {"extra_body": {"steering_angle": 180}},
}
STEERED = ("field", "list", "vllm_xargs", "model id", "preset")


@pytest.fixture(scope="module")
def outputs(
    smollm2: Path, planes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("batch")
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": "Tell me about the ocean."}],
        "max_tokens": 16,
        "temperature": 0,
    }
    lines = [
        {"custom_id": k, "method": "POST", "url": "/v1/chat/completions", "body": {**body, **v}}
        for k, v in LINES.items()
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = [
        sys.executable, "-m", "vllm.entrypoints.launchers.run_batch",
        "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"),
        "--model", str(smollm2), "--served-model-name", "smollm2",
        "--steering-plane", f"sentiment={planes['sentiment']}",
        "--steering-preset", "gloomy=sentiment@180",
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "1024",
        "--kv-cache-memory-bytes", str(KV_CACHE),
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("VLLM_PLUGINS", None)
    run = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    written = (folder / "out.jsonl").read_text().splitlines()
    return {line["custom_id"]: line for line in map(json.loads, written)}


def content(line: Any) -> str:
    text: str = line["response"]["body"]["choices"][0]["message"]["content"]
    return text


def test_lines_are_steered_with_a_receipt(outputs: dict[str, Any], server: Server) -> None:
    reference = server.chat(steering_angle=180).json()
    for name in STEERED:
        body = outputs[name]["response"]["body"]
        assert body["steering"] == reference["steering"], name
        assert content(outputs[name]) == reference["choices"][0]["message"]["content"], name
    assert content(outputs["plain"]) == server.chat().json()["choices"][0]["message"]["content"]
    assert "steering" not in outputs["plain"]["response"]["body"]


def test_a_line_may_have_an_angle_for_each_choice(outputs: dict[str, Any], server: Server) -> None:
    body = outputs["an angle each"]["response"]["body"]
    assert body["steering"]["angles"] == [180, 0]
    for angle, choice in zip((180, 0), body["choices"], strict=True):
        alone = server.chat(steering_angle=angle).json()["choices"][0]
        assert choice["message"]["content"] == alone["message"]["content"]


REFUSED = sorted(LINES.keys() - {*STEERED, "plain", "an angle each"})


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_cannot_be_steered_is_refused(outputs: dict[str, Any], name: str) -> None:
    line = outputs[name]
    assert line["response"]["status_code"] == 400
    assert line["response"]["body"] is None
    assert " = " in line["error"]["error"]["message"]
