"""What PyTorch's compiler is spared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def is_fake_tensor_same(
    original: Callable[..., bool], new: Any, old: Any, *args: Any, **kwargs: Any
) -> bool:
    """Whether a graph's node has the value that it had: surely where it is the same object."""
    return new is old or original(new, old, *args, **kwargs)
