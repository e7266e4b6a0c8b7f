"""Broken files: bytes changed, cut, moved, and numbers of lengths replaced by absurd ones; or whole
files of which one value is another than it should be."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ABSURD = (b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, (2**40).to_bytes(8, "little"))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one fault of a random kind, mostly in its first bytes, where headers are."""
    changed = bytearray(content or b"\0")
    kind = rng.random()
    at = rng.randrange(min(len(changed), rng.choice((64, 400, len(changed)))))
    if kind < 0.5:
        for _ in range(rng.choice((1, 1, 2, 8, 40))):
            changed[rng.randrange(min(len(changed), max(at, 64)))] = rng.randrange(256)
    elif kind < 0.7:
        del changed[rng.randrange(len(changed)) :]
    elif kind < 0.8:
        del changed[at : at + rng.randrange(1, 50)]
    elif kind < 0.9:
        changed[at:at] = rng.randbytes(rng.randrange(1, 30))
    else:
        changed[at : at + 8] = rng.choice(ABSURD)
    return bytes(changed)


LEAVES = (None, True, -1, 0, 2, 10**30, 0.5, float("nan"), "", "x", "1", [], {}, ["x"], {"x": 1})

TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t[..., :-1],
    lambda t: t[..., :1],
    lambda t: t[..., :0],
    lambda t: t[None],
    lambda t: t[None, None],
    lambda t: torch.stack((t, t.flip(-1))),
    lambda t: torch.stack((t, t)),
    lambda t: torch.zeros_like(t),
    lambda t: torch.full_like(t, torch.nan),
    lambda t: t * torch.inf,
    lambda t: t.double() * 1e300,
    lambda t: t.double() * 1e-300,
    lambda t: t.double() * 1e-160,
    lambda t: t.int(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse(),
    lambda t: t.sum(),
    lambda t: t.tolist(),
)


def altered(value: Any, rng: random.Random) -> Any:
    """A value like it, in which one thing is of another kind, shape or size, or missing."""
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k is not key}
        match rng.randrange(8):
            case 0:
                return rest
            case 1:
                return rest | {rng.choice((f"{key}x", 10**9, "1", "", -1, 1)): value[key]}
            case _:
                return {k: altered(v, rng) if k is key else v for k, v in value.items()}
    if isinstance(value, list | tuple) and value:
        i = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return type(value)((*value[:i], *value[i + 1 :]))
            case 1:
                return type(value)((*value, value[i]))
            case _:
                return type(value)((*value[:i], altered(value[i], rng), *value[i + 1 :]))
    if isinstance(value, Tensor) and rng.random() < 0.9:
        return rng.choice(TENSORS)(value)
    return rng.choice(LEAVES)


def alter(file: Path, rng: random.Random) -> bool:
    """Alter a value in a whole file, which stays one of its format; False of other formats."""
    match file.suffix:
        case ".pt":
            torch.save(altered(torch.load(file, weights_only=True), rng), file)
        case ".json" | ".jsonl" | ".svec":
            lines = file.read_text("utf-8-sig").split("\n")
            # Of one value, or of one a line.
            at = rng.randrange(len(lines) - 1) if lines[0].endswith("}") and lines[1:] else None
            if at is None:
                file.write_text(json.dumps(altered(json.loads("\n".join(lines)), rng)))
            else:
                lines[at] = json.dumps(altered(json.loads(lines[at]), rng))
                file.write_text("\n".join(lines))
        case ".npy":
            spoiled = altered(np.load(file, allow_pickle=True).item(), rng)
            np.save(file, np.array(spoiled, dtype=object), allow_pickle=True)
        case ".safetensors":
            found = altered(load_file(file), rng)
            kept = found.items() if isinstance(found, dict) else ()
            dense = {
                str(k): v.contiguous().clone()
                for k, v in kept
                if isinstance(v, Tensor) and not v.is_sparse
            }
            save_file(dense, file)
        case _:
            return False
    return True
