"""How a kernel is laid out on the device. Nothing is tuned at run time: a capture must not wait."""

MAX_WARPS = 16


def block_and_warps(hidden: int) -> tuple[int, int]:
    """Columns of a program (a power of two that holds ``hidden``), and its warps.

    512 columns a warp are 16 a thread: two 16-byte accesses in bf16, four in fp32.
    """
    block = 1 << (hidden - 1).bit_length()
    return block, min(MAX_WARPS, max(1, block // 512))
