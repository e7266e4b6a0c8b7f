"""Giving one object more behaviour without touching its class."""

from __future__ import annotations

from collections.abc import Callable

_MADE_BY = "_steering_retyped_by"


def retype(instance: object, subclass: Callable[[type], type]) -> None:
    """Let ``instance`` be of ``subclass(its class)`` from here on.

    The subclass has a single base: an object can only change to a class of its own layout.

    Raises:
        RuntimeError: it is already; twice would steer twice.
    """
    cls = type(instance)
    if getattr(cls, _MADE_BY, None) is subclass:
        raise RuntimeError(f"{cls.__name__} has been retyped by {subclass.__name__} before")
    new = subclass(cls)
    new.__name__ = new.__qualname__ = f"Steered{cls.__name__}"
    setattr(new, _MADE_BY, subclass)
    instance.__class__ = new
