"""Runs in `.venv-vectors`: repeng and steering-vectors train, save, and steer by themselves.

    python vector_libraries.py MODEL FOLDER

writes repeng.gguf, steering_vectors.pt and, for each, what its own library does to the output of
every next layer's attention norm: `effects.pt`, {library: {site: [d]}}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from steering_vectors import train_steering_vector
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PAIRS = [(f"I am happy about {x}", f"I am sad about {x}") for x in ("rain", "bread", "you", "it")]
PROMPT = "The weather is"


def scaled(model: Any, blocks: list[Any], tokenizer: Any) -> list[torch.Tensor]:
    """[d] a layer, of the last token: the attention norm's output times its input's rms."""
    found: list[torch.Tensor] = []
    handles = [
        block.input_layernorm.register_forward_hook(
            lambda module, args, out: found.append(
                (out * args[0].square().mean(-1, keepdim=True).sqrt())[0, -1].double()
            )
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(**tokenizer(PROMPT, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return found


def main(model: str, folder: Path) -> None:
    # Not by AutoTokenizer: another transformers saved it.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{model}/tokenizer.json", pad_token="<|im_end|>", eos_token="<|im_end|>"
    )
    plain = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    blocks = list(plain.model.layers)
    effects: dict[str, dict[str, torch.Tensor]] = {"repeng": {}, "steering_vectors": {}}
    before = scaled(plain, blocks, tokenizer)

    theirs = train_steering_vector(plain, tokenizer, PAIRS)
    torch.save(theirs.layer_activations, folder / "steering_vectors.pt")
    for layer in range(len(blocks) - 1):
        one = type(theirs)({layer: theirs.layer_activations[layer]}, theirs.layer_type)
        with one.apply(plain, multiplier=0.1):
            after = scaled(plain, blocks, tokenizer)
        effects["steering_vectors"][f"{layer + 1}.attn_in"] = after[layer + 1] - before[layer + 1]

    dataset = [DatasetEntry(positive, negative) for positive, negative in PAIRS]
    vector = ControlVector.train(plain, tokenizer, dataset, batch_size=2)
    vector.export_gguf(folder / "repeng.gguf")
    for layer in vector.directions:
        if layer + 1 < len(blocks):
            model_with = ControlModel(plain, [layer])
            model_with.set_control(vector, 0.1)
            after = scaled(model_with, blocks, tokenizer)
            model_with.unwrap()
            effects["repeng"][f"{layer + 1}.attn_in"] = after[layer + 1] - before[layer + 1]
    torch.save(effects, folder / "effects.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
