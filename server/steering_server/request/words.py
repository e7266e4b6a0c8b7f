"""Steering in a few words, where there is no room for fields: model ids, presets, the default.

    words  = item *("+" item)              applied in order
    item   = [plane] ["@" angle] *("," word)
    angle  = number / number ".." number "/" integer    from one to another over generated tokens
    word   = "rotate_by" / "rotate_to" / "add" / "ablate" / "cap"    the mode
           / "strength=" number
           / "keep_norm"
           / "all" / "prompt" / "generated"    the tokens
           / ("prompt" / "generated") "[" [integer] ":" [integer] "]"    slices of them
           / "gate=" (number / "none")

``sentiment@90``, ``@90,rotate_by``, ``sentiment@180..0/64``, ``sentiment@0,add,strength=0.5``,
``sentiment@180,prompt[-4:],generated+style@45``. The plane may be left out where one is loaded, the
angle where the plane has a default one.
"""

from __future__ import annotations

from typing import Any

from steering_server.request.angle import read_ramp
from steering_server.request.operation import MODES
from steering_server.request.window import WORDS, read_slices

_ANGLE = "an angle in degrees after '@'"


def parse_words(text: str) -> list[dict[str, Any]]:
    """The operations that ``text`` asks for, as the items of the field ``steering``.

    Raises:
        ValueError: saying what cannot be read; values are admission's to judge.
    """
    return [_item(part) for part in text.split("+")]


def _item(text: str) -> dict[str, Any]:
    head, *words = text.split(",")
    plane, at, angle = head.partition("@")
    item: dict[str, Any] = {}
    if plane:
        item["plane"] = plane
    if at:
        item["angle"] = read_ramp(angle) if ".." in angle else _number(angle, _ANGLE)
    for word in words:
        name, value = _word(word)
        slices = item.get(name)
        if (
            isinstance(slices, dict)
            and isinstance(value, dict)
            and not slices.keys() & value.keys()
        ):
            value = slices | value
        elif name in item:
            raise ValueError(f"{word!r} says the {name} a second time")
        item[name] = value
    if not item:
        raise ValueError("must name a plane or an angle, as in sentiment@90 or @90")
    return item


def _word(word: str) -> tuple[str, Any]:
    if word in MODES:
        return "mode", word
    if word in WORDS:
        return "tokens", word
    if word == "keep_norm":
        return word, True
    if word.endswith("]"):
        return "tokens", read_slices(word)
    name, _, value = word.partition("=")
    if name == "gate":
        return "gate", None if value == "none" else _number(value, "a number or none after 'gate='")
    if name == "strength":
        return "strength", _number(value, "a number after 'strength='")
    known = ", ".join([*MODES, *WORDS, "prompt[…:…]", "generated[…:…]", "keep_norm"])
    raise ValueError(f"unknown word {word!r}; known are {known}, strength=…, gate=…")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be {what}, got {text!r}") from None
