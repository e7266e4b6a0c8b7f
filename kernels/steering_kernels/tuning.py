"""How the kernels are laid out on the device. None is tuned at run time: a capture cannot wait.

``make gpu-check`` times every layout of :data:`LAYOUTS`, and says which is the fastest at each
shape: what is chosen here is to follow it, with the figure beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

MAX_WARPS = 16

Form = Literal["branch", "early", "joint"]
"""How the norm's kernel comes by a token's operation.

``branch`` looks at the row after the norm and loads the basis only then: three loads and two
reductions wait for one another. ``early`` issues the loads of row and basis before the norm's
reduction. ``joint`` takes the coordinates from the unrounded activation, so that they are summed
together with its squares: one reduction.
"""


@dataclass(frozen=True)
class Layout:
    """A launch of the norm's kernel.

    Attributes:
        form: see :data:`Form`; of one plane a request only, ``branch`` serves several.
        tokens: that one program takes, keeping gain and basis in registers while the slot stays.
        columns: of a warp.
    """

    form: Form = "branch"
    tokens: int = 1
    columns: int = 512

    def __str__(self) -> str:
        return f"{self.form}, {self.tokens} a program, {self.columns} a warp"


LAYOUTS = tuple(
    Layout(form, tokens, columns)
    for tokens in (1, 4)
    for form in get_args(Form)
    for columns in (512, 1024)
    # At 8192 columns a thread of its 16 warps would need more than the 128 registers there are.
    if (form, tokens, columns) != ("joint", 4, 512)
)
"""What ``make gpu-check`` compares."""


def layout(hidden: int, tokens: int) -> Layout:
    """The layout of the norm's kernel for activations [tokens, hidden].

    H100, bf16, before there were other forms: fused / norm alone 1.06 (16384 x 8192) to 1.59
    (4 x 8192), benchmarks/results/kernels.json. The other forms have not run on a GPU.
    """
    return Layout()


def block_and_warps(hidden: int, columns: int = 512) -> tuple[int, int]:
    """Columns of a program (a power of two that holds ``hidden``), and its warps.

    512 columns a warp are 16 a thread: two 16-byte accesses in bf16, four in fp32.
    """
    block = 1 << (hidden - 1).bit_length()
    return block, min(MAX_WARPS, max(1, block // columns))
