"""Steering in a few words, where there is no room for fields: model ids, presets, the default.

    words  = item *("+" item)              applied in order
    item   = [plane] ["@" angle] *("," word)
    word   = "rotate_by" / "rotate_to"     the mode
           / "all" / "prompt" / "generated"    the tokens
           / "gate=" (number / "none")

``sentiment@90``, ``@90,rotate_by``, ``sentiment@180,generated+style@45``. The plane may be left out
where one is loaded, the angle where the plane has a default one.
"""

from __future__ import annotations

from typing import Any

from steering_server.request.rotation import MODES, TOKENS


def parse_words(text: str) -> list[dict[str, Any]]:
    """The rotations that ``text`` asks for, as the items of the field ``steering``.

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
        item["angle"] = _number(angle, "an angle in degrees after '@'")
    for word in words:
        name, value = _word(word)
        if name in item:
            raise ValueError(f"{word!r} says the {name} a second time")
        item[name] = value
    if not item:
        raise ValueError("must name a plane or an angle, as in sentiment@90 or @90")
    return item


def _word(word: str) -> tuple[str, Any]:
    if word in MODES:
        return "mode", word
    if word in TOKENS:
        return "tokens", word
    name, _, value = word.partition("=")
    if name == "gate":
        return "gate", None if value == "none" else _number(value, "a number or none after 'gate='")
    raise ValueError(f"unknown word {word!r}; known are {', '.join([*MODES, *TOKENS])}, gate=…")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be {what}, got {text!r}") from None
