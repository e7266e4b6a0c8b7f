"""At start-up each site is proved to steer; one that does nothing stops the start by its name.

Engines of other tests are proved as they start; here is what a proof sees and leaves, and what
fails it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import engines
import traffic
from broken import bypass
from oracle import Turn
from planes import random_plane
from steering_planes import Plane, Site, open_plane
from steering_server.engine import plugin, proof, runner
from steering_server.engine.bank import Bank
from steering_server.engine.probe import NormReport, Probe, Seen, WorkerReport
from steering_server.engine.settings import Settings, SettingsError
from tiny import Tiny
from traffic import Ask

EAGER = {"max_num_seqs": 8, "max_model_len": 128, "skip_tokenizer_init": True}
TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""Traced once, as a compiled engine's graph is, and run without a compiler."""

llama = pytest.mark.usefixtures("whole_llama")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the proof says: first that it begins, then what it found."""
    lines: list[str] = []

    def say(message: str, *args: Any) -> None:
        lines.append(message % args)

    monkeypatch.setattr(proof.logger, "info", say)
    monkeypatch.setattr(proof.logger, "warning", say)
    return lines


@pytest.fixture
def whole_llama() -> Iterator[None]:
    """vLLM's Llama layer, as it was, afterwards."""
    from vllm.model_executor.models.llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    yield
    LlamaDecoderLayer.forward = forward


def start(tiny: Tiny, **options: Any) -> Iterator[engines.Engine]:
    options = {**EAGER, **options}
    return engines.start(tiny.model, tiny.planes, in_process=True, **options)


def failure(tiny: Tiny, **options: Any) -> str:
    """Why an engine did not start."""
    executors: list[Any] = []
    prove = proof.prove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "prove", lambda e, s: (executors.append(e), prove(e, s)))
        with pytest.raises(SettingsError) as raised:
            next(start(tiny, **options))
    executors[0].shutdown()
    engines.forget_groups()
    message = str(raised.value)
    assert "\n" not in message
    assert "--steering-skip-proof" in message
    return message


def after(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let the model end with ``change`` of its hidden states."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda *args, **kwargs: change(forward(*args, **kwargs))
    )


@llama
def test_weights_so_small_that_a_turn_is_lost_are_proved(tiny_llama: Tiny, log: list[str]) -> None:
    """vLLM's dummy weights lie within 0.001: in bfloat16 what an MLP adds hardly shows."""
    for _ in start(tiny_llama, dtype="bfloat16", load_format="dummy"):
        assert "Steering proved at 8 site(s)" in log[-1]


@pytest.mark.parametrize("options", [{}, TRACED], ids=["eager", "traced"])
def test_every_site_is_proved_and_nothing_of_it_stays(
    tiny_llama: Tiny, log: list[str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    steps: list[int] = []
    execute = CPUModelRunner.execute_model

    def counted(self: Any, scheduled: Any, *args: Any) -> Any:
        steps.append(scheduled.total_num_scheduled_tokens)
        return execute(self, scheduled, *args)

    states: list[Tensor] = []
    prove = proof.prove

    def between(*args: Any) -> None:
        states.append(torch.get_rng_state())
        prove(*args)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(CPUModelRunner, "execute_model", counted)
    monkeypatch.setattr(proof, "prove", between)
    for engine in start(tiny_llama, **options):
        begins, line = log
        assert begins.startswith("Proving that steering works at 8 site(s) of 3 plane(s)")
        said = re.match(
            r"Steering proved at 8 site\(s\) of 3 plane\(s\) in \d+\.\d\d s, in (\d+) forward "
            r"passes: decode step with 1 token\(s\) a request .*, prefill step with 2 token",
            line,
        )
        assert said is not None, line
        # 12 probes, 7 at a time: both kinds of step, and those of the last requests' end.
        assert int(said[1]) == len([n for n in steps if n]) == (1 + 2 + 1 + 2) + (2 + 1 + 2)
        assert set(steps) == {8, 16, 0}
        assert torch.equal(*states)

        core = engine.llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        wiring = worker.steering
        planes = [open_plane(str(path)) for path in tiny_llama.planes.values()]
        assert wiring.bank.digests == tuple(plane.digest for plane in planes)
        fresh = Bank(planes, wiring.norms, torch.device("cpu"))
        for site, bases in fresh.bases.items():
            assert torch.equal(wiring.bank.bases[site], bases)
        assert not wiring.rows.tokens[..., 3].any(), "rows of a proof stayed"
        assert not worker.model_runner.requests
        assert not worker.model_runner.input_batch.num_reqs
        assert core.scheduler.kv_cache_manager.block_pool.get_usage() == 0

        turns = [Turn(tiny_llama.planes["two"], 150, "rotate_to")]
        prompt = [5 + 3 * i for i in range(20)]
        asks = [
            Ask(prompt, turn, traffic.fields(turn, tiny_llama.planes), tokens=6)
            for turn in (turns, [])
        ]
        for ask, reply in zip(asks, traffic.send(engine, asks), strict=True):
            traffic.check(tiny_llama.oracle, ask, reply)


def test_a_model_takes_less_than_a_forward_pass_a_site(
    smollm2: Path, tmp_path: Path, log: list[str]
) -> None:
    sites = [f"{layer}.{role}" for layer in range(9, 21) for role in ("attn_in", "mlp_in")]
    plane = random_plane(tmp_path / "wide", sites)
    for _ in engines.start(smollm2, {"wide": plane}, in_process=True):
        said = re.match(r"Steering proved at 24 .* in (\d+\.\d\d) s, in (\d+) forward", log[-1])
        assert said is not None, log
        assert int(said[2]) <= len(sites)


@llama
def test_a_norm_that_a_fused_function_bypasses_is_named(tiny_llama: Tiny) -> None:
    bypass(2)
    message = failure(tiny_llama)
    named = re.findall(r"at ([\w., ]+) of plane '(\w+)' on rank 0 in a (\w+) step", message)
    assert set(named) == {
        ("2.mlp_in", plane, step) for plane in tiny_llama.planes for step in ("decode", "prefill")
    }
    assert "fused function" in message


@llama
def test_a_start_without_the_proof_says_so(tiny_llama: Tiny, log: list[str]) -> None:
    bypass(2)
    for _ in start(tiny_llama, steering={"skip_proof": True}):
        assert log == ["Steering was not proved at any site: --steering-skip-proof"]


@pytest.mark.parametrize("flags", [[], ["--steering-skip-proof"]], ids=str)
def test_a_flag_leaves_the_proof_out(tiny_llama: Tiny, flags: list[str]) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    plane = f"--steering-plane=one={tiny_llama.planes['one']}"
    args = parser.parse_args([f"--model={tiny_llama.model}", plane, *flags])
    section = EngineArgs.from_cli_args(args).additional_config["steering"]
    assert Settings.parse(section).skip_proof == bool(flags)


def test_a_graph_older_than_the_wiring_is_told(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    late: list[tuple[Any, ...]] = []
    wire, warm_up = runner.wire, CPUWorker.compile_or_warm_up_model

    def wire_now(worker: Any) -> Any:
        for args in late:
            wire(*args)
        return warm_up(worker)

    monkeypatch.setattr(runner, "wire", lambda *args: late.append(args))
    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", wire_now)
    message = failure(tiny_llama, **TRACED)
    assert "the graph was made without steering" in message
    for site in Settings(sites=("0.attn_in", "3.mlp_in")).parsed_sites():
        assert str(site) in message


@pytest.mark.parametrize("change", [{"max_planes": 2}, {"max_tokens": 64}], ids=str)
def test_rows_of_another_shape_are_named(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    rows = runner.Rows
    monkeypatch.setattr(runner, "Rows", lambda **options: rows(**{**options, **change}))
    message = failure(tiny_llama, max_num_batched_tokens=256)
    shape = [change.get("max_tokens", 256), change.get("max_planes", 1), 7]
    assert f"rank 0: site 1.attn_in reads rows of {shape}, not [256, 1, 7]" in message


def test_a_bank_of_zeros_is_named(tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*args: Any) -> Bank:
        bank = Bank(*args)
        for bases in bank.bases.values():
            bases.zero_()
        return bank

    monkeypatch.setattr(runner, "Bank", empty)
    message = failure(tiny_llama)
    assert "rank 0: site 1.attn_in has no basis of one, two;" in message


def test_a_norm_with_a_bank_of_its_own_is_named(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = runner.wire
    monkeypatch.setattr(runner, "wire", lambda n, bank, *rest: wire(n, bank.clone(), *rest))
    assert "site 0.attn_in has bases of another buffer" in failure(tiny_llama)


def test_a_worker_that_did_not_wire_is_named(tiny_llama: Tiny) -> None:
    message = failure(
        tiny_llama,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        worker_cls="broken.Unwired",
    )
    assert "rank 1 loaded its model without steering" in message
    assert "rank 0" not in message


def test_a_rank_that_steers_does_not_hide_one_that_does_not(tiny_llama: Tiny) -> None:
    message = failure(
        tiny_llama,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        worker_cls="broken.Bypassed",
    )
    assert "at 2.mlp_in of plane 'two' on rank 1" in message
    assert "rank 0" not in message


@llama
@pytest.mark.parametrize("dead", [False, True])
def test_requests_that_change_each_other_are_tried_one_at_a_time(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch, log: list[str], dead: bool
) -> None:
    after(monkeypatch, lambda hidden: hidden + hidden.mean(0))
    if dead:
        bypass(2)
        message = failure(tiny_llama)
        assert set(re.findall(r"at ([\w., ]+) of plane", message)) == {"2.mlp_in"}
    else:
        for _ in start(tiny_llama):
            # Shared passes first; then both kinds of step with each of the 12 probes alone.
            assert f"in {11 + (1 + 2 + 1 + 12) + (2 + 1 + 12)} forward passes" in log[-1]


def test_a_model_that_does_not_compute_the_same_twice_is_judged_by_its_noise(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    after(monkeypatch, lambda hidden: hidden + 1e-5 * torch.randn_like(hidden))
    for _ in start(tiny_llama):
        assert "above the noise of a model that does not compute the same twice" in log[-1]


def test_steering_that_turns_nothing_and_changes_something_stops_the_start(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steering_server.engine import sites

    steer = sites.steer

    def wrong(h: Tensor, bank: Tensor, classes: Tensor, rows: Tensor, *kernels: Any) -> Tensor:
        return steer(h, bank, classes, rows, *kernels) + rows[:, 0, 3:4]

    monkeypatch.setattr(sites, "steer", wrong)
    assert "steering that turns nothing changes the hidden states" in failure(tiny_llama)


def test_hidden_states_that_are_no_numbers_prove_nothing(
    tiny_llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    after(monkeypatch, lambda hidden: hidden * math.nan)
    assert "hidden states of a decode step" in (message := failure(tiny_llama))
    assert "are not finite" in message


def test_an_empty_bank_is_returned_whatever_happened(tiny_llama: Tiny) -> None:
    planes = [open_plane(str(path)) for path in tiny_llama.planes.values()]
    site, other = Site(2, "mlp_in"), Site(0, "attn_in")
    bank = Bank(planes, [site, other], torch.device("cpu"))
    before = {where: bases.clone() for where, bases in bank.bases.items()}
    addresses = {where: bases.data_ptr() for where, bases in bank.bases.items()}
    with pytest.raises(KeyboardInterrupt), bank.lent(3.0) as show:  # noqa: PT012
        assert not any(bases.any() for bases in bank.bases.values())
        show({5: (site, 1)})
        assert torch.equal(bank.bases[site][5], 3.0 * planes[1].bases[site])
        show({0: (other, 1)})
        assert not bank.bases[site].any()
        assert bank.slot("7") == 7
        raise KeyboardInterrupt
    assert [bank.slot(plane.digest) for plane in planes] == [0, 1, 2]
    for where, bases in bank.bases.items():
        assert torch.equal(bases, before[where])
        assert bases.data_ptr() == addresses[where]


PROBES = [Probe(0, "1.attn_in", 0), Probe(0, "2.attn_in", 0), Probe(0, "3.attn_in", 0)]


def seen(**values: Any) -> Seen:
    whole: dict[str, Any] = {
        "step": "decode step",
        "noise": 0.0,
        "identity": 0.0,
        "moved": ((1.0, 1.0, 1.0),),
        "beside": (0.0,),
        "passes": 4,
    }
    return Seen(**{**whole, **values})


@pytest.mark.parametrize(
    ("values", "dead", "unclear"),
    [
        ({}, [], []),
        ({"moved": ((1.0, 0.0, 1e-12),)}, PROBES[1:2], []),
        ({"moved": ((math.nan, 0.0, 1.0),)}, PROBES[1:2], []),
        ({"moved": ((1.0, 0.3, 0.5),), "noise": 0.1, "identity": 0.2}, PROBES[1:2], []),
        ({"moved": ((1.0, 0.0, 1.0),), "beside": (1e-12,)}, [], PROBES),
    ],
)
def test_what_changes_is_judged(
    values: dict[str, Any], dead: list[Probe], unclear: list[Probe]
) -> None:
    found = proof.judge([seen(**values)], [PROBES])
    assert found == ({"decode step": dead} if dead else {}, unclear)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"identity": 1e-12}, "turns nothing changes"),
        ({"identity": math.nan}, "turns nothing changes"),
        ({"noise": math.nan}, "not finite"),
        ({"noise": math.inf}, "not finite"),
    ],
)
def test_what_cannot_be_judged_stops_the_start(values: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        proof.judge([seen(**values)], [PROBES])


def test_what_one_worker_sees_counts() -> None:
    """A stage of a pipeline sees nothing; a rank may be alone in seeing its last norm turn."""
    first = seen(moved=((0.0, 1.0, 0.0),), beside=(0.0,))
    second = seen(moved=((0.5, 0.0, math.nan),), beside=(0.25,))
    (both,) = proof._together([[], [first], [second]])
    assert both.moved[0][:2] == (0.5, 1.0)
    assert math.isnan(both.moved[0][2])
    assert both.beside == (0.25,)
    with pytest.raises(SettingsError, match="no hidden states"):
        proof._together([[], []])


def test_a_pass_has_probes_of_one_rank() -> None:
    probes = [Probe(rank, f"{layer}.attn_in", 0) for rank in (0, 1) for layer in range(5)]
    passes = proof._passes(probes, 3)
    assert [len(part) for part in passes] == [3, 2, 3, 2]
    assert [probe for part in passes for probe in part] == probes
    assert all(len({probe.rank for probe in part}) == 1 for part in passes)


CONFIG: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=64))


def reports(planes: list[Plane], of_norm: Any = (), **values: Any) -> list[WorkerReport]:
    """Of a pipeline of two stages, with two layers each."""
    of_norm = dict(of_norm)
    every = frozenset({0, 1, 2})
    norm = NormReport((64, 1, 7), (8, 2, 128), (8, 5), slots=every, known=every)
    norm = replace(norm, **of_norm)
    whole: dict[str, Any] = {"wired": True, "digests": tuple(p.digest for p in planes)}
    return [
        WorkerReport(
            rank=rank,
            layers=(2 * rank, 2 * rank + 2),
            norms=tuple(
                (f"{layer}.{role}", norm)
                for layer in (2 * rank, 2 * rank + 1)
                for role in ("attn_in", "mlp_in")
            ),
            **{**whole, **(values if rank else {})},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, None),
        ({"digests": ()}, "rank 1 holds other planes than one, two, three"),
        ({"wired": False}, "rank 1 loaded its model without steering"),
        ({"of_norm": {"classes": ()}}, "class means of another buffer, not .slots, 5."),
        ({"of_norm": {"known": frozenset({0, 2})}}, r"site 1\.attn_in has no class means of two"),
    ],
)
def test_the_workers_together_have_every_site(
    tiny_llama: Tiny, values: dict[str, Any], named: str | None
) -> None:
    planes = {name: open_plane(str(path)) for name, path in tiny_llama.planes.items()}
    settings = Settings(planes=dict.fromkeys(planes, "")).resolved(planes, torch.device("cpu"))
    of = list(planes.values())
    if named is None:
        proof.check_wiring(reports(of), settings, of, CONFIG)
        with pytest.raises(SettingsError, match=r"site 2\.attn_in is on no worker"):
            proof.check_wiring(reports(of)[:1], settings, of, CONFIG)
    else:
        with pytest.raises(SettingsError, match=named):
            proof.check_wiring(reports(of, **values), settings, of, CONFIG)
