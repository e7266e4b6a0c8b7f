"""What steering adds to a block's hash."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from steering_server.engine.prefix_key import block_key
from steering_server.request.angle import Ramp
from steering_server.request.operation import Operation
from steering_server.request.window import ALL, NAMED, Window

PLAIN = Operation("sentiment", "d" * 64, 30.0, "rotate_to")


def test_everything_that_changes_an_activation_changes_the_key() -> None:
    def other(**changes: Any) -> tuple[Operation, ...]:
        return (replace(PLAIN, **changes),)

    variants = [
        other(),
        other(angle=30.000001),
        other(angle=Ramp(30.0, 31.0, 100)),
        other(mode="rotate_by"),
        other(gate=0.0),
        other(gate=0.5),
        other(digest="e" * 64),
        other(mode="ablate", strength=1.0),
        other(mode="ablate", strength=0.5),
        other(mode="ablate", strength=0.5, keep_norm=True),
        other(mode="add", strength=0.5),
        other(mode="cap", strength=0.5),
        other() + other(angle=60.0),
        other(angle=60.0) + other(),
        other(tokens=Window((0, 8), None)),
        other(tokens=Window((1, 8), None)),
        other(tokens=Window((8, None), None)),
        other(tokens=Window((0, 8), None)) + other(angle=60.0, tokens=Window((8, None), None)),
    ]
    keys = [block_key(operations, 16, 0, 32) for operations in variants]
    assert len(set(keys)) == len(keys)
    assert all(keys)


def test_a_planes_name_does_not() -> None:
    other = replace(PLAIN, plane="another name")
    assert block_key((other,), 100, 0, 16) == block_key((PLAIN,), 100, 0, 16)


def test_a_block_steered_as_a_whole_has_one_key_whatever_led_to_it() -> None:
    whole = block_key((PLAIN,), 40, 16, 32)
    for window in (NAMED["prompt"], Window((-24, None), None), Window((16, 32), (0, 4))):
        assert block_key((replace(PLAIN, tokens=window),), 40, 16, 32) == whole
    held = replace(PLAIN, angle=Ramp(10.0, 30.0, 4))
    assert block_key((held,), 40, 48, 64) == whole
    assert block_key((replace(held, angle=Ramp(30.0, 10.0, 4)),), 40, 16, 32) == whole
    assert (
        block_key((replace(PLAIN, angle=10.0, tokens=Window((8, 9), None)), PLAIN), 40, 16, 32)
        == whole
    )


def test_an_angle_that_comes_to_rest_at_nothing_is_nothing() -> None:
    fading = replace(PLAIN, mode="rotate_by", angle=Ramp(90.0, 0.0, 8))
    assert block_key((fading,), 16, 16, 32).startswith("[0:1]")
    assert block_key((fading,), 16, 24, 40) == ""
    assert block_key((fading,), 16, 23, 40).startswith("[0:1]")


@pytest.mark.parametrize("seed", range(40))
def test_keys_are_equal_where_and_only_where_every_tokens_steering_is(seed: int) -> None:
    """Against the steering written out token by token."""
    rng = random.Random(seed)
    start, end = 32, 48
    said: dict[str, list[Any]] = {}
    for _ in range(60):
        prompt = rng.choice((20, 32, 35, 40, 48, 60))
        operations = [_operation(rng) for _ in range(rng.choice((1, 1, 2)))]
        tokens = [
            [
                (o.mode, o.strength, angle)
                for o in operations
                if (angle := _angle_at(o, position, prompt)) is not None
            ]
            for position in range(start, end)
        ]
        key = block_key(operations, prompt, start, end)
        assert bool(key) == any(tokens)
        assert said.setdefault(key, tokens) == tokens
    written = [str(tokens) for tokens in said.values()]
    assert len(set(written)) == len(written)


DECIMAL = (45.1, Ramp(0.0, 0.1, 10), Ramp(0.0, 0.3, 30), Ramp(359.9, 0.0, 3), Ramp(0.1, 45.1, 3))
"""In doubles these would part from what they are equal to."""


def test_decimal_ramps_rest_where_they_say() -> None:
    one, three = (replace(PLAIN, angle=ramp) for ramp in DECIMAL[1:3])
    for at in range(10):
        assert one.degrees_at(16 + at, 16) == three.degrees_at(16 + at, 16)
    assert block_key((one,), 16, 16, 26) == block_key((three,), 16, 16, 26)
    falling = replace(PLAIN, mode="rotate_by", angle=DECIMAL[3])
    assert block_key((falling,), 16, 32, 48) == ""
    rising, held = replace(PLAIN, angle=DECIMAL[4]), replace(PLAIN, angle=45.1)
    assert block_key((rising,), 16, 32, 48) == block_key((held,), 16, 32, 48)


def _operation(rng: random.Random) -> Operation:
    ends = (None, 0, 1, 3, 8, 15, 40)
    angle = rng.choice(
        (0.0, 90.0, Ramp(90.0, 0.0, rng.choice((1, 4, 30))), Ramp(0.0, -360.0, 8), *DECIMAL)
    )
    window = rng.choice(
        (
            ALL,
            NAMED["prompt"],
            NAMED["generated"],
            Window((rng.choice((-20, -3, 0, 33)), rng.choice((None, -1, 40))), None),
            Window((rng.choice((-3, 0)), None), (rng.choice(ends) or 0, rng.choice(ends))),
        )
    )
    mode = rng.choice(("rotate_by", "rotate_to", "add"))
    strength = rng.choice((1.0, 2.0)) if mode == "add" else None
    return Operation("p", "d", angle, mode, window, strength=strength)


def _angle_at(operation: Operation, position: int, prompt: int) -> float | None:
    """By Python's own slices of lists."""
    prompted, generated = list(range(prompt)), list(range(prompt, prompt + 200))
    window = operation.tokens
    within = prompted[slice(*window.prompt)] if window.prompt else []
    within += generated[slice(*window.generated)] if window.generated else []
    if position not in within:
        return None
    angle = operation.angle
    if isinstance(angle, Ramp):
        share = Fraction(min(max(0, position - prompt), angle.over), angle.over)
        start, stop = (Fraction(repr(end)) for end in (angle.start, angle.stop))
        # To the digits that an angle on the way has.
        angle = float(round(start + share * (stop - start), 9) % 360)
    return None if operation.mode == "rotate_by" and angle == 0 else angle
