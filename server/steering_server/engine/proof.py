"""The proof, at start-up, that each site steers, in the graphs that will serve.

A site is a module of the model that somebody has to call. A fused function may read its weight
instead, a graph may be older than the wiring, a worker may have loaded its model without us: then
requests would be answered unsteered and nothing would say so. So before the first request each site
of each plane on each worker, alone, turns a token by 180 degrees, and the step's hidden states must
change; without a basis they must not, by a bit.

Ranks of tensor parallelism hold the same hidden states, so one that steers would hide one that does
not: a probe is one site of one plane on one worker, every other basis being zero. Tokens of
different requests do not see each other, so one forward pass carries a probe in each request.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from steering_kernels import CLASSES_WIDTH, ROW_WIDTH
from steering_planes import Plane, Site
from steering_server.engine.probe import Probe, Seen, WorkerReport, describe, largest, look
from steering_server.engine.settings import Settings, SettingsError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")

SKIP = "--steering-skip-proof starts the server without this check"
NAMED = 12
"""Sites that a message names, of one plane on one worker in one kind of step."""
NOISE = 4
"""How many times the difference between two equal steps a change must exceed, where the model does
not compute the same twice."""


def compile_or_warm_up_model(original: Callable[..., None], executor: Any) -> None:
    """An executor's ``compile_or_warm_up_model``, and then, with every graph captured, the proof.

    Raises:
        SettingsError: naming each site that does nothing, or the worker that is not wired.
    """
    original(executor)
    settings = Settings.of(executor.vllm_config)
    if settings.planes and settings.skip_proof:
        logger.warning("Steering was not proved at any site: --steering-skip-proof")
    elif settings.planes:
        prove(executor, settings)


def prove(executor: Any, settings: Settings) -> None:
    """See :func:`compile_or_warm_up_model`.

    Args:
        executor: vLLM's, with its workers ready to serve.
        settings: with at least one plane.
    """
    started = time.perf_counter()
    planes = list(settings.load_planes().values())
    reports = _ask(executor, describe)
    check_wiring(reports, settings, planes, executor.vllm_config)
    probes = _probes(reports, planes, executor.vllm_config.parallel_config.world_size)
    requests = min(report.requests for report in reports)
    # All ranks of data parallelism must run as many steps as each other, whatever they see.
    together = 1 if executor.vllm_config.parallel_config.data_parallel_size > 1 else requests - 1
    passes = _passes(probes, max(together, 1))
    logger.info(
        "Proving that steering works at %d site(s) of %d plane(s), on each worker and in each kind "
        "of step",
        len(settings.sites),
        len(planes),
    )
    seen = _together(_ask(executor, look, requests, passes))
    dead, unclear = judge(seen, passes)
    ran = sum(kind.passes for kind in seen)
    if unclear:
        # Requests do change each other here (their experts, or a scale, are shared): one at a time.
        passes = _passes(unclear, 1)
        again = _together(_ask(executor, look, requests, passes))
        dead = {
            step: [*dead.get(step, ()), *more] for step, more in judge(again, passes)[0].items()
        }
        ran += sum(kind.passes for kind in again)
    if dead:
        raise SettingsError(_complaint(dead, len(probes), list(settings.planes)))
    logger.info(
        "Steering proved at %d site(s) of %d plane(s) in %.2f s, in %d forward passes%s: %s",
        len(settings.sites),
        len(planes),
        time.perf_counter() - started,
        ran,
        ", above the noise of a model that does not compute the same twice"
        if any(kind.noise for kind in seen)
        else "",
        ", ".join(kind.step for kind in seen),
    )


def check_wiring(
    reports: Sequence[WorkerReport],
    settings: Settings,
    planes: Sequence[Plane],
    config: VllmConfig,
) -> None:
    """Compare what the workers say of themselves with what was asked for.

    Raises:
        SettingsError: naming each worker and site, what it must have and what it has.
    """
    rows = (config.scheduler_config.max_num_batched_tokens, settings.max_planes, ROW_WIDTH)
    basis = (2, planes[0].config.hidden_size)
    with_means = {k for k, plane in enumerate(planes) if plane.means is not None}
    problems = []
    for report in reports:
        if not report.wired:
            problems.append(
                f"rank {report.rank} loaded its model without steering, at no site of it"
            )
            continue
        if report.digests != tuple(plane.digest for plane in planes):
            problems.append(
                f"rank {report.rank} holds other planes than {', '.join(settings.planes)}"
            )
        norms = dict(report.norms)
        for site in settings.parsed_sites():
            where = f"rank {report.rank}: site {site}"
            selecting = {k for k, plane in enumerate(planes) if site in plane.bases}
            if site.layer not in range(*report.layers):
                continue
            if (norm := norms.get(str(site))) is None:
                problems.append(f"{where} is not steered")
            elif norm.rows != rows:
                problems.append(f"{where} reads rows of {_shape(norm.rows)}, not {_shape(rows)}")
            elif norm.bank[1:] != basis:
                problems.append(
                    f"{where} has bases of {_shape(norm.bank)}, not [slots, 2, {basis[1]}]"
                )
            elif norm.classes[1:] != (CLASSES_WIDTH,):
                problems.append(
                    f"{where} has class means of {_shape(norm.classes)}, "
                    f"not [slots, {CLASSES_WIDTH}]"
                )
            elif absent := sorted(selecting - norm.slots):
                names = ", ".join(list(settings.planes)[k] for k in absent)
                problems.append(f"{where} has no basis of {names}")
            elif unknown := sorted((selecting & with_means) - norm.known):
                names = ", ".join(list(settings.planes)[k] for k in unknown)
                problems.append(f"{where} has no class means of {names}")
    if all(report.wired for report in reports):
        held = {site for report in reports for site, _ in report.norms}
        problems += [f"site {site} is on no worker" for site in settings.sites if site not in held]
    if problems:
        raise SettingsError(f"steering is not in place: {'; '.join(problems)}; {SKIP}")


def judge(
    seen: Sequence[Seen], passes: Sequence[Sequence[Probe]]
) -> tuple[dict[str, list[Probe]], list[Probe]]:
    """What the passes say.

    Returns:
        By kind of step, the probes that did nothing; and those of passes in which a request under
        no probe changed too, which say nothing.

    Raises:
        SettingsError: an operation without a basis changes something, or nothing can be told.
    """
    dead: dict[str, list[Probe]] = {}
    unclear: dict[Probe, None] = {}
    for kind in seen:
        limit = NOISE * kind.noise
        if not math.isfinite(limit):
            raise SettingsError(f"the hidden states of a {kind.step} are not finite; {SKIP}")
        if not kind.identity <= limit:
            raise SettingsError(
                f"steering that turns nothing changes the hidden states of a {kind.step} by "
                f"{kind.identity:.3g}, of equal steps by {kind.noise:.3g}; {SKIP}"
            )
        for probes, moved, beside in zip(passes, kind.moved, kind.beside, strict=True):
            if not beside <= limit:
                unclear.update(dict.fromkeys(probes))
            elif still := [p for p, m in zip(probes, moved, strict=True) if m <= limit]:
                dead.setdefault(kind.step, []).extend(still)
    return dead, list(unclear)


def _ask(executor: Any, what: Callable[..., Any], *args: Any) -> list[Any]:
    """The answers of all workers, which find the function by its name.

    Raises:
        SettingsError: a worker failed, or has no such function: it runs without this package.
    """
    try:
        answers: list[Any] = executor.collective_rpc(what, args=args)
    except Exception as error:
        raise SettingsError(
            f"whether steering works could not be proved: {type(error).__name__}: {error}; {SKIP}"
        ) from error
    return answers


def _probes(
    reports: Sequence[WorkerReport], planes: Sequence[Plane], world_size: int
) -> list[Probe]:
    """Every site of every plane on every worker; those of other launchers have our sites."""
    norms = {report.rank: report.norms for report in reports}
    return [
        Probe(rank, site, slot)
        for rank in range(world_size)
        for site, _ in norms.get(rank, reports[0].norms)
        for slot, plane in enumerate(planes)
        if Site.parse(site) in plane.bases
    ]


def _passes(probes: Iterable[Probe], together: int) -> list[list[Probe]]:
    """In parts of at most so many, each of one rank alone."""
    return [
        part[start : start + together]
        for _, of_rank in itertools.groupby(probes, key=lambda probe: probe.rank)
        for part in [list(of_rank)]
        for start in range(0, len(part), together)
    ]


def _together(answers: Sequence[Sequence[Seen]]) -> list[Seen]:
    """What any worker saw: most stages of a pipeline see nothing, and the last norm's turn only its
    own rank sees.

    Raises:
        SettingsError: no worker saw anything.
    """
    saw = [answer for answer in answers if answer]
    if not saw:
        raise SettingsError(f"steps give no hidden states to prove steering by; {SKIP}")
    return [
        Seen(
            step=kinds[0].step,
            noise=largest(kind.noise for kind in kinds),
            identity=largest(kind.identity for kind in kinds),
            moved=tuple(
                tuple(map(largest, zip(*moved, strict=True)))
                for moved in zip(*(kind.moved for kind in kinds), strict=True)
            ),
            beside=tuple(map(largest, zip(*(kind.beside for kind in kinds), strict=True))),
            passes=kinds[0].passes,
        )
        for kinds in zip(*saw, strict=True)
    ]


def _complaint(dead: dict[str, list[Probe]], probes: int, names: Sequence[str]) -> str:
    """In one line, what did nothing of so many probes, and why that may be."""
    parts = []
    for step, still in dead.items():
        of_plane = sorted(still, key=_rank_and_slot)
        for (rank, slot), of in itertools.groupby(of_plane, key=_rank_and_slot):
            sites = [probe.site for probe in of]
            more = f" and {len(sites) - NAMED} more" if len(sites) > NAMED else ""
            where = ", ".join(sites[:NAMED]) + more
            parts.append(f"at {where} of plane {names[slot]!r} on rank {rank} in a {step}")
    every = any(len(still) == probes for still in dead.values())
    cause = (
        "the graph was made without steering: is the compile cache of another wiring?"
        if every
        else "a fused function may read the norm's weight and never call the norm"
    )
    return f"steering does nothing {'; '.join(parts)} ({cause}); {SKIP}"


def _rank_and_slot(probe: Probe) -> tuple[int, int]:
    return probe.rank, probe.slot


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]" if shape else "another buffer"
