"""What tests share: the real model, and engines of it, since starting one is what costs."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import engines
import servers
import tiny
from oracle import Oracle
from planes import random_plane

if TYPE_CHECKING:
    from engines import Engine
    from servers import Server
    from tiny import Tiny

if not torch.cuda.is_available():
    # Before Triton is imported: its own functions, too, must be made for the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter_as_compiler import mend

    mend()
    # Inductor asks a process of its own whether this CPU's vectors work. An answer that is late
    # (seen: 60 s, on two busy cores) makes it compile without them what its cache has with them.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

REPOSITORY = Path(__file__).parents[1]
SENTIMENT = REPOSITORY / "steering_vectors/smollm2-135m-instruct/sentiment"


# Of the servers that are asked the same on different roads.
ROADS = ("--enable-scale-out", "--steering-preset", "gloomy=sentiment@180")

# What is shared by tests of several files: they run in one process, whichever of two it is.
SHARED = {
    **dict.fromkeys(("v1", "plain", "v1_compiled"), "v1"),
    "v2": "v2",
    **dict.fromkeys(("server", "bare_server", "strict_server"), "server"),
}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    """Tests that share an engine or a server stay together; others stay with their file's."""
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        if (spec := getattr(item, "callspec", None)) is not None:
            used |= {value for value in spec.params.values() if isinstance(value, str)}
        group = next((SHARED[name] for name in SHARED if name in used), item.path.name)
        item.add_marker(pytest.mark.xdist_group(group))
    yield
    if config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("xdist ignores the groups: each process would start every engine")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a group shares ends with the group: all of it together takes all memory (23 GiB).

    Without xdist groups are not run one by one, and what they share stays to the end.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or _group(item) == _group(nextitem):
        return
    for name in SHARED:
        # As pytest itself ends a fixture of a session whose parameter changes.
        for definition in item.session._fixturemanager._arg2fixturedefs.get(name, ()):
            definition.finish(item._request)


def _group(item: pytest.Item | None) -> str | None:
    mark = None if item is None else item.get_closest_marker("xdist_group")
    return None if mark is None else mark.args[0]


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    engines.default_environment(tmp_path_factory.mktemp("vllm-cache"))
    # vLLM would bind the engines of both processes to the first core.
    if worker_id != "master" and (os.cpu_count() or 1) > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = worker_id.removeprefix("gw")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The bundled model's folder."""
    from steering_server.bundled_model import ensure

    return ensure()


@pytest.fixture(scope="session")
def planes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two planes of SmolLM2: the bundled one, and random bases from the first layer to the last."""
    wide = ["0.mlp_in", "5.attn_in", "12.attn_in", "12.mlp_in", "18.mlp_in", "29.mlp_in"]
    folder = tmp_path_factory.mktemp("planes") / "wide"
    return {
        "sentiment": SENTIMENT,
        "wide": random_plane(folder, wide, seed=7, default_mode="rotate_by", default_angle=40.0),
    }


@pytest.fixture(scope="session")
def oracle(smollm2: Path) -> Oracle:
    """SmolLM2 in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    return Oracle(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model of four layers with planes, for what a real one has no time for."""
    return tiny.steerable("llama", tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def v1(smollm2: Path, planes: dict[str, Path]) -> Iterator[Engine]:
    """The V1 model runner, eager."""
    yield from engines.start(smollm2, planes)


@pytest.fixture(scope="session")
def v1_compiled(smollm2: Path, planes: dict[str, Path]) -> Iterator[Engine]:
    """The V1 model runner, compiled, as `vllm serve` runs it unless told otherwise."""
    yield from engines.start(smollm2, planes, enforce_eager=False)


@pytest.fixture(scope="session")
def v2(smollm2: Path, planes: dict[str, Path]) -> Iterator[Engine]:
    """The V2 model runner, on Triton's interpreter."""
    yield from engines.start(smollm2, planes, v2=True)


@pytest.fixture(scope="session")
def plain(smollm2: Path) -> Iterator[Engine]:
    """vLLM without any plane; V1, eager."""
    yield from engines.start(smollm2, {})


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Any:
    """The engine that a test is parametrised with, by its fixture's name."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`steering serve` with the bundled plane, as `make serve` starts it, but eager and in fp32."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    yield from servers.serve(
        smollm2,
        {"sentiment": SENTIMENT},
        log,
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
        *ROADS,
        # Else a small model fills its answer with the blanks that JSON allows.
        "--structured-outputs-config",
        '{"backend": "xgrammar", "disable_any_whitespace": true}',
    )


@pytest.fixture(scope="session")
def bare_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A platform's own `vllm serve`, which knows of steering only the flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_PLUGINS", raising=False)
        yield from servers.serve(
            smollm2,
            {"sentiment": SENTIMENT},
            tmp_path_factory.mktemp("bare-server") / "server.log",
            *ROADS,
            road=servers.VLLM_SERVE,
        )


@pytest.fixture(scope="session")
def strict_server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve` with the plugin named, a default, and no answer without steering."""
    yield from servers.serve(
        smollm2,
        {"sentiment": SENTIMENT},
        tmp_path_factory.mktemp("strict-server") / "server.log",
        "--enable-scale-out",
        "--steering-default",
        "sentiment@180",
        "--steering-required",
        "--steering-preset",
        "gloomy=sentiment@180",
        road=servers.VLLM_SERVE,
        environment={"VLLM_PLUGINS": "steering"},
    )
