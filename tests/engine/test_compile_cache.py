"""A graph traced for some sites, or by some code, is never found again for others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engines
import steering_kernels
import tiny
import traffic
from oracle import Turn
from planes import random_plane
from tiny import Tiny
from traffic import Ask

PROMPT = [5 + 3 * i for i in range(20)]
SUPPORT = Path(engines.__file__).parent


def asked(tiny: Tiny, plane: str, folder: Path) -> tuple[list[Ask], list[traffic.Reply], int]:
    """A steered and an unsteered answer of a compiled engine with this plane alone, and how many
    graphs the cache holds then."""
    turns = [Turn(tiny.planes[plane], 150, "rotate_to")]
    asks = [Ask(PROMPT, t, traffic.fields(t, tiny.planes), tokens=8) for t in (turns, [])]
    options: dict[str, Any] = {"enforce_eager": False, "skip_tokenizer_init": True}
    planes = {plane: tiny.planes[plane]}
    with engines.environment({"VLLM_CACHE_ROOT": str(folder)}):
        for engine in engines.start(tiny.model, planes, max_model_len=128, **options):
            replies = traffic.send(engine, asks)
    graphs = list((folder / "torch_compile_cache" / "torch_aot_compile").iterdir())
    return asks, replies, len(graphs)


def test_other_sites_are_another_graph(tiny_llama: Tiny, tmp_path: Path) -> None:
    """Two engines that differ in nothing but their sites."""
    counts = []
    for plane in ("one", "three"):
        asks, replies, graphs = asked(tiny_llama, plane, tmp_path)
        counts.append(graphs)
        for ask, reply in zip(asks, replies, strict=True):
            traffic.check(tiny_llama.oracle, ask, reply)
        steered, unsteered = (reply.choices[0].logprobs for reply in replies)
        assert max(abs(a - b) for a, b in zip(steered, unsteered, strict=True)) > 0.01
    assert counts == [1, 2], "the second engine left no graph of its own"


def test_other_code_is_another_key(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def key() -> str:
        steering = {"planes": {"one": str(tiny_llama.planes["one"])}}
        args = EngineArgs(
            model=str(tiny_llama.model),
            skip_tokenizer_init=True,
            additional_config={"steering": {**steering, "allow_model_mismatch": True}},
        )
        return str(args.create_engine_config().compute_hash())

    before = key()
    assert key() == before
    monkeypatch.setattr("steering_server.engine.settings.graph_code", lambda: "another")
    assert key() != before


# Run by an interpreter of its own: what it imports is the copy that a test has edited.
ASK = """
import json, sys
from pathlib import Path
import engines, gpu_pipeline, steering_kernels, traffic
from oracle import Turn
from traffic import Ask

gpu_pipeline.use()
model, plane, prompt = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
turns = [Turn(plane, 150, "rotate_to")]
asks = [Ask(prompt, turns, traffic.fields(turns, {"two": plane}), tokens=8)]
options = dict(enforce_eager=False, skip_tokenizer_init=True, max_model_len=128)
for engine in engines.start(model, {"two": plane}, in_process=True, **options):
    (choice,) = traffic.send(engine, asks)[0].choices
print("ANSWER", json.dumps([steering_kernels.__file__, choice.tokens, choice.logprobs]))
"""


@pytest.mark.slow
def test_an_upgrade_finds_no_graph_of_the_version_before(tiny_llama: Tiny, tmp_path: Path) -> None:
    """A mode is put between two, in a file with nothing that Dynamo traces: a graph of before would
    take one for the next, and vLLM would not see that it is stale."""
    package, cache = tmp_path / "kernels/steering_kernels", tmp_path / "cache"
    shutil.copytree(Path(steering_kernels.__file__).parent, package)
    turns = [Turn(tiny_llama.planes["two"], 150, "rotate_to")]
    ask = Ask(PROMPT, turns, traffic.fields(turns, tiny_llama.planes), tokens=8)

    def run() -> int:
        path = [package.parent, SUPPORT, os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", ASK, tiny_llama.model, turns[0].plane, json.dumps(PROMPT)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, path)),
                "VLLM_CACHE_ROOT": str(cache),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
        assert answers, done.stdout[-2000:] + done.stderr[-4000:]
        file, tokens, logprobs = json.loads(answers[0].removeprefix("ANSWER"))
        assert Path(file).is_relative_to(package)
        reply = traffic.Reply(choices=[traffic.Choice(tokens, logprobs)])
        traffic.check(tiny_llama.oracle, ask, reply)
        return len(list((cache / "torch_compile_cache/torch_aot_compile").iterdir()))

    assert run() == 1
    rows = package / "rows.py"
    source = rows.read_text()
    for number, mode in ((2, "ROTATE_TO"), (3, "ADD"), (4, "ABLATE"), (5, "CAP")):
        assert source.count(f"{mode} = {number}\n") == 1
        source = source.replace(f"{mode} = {number}\n", f"{mode} = {number + 1}\n")
    rows.write_text(source)
    assert run() == 2, "the edited version left no graph of its own"


COUNT = """
import sys
from pathlib import Path
import engines, gpu_pipeline
from vllm.compilation.backends import CompilerManager

gpu_pipeline.use()
compile, pieces = CompilerManager.compile, []

def counted(manager, *args, **kwargs):
    pieces.append(compile(manager, *args, **kwargs))
    return pieces[-1]

CompilerManager.compile = counted
planes = {Path(plane).name: Path(plane) for plane in sys.argv[2:]}
options = dict(enforce_eager=False, skip_tokenizer_init=True, max_model_len=128)
for engine in engines.start(Path(sys.argv[1]), planes, in_process=True, **options):
    print("COUNTED", len(pieces), len(set(map(id, pieces))))
"""
LAYERS = 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sites", "compiled"),
    [
        ([], 3),
        ([f"{i}.{role}" for i in range(LAYERS) for role in ("attn_in", "mlp_in")], 3),
        ([f"{i}.{role}" for i in range(0, LAYERS, 2) for role in ("attn_in", "mlp_in")], 4),
        # Between two attentions: neither, both, the first and the second.
        (["1.mlp_in", "2.attn_in", "2.mlp_in", "4.attn_in"], 6),
    ],
    ids=["plain", "all", "every_other", "every_kind"],
)
def test_layers_share_what_the_selected_sites_leave_equal(
    tmp_path: Path, sites: list[str], compiled: int
) -> None:
    """Cut at attention, a model has a first piece, a last one, and equal ones in between."""
    tiny.make("llama", tmp_path / "model", num_hidden_layers=LAYERS)
    shape = {"model_type": "llama", "hidden_size": tiny.HIDDEN, "num_layers": LAYERS}
    name = {"base_model_name_or_path": "tiny/model"}
    planes = [random_plane(tmp_path / "plane", sites, **name, **shape)] if sites else []
    done = subprocess.run(
        [sys.executable, "-c", COUNT, tmp_path / "model", *planes],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
            **({} if sites else {"VLLM_PLUGINS": ""}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    counts = [line for line in done.stdout.splitlines() if line.startswith("COUNTED")]
    assert counts == [f"COUNTED {LAYERS + 1} {compiled}"], done.stdout[-2000:] + done.stderr[-3000:]
