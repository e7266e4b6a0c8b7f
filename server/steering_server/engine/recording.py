"""Recording what calibration needs: an activation of each prompt at every site.

It is the last token's, or the mean over the tokens that the request names. It happens inside the
worker, where the model runs as it is served (any quantisation, tensor or pipeline parallel); what
leaves the worker is one row a prompt and site, never a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering_planes import Site, find_sites, fingerprint
from steering_server.engine.retype import retype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

WORKER_EXTENSION = "steering_server.engine.recording.RecordingWorker"
"""For vLLM's ``worker_extension_cls``."""


RECORDED = "recorded"
"""The key of ``SamplingParams.extra_args`` with a prompt's positions to be averaged: [from, to)."""


class Recording:
    """The activations that a worker has kept since they were last taken."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[int, int]] = {}
        self._counts: Counter[str] = Counter()
        self._read: Tensor = torch.zeros(0, dtype=torch.int64)
        self._places: Tensor = torch.zeros(0, dtype=torch.int64)
        self._parts: list[str] = []
        self._sums: dict[Site, list[Tensor]] = {}

    def expect(self, request: str, params: SamplingParams | None, prompt: int) -> None:
        """A request's prompt, as many tokens long, will be run."""
        span = (params.extra_args or {}).get(RECORDED) if params is not None else None
        self._spans[request] = (prompt - 1, prompt) if span is None else (span[0], span[1])

    def step(
        self, requests: Sequence[str], scheduled: NDArray[np.int32], computed: NDArray[np.int32]
    ) -> None:
        """What the next forward pass runs: [n] each, in the order of the batch.

        Args:
            requests: ids, all of them expected.
            scheduled: tokens of each request in this step.
            computed: tokens of each before this step.
        """
        starts = np.cumsum(scheduled) - scheduled
        rows: list[int] = []
        places: list[int] = []
        here: list[str] = []
        for request, start, count, before in zip(
            requests, starts.tolist(), scheduled.tolist(), computed.tolist(), strict=True
        ):
            # A prompt may come in several chunks, each with a part of the span.
            low, high = self._spans[request]
            if tokens := range(max(low, before), min(high, before + count)):
                rows += [start + position - before for position in tokens]
                places += [len(here)] * len(tokens)
                here.append(request)
                self._counts[request] += len(tokens)
        self._read = torch.tensor(rows, dtype=torch.int64)
        self._places = torch.tensor(places, dtype=torch.int64)
        self._parts += here

    def watch(self, site: Site, norm: nn.Module) -> None:
        """Keep the sums of ``norm``'s output over each step's rows, one a request."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            normed = output[0] if isinstance(output, tuple) else output
            if len(self._read):
                tokens = normed.reshape(-1, normed.shape[-1])  # [T, d]
                rows = tokens[self._read.to(tokens.device)].double()
                sums = rows.new_zeros(int(self._places[-1]) + 1, rows.shape[1])
                sums.index_add_(0, self._places.to(tokens.device), rows)
                self._sums.setdefault(site, []).append(sums.cpu())

        norm.register_forward_hook(hook)

    def take(self) -> tuple[dict[str, int], dict[Site, Tensor]]:
        """How many tokens of each of the n requests were run, and [n, d] float32 a site, their
        means, in that order; and forget them.

        The order is the runner's own: V2 sorts a batch by its requests' numbers of tokens.
        """
        counts = dict(self._counts)
        place = {request: row for row, request in enumerate(counts)}
        parts = torch.tensor([place[request] for request in self._parts], dtype=torch.int64)
        number = torch.tensor(list(counts.values()), dtype=torch.float64)
        means = {}
        for site, sums in self._sums.items():
            total = torch.zeros(len(counts), sums[0].shape[1], dtype=torch.float64)
            total.index_add_(0, parts, torch.cat(sums))
            means[site] = (total / number[:, None]).float()
        self._spans, self._counts, self._parts, self._sums = {}, Counter(), [], {}
        return counts, means


def recording_runner_v1(runner_class: Any) -> type:
    """A V1 model runner that tells a recording what each step runs."""

    class RecordingRunner(runner_class):  # type: ignore[misc]
        recording: Recording

        def _prepare_inputs(
            self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
        ) -> Any:
            batch = self.input_batch
            for new in scheduler_output.scheduled_new_reqs:
                self.recording.expect(new.req_id, new.sampling_params, new.prompt_len)
            computed = batch.num_computed_tokens_cpu[: len(batch.req_ids)]
            self.recording.step(batch.req_ids, num_scheduled_tokens, computed)
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)

    return RecordingRunner


def recording_model_state(state_class: Any) -> type:
    """A V2 model state likewise."""

    class RecordingModelState(state_class):  # type: ignore[misc]
        recording: Recording

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            self.recording.expect(
                new_req_data.req_id, new_req_data.sampling_params, new_req_data.prompt_len
            )
            super().add_request(req_index, new_req_data)

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> Any:
            if input_batch.req_ids[0] in req_states.req_id_to_index:
                self.recording.step(
                    input_batch.req_ids,
                    input_batch.num_scheduled_tokens,
                    input_batch.num_computed_tokens_np,
                )
            return super().prepare_inputs(input_batch, req_states)

    return RecordingModelState


class RecordingWorker:
    """Mixed into vLLM's worker; its methods are called by ``LLM.collective_rpc``."""

    vllm_config: VllmConfig
    model_runner: Any
    use_v2_model_runner: bool
    steering_recording: Recording

    def steering_record(self) -> dict[str, Any]:
        """Begin to record.

        Returns:
            ``model_type``, ``hidden_size``, ``num_layers``; and of this worker ``sites``, and their
            gains' ``fingerprint``.
        """
        model_config = self.vllm_config.model_config
        text = model_config.hf_text_config
        recording = self.steering_recording = Recording()
        norms = find_sites(self.model_runner.get_model(), text.num_hidden_layers)
        for site, norm in norms.items():
            recording.watch(site, norm)
        if self.use_v2_model_runner:
            retype(self.model_runner.model_state, recording_model_state)
            self.model_runner.model_state.recording = recording
        else:
            retype(self.model_runner, recording_runner_v1)
            self.model_runner.recording = recording
        return {
            "model_type": text.model_type,
            "hidden_size": model_config.get_hidden_size(),
            "num_layers": text.num_hidden_layers,
            "sites": [str(site) for site in norms],
            "fingerprint": fingerprint.of(norms),
        }

    def steering_take(self) -> tuple[dict[str, int], dict[str, bytes]]:
        """What was recorded: each request's tokens, and site -> [n, hidden] float32, as bytes;
        empty beside rank 0."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        counts, taken = self.steering_recording.take()
        # Under tensor parallelism every rank has the whole of a norm's output.
        if get_tensor_model_parallel_rank() != 0:
            return {}, {}
        return counts, {str(site): rows.numpy().tobytes() for site, rows in taken.items()}
