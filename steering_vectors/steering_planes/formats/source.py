"""What a published file holds, before it is a plane for a certain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from steering_planes.artifact import Mode

Index = Literal["block-output", "hidden-states"]
"""What a number of a direction counts: `i` is what block i puts out, which layer i + 1 reads; or
what transformers calls `hidden_states[i]`, which layer i reads."""

Space = Literal["residual", "norm"]
"""Where a direction lives: in the residual stream, or at a norm's output, where planes do."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a source says of itself.

    file: the one to name in errors.
    method, data, n: the artifact's `extraction`.
    base_model, model_type: if it names them.
    default_mode, gate, default_angle, default_strength: of the plane that it becomes.
    """

    file: Path
    method: str
    data: str
    n: int = 1
    base_model: str | None = None
    model_type: str | None = None
    default_mode: Mode | None = None
    gate: float | None = None
    default_angle: float | None = None
    default_strength: float | None = None


@dataclass(frozen=True, eq=False)
class Bases:
    """Two directions at each of some norms' outputs.

    by_module: [2, d] float64 of every norm that the source names (`layers.3.input_layernorm`).
    selected: those that it steers; None where it does not say.
    unselected: why it does not say, for the error.
    """

    facts: Facts
    by_module: Mapping[str, Tensor]
    selected: tuple[str, ...] | None = None
    unselected: str = "this format selects none"


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction a layer, or several.

    by_index: [k, d] float64, numbered as `index` says; None for one that belongs to no layer.
    index: None where the source does not say.
    caps: by the same numbers, the value of the residual's projection on its unit direction that it
        is not to exceed.
    steers_all: without being told more, at all layers that it names.
    """

    facts: Facts
    by_index: Mapping[int | None, Tensor]
    index: Index | None = None
    space: Space = "residual"
    caps: Mapping[int, float] = field(default_factory=dict)
    steers_all: bool = False

    @property
    def rows(self) -> int:
        """Directions a layer."""
        return len(next(iter(self.by_index.values())))

    @property
    def hidden_size(self) -> int:
        return next(iter(self.by_index.values())).shape[1]
