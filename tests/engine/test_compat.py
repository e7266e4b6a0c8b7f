"""Another vLLM's source against the ledger."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from steering_server.engine import compat


@pytest.fixture(scope="module")
def installed() -> Path:
    import vllm

    return Path(vllm.__file__).parents[1]


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """The installed vLLM's Python files, to be changed at will."""
    shutil.copytree(
        installed / "vllm",
        tmp_path / "vllm",
        ignore=lambda _, names: [n for n in names if "." in n and not n.endswith(".py")],
    )
    return tmp_path


def test_the_installed_vllm_fits(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compat.problems(installed) == []
    assert compat.main([str(installed)]) == 0
    assert "0 problem(s)" in capsys.readouterr().out


def test_what_changed_is_named(copy: Path) -> None:
    def replace(file: str, old: str, new: str) -> None:
        path = copy / "vllm" / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    replace("v1/worker/gpu_worker.py", "def load_model(", "def load_the_model(")
    replace("v1/core/kv_cache_utils.py", "end_token_idx: int", "stop_token_idx: int")
    replace("exceptions.py", "class VLLMNotFoundError", "class NotFoundVLLMError")
    found = compat.problems(copy)
    assert [line.split()[0] for line in found] == [
        "vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys",
        "vllm.v1.worker.gpu_worker:Worker.load_model",
        "vllm.exceptions",
    ]
    assert "end_token_idx" in found[0]
    assert "VLLMNotFoundError" in found[2]


def test_a_folder_without_vllm_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no vllm/__init__\.py"):
        compat.problems(tmp_path)
