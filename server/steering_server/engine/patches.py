"""THE ledger: every place of vLLM, and of what it stands on, that steering touches, why, and when
it can go."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


class PatchError(RuntimeError):
    """vLLM is not as the ledger says; steering on it could be silently wrong."""


@dataclass(frozen=True)
class Patch:
    """One function, wrapped.

    Attributes:
        target: ``module:function`` or ``module:Class.function``.
        wrapper: ``module:function``; called with the original before the arguments.
        parameters: the parameters that the wrapper relies on, in the original's order.
        why: what is needed there that no extension point gives.
        until: what would make it unnecessary.
    """

    target: str
    wrapper: str
    parameters: tuple[str, ...]
    why: str
    until: str


@dataclass(frozen=True)
class Override:
    """A method of vLLM that an object of ours overrides (see :mod:`.retype`), by its contract."""

    target: str
    by: str
    parameters: tuple[str, ...]
    why: str


PATCHES = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        wrapper="steering_server.engine.configuration:add_cli_args",
        parameters=("parser",),
        why="--steering-* flags, under `vllm serve` as under `steering serve`",
        until="plugins can register flags",
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.from_cli_args",
        wrapper="steering_server.engine.configuration:from_cli_args",
        parameters=("args",),
        why="the flags' values, into additional_config",
        until="plugins can register flags",
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        wrapper="steering_server.engine.configuration:create_engine_config",
        parameters=("self",),
        why="planes are checked against the model once, before any process starts, and their sites "
        "enter the compile cache's key",
        until="plugins can check and extend VllmConfig",
    ),
    Patch(
        target="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        wrapper="steering_server.engine.requests:process_inputs",
        parameters=("self", "request_id", "prompt", "params", "resumable"),
        why="admission on every route and in the offline LLM class",
        until="plugins can validate SamplingParams.extra_args",
    ),
    Patch(
        target="vllm.v1.engine.async_llm:AsyncLLM.generate",
        wrapper="steering_server.engine.requests:generate",
        parameters=("self", "prompt", "sampling_params"),
        why="steered requests and tokens are counted, with their outcome, on every route",
        until="stat loggers see a finished request's SamplingParams",
    ),
    Patch(
        target="vllm.v1.engine.parallel_sampling:ParentRequest._get_child_sampling_params",
        wrapper="steering_server.engine.requests:child_sampling_params",
        parameters=("self", "index"),
        why="each choice of an answer may have an angle of its own; vLLM gives all one set of "
        "parameters",
        until="choices can differ in their SamplingParams",
    ),
    Patch(
        target="vllm.sampling_params:SamplingParams._verify_greedy_sampling",
        wrapper="steering_server.engine.requests:verify_greedy_sampling",
        parameters=("self",),
        why="greedy choices that have an angle each are not the same answer n times",
        until="vLLM leaves n > 1 to the client",
    ),
    Patch(
        target="vllm.v1.core.kv_cache_utils:_gen_prompt_embeds_extra_hash_keys",
        wrapper="steering_server.engine.prefix_key:with_steering",
        parameters=("request", "start_token_idx", "end_token_idx"),
        why="the hash of a KV block covers its steering; this is the one part of the hash that "
        "is asked block by block, by every caller",
        until="requests can bring extra hash keys",
    ),
    Patch(
        target="vllm.v1.worker.gpu_worker:Worker.load_model",
        wrapper="steering_server.engine.runner:load_model",
        parameters=("self",),
        why="norms and runner are wired after the weights are loaded, before anything is traced",
        until="plugins are called when a model is loaded",
    ),
    Patch(
        target="vllm.v1.executor.abstract:Executor.compile_or_warm_up_model",
        wrapper="steering_server.engine.proof:compile_or_warm_up_model",
        parameters=("self",),
        why="each site is proved to steer once every graph is there, by the one process that sees "
        "all workers",
        until="plugins are called when an engine is ready",
    ),
)

FRONT_END = (
    Patch(
        target="starlette.requests:Request.json",
        wrapper="steering_server.http.bodies:read_json",
        parameters=("self",),
        why="every route of the app reads its JSON here, whatever model it then makes of it: no "
        "steering field is lost on any, and no body is held twice",
        until="vLLM's request models can be extended",
    ),
    Patch(
        target="starlette.requests:Request._get_form",
        wrapper="steering_server.http.bodies:read_form",
        parameters=("self",),
        why="likewise every route that takes a form",
        until="vLLM's request models can be extended",
    ),
    Patch(
        target="vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models",
        wrapper="steering_server.http.presets:show_available_models",
        parameters=("self",),
        why="presets are listed in /v1/models",
        until="plugins can serve model ids",
    ),
    Patch(
        target="vllm.entrypoints.launchers.api_server.app_state:init_endpoint_plugins_state",
        wrapper="steering_server.engine.roads:init_endpoint_plugins_state",
        parameters=("engine_client", "state", "args"),
        why="vLLM serves without an endpoint plugin that failed to load; and `vllm run-batch` has "
        "no app to plug into",
        until="endpoint plugins are required, and batches pass them",
    ),
)
"""Of the processes that take requests; workers need not import what these do."""

COMPILER = (
    Patch(
        target="torch._inductor.fx_utils:_is_fake_tensor_same",
        wrapper="steering_server.engine.compiling:is_fake_tensor_same",
        parameters=("new", "old", "existing_storages"),
        why="PyTorch 2.13 holds a tensor to be another than itself, and so takes the shapes of all "
        "that follows a region of a graph anew, twice a compilation: seconds of each start",
        until="PyTorch holds them to be the same",
    ),
)
"""Of workers that compile plain torch. They spare time and change nothing else, so a PyTorch that
is not as they say is left as it is."""

OVERRIDES = (
    Override(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs",
        by="steering_server.engine.runner:steered_runner_v1",
        parameters=("self", "scheduler_output", "num_scheduled_tokens"),
        why="V1: the rows of a step, from the batch that runs",
    ),
    Override(
        target="vllm.v1.worker.gpu.model_states.interface:ModelState.add_request",
        by="steering_server.engine.runner:steered_model_state",
        parameters=("self", "req_index", "new_req_data"),
        why="V2: sees each request's SamplingParams",
    ),
    Override(
        target="vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs",
        by="steering_server.engine.runner:steered_model_state",
        parameters=("self", "input_batch", "req_states"),
        why="V2: the rows of a step, also before a full CUDA graph is replayed",
    ),
)


def apply() -> None:
    """Apply the ledger to this process's vLLM. Applied already, it stays as it is.

    Raises:
        PatchError: a target that is missing, has lost a parameter, or is wrapped by other hands.
    """
    for entry in (*PATCHES, *OVERRIDES):
        check(entry)
    for patch in PATCHES:
        _wrap(patch)


def apply_front_end() -> None:
    """Apply :data:`FRONT_END`. Applied already, it stays as it is.

    Raises:
        PatchError: see :func:`apply`.
    """
    for patch in FRONT_END:
        check(patch)
    for patch in FRONT_END:
        _wrap(patch)


def apply_compiler() -> None:
    """Apply of :data:`COMPILER` what there is something for. Applied already, it stays as it is."""
    for patch in COMPILER:
        try:
            check(patch)
        except (PatchError, ModuleNotFoundError) as error:
            logger.debug("Not patched: %s", error)
        else:
            _wrap(patch)


def check(entry: Patch | Override) -> None:
    """Compare an entry with what is installed.

    Raises:
        PatchError: naming the target and what is missing.
    """
    _, _, function = _resolve(entry.target)
    names = list(inspect.signature(_plain(function)).parameters)
    absent = [name for name in entry.parameters if name not in names]
    if absent:
        raise PatchError(f"{entry.target}{inspect.signature(_plain(function))} lacks {absent}")


def _resolve(path: str) -> tuple[Any, str, Any]:
    """``module:a.b`` -> (owner, attribute name, raw attribute, descriptors unopened)."""
    module, _, qualname = path.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = qualname.split(".")
    for part in outer:
        owner = getattr(owner, part, None)
    if owner is None or name not in vars(owner):
        raise PatchError(f"{path} does not exist")
    return owner, name, vars(owner)[name]


def _plain(attribute: Any) -> Callable[..., Any]:
    is_wrapped = isinstance(attribute, staticmethod | classmethod)
    function: Callable[..., Any] = attribute.__func__ if is_wrapped else attribute
    return function


def _wrap(patch: Patch) -> None:
    owner, name, attribute = _resolve(patch.target)
    original = _plain(attribute)
    if (by := getattr(original, "_steering_patch", None)) is not None:
        if by != patch:
            raise PatchError(f"{patch.target} is already patched for: {by.why}")
        return
    _, _, wrapper = _resolve(patch.wrapper)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._steering_patch = patch  # type: ignore[attr-defined]
    kind = type(attribute) if isinstance(attribute, staticmethod | classmethod) else None
    setattr(owner, name, kind(wrapped) if kind else wrapped)
    logger.debug("Patched %s: %s", patch.target, patch.why)
