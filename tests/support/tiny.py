"""Tiny models with random weights, one of each architecture, for conformance."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oracle import Oracle
from planes import random_plane

PRE = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
SANDWICH = {
    "attn_in": "input_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
POST = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}

HIDDEN, LAYERS, VOCABULARY = 128, 4, 256

_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Architecture:
    """A transformers config class, what it is made with, and METHOD's names of its norms."""

    config: str
    norms: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    """Its config has names of its own, and takes ``options`` alone."""
    borrowed: bool = False
    """vLLM runs transformers' own classes, and changes them in the process where it does."""


# vLLM's Gemmas have no head of their own.
GEMMA = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}

ARCHITECTURES = {
    "llama": Architecture("LlamaConfig", PRE),
    "mistral": Architecture("MistralConfig", PRE, {"sliding_window": None}),
    "qwen2": Architecture("Qwen2Config", PRE),
    "qwen3": Architecture("Qwen3Config", PRE),
    "qwen3_moe": Architecture(
        "Qwen3MoeConfig",
        PRE,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gemma2": Architecture("Gemma2Config", SANDWICH, GEMMA),
    "gemma3": Architecture("Gemma3TextConfig", SANDWICH, GEMMA),
    "phi3": Architecture("Phi3Config", PRE),
    "olmo2": Architecture("Olmo2Config", POST, borrowed=True),
    "mixtral": Architecture("MixtralConfig", PRE, {"num_local_experts": 4}),
    "gpt2": Architecture(
        "GPT2Config",
        {"attn_in": "ln_1", "mlp_in": "ln_2"},
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 256,
            "vocab_size": VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        own=True,
    ),
    "gpt_neox": Architecture(
        "GPTNeoXConfig",
        PRE,
        {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")},
        own=True,
        borrowed=True,
    ),
}


def make(name: str, folder: Path, **more: Any) -> Any:
    """Save a random model of an architecture; returns it, in fp32.

    ``more`` goes into its config. Weights are large and gains uneven, so that a wrong site, gain or
    order shows.
    """
    import transformers

    kind = ARCHITECTURES[name]
    options = kind.options if kind.own else {**_COMMON, **kind.options}
    config = getattr(transformers, kind.config)(**{**options, **more})
    torch.manual_seed(sum(map(ord, name)))
    # Eager: transformers' other attentions leave out Gemma-2's soft cap.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) - 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Tiny:
    """A saved random model, planes for it, and the truth about both."""

    model: Path
    planes: dict[str, Path]
    oracle: Oracle


def steerable(name: str, folder: Path) -> Tiny:
    """A model of an architecture and three planes, at sites that differ, meet and overlap."""
    kind = ARCHITECTURES[name]
    model = make(name, folder / "model")
    roles = list(kind.norms)
    sites = {
        "one": [f"1.{roles[0]}", f"2.{roles[-1]}"],
        "two": [f"{layer}.{role}" for layer in range(LAYERS) for role in roles],
        "three": [f"{LAYERS - 1}.{roles[0]}", f"2.{roles[-1]}"],
    }
    planes = {
        plane: random_plane(
            folder / plane,
            at,
            seed=seed,
            base_model_name_or_path="tiny/model",
            model_type=model.config.model_type,
            hidden_size=HIDDEN,
            num_layers=LAYERS,
        )
        for seed, (plane, at) in enumerate(sites.items())
    }
    return Tiny(folder / "model", planes, Oracle(model, kind.norms))
