"""Which rows of a step are kept, of which requests."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from vllm import SamplingParams

from steering_planes import Site
from steering_server.engine.recording import RECORDED, Recording

SITE = Site(3, "mlp_in")


class Pair(nn.Module):
    """A norm that returns its residual, too."""

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return h, h * 2


def step(recording: Recording, norm: nn.Module, **batch: tuple[int, int]) -> None:
    """A step of (scheduled, computed) requests; row i of h is i."""
    numbers = zip(*batch.values(), strict=True)
    recording.step(list(batch), *(np.array(c, dtype=np.int32) for c in numbers))
    total = sum(request[0] for request in batch.values())
    # A padded graph runs more rows than are scheduled.
    norm(torch.arange(total + 3, dtype=torch.float32)[:, None].expand(-1, 4))


def params(start: int, stop: int) -> SamplingParams:
    return SamplingParams(extra_args={RECORDED: [start, stop]})


def rows(recording: Recording) -> dict[str, float]:
    counts, taken = recording.take()
    kept = taken[SITE][:, 0].tolist() if taken else []
    return dict(zip(counts, kept, strict=True))


def test_a_prompts_last_token_is_kept_once() -> None:
    recording, norm = Recording(), Pair()
    recording.watch(SITE, norm)
    for request, prompt in {"whole": 5, "first": 9, "last": 8, "generates": 6}.items():
        recording.expect(request, None, prompt)
    step(recording, norm, whole=(5, 0), first=(4, 0), last=(1, 7), generates=(1, 6))
    step(recording, norm, whole=(1, 5), first=(5, 4))
    step(recording, norm, whole=(1, 6))
    assert rows(recording) == {"whole": 4, "last": 9, "first": 5}
    assert recording.take() == ({}, {})


def test_a_span_is_averaged_over_the_chunks_it_comes_in() -> None:
    recording, norm = Recording(), nn.Identity()
    recording.watch(SITE, norm)
    recording.expect("a", params(2, 7), 8)
    recording.expect("b", params(1, 2), 2)
    step(recording, norm, b=(2, 0), a=(4, 0))  # a's positions 2 and 3 are rows 4 and 5
    step(recording, norm, a=(2, 4))  # 4 and 5: rows 0 and 1
    step(recording, norm, a=(2, 6), b=(1, 2))  # 6: row 0
    counts, taken = recording.take()
    assert counts == {"b": 1, "a": 5}
    assert taken[SITE][:, 0].tolist() == [1.0, (4 + 5 + 0 + 1 + 0) / 5]
    assert taken[SITE].shape == (2, 4)
    assert taken[SITE].dtype == torch.float32


def test_what_a_preempted_request_runs_twice_is_counted_twice() -> None:
    recording, norm = Recording(), nn.Identity()
    recording.watch(SITE, norm)
    recording.expect("a", params(0, 4), 4)
    step(recording, norm, a=(3, 0))
    step(recording, norm, a=(4, 0))
    counts, _ = recording.take()
    assert counts == {"a": 7}
