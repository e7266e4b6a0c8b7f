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


def step(recording: Recording, norm: nn.Module, *batch: tuple[int, int, int]) -> None:
    """A step of (scheduled, computed, prompt) requests; row i of h is i, counted over all steps."""
    scheduled, computed, prompts = (np.array(c, dtype=np.int32) for c in zip(*batch, strict=True))
    recording.step(scheduled, computed, prompts)
    total = int(scheduled.sum())
    # A padded graph runs more rows than are scheduled.
    norm(torch.arange(total + 3, dtype=torch.float32)[:, None].expand(-1, 4))


def rows(recording: Recording) -> list[int]:
    taken = recording.take()
    return [int(row[0]) for row in taken[SITE]] if taken else []


def test_prompts_that_end_in_this_step_are_kept_once() -> None:
    recording, norm = Recording(), Pair()
    recording.watch(SITE, norm)
    # Whole, a first chunk, a last chunk of one token, and one that generates.
    step(recording, norm, (5, 0, 5), (4, 0, 9), (1, 7, 8), (1, 6, 6))
    assert rows(recording) == [4, 9]
    step(recording, norm, (1, 5, 5), (5, 4, 9))
    assert rows(recording) == [5]
    step(recording, norm, (1, 6, 5))
    assert rows(recording) == []


def test_rows_gather_until_they_are_taken() -> None:
    recording, norm = Recording(), nn.Identity()
    recording.watch(SITE, norm)
    step(recording, norm, (2, 0, 2))
    step(recording, norm, (3, 0, 3))
    taken = recording.take()[SITE]
    assert taken.shape == (2, 4)
    assert taken.dtype == torch.float32
    assert recording.take() == {}
