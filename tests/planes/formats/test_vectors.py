"""A control vector of a real model's residual stream is our own candidate where it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration_oracle import activations
from oracle import LLAMA_NORMS
from published import gguf
from steering_planes.contrast import read_contrast
from steering_planes.examples import Conversation
from steering_planes.formats import import_plane

CONTRAST = Path(__file__).parents[3] / "steering_vectors/contrast_sets/sentiment.json"
LAYERS = 30

Sides = tuple[Tensor, Tensor]
"""[n, layers + 1, d] of the positive class and of the negative one."""


@pytest.fixture(scope="module")
def recorded(smollm2: Path) -> tuple[Sides, dict[tuple[int, str], Tensor]]:
    """Residuals, and the unit difference of means at every norm: by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    contrast = read_contrast(CONTRAST)
    sides = [
        [example.conversation for example in side[:48]]
        for side in (contrast.positive, contrast.negative)
    ]
    residuals = [torch.stack([residual(model, tokenizer, c) for c in side]) for side in sides]
    positive, negative = (activations(model, tokenizer, side, LLAMA_NORMS) for side in sides)
    candidates = {}
    for key in positive:
        difference = torch.from_numpy(positive[key].mean(0) - negative[key].mean(0))
        candidates[key] = difference / difference.norm()
    return (residuals[0], residuals[1]), candidates


def residual(model: Any, tokenizer: Any, conversation: Conversation) -> Tensor:
    """[layers + 1, d] of the last prompt token."""
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    return torch.stack([state[0, -1].double() for state in states])


def cosines(
    recorded: tuple[Sides, dict[tuple[int, str], Tensor]],
    smollm2: Path,
    folder: Path,
    scale: Callable[[Tensor], Tensor],
    shift: int = 0,
) -> Tensor:
    """[28]: of an imported control vector and the candidate at attn_in of layers 2 to 29."""
    (positive, negative), candidates = recorded
    difference = scale(positive).mean(0) - scale(negative).mean(0)
    # The output of block i is hidden_states[i + 1].
    by_block = {i: difference[i + 1 + shift].float() for i in range(1, LAYERS - 1)}
    file = gguf(folder / "happy.gguf", by_block)
    plane = import_plane([file], name="happy", base_model=str(smollm2), sites="2-29.attn_in")
    return torch.stack([
        basis[0].double() @ candidates[(site.layer, site.role)]
        for site, basis in plane.bases.items()
    ])  # fmt: skip


def test_it_is_read_by_the_next_layer_through_its_gain(
    recorded: Any, smollm2: Path, tmp_path: Path
) -> None:
    """As published, of raw residuals: what is left is that the classes' own rms differ."""
    found = cosines(recorded, smollm2, tmp_path, lambda residuals: residuals)
    assert float(found.median()) >= 0.99
    assert float(found.min()) >= 0.95
    off = cosines(recorded, smollm2, tmp_path, lambda residuals: residuals, shift=-1)
    assert bool((off < found).all())


def test_up_to_each_tokens_rms_it_is_the_candidate_itself(
    recorded: Any, smollm2: Path, tmp_path: Path
) -> None:
    def unit(residuals: Tensor) -> Tensor:
        return residuals / residuals.square().mean(-1, keepdim=True).sqrt()

    found = cosines(recorded, smollm2, tmp_path, unit)
    assert float(found.min()) >= 0.9999
