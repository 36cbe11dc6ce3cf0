"""1x1 convolution, and 3x3 with stride 2, on the CPU: gathered pixels times weights, without a padded or unfolded copy.

Source and result are pixels in order (H, W, C), fp32; the source is given row by row, so that it may lie in bands.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_vae.ops import kernels
from sd_vae.ops.threads import num_threads, run_together
from sd_vae.ops.vectors import LANES
from sd_vae.ops.workspace import Workspace

__all__ = ["convolve_directly", "panels", "scratch_bytes"]


def panels(weight: Tensor, workspace: Workspace) -> Tensor:
    """Return weights (C_out, C_in, kh, kw) in the kernel's order, (C_out / PANEL, kh kw, C_in, PANEL)."""
    num_out, num_in, *taps = weight.shape
    shape = (num_out // kernels.PANEL, taps[0] * taps[1], num_in, kernels.PANEL)
    room = workspace.scratch("panels", shape, torch.float32)
    return room.copy_(weight.detach().view(shape[0], kernels.PANEL, num_in, -1).permute(0, 3, 2, 1))


def convolve_directly(
    rows: npt.NDArray[np.int64],
    num_columns: int,
    weights: Tensor,
    bias: Tensor,
    out: Tensor,
    workspace: Workspace,
    *,
    taps: int,
    stride: int,
) -> None:
    """Write a convolution, padded by zeros on the right and at the bottom only, into `out`.

    Args:
        rows: Address of each source row from the first on; 0 is a row of zeros.
        num_columns: Pixels in a source row.
        weights: As `panels` gives them.
        bias: (C_out,).
        out: (R, W, C_out), contiguous.
        workspace: Where scratch memory comes from.
        taps: Width of the square kernel.
        stride: Source pixels from one output pixel to the next.
    """
    height, width, out_channels = out.shape
    in_channels = weights.shape[2]
    depth = taps * taps * in_channels
    own = _thread_bytes(taps, in_channels)
    room = workspace.scratch("winograd", (scratch_bytes(taps, in_channels),))
    room[: 4 * LANES].view(torch.float32).fill_(1)
    left = room.data_ptr() + 4 * LANES
    scratch = (room.data_ptr(), left, left + 4 * kernels.STRETCH * depth, own)
    counter = np.zeros(1, np.int64)

    def work(thread: int) -> None:
        kernels.convolve_directly(
            counter.ctypes.data,
            thread,
            (height, width),
            rows,
            num_columns,
            stride,
            (taps, taps),
            (in_channels, out_channels),
            (weights.data_ptr(), bias.data_ptr()),
            out.data_ptr(),
            scratch,
        )

    run_together(work)


def scratch_bytes(taps: int, in_channels: int) -> int:
    """Scratch memory that a convolution takes."""
    return 4 * LANES + _thread_bytes(taps, in_channels) * num_threads()


def _thread_bytes(taps: int, in_channels: int) -> int:
    return 4 * kernels.STRETCH * (taps * taps * in_channels + kernels.PANEL)
