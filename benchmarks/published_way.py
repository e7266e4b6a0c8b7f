"""Steering as the papers' code does it, to compare with: eager forward hooks, a matrix a layer.

Written afresh after their description: at each steered module's output, h is multiplied by a d-by-d
matrix I - P + B R(angle) B^T for one angle of the whole process.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from steering_planes import Plane, find_sites


def _worker_class() -> Any:
    if torch.cuda.is_available():
        from vllm.v1.worker.gpu_worker import Worker

        return Worker
    from vllm.v1.worker.cpu_worker import CPUWorker

    return CPUWorker


class HookedWorker(_worker_class()):  # type: ignore[misc]
    """vLLM's worker (``--worker-cls``), with every site of a plane hooked at one angle.

    The plane's folder and the angle in degrees are in the environment.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        plane = Plane.load(Path(os.environ["PUBLISHED_WAY_PLANE"]))
        degrees = float(os.environ["PUBLISHED_WAY_DEGREES"])
        model = self.model_runner.get_model()
        sites = find_sites(model, plane.config.num_layers)
        dtype = next(model.parameters()).dtype
        for site in plane.sites:
            matrix = rotation_matrix(plane.bases[site], degrees).to(dtype)
            sites[site].register_forward_hook(_hook(matrix))


def rotation_matrix(basis: torch.Tensor, degrees: float) -> torch.Tensor:
    """[d, d], for h as a row: the rotation within the plane of a basis [2, d]."""
    theta = math.radians(degrees)
    turn = torch.tensor(
        [[math.cos(theta), math.sin(theta)], [-math.sin(theta), math.cos(theta)]],
        dtype=torch.float64,
    )
    b = basis.double()
    return torch.eye(b.shape[1], dtype=torch.float64) + b.T @ (turn - torch.eye(2)) @ b


def _hook(matrix: torch.Tensor) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] @ matrix, *output[1:])
        return output @ matrix

    return hook
