"""`steering import` and `steering inspect`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planes import random_plane
from steering_planes import Plane, Site
from steering_server.cli.main import main

REPOSITORY = Path(__file__).parents[2]
TOLD = ("--model-type", "qwen2", "--num-layers", "2")


@pytest.fixture
def steering(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `steering …`; gives exit status and output."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["/bin/steering", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        said = [*capsys.readouterr(), code if isinstance(code, str) else ""]
        return code if isinstance(code, int) else 1, "".join(said)

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of Angular Steering's: a basis at each norm of two layers."""
    rng = np.random.default_rng(0)
    directions = {
        f"model.layers.{layer}.{norm}": {
            key: rng.normal(size=16) for key in ("first_direction", "second_direction")
        }
        for layer in range(2)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    file = tmp_path / "refusal.npy"
    np.save(file, np.array(directions, dtype=object), allow_pickle=True)
    return file


def test_a_published_plane_is_brought_in(
    steering: Callable[..., tuple[int, str]], source: Path, tmp_path: Path
) -> None:
    words = ("import", source, "-o", tmp_path / "refusal", "--sites", "0.mlp_in,1.attn_in")
    told = ("--base-model", "Qwen/Qwen2.5-7B-Instruct", *TOLD)
    status, said = steering(*words, *told)
    assert status == 0, said
    plane = Plane.load(tmp_path / "refusal")
    assert plane.sites == (Site(0, "mlp_in"), Site(1, "attn_in"))
    assert (plane.config.model_type, plane.config.num_layers) == ("qwen2", 2)
    status, said = steering(*words, *told)
    assert status == 1
    assert "never written over another unasked" in said


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ((), "the source names no model: give --base-model"),
        (("--base-model", "org/llama"), "no folder with a config.json and not in the Hub's cache"),
        (("--base-model", "m", *TOLD, "--sites", "7.mlp_in"), "layer 7, mlp_in is not among 0-1"),
        (("--base-model", "m", *TOLD, "--sites", "x"), "sites are written all, 7, 12-20 or"),
        (("--residual-rms", "0"), "must be above 0"),
        (("--row", "-1"), "--row"),
    ],
)
def test_what_is_missing_is_named(
    steering: Callable[..., tuple[int, str]],
    source: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    rule: str,
) -> None:
    sites = () if "--sites" in more else ("--sites", "0.mlp_in")
    status, said = steering("import", source, "-o", tmp_path / "refusal", *sites, *more)
    assert status != 0
    assert rule in said
    assert not (tmp_path / "refusal").exists()


def test_inspect_says_what_a_plane_is(
    steering: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = random_plane(tmp_path / "mood", ["3.mlp_in", "20.attn_in"])
    status, said = steering("inspect", path)
    assert status == 0
    plane = Plane.load(path)
    for word in (
        plane.digest,
        "HuggingFaceTB/SmolLM2-135M-Instruct (llama, 30 layers, hidden size 576)",
        "2 sites in 2 layers: 3.mlp_in 20.attn_in",
        "yes: finite, orthonormal to",
        "rotate_by, rotate_to, add, ablate, cap",
    ):
        assert word in said
    assert "class means" not in said


def test_inspect_says_why_a_plane_takes_fewer_operations(
    steering: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = random_plane(tmp_path / "mood", ["3.mlp_in"], format_version=1)
    status, said = steering("inspect", path)
    assert status == 0
    why = "made without class means; calibrate it again for add and cap"
    assert f"rotate_by, rotate_to, ablate ({why})" in said
    assert "rho" not in said


def test_inspect_gives_each_sites_numbers(
    steering: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """rho of the sites that are steered, beside the statistics of all that were measured."""
    statistics = {"2.mlp_in": {"auroc": 0.5}, "3.mlp_in": {"auroc": 0.875}}
    path = random_plane(tmp_path / "mood", ["3.mlp_in", "20.attn_in"], statistics=statistics)
    means = Plane.load(path).means
    assert means is not None
    status, said = steering("inspect", path)
    assert status == 0
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in said.splitlines()]
    first, second = (f"{means[Site.parse(s)].rho:.4f}" for s in ("3.mlp_in", "20.attn_in"))
    for row in (
        ["site", "steered", "auroc", "rho"],
        ["2.mlp_in", "0.5000"],
        ["3.mlp_in", "yes", "0.8750", first],
        ["20.attn_in", "yes", second],
    ):
        assert row in rows


def test_inspect_knows_the_bundled_planes(steering: Callable[..., tuple[int, str]]) -> None:
    status, said = steering("inspect", "smollm2-135m-instruct/sentiment")
    assert status == 0
    bundled = REPOSITORY / "steering_vectors/smollm2-135m-instruct/sentiment"
    assert Plane.load(bundled).digest in said


def test_inspect_refuses_a_plane_that_is_not_sound(
    steering: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = random_plane(tmp_path / "mood", ["3.mlp_in"])
    (path / "steering_plane.safetensors").write_bytes(b"x")
    for location in (path, tmp_path / "none", "hf://nowhere"):
        status, said = steering("inspect", location)
        assert status == 1
        assert said.startswith("steering: error: ")


def documented() -> list[str]:
    text = (REPOSITORY / "docs/formats.md").read_text()
    return re.findall(r"`(steering import [^`]+)`", text)


@pytest.mark.parametrize("command", documented())
def test_a_documented_command_is_understood(
    steering: Callable[..., tuple[int, str]],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of its file nothing is there; every option is."""
    monkeypatch.chdir(tmp_path)
    status, said = steering(*command.removeprefix("steering ").split())
    assert status == 1
    assert re.search(r"steering: error: \S+: file=\S+: no such file", said), said


def test_every_layout_is_documented() -> None:
    from steering_planes.formats import LAYOUTS

    text = (REPOSITORY / "docs/formats.md").read_text()
    for layout in LAYOUTS:
        assert layout.whose.partition(",")[0] in text, layout
    assert len(documented()) >= len(LAYOUTS)
