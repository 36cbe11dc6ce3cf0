"""What numba compiles: 3x3 convolution by Winograd F(4x4, 3x3), its weights, and GroupNorm's statistics.

A convolution works through blocks of 4x4 output tiles. A block normalises the pixels that it reads (so a normalised
feature map is never stored), transforms them, multiplies 36 matrices, and transforms back into the output, all in
memory that stays in the processor's cache. Threads take blocks from a counter; no sum depends on which thread or block
it falls into. Addresses are integers that `sd_vae.ops.winograd` has checked; lengths named *_bytes are in bytes.
"""

import numpy as np
from numba import njit

from sd_vae.ops.products import accumulate, multiply
from sd_vae.ops.transforms import gradient_transform, input_transform, output_transform, weight_transform
from sd_vae.ops.vectors import COLUMNS, LANES, ROWS, atomic_add, copy_vector, scale_shift_silu, store_zero

__all__ = [
    "convolve",
    "convolve_directly",
    "fill_window",
    "fingerprint",
    "normalise",
    "statistics",
    "transform_weights",
]

VECTOR_BYTES = 4 * LANES
PANEL_BYTES = 8 * LANES
PANEL = 2 * LANES  # output channels of one register tile
STRIPE = 64  # input channels whose weights' gradient a thread sums at a time
TILES_SUMMED = 48
STRETCH = 4 * ROWS  # output pixels whose sources are gathered at once
MIX = np.uint64(0x9E3779B97F4A7C15)
INLINED = "6d8aece2a77b1cdf"
"""sha256 of products.py, transforms.py and vectors.py, which are compiled into these kernels: numba keeps compiled code
for as long as this file stays as it is, so this file has to change with them."""


@njit(cache=True, nogil=True)
def _clear(address, num_bytes):
    """Zeros from an address on."""
    for c in range(0, num_bytes, VECTOR_BYTES):
        store_zero(address + c)


@njit(cache=True, nogil=True)
def normalise(source, num_pixels, width_bytes, scale, shift, activate, target):
    """Scale, shift and perhaps SiLU of consecutive pixels, each `width_bytes` of channels."""
    for pixel in range(num_pixels):
        base = pixel * width_bytes
        for c in range(0, width_bytes, VECTOR_BYTES):
            scale_shift_silu(source + base + c, target + base + c, scale + c, shift + c, activate)


@njit(cache=True, nogil=True)
def fill_window(rows, first_row, first_column, height, width, num_columns, width_bytes, norm, target):
    """Normalised pixels of a window into a map, zero outside it; `rows` holds each row's address, 0 for a row outside.

    norm: addresses of scale and shift, and whether SiLU follows.
    """
    scale, shift, activate = norm
    for i in range(height):
        row = rows[first_row + i]
        line = target + i * width * width_bytes
        before = min(width, max(0, -first_column))
        after = min(width, max(before, num_columns - first_column))
        if row == 0:
            before = after = width
        _clear(line, before * width_bytes)
        source = row + (first_column + before) * width_bytes
        normalise(source, after - before, width_bytes, scale, shift, activate, line + before * width_bytes)
        _clear(line + after * width_bytes, (width - after) * width_bytes)


@njit(cache=True, nogil=True)
def convolve(counter, thread, grid, block, rows, num_columns, channels, norm, weights, points, double, out, scratch):
    """Blocks of one convolution until the counter runs out.

    grid: pictures, tiles down and across, output rows and columns. block: the same three, of a block. rows: by picture,
    address of each source row from the one above the first. channels: in, out. norm: addresses of scale and shift, and
    whether SiLU follows. weights: addresses of the transformed weights and the bias. points: which of the 36 to
    multiply, the others being zero. double: whether every source pixel is read as if repeated 2x2. out: address, and
    whether to add to it. scratch: addresses of patch, points in, points out; bytes between points in, points out; bytes
    a thread.
    """
    num_pictures, tiles_down, tiles_across, out_height, out_width = grid
    block_pictures, block_down, block_across = block
    in_bytes, out_bytes = channels[0] * 4, channels[1] * 4
    step = 2 if double else 4
    own = thread * scratch[5]
    patch, left, product = scratch[0] + own, scratch[1] + own, scratch[2] + own
    left_step, product_step = scratch[3], scratch[4]
    table = np.empty(36, np.int64)
    table_address = table.ctypes.data
    if len(points) < 36:
        _clear(product, 36 * product_step)
    blocks_down, blocks_across = -(-tiles_down // block_down), -(-tiles_across // block_across)
    num_blocks = -(-num_pictures // block_pictures) * blocks_down * blocks_across
    while True:
        index = atomic_add(counter, 1)
        if index >= num_blocks:
            break
        first, rest = index // (blocks_down * blocks_across) * block_pictures, index % (blocks_down * blocks_across)
        top, start = rest // blocks_across * block_down, rest % blocks_across * block_across
        pictures = min(block_pictures, num_pictures - first)
        down, across = min(block_down, tiles_down - top), min(block_across, tiles_across - start)
        height, width = down * step + 2, across * step + 2
        for picture in range(pictures):
            target = patch + picture * height * width * in_bytes
            source = rows[first + picture]
            fill_window(source, top * step, start * step - 1, height, width, num_columns, in_bytes, norm, target)
        num_tiles = pictures * down * across
        for tile in range(num_tiles):
            picture, place = tile // (down * across), tile % (down * across)
            y, x = picture * height + place // across * step, place % across * step
            for i in range(6):
                for j in range(6):
                    dy, dx = ((i + 1) >> 1, (j + 1) >> 1) if double else (i, j)
                    table[6 * i + j] = patch + ((y + dy) * width + x + dx) * in_bytes
            target = left + tile // ROWS * ROWS * in_bytes + tile % ROWS * VECTOR_BYTES
            for c in range(0, in_bytes, VECTOR_BYTES):
                input_transform(table_address, c, target + c * ROWS, left_step)
        for panel in range(0, out_bytes, PANEL_BYTES):
            for p in points:
                right = weights[0] + (panel * 36 + p * PANEL_BYTES) * channels[0]
                for group in range(-(-num_tiles // ROWS)):
                    a = left + p * left_step + group * ROWS * in_bytes
                    c = product + p * product_step + group * ROWS * PANEL_BYTES
                    multiply(a, right, c, channels[0] // LANES)
            for tile in range(num_tiles):
                picture, place = tile // (down * across), tile % (down * across)
                y, x = (top + place // across) * 4, (start + place % across) * 4
                corner = out[0] + (first + picture) * out_height * out_width * out_bytes
                for i in range(4):
                    for j in range(4):
                        inside = y + i < out_height and x + j < out_width
                        # Beyond the edge: thrown onto the patch, which is spent.
                        table[4 * i + j] = corner + ((y + i) * out_width + x + j) * out_bytes if inside else patch
                for c in range(0, PANEL_BYTES, VECTOR_BYTES):
                    source = product + tile * PANEL_BYTES + c
                    output_transform(source, product_step, table_address, panel + c, weights[1], out[1])


@njit(cache=True, nogil=True)
def weight_gradient(counter, thread, grid, rows, gradient_rows, channels, target, scratch):
    """Winograd's gradient of the transformed weights, (36, C_in, C_out), STRIPE input channels at a time.

    grid: pictures, tiles down and across, rows and columns. rows, gradient_rows: by picture, addresses of the rows of
    the source, from the one above the first, and of the result's gradient. channels: in, out. target: its address, all
    zeros. scratch: addresses of patch, source points, gradient points; bytes between points in each; bytes a thread.
    """
    num_pictures, tiles_down, tiles_across, num_rows, num_columns = grid
    in_bytes, out_bytes = channels[0] * 4, channels[1] * 4
    own = thread * scratch[5]
    patch, left, right = scratch[0] + own, scratch[1] + own, scratch[2] + own
    left_step, right_step = scratch[3], scratch[4]
    table = np.empty(36, np.int64)
    table_address = table.ctypes.data
    _clear(patch, max(in_bytes, out_bytes))
    num_tiles = num_pictures * tiles_down * tiles_across
    while True:
        first = atomic_add(counter, STRIPE) * 4
        if first >= in_bytes:
            break
        stripe = min(STRIPE * 4, in_bytes - first)
        for start in range(0, num_tiles, TILES_SUMMED):
            together = min(TILES_SUMMED, num_tiles - start)
            for tile in range(together):
                picture, place = (
                    (start + tile) // (tiles_down * tiles_across),
                    (start + tile) % (tiles_down * tiles_across),
                )
                y, x = place // tiles_across * 4, place % tiles_across * 4
                for i in range(6):
                    for j in range(6):
                        row, column = rows[picture, y + i], x + j - 1
                        inside = row != 0 and 0 <= column < num_columns
                        table[6 * i + j] = row + column * in_bytes + first if inside else patch
                for c in range(0, stripe, VECTOR_BYTES):
                    input_transform(table_address, c, left + tile * stripe + c, left_step)
                for i in range(4):
                    for j in range(4):
                        inside = y + i < num_rows and x + j < num_columns
                        table[4 * i + j] = gradient_rows[picture, y + i] + (x + j) * out_bytes if inside else patch
                for c in range(0, out_bytes, VECTOR_BYTES):
                    gradient_transform(table_address, c, right + tile * out_bytes + c, right_step)
            for p in range(36):
                for c in range(0, stripe, 4 * COLUMNS):
                    sums = target + (p * channels[0] + (first + c) // 4) * out_bytes
                    for panel in range(0, out_bytes, PANEL_BYTES):
                        a, b = left + p * left_step + c, right + p * right_step + panel
                        accumulate(a, stripe, b, out_bytes, sums + panel, out_bytes, together)


@njit(cache=True, nogil=True)
def convolve_directly(counter, thread, size, rows, num_columns, stride, taps, channels, weights, out, scratch):
    """Stretches of output rows of a 1x1 or strided convolution until the counter runs out.

    size: output rows and columns. rows: address of each source row that tap (0, .) of output row 0 starts from; 0 is a
    row of zeros, and so are columns beyond the last. taps: down and across. channels: in, out. weights: addresses of
    (C_out / PANEL, taps, C_in, PANEL) and of the bias. scratch: addresses of one vector of ones, gathered source,
    products; bytes a thread.
    """
    height, width = size
    taps_down, taps_across = taps
    in_bytes, out_bytes = channels[0] * 4, channels[1] * 4
    left, product = scratch[1] + thread * scratch[3], scratch[2] + thread * scratch[3]
    depth_bytes = taps_down * taps_across * in_bytes
    across = -(-width // STRETCH)
    while True:
        index = atomic_add(counter, 1)
        if index >= height * across:
            break
        y, start = index // across, index % across * STRETCH
        num_pixels = min(STRETCH, width - start)
        for pixel in range(num_pixels):
            target = left + pixel // ROWS * ROWS * depth_bytes + pixel % ROWS * VECTOR_BYTES
            for dy in range(taps_down):
                row = rows[y * stride + dy]
                for dx in range(taps_across):
                    x = (start + pixel) * stride + dx
                    inside = row != 0 and x < num_columns
                    for c in range(0, in_bytes, VECTOR_BYTES):
                        if inside:
                            copy_vector(row + x * in_bytes + c, target)
                        else:
                            store_zero(target)
                        target += ROWS * VECTOR_BYTES
        for panel in range(0, out_bytes, PANEL_BYTES):
            right = weights[0] + panel // 4 * depth_bytes
            for group in range(0, num_pixels, ROWS):
                multiply(left + group * depth_bytes, right, product, depth_bytes // VECTOR_BYTES)
                for pixel in range(group, min(group + ROWS, num_pixels)):
                    source = product + (pixel - group) * PANEL_BYTES
                    target = out + (y * width + start + pixel) * out_bytes + panel
                    for c in range(0, PANEL_BYTES, VECTOR_BYTES):
                        scale_shift_silu(source + c, target + c, scratch[0], weights[1] + panel + c, 0)


@njit(cache=True, nogil=True)
def transform_weights(counter, weight, target):
    """G w G^T of 3x3 weights (C_out, C_in, 3, 3), any strides, into (C_out / PANEL, 36, C_in, PANEL)."""
    num_panels, _, num_inputs, _ = target.shape
    taps = np.empty((9, LANES), np.float32)
    while True:
        panel = atomic_add(counter, 1)
        if panel >= num_panels:
            break
        for c in range(num_inputs):
            for first in range(0, PANEL, LANES):
                for lane in range(LANES):
                    for i in range(9):
                        taps[i, lane] = weight[panel * PANEL + first + lane, c, i // 3, i % 3]
                address = target[panel, 0, c, first:].ctypes.data
                weight_transform(taps.ctypes.data, address, num_inputs * PANEL_BYTES)


@njit(cache=True, nogil=True)
def statistics(band, mean, second):
    """Each row's mean and sum of squared differences from it, by channel: (R, W, C) into two of (R, C).

    Sums of differences from the row's first pixel, so that a mean far from zero does not cancel.
    """
    num_rows, num_columns, num_channels = band.shape
    shift = np.empty(num_channels, np.float32)
    first, squares = np.empty(num_channels, np.float32), np.empty(num_channels, np.float32)
    for row in range(num_rows):
        shift[:] = band[row, 0]
        first[:] = 0
        squares[:] = 0
        for column in range(num_columns):
            for c in range(num_channels):
                difference = band[row, column, c] - shift[c]
                first[c] += difference
                squares[c] += difference * difference
        for c in range(num_channels):
            mean[row, c] = np.float64(shift[c]) + np.float64(first[c]) / num_columns
            second[row, c] = squares[c] - np.float64(first[c]) * first[c] / num_columns


@njit(cache=True, nogil=True)
def fingerprint(words):
    """A 64-bit hash of a contiguous array of uint32, in lanes that the processor runs side by side."""
    lanes = np.full(32, MIX, np.uint64)
    for start in range(0, len(words) - 31, 32):
        for lane in range(32):
            lanes[lane] = (lanes[lane] ^ np.uint64(words[start + lane])) * MIX + np.uint64(lane)
    for index in range(len(words) // 32 * 32, len(words)):
        lanes[index % 32] = (lanes[index % 32] ^ np.uint64(words[index])) * MIX
    result = np.uint64(len(words))
    for lane in range(32):
        result = (result ^ (lanes[lane] >> np.uint64(29)) ^ lanes[lane]) * MIX
    return result
