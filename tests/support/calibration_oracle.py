"""What calibration is held to: transformers, one prompt at a time, and METHOD.md 3 in NumPy.

Shares no code with the project: norms are found by their names, principal components by an
eigenvalue decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Key = tuple[int, str]
Array = NDArray[np.float64]


def activations(
    model: Any, tokenizer: Any, conversations: Sequence[Any], norms: Mapping[str, str]
) -> dict[Key, Array]:
    """The last prompt token's activation at every norm: [n, d] each.

    Args:
        model: a transformers model with ``model.layers``.
        tokenizer: its tokenizer, with a chat template.
        conversations: messages that end with the user's turn.
        norms: role -> name of the norm in a decoder layer.
    """
    found: dict[Key, list[Array]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for role, name in norms.items():
            rows = found.setdefault((index, role), [])
            handles.append(
                getattr(layer, name).register_forward_hook(
                    lambda module, args, out, rows=rows: rows.append(out[0, -1].double().numpy())
                )
            )
    with torch.no_grad():
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
            model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    for handle in handles:
        handle.remove()
    return {key: np.stack(rows) for key, rows in found.items()}


@dataclass(frozen=True)
class Found:
    """Directions [d] of every site whose classes differ, and bases [2, d] of the selected ones.

    Of the selected ones also the classes' raw means in the plane, [2, 2] (positive, negative; c1,
    c2), and rho, the distance of those means.
    """

    candidates: dict[Key, Array]
    bases: dict[Key, Array]
    means: dict[Key, Array]
    rho: dict[Key, float]


def calibrate(positive: dict[Key, Array], negative: dict[Key, Array], *, per_site: bool,
              by_layer: bool) -> Found:  # fmt: skip
    """METHOD.md 3, steps 3 to 6, with max_sim."""
    candidates = {}
    for key in sorted(positive):
        difference = positive[key].mean(0) - negative[key].mean(0)
        length = np.linalg.norm(difference)
        if length > 1e-4 * np.linalg.norm(positive[key], axis=1).mean():
            candidates[key] = difference / length
    stacked = np.stack(list(candidates.values()))
    feature = list(candidates)[int((stacked @ stacked.T).mean(1).argmax())]
    centred = stacked - stacked.mean(0)
    pc1 = np.linalg.eigh(centred.T @ centred)[1][:, -1]

    def unit(rows: Array) -> Array:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    own = {key: candidates[key if per_site else feature] for key in candidates}
    passing = {
        key
        for key, b1 in own.items()
        if (unit(positive[key]) @ b1).mean() * (unit(negative[key]) @ b1).mean() < 0
    }
    if by_layer:
        whole = {key[0] for key in positive} - {key[0] for key in positive if key not in passing}
        passing = {key for key in passing if key[0] in whole}
    bases = {}
    for key in sorted(passing):
        b2 = pc1 - (pc1 @ own[key]) * own[key]
        bases[key] = np.stack([own[key], b2 / np.linalg.norm(b2)])
    if sum((unit(negative[key]) @ basis[1]).mean() for key, basis in bases.items()) < 0:
        bases = {key: np.stack([basis[0], -basis[1]]) for key, basis in bases.items()}
    means, rho = class_means(positive, negative, bases)
    return Found(candidates, bases, means, rho)


def class_means(
    positive: dict[Key, Array], negative: dict[Key, Array], bases: Mapping[Key, Array]
) -> tuple[dict[Key, Array], dict[Key, float]]:
    """METHOD.md 2b: example by example onto a basis, then the mean; and rho, by the cosine rule."""
    means, rho = {}, {}
    for key, basis in bases.items():
        p, q = positive[key], negative[key]
        means[key] = np.array([[np.mean([x @ b for x in side]) for b in basis] for side in (p, q)])
        # |mean(p) - mean(q)|^2 out of the mean inner products of all pairs.
        squared = (p @ p.T).mean() - 2 * (p @ q.T).mean() + (q @ q.T).mean()
        rho[key] = float(np.sqrt(squared))
    return means, rho
