"""A graph traced for some sites is never found again for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import traffic
from oracle import Turn
from tiny import Tiny
from traffic import Ask

PROMPT = [5 + 3 * i for i in range(20)]


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
