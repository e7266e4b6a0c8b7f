"""Files of others, opened without running any code in them.

Torch archives are read weights-only, pickled NumPy arrays by an unpickler that admits arrays and
plain containers, the rest by readers of plain data. Whatever is wrong with a file is a PlaneError.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steering_planes.artifact import PlaneError

# What the readers below raise at bytes that are not theirs. Deep nesting is a RecursionError, a
# length without end a MemoryError.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    tokenize.TokenError,
    SyntaxError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)

# What an array is pickled as, beside what torch itself admits.
_ARRAYS: list[Any] = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.ndarray,
    np.dtype,
    np.dtypes.Float16DType,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]

_FLOAT32 = torch.finfo(torch.float32)

_POINTER = b"version https://git-lfs"


def torch_archive(file: Path) -> Any:
    """What torch.save wrote: tensors in plain containers."""
    what = "a torch archive of tensors, arrays and plain containers"
    with reading(file, what), torch.serialization.safe_globals(_ARRAYS):
        return torch.load(file, weights_only=True, map_location="cpu")


def numpy_file(file: Path) -> Any:
    """An array, or what was pickled into a .npy: arrays in plain containers."""
    with reading(file, "an array, or a pickle of arrays and plain containers"):
        content = io.BytesIO(file.read_bytes())
        major, _ = np.lib.format.read_magic(content)  # type: ignore[no-untyped-call]
        read_header = getattr(np.lib.format, f"read_array_header_{major}_0")
        _, _, dtype = read_header(content)
        if dtype != np.dtype(object):
            return np.load(file, allow_pickle=False)
        loaded = _ArraysOnly(content).load()
        return loaded.item() if isinstance(loaded, np.ndarray) and not loaded.shape else loaded


def json_file(file: Path) -> Any:
    """Any JSON value."""
    with reading(file, "JSON"):
        return json.loads(file.read_bytes().decode("utf-8-sig"))


def optional_json(file: Path) -> Mapping[str, Any]:
    """A JSON object beside an artifact; empty where there is no such file."""
    loaded = json_file(file) if file.exists() else {}
    if not isinstance(loaded, dict):
        raise PlaneError(file, "file", type(loaded).__name__, "must be a JSON object")
    return loaded


@dataclass(frozen=True)
class Safetensors:
    """A safetensors file: its tensors' shapes, and they themselves when asked for."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> Tensor:
        with reading(self.file, "a whole safetensors file"), _safe_open(self.file) as opened:
            found: Tensor = opened.get_tensor(name)
            return found

    def row(self, name: str, index: int) -> Tensor:
        """[d], of a tensor [k, d] of which no more is read; raises IndexError."""
        with reading(self.file, "a whole safetensors file"), _safe_open(self.file) as opened:
            found: Tensor = opened.get_slice(name)[index : index + 1]
        return found[0]


def safetensors_file(file: Path) -> Safetensors:
    """A safetensors file, of which the header is read."""
    with reading(file, "a whole safetensors file"), _safe_open(file) as opened:
        names = list(opened.keys())
        return Safetensors(file, {n: tuple(opened.get_slice(n).get_shape()) for n in names})


def _safe_open(file: Path) -> Any:
    return safe_open(file, framework="pt")


@dataclass(frozen=True, eq=False)
class Gguf:
    """A GGUF file's text fields and float tensors."""

    architecture: str | None
    fields: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def gguf_file(file: Path) -> Gguf:
    """A GGUF file; float tensors as float64."""
    from gguf import GGUFReader, GGUFValueType

    with reading(file, "a GGUF file"):
        reader = GGUFReader(file)
        fields = {
            name: str(field.contents())
            for name, field in reader.fields.items()
            if field.types and field.types[0] != GGUFValueType.ARRAY
        }
        tensors = {
            tensor.name: torch.from_numpy(tensor.data.astype(np.float64))
            for tensor in reader.tensors
            if tensor.data.dtype.kind == "f"
        }
    return Gguf(fields.get("general.architecture"), fields, tensors)


def rows(file: Path, field: str, value: Any) -> Tensor:
    """One direction [d], or several [k, d], as [k, d] float64.

    Raises PlaneError unless these are numbers that float32 has room for; a row may be all zeros.
    """
    if isinstance(value, np.ndarray | list):
        with reading(file, "numbers", field):
            array = np.asarray(value)
            if array.dtype.kind != "f" and not (
                isinstance(value, list) and array.dtype.kind == "i"
            ):
                raise TypeError(f"they are {array.dtype}")
            value = torch.from_numpy(array.astype(np.float64))
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise PlaneError(file, field, type(value).__name__, "must be a tensor of numbers")
    if not value.is_floating_point() or value.is_meta:
        raise PlaneError(file, f"{field}.dtype", value.dtype, "must be a floating dtype")
    if value.ndim not in (1, 2) or value.shape[-1] < 2 or value.shape[0] < 1:
        raise PlaneError(file, f"{field}.shape", list(value.shape), "must be [d] or [k, d]")
    found: Tensor = value.detach().double().reshape(-1, value.shape[-1])
    if not bool(found.isfinite().all()):
        raise PlaneError(file, field, float(found[~found.isfinite()][0]), "must be finite")
    for size in found.abs().amax(1).tolist():
        # Norms are taken in float64 later: the squares of more, or of less, are no numbers there.
        if size and not _FLOAT32.tiny <= size <= _FLOAT32.max:
            raise PlaneError(file, field, size, "must be within the range of float32")
    return found


@contextmanager
def reading(file: Path, what: str, field: str = "file") -> Iterator[None]:
    """Turns whatever a reader raises into one line."""
    _refuse_pointer(file)
    try:
        # A warning about a file is no use to anyone; what is no number is refused later, by name.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PlaneError:
        raise
    except FileNotFoundError:
        raise PlaneError(file, field, file.name, "no such file") from None
    except OSError as error:
        rule = error.strerror or f"must be {what}: {_said(error)}"
        raise PlaneError(file, field, file.name, rule) from None
    except (*_UNREADABLE, SafetensorError) as error:
        raise PlaneError(file, field, file.name, f"must be {what}: {_said(error)}") from None


def _refuse_pointer(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            head = opened.read(len(_POINTER))
    except (OSError, ValueError):
        return  # the reader says it
    if head == _POINTER:
        rule = "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
        raise PlaneError(file, "file", file.name, rule)


def _said(error: BaseException) -> str:
    # What torch says first is how to load the file unsafely.
    if match := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it asks for {match[1]}"
    if "Weights only load failed" in str(error):
        return "it holds more than that"
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


class _ArraysOnly(pickle._Unpickler):
    """Admits NumPy arrays; containers, numbers and strings need no admission.

    The unpickler in Python, whose memo is a dict: in C it is an array, of as many gigabytes as four
    bytes of a file ask for.
    """

    ADMITTED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # Where NumPy 2 keeps it; the old name warns.
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
