"""Recording what calibration needs: the last prompt token's activation at every site.

It happens inside the worker, where the model runs as it is served (any quantisation, tensor or
pipeline parallel); what leaves the worker is one row a prompt and site, never a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steering_planes import Site, find_sites
from steering_server.engine.retype import retype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

WORKER_EXTENSION = "steering_server.engine.recording.RecordingWorker"
"""For vLLM's ``worker_extension_cls``."""


class Recording:
    """The activations that a worker has kept since they were last taken."""

    def __init__(self) -> None:
        self._last: Tensor = torch.zeros(0, dtype=torch.int64)
        self._ended: list[str] = []
        self._kept: dict[Site, list[Tensor]] = {}

    def step(
        self,
        requests: Sequence[str],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
        prompts: NDArray[np.int32],
    ) -> None:
        """What the next forward pass runs: [n] each, in the order of the batch.

        Args:
            requests: ids.
            scheduled: tokens of each request in this step.
            computed: tokens of each before this step.
            prompts: length of each prompt.
        """
        starts = np.cumsum(scheduled) - scheduled
        # A prompt may come in several chunks; the last one has the token that counts.
        ends_here = (computed < prompts) & (computed + scheduled >= prompts)
        rows = (starts + prompts - 1 - computed)[ends_here]
        self._last = torch.from_numpy(rows.astype(np.int64))
        self._ended += [requests[index] for index in np.flatnonzero(ends_here)]

    def watch(self, site: Site, norm: nn.Module) -> None:
        """Keep ``norm``'s output at the rows of each step."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            normed = output[0] if isinstance(output, tuple) else output
            if len(self._last):
                tokens = normed.reshape(-1, normed.shape[-1])  # [T, d]
                rows = tokens[self._last.to(tokens.device)]
                self._kept.setdefault(site, []).append(rows.float().cpu())

        norm.register_forward_hook(hook)

    def take(self) -> tuple[list[str], dict[Site, Tensor]]:
        """The ids of the n requests whose prompts ended, and [n, d] float32 a site, of each in that
        order; and forget them.

        The order is the runner's own: V2 sorts a batch by its requests' numbers of tokens.
        """
        taken = self._ended, {site: torch.cat(rows) for site, rows in self._kept.items()}
        self._ended, self._kept = [], {}
        return taken


def recording_runner_v1(runner_class: Any) -> type:
    """A V1 model runner that tells a recording what each step runs."""

    class RecordingRunner(runner_class):  # type: ignore[misc]
        recording: Recording

        def _prepare_inputs(
            self, scheduler_output: SchedulerOutput, num_scheduled_tokens: NDArray[np.int32]
        ) -> Any:
            batch = self.input_batch
            n = len(batch.req_ids)
            self.recording.step(
                batch.req_ids,
                num_scheduled_tokens,
                batch.num_computed_tokens_cpu[:n],
                batch.num_prompt_tokens[:n],
            )
            return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)

    return RecordingRunner


def recording_model_state(state_class: Any) -> type:
    """A V2 model state likewise."""

    class RecordingModelState(state_class):  # type: ignore[misc]
        recording: Recording

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> Any:
            if input_batch.req_ids[0] in req_states.req_id_to_index:
                self.recording.step(
                    input_batch.req_ids,
                    input_batch.num_scheduled_tokens,
                    input_batch.num_computed_tokens_np,
                    req_states.prompt_len.np[input_batch.idx_mapping_np],
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
            ``model_type``, ``hidden_size``, ``num_layers``, and ``sites``, those of this worker.
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
        }

    def steering_take(self) -> tuple[list[str], dict[str, bytes]]:
        """What was recorded: the requests' ids, and site -> [n, hidden] float32, as bytes; empty
        beside rank 0."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

        requests, taken = self.steering_recording.take()
        # Under tensor parallelism every rank has the whole of a norm's output.
        if get_tensor_model_parallel_rank() != 0:
            return [], {}
        return requests, {str(site): rows.numpy().tobytes() for site, rows in taken.items()}
