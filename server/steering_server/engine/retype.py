"""Giving one object more behaviour without touching its class."""

from __future__ import annotations


def retype(instance: object, mixin: type) -> None:
    """Let ``instance`` behave as if its class had ``mixin`` before it.

    Raises:
        RuntimeError: the mixin is already there; twice would steer twice.
    """
    cls = type(instance)
    if issubclass(cls, mixin):
        raise RuntimeError(f"{cls.__name__} is already a {mixin.__name__}")
    instance.__class__ = type(f"{mixin.__name__}[{cls.__name__}]", (mixin, cls), {})
