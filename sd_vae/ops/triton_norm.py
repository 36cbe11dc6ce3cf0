"""GroupNorm and SiLU fused for GPUs, in two passes over a channels_last map, with the residual add before it.

The first pass reads the map once and keeps mean and squared deviations of every channel over blocks of rows, enough
blocks to occupy the whole GPU; a small kernel merges them into a mean and a scale by channel; the second pass reads the
map again, scales, shifts, applies SiLU and writes. Everything between load and store is fp32. Where the map is itself
a residual sum, `add_with_statistics` makes it and its statistics in one pass. Forward only: no gradient.

The kernels are in `triton_kernels`, imported at the first launch: triton does not exist on macOS. Tested in Triton's
interpreter on a CPU; unmeasured on a GPU.

Shapes: B batch, D feature channels, H W the map's size.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Statistics", "add_with_statistics", "channel_statistics", "group_norm_silu", "supports"]

TILE_SIZE = 4096
"""Values that a program holds at a time: 32 a thread."""

MAX_COLUMNS = 128
"""Channels of a tile; 256 bytes in half precision, so that a warp reads whole cache lines."""

TARGET_PROGRAMS = 1024
"""Programs that occupy a GPU: about eight for each of an H200's 132 multiprocessors."""

MIN_CAPABILITY = (8, 0)
"""Oldest GPU that Triton supports, Ampere."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the first pass leaves for `group_norm_silu`."""

    moments: Tensor
    """Mean and sum of squared deviations of each channel over each block of rows, fp32 (B, blocks, 2, D)."""
    rows_per_block: int
    """Pixels of a block, counted along the flattened H * W; the last block may have fewer."""


def supports(x: Tensor, num_groups: int) -> str | None:
    """Return why the kernels cannot normalise x here, or None where they can.

    Their domain: triton installed, gradients off, not inside torch.compile (which fuses the plain operations itself), a
    non-empty channels_last map (B, D, H, W) in fp32, fp16 or bf16 on a CUDA device of capability 8.0, D divisible by
    num_groups.
    """
    import torch

    if torch.compiler.is_compiling():
        return "torch.compile fuses the plain operations itself"
    if x.device.type != "cuda":
        return f"x is on the {x.device.type}, not on a CUDA device"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x has dtype {x.dtype}, not float32, float16 or bfloat16"
    if torch.is_grad_enabled():
        return "gradients are on, and the kernels have none"
    if x.dim() != 4 or not x.numel():
        return f"x has shape {tuple(x.shape)}, not (B, D, H, W) with at least one value"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels_last"
    if x.shape[1] % num_groups:
        return f"{x.shape[1]} channels do not divide into {num_groups} groups"
    if not _triton_is_installed():
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, Triton needs 8.0"
    return None


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool,
    residual: Tensor | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """Return silu(group_norm(x)) or group_norm(x), of x's shape, dtype and format; `supports` says for which x.

    Args:
        x: Feature map (B, D, H, W), channels_last.
        weight: Gain of each channel (D,), any float dtype.
        bias: Shift of each channel (D,), any float dtype.
        num_groups: Groups that D is divided into.
        eps: Added to the variance, which is the mean squared deviation over a group of one image.
        silu: Apply SiLU after the norm.
        residual: Normalise x + residual instead; where that sum is needed too, call `add_with_statistics` first.
        statistics: Those of x where it is known already, so that the first pass is saved.
    """
    import torch

    from sd_vae.ops import triton_kernels

    if residual is not None:
        x, statistics = add_with_statistics(x, residual)
    if statistics is None:
        statistics = channel_statistics(x)
    batch_size, channels, height, width = x.shape
    num_rows, group_size = height * width, channels // num_groups
    scales = torch.empty((batch_size, 2, channels), dtype=torch.float32, device=x.device)
    normalised = torch.empty_like(x)
    rows, columns = _tile_shape(channels)
    members = _power_of_two(group_size)
    # Triton launches on the current device, which need not be x's.
    with torch.cuda.device_of(x):
        triton_kernels.group_scales[(num_groups, batch_size)](
            statistics.moments,
            weight,
            scales,
            eps,
            num_rows,
            statistics.rows_per_block,
            statistics.moments.shape[1],
            channels,
            group_size,
            BLOCKS=max(1, TILE_SIZE // members),
            COLUMNS=members,
        )
        triton_kernels.normalise[(_quotient(num_rows, rows), _quotient(channels, columns), batch_size)](
            x, scales, bias, normalised, num_rows, channels, SILU=silu, ROWS=rows, COLUMNS=columns
        )
    return normalised


def channel_statistics(x: Tensor) -> Statistics:
    """Return the statistics of a channels_last map (B, D, H, W), from one pass over it."""
    return _first_pass(x, x, x, add=False)


def add_with_statistics(x: Tensor, residual: Tensor) -> tuple[Tensor, Statistics]:
    """Return x + residual, rounded to x's dtype, and the statistics of that sum, from one pass.

    Args:
        x: Feature map (B, D, H, W), channels_last.
        residual: Another of the same shape and format.
    """
    import torch

    total = torch.empty_like(x)
    return total, _first_pass(x, residual, total, add=True)


def _first_pass(x: Tensor, residual: Tensor, total: Tensor, *, add: bool) -> Statistics:
    """Launch `row_block_moments`; without `add`, residual and total are not touched."""
    import torch

    from sd_vae.ops import triton_kernels

    batch_size, channels, height, width = x.shape
    rows, columns = _tile_shape(channels)
    num_tiles, num_column_tiles = _quotient(height * width, rows), _quotient(channels, columns)
    # The fewest blocks that still occupy the GPU: their moments are written and read again.
    tiles_per_block = max(1, batch_size * num_column_tiles * num_tiles // TARGET_PROGRAMS)
    num_blocks = _quotient(num_tiles, tiles_per_block)
    moments = torch.empty((batch_size, num_blocks, 2, channels), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        triton_kernels.row_block_moments[(num_blocks, num_column_tiles, batch_size)](
            x,
            residual,
            total,
            moments,
            height * width,
            channels,
            tiles_per_block,
            ADD=add,
            ROWS=rows,
            COLUMNS=columns,
        )
    return Statistics(moments=moments, rows_per_block=tiles_per_block * rows)


@functools.cache
def _triton_is_installed() -> bool:
    """Whether triton can be imported; looking takes longer than a small kernel."""
    return importlib.util.find_spec("triton") is not None


def _tile_shape(channels: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two."""
    columns = min(_power_of_two(channels), MAX_COLUMNS)
    return TILE_SIZE // columns, columns


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _quotient(number: int, divisor: int) -> int:
    """The number of times that divisor fits, rounded up."""
    return -(-number // divisor)
