"""Each request's steering -> the row of each token, once a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering_kernels import Mode, encode_row, identity_row
from steering_kernels.rows import COS, MODE, SIN
from steering_server.engine.bank import Bank
from steering_server.request.angle import PARTS, Ramp
from steering_server.request.operation import Operation
from steering_server.request.window import ALL, LAST

_MODES = {
    "rotate_by": Mode.ROTATE_BY,
    "rotate_to": Mode.ROTATE_TO,
    "add": Mode.ADD,
    "ablate": Mode.ABLATE,
    "cap": Mode.CAP,
}

# See _time: on at every position, at one angle.
_ALWAYS = (0.0, float(LAST), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Rows:
    """The rows of a step's tokens, in a device buffer that never moves.

    Requests have places in a table (the model runner's own numbering of its batch); a step names
    the places it runs, and every token gets a copy of its request's rows, on, off and turned as its
    position says.

    Args:
        max_requests: places in the table.
        max_tokens: the most tokens of a step, padding included.
        max_planes: operations a request.
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
        self._table = np.tile(self._identity, (max_requests, 1, 1))  # [requests, planes, 7]
        self._always = np.tile(np.array(_ALWAYS), (max_planes, 1))
        self._times = np.tile(self._always, (max_requests, 1, 1))  # [requests, planes, 8]
        self._steered = np.zeros(max_requests, dtype=bool)
        self._timed = np.zeros(max_requests, dtype=bool)
        self._ramped = np.zeros(max_requests, dtype=bool)
        self._written = 0
        self._host = np.tile(self._identity, (max_tokens, 1, 1))
        self.tokens: Tensor = torch.from_numpy(self._host.copy()).to(device)
        """[tokens, planes, 7] float32; see :mod:`steering_kernels.rows`."""

    def put(self, place: int, operations: tuple[Operation, ...], prompt_tokens: int) -> None:
        """Let the request at ``place`` be steered by ``operations``; none of them leaves it alone.

        Args:
            place: the request's index in the runner's numbering.
            operations: at most ``max_planes``, in order of application.
            prompt_tokens: where the generated tokens begin.

        Raises:
            RuntimeError: more operations than the graph was built for, a plane that the bank lacks,
                or one with an angle for each of several choices; every place is then as it was.
        """
        if len(operations) > len(self._identity):
            raise RuntimeError(
                f"{len(operations)} operations in a graph built for {len(self._identity)}"
            )
        # All of it before any of it is kept: an operation that fails must not leave half a row.
        rows, times = self._identity.copy(), self._always.copy()
        for k, operation in enumerate(operations):
            rows[k] = self._encoded(operation)
            times[k] = _time(operation, prompt_tokens)
        self._table[place] = rows
        self._times[place] = times
        self._steered[place] = bool(operations)
        self._ramped[place] = any(isinstance(o.angle, Ramp) for o in operations)
        self._timed[place] = self._ramped[place] or any(o.tokens != ALL for o in operations)

    def _encoded(self, operation: Operation) -> list[float]:
        if (angle := operation.angle) is None:
            raise RuntimeError(f"an angle for each of {len(operation.fan)} choices in one request")
        return encode_row(
            _MODES[operation.mode],
            angle.start if isinstance(angle, Ramp) else angle,
            self._bank.slot(operation.digest),
            operation.gate,
            operation.strength or 0.0,
            operation.keep_norm,
        )

    def write(
        self,
        places: NDArray[np.intp],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
        positions: Tensor | None = None,
    ) -> None:
        """Write a step's rows to the device; tokens beyond the step's get identity rows.

        Args:
            places: [n] the step's requests, in the order of their tokens.
            scheduled: [n] tokens of each in this step.
            computed: [n] tokens of each before this step.
            positions: [tokens or more] each token's position, on the device, where vLLM knows it
                only there: with speculative tokens still in flight ``computed`` is an upper bound.

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
        if not self._timed[places].any():
            self._flush(total)
            return
        times = self._times[owners]  # [tokens, planes, 8]
        ramped = bool(self._ramped[places].any())
        if positions is None:
            starts = np.cumsum(scheduled) - scheduled
            at = np.arange(total) - np.repeat(starts - computed, scheduled)
            settle(np, self._host[:total], times, at, ramped=ramped)
            self._flush(total)
        else:
            self._flush(total)
            sent = self._pinned(torch.from_numpy(times)).to(self.tokens.device, non_blocking=True)
            settle(torch, self.tokens[:total], sent, positions[:total], ramped=ramped)

    def _flush(self, total: int) -> None:
        """Copy the first ``total`` host rows; reset what the step before left behind them."""
        reach = max(total, self._written)
        self._host[total:reach] = self._identity
        self._written = total
        if reach:
            rows = self._pinned(torch.from_numpy(self._host[:reach]))
            self.tokens[:reach].copy_(rows, non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        # A copy for each step: the host may write the next step's values while this one's transfer
        # still waits for its turn. The allocator reuses it only once it is done.
        return values.pin_memory() if self.tokens.device.type == "cuda" else values


def _time(operation: Operation, prompt_tokens: int) -> tuple[float, ...]:
    """When an operation acts, and how its angle moves.

    Returns:
        Start and stop of each of two spans of positions; then the position that its angle starts to
        change at, that angle, the one that it comes to, and after how many tokens (0: not at all).
    """
    spans = [float(end) for span in operation.tokens.spans(prompt_tokens) for end in span]
    spans += [0.0] * (4 - len(spans))
    ramp = operation.angle
    if not isinstance(ramp, Ramp):
        return (*spans, 0.0, 0.0, 0.0, 0.0)
    return (*spans, float(prompt_tokens), ramp.start, ramp.stop, float(ramp.over))


def settle(xp: Any, rows: Any, times: Any, positions: Any, *, ramped: bool) -> None:
    """Turn rows off, or to their angle, as their tokens' positions say; in place.

    Args:
        xp: numpy or torch, whichever has the positions.
        rows: [T, planes, 7] float32.
        times: [T, planes, 8] float64, see :func:`_time`.
        positions: [T].
        ramped: whether any angle changes.
    """
    at = positions[:, None]  # [T, 1]
    start1, stop1, start2, stop2 = (times[..., i] for i in range(4))
    on = ((at >= start1) & (at < stop1)) | ((at >= start2) & (at < stop2))
    if ramped:
        origin, start, stop, over = (times[..., i] for i in range(4, 8))
        # As Ramp.at, to the last digit.
        done, ramps = at - origin, over > 0
        degrees = start + (stop - start) * done / xp.where(ramps, over, 1.0)
        degrees = xp.round(degrees * PARTS) / PARTS
        degrees = xp.where(done <= 0, start, xp.where(done >= over, stop, degrees))
        cos, sin = _cos_sin(xp, degrees)
        rows[..., COS] = xp.where(ramps, cos, rows[..., COS])
        rows[..., SIN] = xp.where(ramps, sin, rows[..., SIN])
        turns_none = (rows[..., MODE] == float(Mode.ROTATE_BY)) & (degrees % 360.0 == 0)
        on &= ~(ramps & turns_none)
    rows[..., MODE] = xp.where(on, rows[..., MODE], float(Mode.OFF))


def _cos_sin(xp: Any, degrees: Any) -> tuple[Any, Any]:
    """As :func:`steering_planes.cos_sin`, of many: exact at multiples of 90."""
    quarter = xp.round(degrees / 90.0)
    rest = (degrees - 90.0 * quarter) * (math.pi / 180.0)  # Within 45 degrees of an axis.
    c, s = xp.cos(rest), xp.sin(rest)
    quarter = quarter % 4
    odd, flips = quarter % 2 == 1, quarter >= 2
    cos, sin = xp.where(odd, -s, c), xp.where(odd, c, s)
    return xp.where(flips, -cos, cos), xp.where(flips, -sin, sin)
