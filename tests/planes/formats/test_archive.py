"""Nothing in a file is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_planes import PlaneError
from steering_planes.formats import import_plane


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_pickle_that_would_run_code_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = np.empty((), dtype=object)
    bomb[()] = {"model.layers.0.input_layernorm": {"first_direction": Bomb(mark)}}
    np.save(tmp_path / "b.npy", bomb, allow_pickle=True)
    for name, content in (
        ("plane.pt", {"basis": Bomb(mark)}),
        ("vector.pt", {0: Bomb(mark)}),
        ("vec_layer_1.pt", Bomb(mark)),
    ):
        torch.save(content, tmp_path / name)
    for name in ("plane.pt", "vector.pt", "vec_layer_1.pt", "b.npy"):
        with pytest.raises(PlaneError, match="plain containers") as caught:
            import_plane([tmp_path / name], name="plane", sites="0")
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)
    assert not mark.exists()
    pickle.loads((tmp_path / "b.npy").read_bytes().partition(b"\n")[2])
    assert mark.exists(), "the bomb was a dud"


def test_a_pickled_class_is_refused_by_name(tmp_path: Path) -> None:
    """steering-vectors' SteeringVector, which its users pickle whole."""
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "vector.pt")
    with pytest.raises(PlaneError, match=r"vector\.pt: file=vector\.pt: must be a torch archive"):
        import_plane([tmp_path / "vector.pt"], name="plane")


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (torch.full((8,), torch.nan), "tensor=nan: must be finite"),
        (torch.ones(8).double() * 1e300, "tensor=1e\\+300: must be within the range of float32"),
        (torch.ones(8).double() * 1e-160, "tensor=1e-160: must be within the range of float32"),
        (torch.zeros(2, 3, 4), r"tensor\.shape=\[2, 3, 4\]: must be \[d\] or \[k, d\]"),
        (torch.ones(8, dtype=torch.int64), r"tensor\.dtype=torch\.int64: must be a floating dtype"),
        (torch.eye(8).to_sparse(), "must be a tensor of numbers"),
        ({"a": torch.ones(8)}, "layer=a: must be a layer's number"),
        ({0: torch.ones(8), 1: torch.ones(6)}, r"layer 1=\[1, 6\]: must be \[1, 8\], as"),
        ({}, "there are none"),
        ([], r"tensor\.shape=\[0\]: must be \[d\] or"),
        ("text", "must be a tensor of numbers"),
    ],
)  # fmt: skip
def test_what_is_no_direction_is_named(value: Any, rule: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "vector.pt")
    with pytest.raises(PlaneError, match=rule):
        import_plane([tmp_path / "vector.pt"], name="p", base_model="m", sites="0.attn_in",
                     space="norm", model_type="llama", num_layers=2)  # fmt: skip


def test_zeros_point_nowhere(tmp_path: Path) -> None:
    torch.save({0: torch.ones(8), 1: torch.zeros(8)}, tmp_path / "vector.pt")
    with pytest.raises(PlaneError, match=r"direction at 1\.attn_in=0\.0: must not be zero"):
        import_plane([tmp_path / "vector.pt"], name="p", base_model="m", sites="1.attn_in",
                     space="norm", model_type="llama", num_layers=2)  # fmt: skip
