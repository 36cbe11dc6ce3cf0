"""Winograd's F(4x4, 3x3) transforms of one tile, all 36 points of LANES channels at once.

With the points 0, 1, -1, 2, -2 and infinity; A, B and G are the matrices of the paper. The gradient's transform is the
transpose of the output's.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from sd_vae.ops.vectors import LANES, Vectors, offset_of

__all__ = ["gradient_transform", "input_transform", "output_transform", "weight_transform"]


def _input_row(v: Vectors, d: list[Any]) -> list[Any]:
    """B^T d: six samples to six points."""
    t0, t1 = v.scaled_add(-4, d[2], d[4]), v.scaled_add(-4, d[1], d[3])
    t2, half = v.sub(d[4], d[2]), v.sub(d[3], d[1])
    t3 = v.add(half, half)
    first = v.scaled_add(4, d[0], v.scaled_add(-5, d[2], d[4]))
    last = v.scaled_add(4, d[1], v.scaled_add(-5, d[3], d[5]))
    return [first, v.add(t0, t1), v.sub(t0, t1), v.add(t2, t3), v.sub(t2, t3), last]


def _output_row(v: Vectors, m: list[Any]) -> list[Any]:
    """A^T m: six points to four samples."""
    a, b, c, d = v.add(m[1], m[2]), v.sub(m[1], m[2]), v.add(m[3], m[4]), v.sub(m[3], m[4])
    return [
        v.add(v.add(m[0], a), c),
        v.scaled_add(2, d, b),
        v.scaled_add(4, c, a),
        v.add(v.scaled_add(8, d, b), m[5]),
    ]


def _gradient_row(v: Vectors, y: list[Any]) -> list[Any]:
    """A y: four samples to six points, the transpose of `_output_row`."""
    even, odd = v.add(y[0], y[2]), v.add(y[1], y[3])
    wide, tall = v.scaled_add(4, y[2], y[0]), v.scaled_add(8, y[3], v.scale(2, y[1]))
    return [y[0], v.add(even, odd), v.sub(even, odd), v.add(wide, tall), v.sub(wide, tall), y[3]]


def _weight_row(v: Vectors, w: list[Any]) -> list[Any]:
    """G w: three weights to six points."""
    even = v.add(w[0], w[2])
    small, middle = v.scaled_add(1 / 24, w[0], v.scale(1 / 6, w[2])), v.scale(1 / 12, w[1])
    return [
        v.scale(1 / 4, w[0]),
        v.scale(-1 / 6, v.add(even, w[1])),
        v.scale(-1 / 6, v.sub(even, w[1])),
        v.add(small, middle),
        v.sub(small, middle),
        w[2],
    ]


@intrinsic
def input_transform(_: Any, table: Any, offset: Any, target: Any, step: Any) -> Any:
    """B^T d B of one tile and LANES channels.

    table holds the addresses of the tile's 6x6 pixels, offset is the first channel's in bytes; the 36 points go to
    target, target + step, ...
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, offset, target, step = arguments
        v = Vectors(builder)
        columns = []
        for j in range(6):
            samples = [v.load(builder.add(v.entry(table, 6 * i + j), offset)) for i in range(6)]
            columns.append(_input_row(v, samples))
        for i in range(6):
            for point in _input_row(v, [columns[j][i] for j in range(6)]):
                v.store(point, target)
                target = builder.add(target, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def output_transform(_: Any, points: Any, step: Any, table: Any, offset: Any, bias: Any, add: Any) -> Any:
    """A^T m A + bias of one tile and LANES channels, added to what is there where `add` is not zero.

    The 36 points lie at points, points + step, ...; table holds the addresses of the 4x4 output pixels.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        points, step, table, offset, bias, add = arguments
        v = Vectors(builder)
        m = []
        for _ in range(36):
            m.append(v.load(points))
            points = builder.add(points, step)
        columns = [_output_row(v, m[j::6]) for j in range(6)]
        shift = v.load(builder.add(bias, offset))
        rows = [_output_row(v, [columns[j][i] for j in range(6)]) for i in range(4)]
        pixels = [(v.add(value, shift), i) for i, value in enumerate(value for row in rows for value in row)]
        with builder.if_else(builder.icmp_signed("!=", add, offset_of(0))) as (then, otherwise):
            with then:
                for value, i in pixels:
                    address = builder.add(v.entry(table, i), offset)
                    v.store(v.add(value, v.load(address)), address)
            with otherwise:
                for value, i in pixels:
                    v.store(value, builder.add(v.entry(table, i), offset))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def gradient_transform(_: Any, table: Any, offset: Any, target: Any, step: Any) -> Any:
    """A Y A^T of the gradient of one tile and LANES channels, the transpose of `output_transform`.

    table holds the addresses of the tile's 4x4 pixels; the 36 points go to target, target + step, ...
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, offset, target, step = arguments
        v = Vectors(builder)
        columns = []
        for j in range(4):
            samples = [v.load(builder.add(v.entry(table, 4 * i + j), offset)) for i in range(4)]
            columns.append(_gradient_row(v, samples))
        for i in range(6):
            for point in _gradient_row(v, [columns[j][i] for j in range(4)]):
                v.store(point, target)
                target = builder.add(target, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def weight_transform(_: Any, source: Any, target: Any, step: Any) -> Any:
    """G w G^T for LANES pairs of channels: nine vectors in order, to 36 at target, target + step, ..."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, step = arguments
        v = Vectors(builder)
        w = [v.load(builder.add(source, offset_of(4 * LANES * i))) for i in range(9)]
        columns = [_weight_row(v, w[x::3]) for x in range(3)]
        for i in range(6):
            for point in _weight_row(v, [columns[x][i] for x in range(3)]):
                v.store(point, target)
                target = builder.add(target, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate
