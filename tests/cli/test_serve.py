"""Starting the server: flags, and what stops the start."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from planes import random_plane
from servers import command
from steering_planes import PlaneError
from steering_server.engine.plugin import enable_everywhere
from steering_server.engine.settings import Settings, SettingsError

TENSORS = "steering_plane.safetensors"


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our flags name the plugin in it; it is restored."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")


def configure(model: Path, *flags: str) -> Any:
    """vLLM's configuration, made as `steering serve MODEL FLAGS` makes it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(model), "--enforce-eager", *flags])
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


@pytest.fixture
def plane(tmp_path: Path) -> Path:
    return random_plane(tmp_path / "mood", ["3.mlp_in", "1.attn_in"])


def test_flags_settle_planes_digests_and_sites(smollm2: Path, plane: Path) -> None:
    flags = ["--steering-plane", f"a={plane}", "--steering-plane", str(plane)]
    settings = Settings.of(configure(smollm2, *flags, "--steering-max-planes", "2"))
    assert settings.planes == {"a": str(plane), "mood": str(plane)}
    assert settings.sites == ("1.attn_in", "3.mlp_in")
    assert settings.max_planes == 2
    assert settings.digests["a"] == settings.digests["mood"]


def test_an_api_server_without_the_plugin_yet_reads_the_same(smollm2: Path, plane: Path) -> None:
    """vLLM's further API servers read the pickled arguments before a plugin is loaded."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--steering-plane", f"a={plane}", "--steering-kernels", "torch"]
    args = parser.parse_args(["--model", str(smollm2), *flags])
    here = AsyncEngineArgs.from_cli_args(args)
    assert here.additional_config == {"steering": {"planes": {"a": str(plane)}, "kernels": "torch"}}
    sent = pickle.loads(pickle.dumps(args))
    unpatched = AsyncEngineArgs.from_cli_args.__func__.__wrapped__
    assert unpatched(AsyncEngineArgs, sent).additional_config == here.additional_config
    # Nor are there two places of steering to those that have it.
    assert AsyncEngineArgs.from_cli_args(sent).additional_config == here.additional_config


def test_what_is_parsed_is_settled_for_whoever_is_sent_it(smollm2: Path, plane: Path) -> None:
    """vLLM's supervisor of data-parallel servers sends its arguments on as it parsed them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--steering-plane", f"a={plane}", "--steering-default", "a@9", "--steering-required"]
    args = parser.parse_args(["--model", str(smollm2), *flags])
    section = {"planes": {"a": str(plane)}, "default": "a@9", "required": True}
    unpatched = AsyncEngineArgs.from_cli_args.__func__.__wrapped__
    sent = unpatched(AsyncEngineArgs, pickle.loads(pickle.dumps(args)))
    assert sent.additional_config == {"steering": section}
    assert "steering" in os.environ["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--steering-default", "a@x"], "an angle in degrees"),
        (["--steering-default", "b@9"], "no such plane"),
        (["--steering-preset", "calm=a@400"], "between -360 and 360"),
        (["--steering-preset", "calm"], "NAME=WORDS"),
        (["--steering-preset", "calm=a@1", "--steering-preset", "calm=a@2"], "already taken"),
    ],
)
def test_words_that_no_request_could_say_stop_the_start(
    smollm2: Path, plane: Path, flags: list[str], rule: str
) -> None:
    with pytest.raises(SettingsError, match=rule):
        configure(smollm2, "--steering-plane", f"a={plane}", *flags)


def test_a_default_without_a_plane_stops_the_start(smollm2: Path) -> None:
    with pytest.raises(SettingsError, match="needs a plane"):
        configure(smollm2, "--steering-required")


def test_sites_are_part_of_the_compile_caches_key(smollm2: Path, tmp_path: Path) -> None:
    hashes = [
        configure(smollm2, "--steering-plane", f"p={path}").compute_hash()
        for path in (
            random_plane(tmp_path / "one", ["3.mlp_in"]),
            random_plane(tmp_path / "two", ["4.mlp_in"]),
        )
    ]
    assert hashes[0] != hashes[1]


def test_without_planes_vllms_configuration_is_untouched(smollm2: Path) -> None:
    assert configure(smollm2).additional_config == {}


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A damage to the tensors, with the header's metadata left as it is."""

    def damage(plane: Path) -> None:
        from safetensors import safe_open

        file = plane / TENSORS
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=metadata)

    return damage


def spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda p: (p / TENSORS).unlink(), "file"),
    "truncated": (lambda p: os.truncate(p / TENSORS, 900), "safetensors"),
    "non-orthonormal": (rewrite(spoil(0.9)), "orthonormal"),
    "NaN": (rewrite(spoil(float("nan"))), "finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_plane_stops_the_start(smollm2: Path, plane: Path, name: str) -> None:
    damage, rule = DAMAGES[name]
    damage(plane)
    with pytest.raises(PlaneError, match=rule) as caught:
        configure(smollm2, "--steering-plane", f"mood={plane}")
    assert str(plane) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"hidden_size": 512}, "hidden_size=576: must be 512"),
        ({"num_layers": 24}, "num_layers=30: must be 24"),
        ({"model_type": "qwen2"}, "model_type=llama: must be 'qwen2'"),
        ({"base_model_name_or_path": "org/Other-Instruct"}, "must be 'org/Other-Instruct'"),
    ],
)
def test_a_plane_of_another_model_stops_the_start(
    smollm2: Path, tmp_path: Path, config: dict[str, Any], rule: str
) -> None:
    plane = random_plane(tmp_path / "mood", ["3.mlp_in"], **config)
    with pytest.raises(PlaneError, match=rule):
        configure(smollm2, "--steering-plane", f"mood={plane}")


def test_a_mismatch_of_names_can_be_allowed(smollm2: Path, tmp_path: Path) -> None:
    plane = random_plane(tmp_path / "mood", ["3.mlp_in"], base_model_name_or_path="org/Other")
    configure(smollm2, "--steering-plane", f"mood={plane}", "--steering-allow-model-mismatch")


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--steering-plane", "mood="], "must be NAME=PATH or PATH"),
        (["--steering-plane", "a={plane}", "--steering-plane", "a={plane}"], "already taken"),
        (["--steering-plane", "a={plane}", "--steering-max-planes", "0"], "max_planes = 0"),
        (
            ["--steering-plane", "a={plane}", "--additional-config", '{"steering": {}}'],
            "not both",
        ),
        (["--additional-config", '{"steering": {"plane": 3}}'], "steering.plane = 3"),
    ],
)
def test_settings_that_make_no_sense_stop_the_start(
    smollm2: Path, plane: Path, flags: list[str], rule: str
) -> None:
    with pytest.raises(SettingsError, match=rule):
        configure(smollm2, *(flag.replace("{plane}", str(plane)) for flag in flags))


def test_what_bypasses_admission_stops_the_start(
    smollm2: Path, plane: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SettingsError, match="VLLM_USE_RUST_FRONTEND"):
        configure(smollm2, "--steering-plane", str(plane))


def test_the_command_says_it_in_one_line(smollm2: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [command("steering"), "serve", str(smollm2), "--steering-plane", f"x={tmp_path / 'no'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("steering: error: ")
    assert str(tmp_path / "no") in last
    assert "Traceback" not in run.stderr


def test_every_flag_of_vllm_is_there() -> None:
    run = subprocess.run(
        [command("steering"), "serve", "--help=all"], capture_output=True, text=True, check=True
    )
    for flag in ("--tensor-parallel-size", "--api-key", "--data-parallel-size", "--steering-plane"):
        assert flag in run.stdout


@pytest.mark.parametrize(
    ("before", "expected"),
    [("", {"steering"}), ("mine", {"mine", "steering"}), ("steering", {"steering"})],
)
def test_the_plugin_joins_those_named(
    monkeypatch: pytest.MonkeyPatch, before: str, expected: set[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    enable_everywhere()
    assert set(os.environ["VLLM_PLUGINS"].split(",")) == expected


def test_plugins_that_were_on_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import entry_points

    monkeypatch.setenv("VLLM_PLUGINS", "")  # So that it is restored, whatever it was.
    monkeypatch.delenv("VLLM_PLUGINS")
    enable_everywhere()
    general = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert general <= set(os.environ["VLLM_PLUGINS"].split(","))
