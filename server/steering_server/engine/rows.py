"""Each request's steering -> the row of each token, once a step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering_kernels import Mode, encode_row, identity_row
from steering_kernels.rows import MODE
from steering_server.engine.bank import Bank
from steering_server.request.rotation import Rotation

_MODES = {"rotate_by": Mode.ROTATE_BY, "rotate_to": Mode.ROTATE_TO}
_SCOPES = {"all": 0, "prompt": 1, "generated": 2}
_PROMPT, _GENERATED = _SCOPES["prompt"], _SCOPES["generated"]


class Rows:
    """The rows of a step's tokens, in a device buffer that never moves.

    Requests have places in a table (the model runner's own numbering of its batch); a step names
    the places it runs, and every token gets a copy of its request's rows.

    Args:
        max_requests: places in the table.
        max_tokens: the most tokens of a step, padding included.
        max_planes: rotations a request.
        bank: gives the planes' slots.
        device: where the model runs.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        max_planes: int,
        bank: Bank,
        device: torch.device,
    ) -> None:
        self._bank = bank
        self._identity = np.array([identity_row()] * max_planes, dtype=np.float32)
        self._table = np.tile(self._identity, (max_requests, 1, 1))  # [requests, planes, 5]
        self._scope = np.zeros((max_requests, max_planes), dtype=np.int8)
        self._prompt = np.zeros(max_requests, dtype=np.int64)
        self._steered = np.zeros(max_requests, dtype=bool)
        self._written = 0
        self._host = np.tile(self._identity, (max_tokens, 1, 1))
        self.tokens: Tensor = torch.from_numpy(self._host.copy()).to(device)
        """[tokens, planes, 5] float32; see :mod:`steering_kernels.rows`."""

    def put(self, place: int, rotations: tuple[Rotation, ...], prompt_tokens: int) -> None:
        """Let the request at ``place`` be steered by ``rotations``; none of them leaves it alone.

        Args:
            place: the request's index in the runner's numbering.
            rotations: at most ``max_planes``, in order of application.
            prompt_tokens: where the generated tokens begin.

        Raises:
            RuntimeError: more rotations than the graph was built for, or a plane that the bank
                lacks; every place is then as it was.
        """
        if len(rotations) > len(self._identity):
            raise RuntimeError(
                f"{len(rotations)} rotations in a graph built for {len(self._identity)}"
            )
        # All of it before any of it is kept: a rotation that fails must not leave half a row.
        encoded = [
            encode_row(_MODES[r.mode], r.angle, self._bank.slot(r.digest), r.gate)
            for r in rotations
        ]
        self._table[place] = self._identity
        self._scope[place] = _SCOPES["all"]
        for k, r in enumerate(rotations):
            self._table[place, k] = encoded[k]
            self._scope[place, k] = _SCOPES[r.tokens]
        self._prompt[place] = prompt_tokens
        self._steered[place] = bool(rotations)

    def write(
        self, places: NDArray[np.intp], scheduled: NDArray[np.int32], computed: NDArray[np.int32]
    ) -> None:
        """Write a step's rows to the device; tokens beyond the step's get identity rows.

        Args:
            places: [n] the step's requests, in the order of their tokens.
            scheduled: [n] tokens of each in this step.
            computed: [n] tokens of each before this step. Where vLLM only knows an upper bound
                (speculative tokens still in flight) the bound serves: it can only be too high for
                tokens that are generated anyway.

        Raises:
            RuntimeError: a step larger than the buffer.
        """
        total = int(scheduled.sum())
        if total > len(self._host):
            raise RuntimeError(f"{total} tokens in a step, rows for {len(self._host)}")
        if not self._steered[places].any():
            self._flush(0)
            return
        owners = np.repeat(places, scheduled)  # [tokens]
        np.take(self._table, owners, axis=0, out=self._host[:total])
        if self._scope[places].any():
            starts = np.cumsum(scheduled) - scheduled
            positions = np.arange(total) - np.repeat(starts - computed, scheduled)
            generated = (positions >= self._prompt[owners])[:, None]
            scope = self._scope[owners]  # [tokens, planes]
            outside = ((scope == _PROMPT) & generated) | ((scope == _GENERATED) & ~generated)
            self._host[:total, :, MODE][outside] = Mode.OFF
        self._flush(total)

    def _flush(self, total: int) -> None:
        """Copy the first ``total`` host rows; reset what the step before left behind them."""
        reach = max(total, self._written)
        self._host[total:reach] = self._identity
        self._written = total
        if not reach:
            return
        rows = torch.from_numpy(self._host[:reach])
        if self.tokens.device.type == "cuda":
            # A pinned copy for each step: the host may write the next step's rows while this one's
            # transfer still waits for its turn. The allocator reuses it only once it is done.
            self.tokens[:reach].copy_(rows.pin_memory(), non_blocking=True)
        else:
            self.tokens[:reach].copy_(rows)
