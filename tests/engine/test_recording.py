"""Which rows of a step are the last tokens of prompts."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from steering_planes import Site
from steering_server.engine.recording import Recording

SITE = Site(3, "mlp_in")


class Pair(nn.Module):
    """A norm that returns its residual, too."""

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return h, h * 2


def step(recording: Recording, norm: nn.Module, **batch: tuple[int, int, int]) -> None:
    """A step of (scheduled, computed, prompt) requests; row i of h is i."""
    numbers = zip(*batch.values(), strict=True)
    recording.step(list(batch), *(np.array(c, dtype=np.int32) for c in numbers))
    scheduled = [request[0] for request in batch.values()]
    total = sum(scheduled)
    # A padded graph runs more rows than are scheduled.
    norm(torch.arange(total + 3, dtype=torch.float32)[:, None].expand(-1, 4))


def rows(recording: Recording) -> dict[str, int]:
    requests, taken = recording.take()
    kept = [int(row[0]) for row in taken[SITE]] if taken else []
    return dict(zip(requests, kept, strict=True))


def test_prompts_that_end_in_this_step_are_kept_once() -> None:
    recording, norm = Recording(), Pair()
    recording.watch(SITE, norm)
    step(recording, norm, whole=(5, 0, 5), first=(4, 0, 9), last=(1, 7, 8), generates=(1, 6, 6))
    assert rows(recording) == {"whole": 4, "last": 9}
    step(recording, norm, whole=(1, 5, 5), first=(5, 4, 9))
    assert rows(recording) == {"first": 5}
    step(recording, norm, whole=(1, 6, 5))
    assert rows(recording) == {}


def test_rows_gather_until_they_are_taken() -> None:
    recording, norm = Recording(), nn.Identity()
    recording.watch(SITE, norm)
    step(recording, norm, b=(2, 0, 2))
    step(recording, norm, a=(3, 0, 3))
    requests, taken = recording.take()
    assert requests == ["b", "a"]
    assert taken[SITE].shape == (2, 4)
    assert taken[SITE].dtype == torch.float32
    assert recording.take() == ([], {})
