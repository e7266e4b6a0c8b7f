"""From flags to vLLM's configuration: what is steered is settled before any process starts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.usage.usage_lib import UsageContext

from steering_planes import open_plane
from steering_server.engine import kv_connectors, patches
from steering_server.engine.plugin import enable_everywhere
from steering_server.engine.settings import SECTION, Settings, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger(f"vllm.{__name__}")

FLAGS = (
    "steering_plane",
    "steering_max_planes",
    "steering_allow_model_mismatch",
    "steering_kernels",
    "steering_norms",
    "steering_skip_proof",
    "steering_default",
    "steering_required",
    "steering_preset",
)


_TAKES_REQUESTS = (UsageContext.OPENAI_API_SERVER, UsageContext.OPENAI_BATCH_RUNNER)


def add_cli_args(original: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's engine flags, and ours in a group of their own."""
    parser = original(parser, *args, **kwargs)
    parse = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        # At once: some ways of vLLM to start servers send the arguments on as they were parsed, to
        # processes that read them before a plugin is loaded.
        namespace, rest = parse(*args, **kwargs)
        _fold(namespace)
        return namespace, rest

    parser.parse_known_args = parse_known_args
    group = parser.add_argument_group(
        "steering", "Turning, moving and limiting activations in a plane, as each request asks."
    )
    group.add_argument(
        "--steering-plane",
        action="append",
        metavar="[NAME=]PATH",
        help="A plane that requests may name: a folder with steering_config.json and "
        "steering_plane.safetensors, or hf://organisation/repository[@revision]. The name "
        "defaults to the plane's own. May be repeated.",
    )
    group.add_argument(
        "--steering-max-planes",
        type=int,
        metavar="N",
        help="How many planes one request may combine (default: 1).",
    )
    group.add_argument(
        "--steering-allow-model-mismatch",
        action="store_true",
        help="Accept a plane that was made for another model of the same shape.",
    )
    group.add_argument(
        "--steering-kernels",
        choices=["auto", "triton", "torch"],
        help="What steers: Triton's kernels or plain torch in the model's graph (default: the "
        "faster one on this device).",
    )
    group.add_argument(
        "--steering-norms",
        choices=["auto", "fused", "kept"],
        help="What selected sites have: our norm, which steers in the same pass, or vLLM's own, "
        "whose output is then steered (default: ours, but vLLM's where it fuses norms with the "
        "all-reduce before them, and for plain torch that is not compiled).",
    )
    group.add_argument(
        "--steering-skip-proof",
        action="store_true",
        help="Start without the proof that each site steers, which costs some forward passes.",
    )
    group.add_argument(
        "--steering-default",
        metavar="WORDS",
        help="What steers a request that says nothing of it, as in sentiment@90 or "
        "sentiment@0,add,strength=0.5,generated+style@45 (default: nothing does).",
    )
    group.add_argument(
        "--steering-required",
        action="store_true",
        help="Refuse, with a 400, a request that would be answered unsteered.",
    )
    group.add_argument(
        "--steering-preset",
        action="append",
        metavar="NAME=WORDS",
        help="A model id that stands for a steering, as in cheerful=sentiment@0; listed in "
        "/v1/models. May be repeated.",
    )
    return parser


def _fold(args: argparse.Namespace) -> None:
    """Our flags, into ``additional_config``, which vLLM hands on to every process it starts.

    Raises:
        SettingsError: a flag that does not parse, or steering given in two places.
    """
    section: dict[str, Any] = {}
    if planes := getattr(args, "steering_plane", None):
        section["planes"] = _named(planes)
    if (max_planes := getattr(args, "steering_max_planes", None)) is not None:
        section["max_planes"] = max_planes
    for flag in ("allow_model_mismatch", "skip_proof", "required"):
        if getattr(args, f"steering_{flag}", False):
            section[flag] = True
    for flag in ("kernels", "norms", "default"):
        if (value := getattr(args, f"steering_{flag}", None)) is not None:
            section[flag] = value
    if presets := getattr(args, "steering_preset", None):
        section["presets"] = _presets(presets)
    if not section:
        return
    given = getattr(args, "additional_config", None) or {}
    if SECTION in given:
        raise SettingsError(
            f"give --steering-* flags or additional_config.{SECTION}, not both: flags set "
            f"{', '.join(section)}"
        )
    args.additional_config = {**given, SECTION: section}
    for flag in FLAGS:
        setattr(args, flag, None)
    # For the processes that are started from here, whatever they load first.
    enable_everywhere()


def from_cli_args(
    original: Callable[..., EngineArgs], cls: type[EngineArgs], args: argparse.Namespace
) -> EngineArgs:
    """vLLM's engine arguments, with our flags in ``additional_config``.

    Raises:
        SettingsError: see :func:`_fold`.
    """
    _fold(args)
    return original(cls, args)


def _named(flags: list[str]) -> dict[str, str]:
    planes: dict[str, str] = {}
    for flag in flags:
        name, equals, path = flag.partition("=")
        if not equals:
            name, path = "", flag
        if not path:
            raise SettingsError(f"--steering-plane {flag!r}: must be NAME=PATH or PATH")
        name = name or open_plane(path).name
        if name in planes:
            raise SettingsError(f"--steering-plane {flag!r}: the name {name!r} is already taken")
        planes[name] = path
    return planes


def _presets(flags: list[str]) -> dict[str, str]:
    presets: dict[str, str] = {}
    for flag in flags:
        name, _, words = flag.partition("=")
        if not name or not words:
            raise SettingsError(f"--steering-preset {flag!r}: must be NAME=WORDS")
        if name in presets:
            raise SettingsError(f"--steering-preset {flag!r}: the name {name!r} is already taken")
        presets[name] = words
    return presets


def create_engine_config(
    original: Callable[..., VllmConfig], engine_args: EngineArgs, *args: Any, **kwargs: Any
) -> VllmConfig:
    """vLLM's configuration, with the steering in it checked against the model and resolved.

    Raises:
        PlaneError: a plane that is missing, broken or made for another model.
        SettingsError: settings that do not parse, kernels that cannot run on this device, or a
            feature that steering cannot work under.
    """
    vllm_config = original(engine_args, *args, **kwargs)
    settings = Settings.of(vllm_config)
    settings.admission()
    if not settings.planes:
        return vllm_config
    refuse_unsupported(vllm_config)
    planes = settings.load_planes()
    model = vllm_config.model_config
    text = model.hf_text_config
    for plane in planes.values():
        plane.check_model(
            hidden_size=model.get_hidden_size(),
            num_layers=text.num_hidden_layers,
            model_type=text.model_type,
            name_or_path=model.model,
            allow_mismatch=settings.allow_model_mismatch,
        )
        if plane.config.fingerprint is None:
            logger.info(
                "Plane %s has no fingerprint of its base model's weights: it goes by the name %s",
                plane.name,
                plane.config.base_model_name_or_path,
            )
    usage = kwargs.get("usage_context", args[0] if args else None)
    if usage in _TAKES_REQUESTS:
        # Whatever command started this server: its routes must know the fields.
        enable_everywhere()
        patches.apply_front_end()
    device = torch.device(vllm_config.device_config.device_type)
    compilation = vllm_config.compilation_config
    resolved = settings.resolved(
        planes,
        device,
        compiled=compilation.mode != CompilationMode.NONE,
        all_reduce_fused=bool(compilation.pass_config.fuse_allreduce_rms),
    )
    vllm_config.additional_config = {
        **vllm_config.additional_config,
        SECTION: resolved.model_dump(mode="json"),
    }
    return vllm_config


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Stop under what would reorder or split a step's tokens, mix KV up, or bypass admission.

    Raises:
        SettingsError: naming every such setting.
    """
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    problems = [
        f"{name} ({why})"
        for name, why, on in (
            (
                "VLLM_USE_RUST_FRONTEND=1",
                "it replaces the API server that admits steering",
                envs.VLLM_USE_RUST_FRONTEND,
            ),
            (
                "--enable-dbo, --ubatch-size",
                "microbatching runs a step's tokens in parts",
                parallel.use_ubatching,
            ),
            (
                "--prefill-context-parallel-size",
                "it deals a prompt's tokens out to several workers",
                parallel.prefill_context_parallel_size > 1,
            ),
            (
                "--enable-expert-parallel with tensor and data parallelism",
                "sequence-parallel experts let a layer see a part of a step's tokens",
                parallel.use_sequence_parallel_moe,
            ),
            (
                "--kv-sharing-fast-prefill",
                "layers that share KV see a part of a step's tokens, and would steer others",
                vllm_config.cache_config.kv_sharing_fast_prefill,
            ),
            (
                "--speculative-config enable_adaptive_verification",
                "which drafts are verified is decided on the device, after the step is laid out",
                speculative is not None and speculative.enable_adaptive_verification,
            ),
            (
                "--runner pooling",
                "it generates nothing that a request could steer",
                vllm_config.model_config.runner_type == "pooling",
            ),
        )
        if on
    ]
    problems += [
        f"KV connector {name} ({why}; start without it or without planes)"
        for name, why in kv_connectors.refused(vllm_config.kv_transfer_config)
    ]
    if problems:
        raise SettingsError(f"steering cannot work with {'; '.join(problems)}")
