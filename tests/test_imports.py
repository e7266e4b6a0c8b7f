"""Imports go one way: planes <- kernels <- server."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {
    "steering_planes": (
        "steering_vectors",
        {"steering_kernels", "steering_server", "vllm", "triton"},
    ),
    "steering_kernels": ("kernels", {"steering_server", "vllm"}),
    "steering_server": ("server", set()),
}


def imported(file: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    folder, forbidden = PACKAGES[package]
    files = list((REPOSITORY / folder / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & forbidden, file


@pytest.mark.parametrize("folder", ["steering_vectors", "kernels", "server"])
def test_the_folders_are_no_packages(folder: str) -> None:
    """`import kernels` would hide another project's package of that name."""
    assert not (REPOSITORY / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", ["steering_planes", "steering_kernels"])
def test_the_lower_packages_do_not_load_vllm(package: str) -> None:
    code = f"import {package}, sys; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
