"""3x3 convolution on the CPU by Winograd F(4x4, 3x3): a quarter of the multiplications, exact in real arithmetic.

Source and result are pixels in order (H, W, C), fp32. The source is given row by row, so that it may lie in several
bands; a GroupNorm's scale and shift with SiLU, a nearest-neighbour doubling and a residual addition are done on the
way. Rounding costs 2 to 3 times that of a direct convolution (`tests/ops`); no result depends on threads or blocks.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_vae.ops import kernels
from sd_vae.ops.threads import num_threads, run_together
from sd_vae.ops.vectors import LANES, ROWS
from sd_vae.ops.workspace import ALIGNMENT, Workspace

__all__ = ["Affine", "convolve", "scratch_bytes", "unsupported", "weight_gradient"]

Rows = npt.NDArray[np.int64]

ALL_POINTS = np.arange(36)
# Of a doubled source two of the six points in each direction are always equal, and their difference is zero.
DOUBLED_POINTS = np.array([p for p in range(36) if p // 6 != 2 and p % 6 != 2])
# G: three weights to six points.
POINTS = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)
MAX_TILES = 72  # in a block: what is transformed stays in the second-level cache


@dataclass(frozen=True)
class Affine:
    """What happens to a source pixel before the convolution: x * scale + shift by channel, then SiLU or not."""

    scale: Tensor
    shift: Tensor
    activate: bool

    @classmethod
    def identity(cls, num_channels: int) -> "Affine":
        """Leave pixels as they are."""
        return cls(torch.ones(num_channels), torch.zeros(num_channels), False)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """As the kernels take it."""
        return self.scale.data_ptr(), self.shift.data_ptr(), int(self.activate)


def unsupported(in_channels: int, out_channels: int) -> str | None:
    """Why these widths are outside the kernels' domain; None where they are inside."""
    if in_channels % LANES:
        return f"{in_channels} input channels are not a multiple of {LANES}"
    if out_channels % (2 * LANES):
        return f"{out_channels} output channels are not a multiple of {2 * LANES}"
    return None


def convolve(
    rows: Rows,
    num_columns: int,
    affine: Affine,
    points: npt.NDArray[np.float32],
    bias: Tensor,
    out: Tensor,
    workspace: Workspace,
    *,
    add: bool = False,
    double: bool = False,
) -> None:
    """Write conv3x3(silu(x * scale + shift)) + bias into `out`, or add it to what is there.

    Args:
        rows: By picture, address of each source row, from the one above the first that is asked for to the one below
            the last, (B, rows); 0 is a row of zeros.
        num_columns: Pixels in a source row.
        affine: What happens to each pixel first; zeros outside the map stay zero.
        points: Weights as `transformed` gives them.
        bias: (C_out,).
        out: (B, R, W, C_out), contiguous.
        workspace: Where scratch memory comes from.
        add: Add to `out`.
        double: Read the source as if every pixel were repeated 2x2: `out` has twice its rows and columns.
    """
    num_pictures, height, width, out_channels = out.shape
    in_channels = len(affine.scale)
    step = 2 if double else 4
    grid = num_pictures, -(-height // 4), -(-width // 4)
    block = _block(*grid, num_threads())
    table = np.zeros((num_pictures, grid[1] * step + 2), np.int64)
    table[:, : rows.shape[1]] = rows
    offsets = _layout(block, step, in_channels, out_channels)
    base = workspace.scratch("winograd", (offsets[-1] * num_threads(),)).data_ptr()
    scratch = (base, base + offsets[0], base + offsets[1], *offsets[2:])
    counter = np.zeros(1, np.int64)
    chosen = DOUBLED_POINTS if double else ALL_POINTS

    def work(thread: int) -> None:
        kernels.convolve(
            counter.ctypes.data,
            thread,
            (*grid, height, width),
            block,
            table,
            num_columns,
            (in_channels, out_channels),
            affine.addresses,
            (points.ctypes.data, bias.data_ptr()),
            chosen,
            double,
            (out.data_ptr(), int(add)),
            scratch,
        )

    run_together(work)


def weight_gradient(source: Tensor, gradient: Tensor, workspace: Workspace) -> Tensor:
    """Return the gradient of a 3x3 convolution's weights, (C_out, C_in, 3, 3).

    G^T (sum over tiles of (B^T d B) (A y A^T)) G, the transpose of the convolution in its weights.

    Args:
        source: (B, H, W, C_in), contiguous.
        gradient: Of the result, (B, H, W, C_out), contiguous.
        workspace: Where scratch memory comes from.
    """
    num_pictures, height, width, in_channels = source.shape
    out_channels = gradient.shape[3]
    tiles = -(-height // 4), -(-width // 4)
    rows = np.zeros((num_pictures, tiles[0] * 4 + 2), np.int64)
    gradient_rows = np.zeros((num_pictures, tiles[0] * 4), np.int64)
    index = np.arange(num_pictures * height).reshape(num_pictures, height)
    rows[:, 1 : height + 1] = source.data_ptr() + 4 * width * in_channels * index
    gradient_rows[:, :height] = gradient.data_ptr() + 4 * width * out_channels * index
    # As in `_layout`: steps that spread the 36 points over the cache.
    summed, stripe = kernels.TILES_SUMMED, min(kernels.STRIPE, in_channels)
    left_step, right_step = (_round_up(summed * c * 4, 2048) + ALIGNMENT for c in (stripe, out_channels))
    patch = _round_up(max(in_channels, out_channels) * 4, ALIGNMENT)
    own = _round_up(patch + 36 * (left_step + right_step), 4096)
    base = workspace.scratch("winograd", (own * num_threads(),)).data_ptr()
    scratch = (base, base + patch, base + patch + 36 * left_step, left_step, right_step, own)
    sums = torch.zeros(36, in_channels, out_channels)
    counter = np.zeros(1, np.int64)

    def work(thread: int) -> None:
        kernels.weight_gradient(
            counter.ctypes.data,
            thread,
            (num_pictures, *tiles, height, width),
            rows,
            gradient_rows,
            (in_channels, out_channels),
            sums.data_ptr(),
            scratch,
        )

    run_together(work)
    both = torch.kron(POINTS, POINTS)  # (36, 9)
    taps = (both.t() @ sums.view(36, -1)).view(9, in_channels, out_channels)
    return taps.permute(2, 1, 0).reshape(out_channels, in_channels, 3, 3)


def scratch_bytes(height: int, width: int, in_channels: int, out_channels: int, *, double: bool = False) -> int:
    """Scratch memory that a convolution of one picture with this output size takes."""
    block = _block(1, -(-height // 4), -(-width // 4), num_threads())
    return _layout(block, 2 if double else 4, in_channels, out_channels)[-1] * num_threads()


def _layout(
    block: tuple[int, int, int], step: int, in_channels: int, out_channels: int
) -> tuple[int, int, int, int, int]:
    """Where points in and out start, bytes from one point to the next in each, and bytes a thread."""
    pictures, down, across = block
    padded = -(-pictures * down * across // ROWS) * ROWS
    # One line more than a multiple of a large power of two, or all 36 points compete for the same cache sets.
    left_step, product_step = (_round_up(padded * c * 4, 2048) + ALIGNMENT for c in (in_channels, kernels.PANEL))
    patch = pictures * (down * step + 2) * (across * step + 2) * in_channels * 4
    left = _round_up(max(patch, out_channels * 4), ALIGNMENT)
    product = left + 36 * left_step
    return left, product, left_step, product_step, _round_up(product + 36 * product_step, 4096)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache(maxsize=256)
def _block(num_pictures: int, tiles_down: int, tiles_across: int, threads: int) -> tuple[int, int, int]:
    """Pictures, tiles down and tiles across that a block has: the cheapest for the busiest thread.

    Counted in tiles that are multiplied, the register tile's empty rows among them; a block's pixels, borders included,
    are normalised at about a tenth of that, and fetching the weights costs about ten tiles.
    """
    best = (float("inf"), (1, 1, 1))
    for down in range(1, min(tiles_down, MAX_TILES) + 1):
        for across in range(1, min(tiles_across, MAX_TILES // down) + 1):
            whole = down == tiles_down and across == tiles_across
            border = (4 * down + 2) * (4 * across + 2) / 16
            for pictures in range(1, min(num_pictures, MAX_TILES // (down * across)) + 1 if whole else 2):
                places = -(-tiles_down // down) * -(-tiles_across // across)
                rounds = -(-(-(-num_pictures // pictures) * places) // threads)
                padded = -(-pictures * down * across // ROWS) * ROWS
                cost = rounds * (padded + 0.1 * pictures * border + 10)
                best = min(best, (cost, (pictures, down, across)))
    return best[1]
