"""Steered greedy generation with transformers and forward hooks: slow, plain and in fp32.

It shares nothing with the serving path but the plane, so it is also the truth that the server's
answers are compared with.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steering_planes.artifact import Mode, Plane
from steering_planes.geometry import rotate_by, rotate_to
from steering_planes.sites import Site, find_sites
from steering_server.evaluation.hooks import encode, hooked


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    plane: Plane | None = None,
    angle: float | None = None,
    mode: Mode | None = None,
    batch_size: int = 30,
) -> list[str]:
    """Greedy continuations of user prompts in the chat template, without a system prompt.

    With a plane and an angle in degrees every token, prompt and generated, is steered at the
    plane's sites, in `mode` or the plane's default mode and with the plane's gate.
    """
    modules = find_sites(model, model.config.get_text_config().num_hidden_layers)
    rotate = (
        rotate_to if plane and (mode or plane.config.default_mode) == "rotate_to" else rotate_by
    )
    steered = {} if plane is None or angle is None else {s: modules[s] for s in plane.sites}

    def turn(site: Site, output: Tensor) -> Tensor:
        assert plane is not None
        assert angle is not None
        return rotate(output, plane.bases[site], angle, plane.config.gate).to(output.dtype)

    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        conversations = [
            [{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch_size]
        ]
        batch = encode(tokenizer, conversations, "left")
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with hooked(steered, turn):
            ids = model.generate(**batch, max_new_tokens=max_tokens, do_sample=False)
        new = ids[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
