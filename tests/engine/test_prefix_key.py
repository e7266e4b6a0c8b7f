"""What steering adds to a block's hash."""

from __future__ import annotations

import itertools

import pytest

from steering_server.engine.prefix_key import block_key
from steering_server.request.rotation import Mode, Rotation, Tokens


def rotation(
    angle: float = 30.0, tokens: Tokens = "all", mode: Mode = "rotate_to", gate: float | None = None
) -> Rotation:
    return Rotation("sentiment", "d" * 64, angle, mode, tokens, gate)


def test_everything_that_changes_an_activation_changes_the_key() -> None:
    variants = [
        (rotation(),),
        (rotation(angle=30.000001),),
        (rotation(mode="rotate_by"),),
        (rotation(gate=0.0),),
        (rotation(gate=0.5),),
        (Rotation("sentiment", "e" * 64, 30.0, "rotate_to", "all", None),),
        (rotation(), rotation(60)),
        (rotation(60), rotation()),
    ]
    keys = [block_key(rotations, 100, 0, 16) for rotations in variants]
    assert len(set(keys)) == len(keys)
    assert all(keys)


def test_a_planes_name_does_not() -> None:
    other = Rotation("another name", "d" * 64, 30.0, "rotate_to", "all", None)
    assert block_key((other,), 100, 0, 16) == block_key((rotation(),), 100, 0, 16)


@pytest.mark.parametrize(("prompt", "start", "end"), [(100, 0, 16), (40, 32, 48), (20, 32, 48)])
def test_a_key_says_which_tokens_of_the_block_are_steered(
    prompt: int, start: int, end: int
) -> None:
    """Two scopes have one key exactly where they steer the same tokens of the block."""
    steered = {
        "all": set(range(start, end)),
        "prompt": set(range(start, min(end, prompt))),
        "generated": set(range(max(start, prompt), end)),
    }
    for a, b in itertools.product(steered, repeat=2):
        keys = [block_key((rotation(tokens=t),), prompt, start, end) for t in (a, b)]  # type: ignore[arg-type]
        assert (keys[0] == keys[1]) == (steered[a] == steered[b])
        assert bool(keys[0]) == bool(steered[a])


def test_a_boundary_inside_a_block_is_in_the_key() -> None:
    scoped = (rotation(tokens="generated"),)
    assert block_key(scoped, 35, 32, 48) != block_key(scoped, 36, 32, 48)
