"""The Triton kernels of GroupNorm and SiLU; `triton_norm` launches them. Importing this needs triton.

Maps are channels_last: row r of an image holds the `channels` values of one pixel, `num_rows` = H * W rows an image.
A program works on tiles of ROWS x COLUMNS values, in fp32 whatever the map's dtype, with masked edges, so no size or
width has to be a power of two. Tested in Triton's interpreter; unmeasured on a GPU.

Source of the merging: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances", 1979, eq. 2.1.
"""

# ruff: noqa: N803 - parameters fixed when a kernel is compiled are upper case, as everywhere in Triton

import triton
import triton.language as tl

__all__ = ["group_scales", "normalise", "row_block_moments"]


@triton.jit
def _merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Count, mean and sum of squared deviations (m2) of two samples together; either may be empty."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1.0)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def _tile(image, first_row, num_rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets into a map of the tile at `first_row` of an image, which values are inside, and its channels."""
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < channels)[None, :]
    # In 64 bits: a map of 4096x4096 with 128 channels has 2^31 values.
    offsets = (image.to(tl.int64) * num_rows + rows)[:, None] * channels + columns[None, :]
    return offsets, inside, columns


@triton.jit
def row_block_moments(
    x,
    residual,
    total,
    moments,
    num_rows,
    channels,
    tiles_per_block,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write mean and m2 of every channel over a block of rows to moments (B, blocks, 2, channels).

    A tile's deviations are taken from its own mean while it is in registers, so a mean far from zero does not cancel.
    With ADD the moments are those of x + residual, rounded to x's dtype, which is written to `total`.
    Grid: blocks, channels / COLUMNS, B.
    """
    block, image = tl.program_id(0), tl.program_id(2)
    count = 0.0
    mean = tl.zeros([COLUMNS], tl.float32)
    m2 = tl.zeros([COLUMNS], tl.float32)
    for tile in range(tiles_per_block):
        first_row = (block * tiles_per_block + tile) * ROWS
        offsets, inside, _ = _tile(image, first_row, num_rows, channels, ROWS, COLUMNS)
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
            rounded = (values + addend).to(total.dtype.element_ty)
            tl.store(total + offsets, rounded, mask=inside)
            values = rounded.to(tl.float32)
        tile_count = tl.minimum(tl.maximum(num_rows - first_row, 0), ROWS).to(tl.float32)
        tile_mean = tl.sum(values, axis=0) / tl.maximum(tile_count, 1.0)
        deviations = tl.where(inside, values - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(deviations * deviations, axis=0)
        count, mean, m2 = _merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    cells = (image.to(tl.int64) * tl.num_programs(0) + block) * 2 * channels + columns
    tl.store(moments + cells, mean, mask=columns < channels)
    tl.store(moments + cells + channels, m2, mask=columns < channels)


@triton.jit
def group_scales(
    moments,
    weight,
    scales,
    eps,
    num_rows,
    rows_per_block,
    num_blocks,
    channels,
    group_size,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge a group's moments; write its mean and weight / sqrt(var + eps) by channel to scales (B, 2, channels).

    Grid: num_groups, B.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    members = tl.arange(0, COLUMNS)
    columns = group * group_size + members
    count, mean, m2 = 0.0, 0.0, 0.0
    for first in range(0, num_blocks, BLOCKS):
        blocks = first + tl.arange(0, BLOCKS)
        inside = (blocks < num_blocks)[:, None] & (members < group_size)[None, :]
        cells = (image.to(tl.int64) * num_blocks + blocks)[:, None] * 2 * channels + columns[None, :]
        part_mean = tl.load(moments + cells, mask=inside, other=0.0)
        part_m2 = tl.load(moments + cells + channels, mask=inside, other=0.0)
        rows = tl.minimum(num_rows - blocks * rows_per_block, rows_per_block).to(tl.float32)
        part_count = tl.where(inside, rows[:, None], 0.0)
        tile_count = tl.sum(part_count)
        tile_mean = tl.sum(part_count * part_mean) / tile_count
        deviations = part_mean - tile_mean
        tile_m2 = tl.sum(part_m2 + part_count * deviations * deviations)
        count, mean, m2 = _merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    gain = tl.load(weight + columns, mask=members < group_size, other=0.0).to(tl.float32)
    cells = image * 2 * channels + columns
    tl.store(scales + cells, tl.zeros([COLUMNS], tl.float32) + mean, mask=members < group_size)
    tl.store(scales + cells + channels, gain / tl.sqrt(m2 / count + eps), mask=members < group_size)


@triton.jit
def normalise(
    x,
    scales,
    bias,
    out,
    num_rows,
    channels,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write (x - mean) * scale + bias, through SiLU where asked, to `out`. Grid: rows / ROWS, channels / COLUMNS, B."""
    image = tl.program_id(2)
    offsets, inside, columns = _tile(image, tl.program_id(0) * ROWS, num_rows, channels, ROWS, COLUMNS)
    cells = image * 2 * channels + columns
    mean = tl.load(scales + cells, mask=columns < channels, other=0.0)
    scale = tl.load(scales + cells + channels, mask=columns < channels, other=0.0)
    shift = tl.load(bias + columns, mask=columns < channels, other=0.0).to(tl.float32)
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    values = (values - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=inside)
