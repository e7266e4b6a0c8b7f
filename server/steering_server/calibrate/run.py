"""From a contrast to a plane.

plane = calibrate("org/model", read_contrast("mood.json"), name="mood").plane
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steering_planes import Extraction, Plane
from steering_planes.artifact import Mode
from steering_planes.calibration import (
    Activations,
    Calibration,
    CalibrationError,
    NothingSelectedError,
    Options,
    separation,
)
from steering_planes.calibration import calibrate as find_plane
from steering_planes.contrast import Contrast
from steering_server.calibrate.chat import Chat
from steering_server.calibrate.record import Progress, Token, record

HELD_OUT = 5
"""Every fifth example of each class is held out where separation is measured."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Both classes' activations, and what was found in them: what a report is made of."""

    name: str
    extraction: Extraction
    calibration: Calibration
    positive: Activations
    negative: Activations


@dataclass(frozen=True, eq=False)
class Calibrated(Measured):
    """A plane, how it was found, and what it was found from."""

    plane: Plane


class NoPlaneError(CalibrationError):
    """No site discriminates; `measured` says why."""

    def __init__(self, said: str, measured: Measured) -> None:
        super().__init__(said)
        self.measured = measured


def calibrate(
    model: str,
    contrast: Contrast,
    *,
    name: str,
    options: Options | None = None,
    chat: Chat | None = None,
    token: Token = "last",
    base_model: str | None = None,
    revision: str | None = None,
    default_mode: Mode = "rotate_by",
    default_angle: float | None = None,
    gate: float | None = None,
    engine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Find the plane that separates a contrast's two classes (METHOD: Selective Steering, 3).

    The plane comes from all examples. How well each site separates the classes is measured on
    every fifth example, with directions from the others, and kept as the site's ``auroc``.

    Args:
        model: a folder or a repository that vLLM can load.
        contrast: the two classes.
        name: the plane's.
        options: how to calibrate; the published method unless given.
        chat: how conversations become text; by the tokenizer's template unless given.
        token: which token of an example counts.
        base_model: the model's public name; the folder's or the repository's unless given.
        revision: the model's.
        default_mode: of requests that name none.
        default_angle: degrees, of requests that name the plane alone.
        gate: only tokens with c1 above it are steered, unless a request says otherwise.
        engine: more arguments of ``vllm.LLM`` (dtype, tensor_parallel_size, quantization, …).
        progress: told how far it is.

    Raises:
        CalibrationError: activations that give no plane; NoPlaneError where no site discriminates.
        ContrastError: an example that the model does not take, naming file and line.
    """
    options = options or Options()
    recorded = record(
        model,
        contrast,
        chat=chat,
        token=token,
        sites=options.sites,
        engine={"revision": revision, **(engine or {})},
        progress=progress,
    )
    sides = recorded.positive, recorded.negative
    extraction = Extraction(
        method=str(options) + ("" if token == "last" else f", token {token}"),
        data=", ".join(
            (*(f"{file.name} sha256:{_sha256(file)}" for file in contrast.files), *contrast.changes)
        ),
        n=min(len(contrast.positive), len(contrast.negative)),
        seed=contrast.seed if options.direction != "random" else options.seed,
        chat_template_sha256=recorded.chat_template_sha256,
    )
    separated = separation(*sides, options, HELD_OUT)
    try:
        calibration = find_plane(*sides, options).with_separation(separated)
    except NothingSelectedError as error:
        found = error.calibration.with_separation(separated)
        raise NoPlaneError(str(error), Measured(name, extraction, found, *sides)) from None
    folder = Path(model)
    plane = calibration.to_plane(
        name=name,
        base_model_name_or_path=base_model or (folder.resolve().name if folder.is_dir() else model),
        revision=revision,
        model_type=recorded.model_type,
        num_layers=recorded.num_layers,
        default_mode=default_mode,
        default_angle=default_angle,
        gate=gate,
        extraction=extraction,
        fingerprint=recorded.fingerprint,
    )
    return Calibrated(name, extraction, calibration, *sides, plane)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
