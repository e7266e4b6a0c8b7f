"""Steering in a worker: wired to the model and the model runner once the weights are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.logger import init_logger

from steering_planes import Plane, PlaneError, Site, find_sites, fingerprint
from steering_server.engine import patches
from steering_server.engine.bank import Bank
from steering_server.engine.retype import retype
from steering_server.engine.rows import Rows
from steering_server.engine.settings import Settings, SettingsError
from steering_server.engine.sites import wire
from steering_server.request.operation import Operation, admitted

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Wiring:
    """What steers in one worker.

    Attributes:
        bank: the planes.
        rows: what every token of a step carries.
        norms: the steered norms, by site.
        layers: the model's layers that this process has.
    """

    bank: Bank
    rows: Rows
    norms: Mapping[Site, nn.Module]
    layers: range


def steered_runner_v1(runner_class: Any) -> type:
    """A V1 model runner that writes its steps' rows. Places are indices of its batch."""

    class SteeredRunner(runner_class):  # type: ignore[misc]
        steering: Rows
        _steering_order: list[str]

        def _prepare_inputs(
            self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
        ) -> Any:
            # Called after _update_states, with the batch of this very step: a request's first
            # step is in it, and vLLM has waited for the last step's host buffers.
            order = self.input_batch.req_ids
            # A known id is among the new requests when a streaming input replaces its prompt.
            new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
            if new or order != self._steering_order:
                before = itertools.chain(self._steering_order, itertools.repeat(None))
                for place, (req_id, was) in enumerate(zip(order, before, strict=False)):
                    if req_id != was or req_id in new:
                        request = self.requests[req_id]
                        operations = _operations(request.sampling_params)
                        self.steering.put(place, operations, request.num_prompt_tokens)
                self._steering_order = list(order)
            n = len(order)
            computed = self.input_batch.num_computed_tokens_cpu[:n]
            if not self.use_async_spec_decode:
                self.steering.write(np.arange(n), num_scheduled_tokens, computed)
                return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
            # Only the device knows how many drafts were accepted, once super() has told it.
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
            self.steering.write(np.arange(n), num_scheduled_tokens, computed, self.positions)
            return prepared

    return SteeredRunner


def steered_model_state(state_class: Any) -> type:
    """A V2 model state that writes its steps' rows. Places are the runner's request indices."""

    class SteeredModelState(state_class):  # type: ignore[misc]
        steering: Rows
        steering_by_device: bool

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            operations = _operations(new_req_data.sampling_params)
            self.steering.put(req_index, operations, new_req_data.prompt_len)
            super().add_request(req_index, new_req_data)

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> Any:
            # Dummy batches (warm-up, idle data-parallel ranks) run with the rows that are there.
            if input_batch.req_ids[0] in req_states.req_id_to_index:
                scheduled = input_batch.num_scheduled_tokens
                if input_batch.num_tokens != int(scheduled.sum()):
                    raise RuntimeError(
                        f"{input_batch.num_tokens} tokens in a batch that schedules "
                        f"{scheduled.sum()}: whose each one is cannot be told"
                    )
                self.steering.write(
                    input_batch.idx_mapping_np,
                    scheduled,
                    input_batch.num_computed_tokens_np,
                    # With drafts in flight only the device knows how many were accepted.
                    input_batch.positions if self.steering_by_device else None,
                )
            return super().prepare_inputs(input_batch, req_states)

    return SteeredModelState


def _operations(params: SamplingParams | None) -> tuple[Operation, ...]:
    return () if params is None else admitted(params.extra_args)


def sites_here(asked: Iterable[Site], norms: Collection[Site], layers: range) -> list[Site]:
    """Those of the sites asked for that this process holds.

    Args:
        asked: the sites of all planes.
        norms: the sites of the model in this process, numbered as in the whole model.
        layers: the layers of this process: a stage of a pipeline has only its own.

    Raises:
        SettingsError: naming each site that should be here and is not.
    """
    here = [site for site in asked if site.layer in layers]
    if missing := [str(site) for site in here if site not in norms]:
        raise SettingsError(
            f"no site {', '.join(missing)} in the model's layers {layers.start} to "
            f"{layers.stop - 1}; their sites have the roles "
            f"{', '.join(sorted({site.role for site in norms}))}"
        )
    return here


def check_weights(
    planes: Iterable[Plane],
    norms: Mapping[Site, nn.Module],
    dtype: torch.dtype,
    allow_mismatch: bool,
) -> None:
    """Compare the gains that were loaded with those that each plane was made for.

    Raises:
        PlaneError: see :meth:`Plane.check_weights`; a warning if a mismatch is allowed.
    """
    served = fingerprint.of(norms)
    for plane in planes:
        try:
            plane.check_weights(served, dtype)
        except PlaneError as error:
            if not allow_mismatch:
                raise
            logger.warning("%s", error)


def load_model(original: Callable[..., None], worker: Any, *args: Any, **kwargs: Any) -> None:
    """A worker's ``load_model``, and then the wiring, before anything is traced or captured.

    The worker keeps a :class:`Wiring` as ``worker.steering``.

    Raises:
        PlaneError: a plane whose base model's norms are others than the loaded model's.
        SettingsError: the model lacks a site that a plane selects.
    """
    original(worker, *args, **kwargs)
    settings = Settings.of(worker.vllm_config)
    if not settings.planes:
        return
    runner = worker.model_runner
    model_config = worker.vllm_config.model_config
    norms = find_sites(runner.get_model(), model_config.hf_text_config.num_hidden_layers)
    planes = settings.load_planes()
    check_weights(planes.values(), norms, model_config.dtype, settings.allow_model_mismatch)
    layers = range(*model_config.get_layers_start_end_indices(worker.vllm_config.parallel_config))
    here = sites_here(settings.parsed_sites(), norms, layers)
    bank = Bank(planes.values(), here, worker.device)
    scheduler = worker.vllm_config.scheduler_config
    rows = Rows(
        max_requests=scheduler.max_num_seqs,
        max_tokens=runner.max_num_tokens,
        max_planes=settings.max_planes,
        bank=bank,
        device=worker.device,
    )
    choice = settings.kernels_on(worker.device)
    if choice.kernels == "torch":
        patches.apply_compiler()
    fuse = settings.chosen_norms == "fused"
    for site in here:
        wire(norms[site], bank.bases[site], bank.classes[site], rows.tokens, choice.kernels, fuse)
    if worker.use_v2_model_runner:
        retype(runner.model_state, steered_model_state)
        runner.model_state.steering = rows
        runner.model_state.steering_by_device = (
            scheduler.async_scheduling and worker.vllm_config.speculative_config is not None
        )
    else:
        retype(runner, steered_runner_v1)
        runner.steering = rows
        runner._steering_order = []
    worker.steering = Wiring(bank, rows, {site: norms[site] for site in here}, layers)
    logger.info(
        "Steering %d site(s) with plane(s) %s on %s kernels (%s), norms %s: %s",
        len(here),
        ", ".join(settings.planes),
        choice.kernels,
        choice.why,
        settings.chosen_norms,
        " ".join(map(str, here)),
    )
