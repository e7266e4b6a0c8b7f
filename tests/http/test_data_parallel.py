"""Two engines behind two API servers: every one of them steers, and the counters add up."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import servers
from servers import Server


@pytest.fixture(scope="module")
def replicated(
    smollm2: Path, planes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """`steering serve --data-parallel-size 2 --api-server-count 2`."""
    yield from servers.serve(
        smollm2,
        {"sentiment": planes["sentiment"]},
        tmp_path_factory.mktemp("replicated") / "server.log",
        "--data-parallel-size",
        "2",
        "--api-server-count",
        "2",
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )


@pytest.mark.slow
def test_replicas_answer_as_one_server_does(server: Server, replicated: Server) -> None:
    angles: list[float | None] = [None, *(15.0 * i for i in range(23))]

    def ask(angle: float | None) -> Any:
        steering = {} if angle is None else {"steering_angle": angle}
        # A connection each, so that the listening sockets share them out.
        with servers.client(replicated.host, replicated.port) as own:
            return replace(replicated, client=own).chat(**steering)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, angles))
    for angle, answer in zip(angles, answers, strict=True):
        assert answer.status_code == 200, answer.text
        alone = server.chat(**({} if angle is None else {"steering_angle": angle}))
        assert answer.json()["choices"] == alone.json()["choices"]
        assert answer.headers.get("steering") == alone.headers.get("steering")
    refused = [replicated.chat(steering_angle=361).status_code for _ in range(4)]
    assert refused == [400] * 4
    labels = {"plane": "sentiment", "mode": "rotate_to", "outcome": "ok"}
    assert replicated.metric("steering_requests_total", **labels) == len(angles) - 1
    assert replicated.metric("steering_rejections_total", reason="bad_angle") == 4
    # vLLM's own counter, by engine: both were used.
    served = [
        replicated.metric("vllm:request_success_total", engine=engine) for engine in ("0", "1")
    ]
    assert sum(served) == len(angles)
    assert min(served) > 0
