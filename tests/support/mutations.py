"""Broken files: bytes changed, cut, moved, and numbers of lengths replaced by absurd ones."""

from __future__ import annotations

import random

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
