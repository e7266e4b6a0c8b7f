"""An adapter and steering in one batch."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import engines
import traffic
from oracle import Oracle, Turn
from tiny import HIDDEN, LAYERS, Tiny
from traffic import Ask

RANK = 4
PROMPT = [random.Random(1).randrange(3, 256) for _ in range(70)]


def make_adapter(folder: Path) -> Path:
    """A random LoRA of the tiny model's query and down projections, as peft saves it."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(LAYERS):
        for name, inner in (("self_attn.q_proj", HIDDEN), ("mlp.down_proj", 256)):
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.1
            tensors[f"{at}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(oracle: Oracle, adapter: Path) -> Oracle:
    """The model with the adapter, of scale 1, added to its weights."""
    model: Any = copy.deepcopy(oracle.model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            at = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                model.get_submodule(at).weight.add_(tensors[name.replace("_A", "_B")] @ a)
    return Oracle(model, oracle.norms)


def test_an_adapter_and_steerings_meet_in_one_batch(tiny_llama: Tiny, tmp_path: Path) -> None:
    """With the adapter and then without, each twice: the second time from a cache that keeps them
    apart. Not in one batch: on a CPU, vLLM then gives the adapter to every request."""
    from vllm.lora.request import LoRARequest

    adapter = make_adapter(tmp_path / "adapter")
    oracles = {True: merged(tiny_llama.oracle, adapter), False: tiny_llama.oracle}
    plane = tiny_llama.planes["two"]
    steerings = [[], [Turn(plane, 140, "rotate_to")], [Turn(plane, 70, "rotate_by")]]
    asks = [Ask(PROMPT, t, traffic.fields(t, tiny_llama.planes), tokens=8) for t in steerings]
    starting = engines.start(
        tiny_llama.model,
        tiny_llama.planes,
        in_process=True,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=8,
        max_model_len=160,
        max_num_seqs=8,
    )
    request = LoRARequest("tiny", 1, str(adapter))
    firsts = []
    for engine in starting:
        for lora in (True, False):
            for cached in (0, 64):
                replies = traffic.send(engine, asks, lora=request if lora else None)
                assert [reply.cached for reply in replies] == [cached] * 3
                for ask, reply in zip(asks, replies, strict=True):
                    traffic.check(oracles[lora], ask, reply)
                firsts += [reply.choices[0].logprobs[0] for reply in replies if not cached]
    assert len({round(first, 3) for first in firsts}) == 6, "they cannot be told apart"
