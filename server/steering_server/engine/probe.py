"""A worker's part in the proof that steering steers (see :mod:`.proof`).

Its steps are built as the scheduler builds them, of requests, prompts and blocks of the KV cache,
and go through the worker's own ``execute_model``: the way of real steps, from a request's steering
to its rows, in whatever graph the runner picks for the shape. vLLM's dummy steps would not do:
their tokens do not attend to what they wrote, so what a norm before attention returns is lost.

Nothing is sampled. The cache is empty yet, and no block is hashed: later requests find free ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.utils.math_utils import cdiv

from steering_planes import Site
from steering_server.engine.bank import SLOTS, Bank
from steering_server.request.operation import EXTRA_ARG, Operation

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

    from steering_server.engine.runner import Wiring

LARGE = 16
"""Tokens that a large step has at least, where no CUDA graph says what is large."""


LENGTH = 256.0
"""How long the bases of a proof are: what they turn, they move 65536 times as far. What must be
told is whether a site reaches the hidden states at all, even where weights are so small (vLLM's
dummy ones) that bfloat16 would lose a turn. float16 has no room for it, and loses less."""


@dataclass(frozen=True)
class NormReport:
    """One steered norm of a worker.

    Attributes:
        rows: shape of the rows that it reads; () if they are not those that the worker writes.
        bank: shape of its bases; () if they are not the worker's.
        classes: shape of its class means; () likewise.
        slots: those that hold a basis.
        known: those that hold class means.
    """

    rows: tuple[int, ...]
    bank: tuple[int, ...]
    classes: tuple[int, ...]
    slots: frozenset[int]
    known: frozenset[int]


@dataclass(frozen=True)
class WorkerReport:
    """How a worker is wired.

    Attributes:
        rank: among the workers of the model.
        wired: False of one that loaded its model without us; the rest is then empty.
        digests: the planes', in the order of their slots.
        layers: its first layer, and the one past its last.
        norms: by site, such as "18.attn_in".
        requests: how many fit into one step of a proof.
    """

    rank: int
    wired: bool
    digests: tuple[str, ...] = ()
    layers: tuple[int, int] = (0, 0)
    norms: tuple[tuple[str, NormReport], ...] = ()
    requests: int = 0


@dataclass(frozen=True)
class Probe:
    """One site of one plane, by its slot, on one worker."""

    rank: int
    site: str
    slot: int


@dataclass(frozen=True)
class Seen:
    """What one kind of step showed one worker: largest differences between hidden states.

    Attributes:
        step: the kind, in words.
        noise: between two equal steps without steering.
        identity: between a step without steering and one whose operations have no basis.
        moved: of each pass, for each of its probes, the requests under it.
        beside: of each pass, the request under none of its probes; 0 where all were under one.
        passes: forward passes that it took.
    """

    step: str
    noise: float
    identity: float
    moved: tuple[tuple[float, ...], ...]
    beside: tuple[float, ...]
    passes: int


def describe(worker: Any) -> WorkerReport:
    """Called on every worker."""
    wiring: Wiring | None = getattr(worker, "steering", None)
    if wiring is None:
        return WorkerReport(_rank(worker), wired=False)
    return WorkerReport(
        _rank(worker),
        wired=True,
        digests=wiring.bank.digests,
        layers=(wiring.layers.start, wiring.layers.stop),
        norms=tuple(
            (str(site), _describe_norm(norm, wiring.bank, site, wiring.rows.tokens))
            for site, norm in wiring.norms.items()
        ),
        requests=_Steps(worker).requests,
    )


def _describe_norm(norm: nn.Module, bank: Bank, site: Site, rows: Tensor) -> NormReport:
    def shape(name: str, live: Tensor) -> tuple[int, ...]:
        buffer: Any = getattr(norm, name, None)
        same = buffer is not None and buffer.data_ptr() == live.data_ptr()
        return tuple(buffer.shape) if same else ()

    bases, classes = bank.bases[site], bank.classes[site]
    return NormReport(
        shape("steering_rows", rows),
        shape("steering_bank", bases),
        shape("steering_classes", classes),
        _filled(bases),
        _filled(classes),
    )


def _filled(slots: Tensor) -> frozenset[int]:
    """Which of the slots are not zero."""
    return frozenset(slots.flatten(1).any(1).nonzero().flatten().tolist())


def look(worker: Any, requests: int, passes: Sequence[Sequence[Probe]]) -> list[Seen]:
    """Called on every worker at once: run the passes, in each kind of step.

    In a pass every basis of the bank is zero but those of its probes on this worker, probe k's in
    slot k. All requests are under the one probe of a pass that has one; else request k is under
    probe k, and the last one under none.

    Args:
        worker: vLLM's.
        requests: how many a step has.
        passes: the probes of each, fewer than requests or one.

    Returns:
        One for each kind of step; nothing of a worker that ends without hidden states.
    """
    wiring: Wiring = worker.steering
    rank, steps, unsteered = _rank(worker), _Steps(worker), [None] * requests
    length = 1.0 if worker.vllm_config.model_config.dtype == torch.float16 else LENGTH
    seen = []
    with torch.inference_mode(), _undisturbed(worker):
        try:
            for step in steps.kinds(requests):
                before = steps.passes
                plain = steps.run(step, unsteered)
                changes = [_change(plain, steps.run(step, unsteered))]
                with wiring.bank.lent(length) as show:
                    changes.append(_change(plain, steps.run(step, _under(requests, SLOTS))))
                    for probes in passes:
                        own = {k: p for k, p in enumerate(probes) if p.rank == rank}
                        show({k: (Site.parse(p.site), p.slot) for k, p in own.items()})
                        under = _under(requests, len(probes))
                        changes.append(_change(plain, steps.run(step, under)))
                if plain is not None:
                    # Here alone the host waits for the device.
                    table = torch.stack([c for c in changes if c is not None]).tolist()
                    words = steps.words(step)
                    seen.append(_seen(words, table, passes, steps.passes - before))
        finally:
            steps.finish()
            # No row of a proof stays: idle data-parallel workers run with those that are there.
            nobody = np.zeros(0, dtype=np.int32)
            wiring.rows.write(nobody.astype(np.intp), nobody, nobody)
    return seen


def _rank(worker: Any) -> int:
    # Where the processes are somebody else's (external launchers), data parallelism counts too.
    return int(worker.rank) % int(worker.vllm_config.parallel_config.world_size)


def _under(requests: int, probes: int) -> list[int | None]:
    """The slot of each request in a pass of so many probes; see :func:`look`."""
    return [0] * requests if probes == 1 else [k if k < probes else None for k in range(requests)]


def _change(plain: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    """[requests], the largest difference; NaN where something is not finite."""
    return None if plain is None or hidden is None else (hidden - plain).abs().amax(1)


def _seen(step: str, table: list[list[float]], passes: Sequence[Sequence[Probe]], ran: int) -> Seen:
    """From what changed: [2 + passes, requests]."""
    noise, identity, *looks = table
    moved, beside = [], []
    for probes, changes in zip(passes, looks, strict=True):
        under = _under(len(changes), len(probes))
        by_slot = {
            slot: largest(c for c, s in zip(changes, under, strict=True) if s == slot)
            for slot in (*range(len(probes)), None)
        }
        beside.append(by_slot.pop(None))
        moved.append(tuple(by_slot.values()))
    return Seen(step, largest(noise), largest(identity), tuple(moved), tuple(beside), ran)


def largest(values: Iterable[float]) -> float:
    """Of none, 0; NaN is larger than any number."""
    return max(values, key=lambda v: math.inf if math.isnan(v) else v, default=0.0)


@contextmanager
def _undisturbed(worker: Any) -> Iterator[None]:
    """No KV connector takes part, and vLLM says of each step in which CUDA graph it ran."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    runner, metrics = worker.model_runner, worker.vllm_config.observability_config
    counted, metrics.cudagraph_metrics = metrics.cudagraph_metrics, True
    agent = kv_transfer_state._KV_CONNECTOR_AGENT
    try:
        if worker.use_v2_model_runner:
            runner.kv_connector.set_disabled(True)
        else:
            kv_transfer_state._KV_CONNECTOR_AGENT = None
        yield
    finally:
        metrics.cudagraph_metrics = counted
        if worker.use_v2_model_runner:
            runner.kv_connector.set_disabled(False)
        else:
            kv_transfer_state._KV_CONNECTOR_AGENT = agent


@dataclass(frozen=True)
class _Step:
    """A kind of step: ``tokens`` of each request, after ``computed`` that a step before ran."""

    name: str
    tokens: int
    computed: int = 0


class _Steps:
    """Runs steps on one worker, and tells what came out.

    Attributes:
        passes: forward passes so far.
    """

    def __init__(self, worker: Any) -> None:
        self._worker, self._runner, self._config = worker, worker.model_runner, worker.vllm_config
        self._v2: bool = worker.use_v2_model_runner
        self._specs = [
            group.kv_cache_spec for group in self._runner.kv_cache_config.kv_cache_groups
        ]
        self._live: set[str] = set()
        self._prepared: _Step | None = None
        self._graph = "NONE"
        self.passes = 0

    @property
    def _decode(self) -> int:
        """Tokens of a request in a uniform decode step: with drafts, more than one."""
        runner = self._runner
        return int(runner.decode_query_len if self._v2 else runner.uniform_decode_query_len)

    @property
    def requests(self) -> int:
        """How many fit into one step: one for each slot and one without, if there is room."""
        scheduler = self._config.scheduler_config
        most = min(
            SLOTS + 1,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens // self._decode,
        )
        while most > 1 and not self._fits(most, 1 + self._decode):
            most -= 1
        return int(most)

    def kinds(self, requests: int) -> list[_Step]:
        """Every kind of step that can run in another graph.

        A decode step, which takes a full CUDA graph where there are any; a prefill step among the
        captured sizes, and one beyond them (without graphs, one of :data:`LARGE` tokens); and one
        in each further range of sizes that is compiled by itself.
        """
        compilation, scheduler = self._config.compilation_config, self._config.scheduler_config
        sizes = compilation.cudagraph_capture_sizes if compilation.cudagraph_mode else None
        above = {0, max(sizes)} if sizes else {LARGE - 1}
        above |= {r.end for r in compilation.get_compile_ranges()}
        steps = [_Step("decode", self._decode, computed=1)]
        for bound in sorted(b for b in above if b < scheduler.max_num_batched_tokens):
            # One more than in a decode step, or it would be one.
            tokens = min(
                max(self._decode + 1, bound // requests + 1),
                scheduler.max_num_batched_tokens // requests,
                self._config.model_config.max_model_len,
            )
            while tokens > 1 and not self._fits(requests, tokens):
                tokens //= 2
            step = _Step("prefill", tokens)
            if step not in steps:
                steps.append(step)
        return steps

    def words(self, step: _Step) -> str:
        """Such as "decode step with 1 token(s) a request (CUDA graph: FULL)", of one that ran."""
        return f"{step.name} step with {step.tokens} token(s) a request (CUDA graph: {self._graph})"

    def run(self, step: _Step, slots: Sequence[int | None]) -> Tensor | None:
        """One step of new requests.

        Args:
            step: the kind.
            slots: of each request, the bank's slot that turns it by 180 degrees; None leaves it.

        Returns:
            [requests, tokens * hidden], a copy; None on a worker that ends without hidden states.
        """
        if step.computed and (step != self._prepared or self._is_stateful):
            # As a hit in the prefix cache: what went before is there, unsteered.
            before = _Step(step.name, step.computed)
            self._execute(before, [None] * len(slots), prompt=step.computed + step.tokens)
        self._prepared = step
        return self._execute(step, slots, prompt=step.computed + step.tokens)

    def finish(self) -> None:
        """Take the last requests out of the runner."""
        from vllm.v1.core.sched.output import SchedulerOutput

        output = SchedulerOutput.make_empty()
        output.finished_req_ids = self._live
        self._live = set()
        self._runner.execute_model_state = None
        self._worker.execute_model(output)

    @property
    def _is_stateful(self) -> bool:
        """A step overwrites what it read, so that each needs the step before it again."""
        from vllm.v1.kv_cache_interface import MambaSpec

        return any(isinstance(getattr(s, "first_spec", s), MambaSpec) for s in self._specs)

    def _blocks(self, tokens: int) -> list[int]:
        """Blocks of the KV cache of a request with so many tokens, in each group."""
        config = self._config
        length = config.model_config.max_model_len
        return [
            min(
                cdiv(tokens + config.num_lookahead_tokens, spec.block_size)
                + getattr(getattr(spec, "first_spec", spec), "num_speculative_blocks", 0),
                spec.max_num_blocks_per_req(config, length),
            )
            for spec in self._specs
        ]

    def _fits(self, requests: int, tokens: int) -> bool:
        # Block 0 is vLLM's, for padding.
        blocks = int(self._runner.kv_cache_config.num_blocks) - 1
        return not self._specs or requests * sum(self._blocks(tokens)) <= blocks

    def _execute(self, step: _Step, slots: Sequence[int | None], prompt: int) -> Tensor | None:
        from vllm.v1.core.sched.output import SchedulerOutput

        output, runner = SchedulerOutput.make_empty(), self._runner
        ids = [f"steering-proof-{self.passes}-{i}" for i in range(len(slots))]
        output.scheduled_new_reqs = list(self._new_requests(ids, step, slots, prompt))
        output.num_scheduled_tokens = dict.fromkeys(ids, step.tokens)
        output.total_num_scheduled_tokens = len(ids) * step.tokens
        output.finished_req_ids, self._live = self._live, set(ids)
        if runner.kv_cache_config.needs_kv_cache_zeroing and not step.computed:
            output.new_block_ids_to_zero = [
                block
                for request in output.scheduled_new_reqs
                for group in request.block_ids
                for block in group
            ]
        if self._v2:
            output.num_spec_tokens_to_schedule = runner.num_speculative_steps
            if step.computed and step.tokens > 1:
                # Known tokens in the place of drafts: of a decode step V2 asks that there be some.
                output.scheduled_spec_decode_tokens = {i: [0] * (step.tokens - 1) for i in ids}
        self.passes += 1
        self._worker.execute_model(output)
        # Instead of sampling from it.
        state, runner.execute_model_state = runner.execute_model_state, None
        hidden = getattr(state, "hidden_states", None)
        if not isinstance(hidden, Tensor):
            return None
        if state.cudagraph_stats is not None:
            self._graph = state.cudagraph_stats.runtime_mode
        # The runner orders its batch as it likes.
        batch = state.input_batch if self._v2 else runner.input_batch
        order = torch.tensor([list(batch.req_ids).index(i) for i in ids], device=hidden.device)
        return hidden[: len(ids) * step.tokens].reshape(len(ids), -1)[order]

    def _new_requests(
        self, ids: Sequence[str], step: _Step, slots: Sequence[int | None], prompt: int
    ) -> Iterator[NewRequestData]:
        from vllm import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData

        free = itertools.count(1)
        # Away from the ends of the vocabulary, where special tokens are.
        vocabulary = self._config.model_config.get_vocab_size()
        for index, (req_id, slot) in enumerate(zip(ids, slots, strict=True)):
            tokens = [
                vocabulary // 4 + (7919 * index + 104729 * position) % (vocabulary // 2)
                for position in range(prompt)
            ]
            operation = Operation("", str(slot), 180.0, "rotate_by")
            steering = {} if slot is None else {EXTRA_ARG: [operation.to_wire()]}
            yield NewRequestData(
                req_id=req_id,
                prompt_token_ids=tokens,
                prefill_token_ids=tokens,
                mm_features=[],
                sampling_params=SamplingParams(temperature=0, max_tokens=1, extra_args=steering),
                pooling_params=None,
                block_ids=tuple(
                    list(itertools.islice(free, count)) for count in self._blocks(prompt)
                ),
                num_computed_tokens=step.computed,
                lora_request=None,
            )
