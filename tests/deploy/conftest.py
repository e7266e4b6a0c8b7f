"""The scripts of deploy/, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"deploy_{name}", REPOSITORY / "deploy" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load() -> ModuleType:
    """deploy/load.py"""
    return script("load")


@pytest.fixture(scope="session")
def demo() -> ModuleType:
    """deploy/demo.py"""
    return script("demo")
