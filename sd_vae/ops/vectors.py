"""Vector instructions for the Winograd kernels, emitted as LLVM IR through numba.

numba's own loop vectoriser reaches a third of these kernels' speed (`benchmarks/`), so the four inner steps are
written as vectors: the 6x6 input transform, the 4x4 output transform, the matrix product's register tile, and
scale-shift-SiLU. Addresses are plain integers; `sd_vae.ops.winograd` checks shapes and layout before any is made.

LANES floats make a vector; the register tile is ROWS x 2 vectors of accumulators. Both follow the processor.

Sources: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, F(4x4, 3x3) with the
points 0, 1, -1, 2, -2, infinity; Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
"""

from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "ROWS",
    "atomic_add",
    "copy_vector",
    "has_fused_vectors",
    "input_transform",
    "multiply",
    "output_transform",
    "scale_shift_silu",
    "store_zero",
    "weight_transform",
]


def _host_features() -> dict[str, bool]:
    """What numba compiles for: the host's features, or those that NUMBA_CPU_FEATURES names."""
    named = numba.config.CPU_FEATURES
    if named is None:
        return dict(llvm.get_host_cpu_features())
    return {feature.lstrip("+"): True for feature in named.split(",") if feature.startswith("+")}


def has_fused_vectors() -> bool:
    """Whether the processor has the vectors and the fused multiply-add that these kernels are written for."""
    features = _host_features()
    return bool(features.get("avx2") and features.get("fma"))


# 32 vector registers of 16 floats, or 16 of 8: accumulators, two of the right-hand side, one broadcast.
LANES, ROWS = (16, 12) if _host_features().get("avx512f") else (8, 6)
UNROLL = 4  # steps of the inner product in one turn of its loop

FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
ADDRESS = ir.IntType(64)
FUSE = ("contract", "nsz")


def _constant(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [float(value)] * LANES)


def _offset(value: int) -> ir.Constant:
    return ir.Constant(ADDRESS, value)


class _Vectors:
    """The handful of vector operations that the formulas below are written in."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, address: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, FLOATS.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, FLOATS.as_pointer()), align=4)

    def broadcast(self, address: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, ir.FloatType().as_pointer()), align=4)
        first = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, ir.Constant(FLOATS, ir.Undefined), ir.Constant(INTS, [0] * LANES))

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=FUSE)

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=FUSE)

    def scale(self, factor: float, a: Any) -> Any:
        return self.builder.fmul(_constant(factor), a, flags=FUSE)

    def scaled_add(self, factor: float, a: Any, b: Any) -> Any:
        """Factor * a + b."""
        return self.builder.fadd(self.scale(factor, a), b, flags=FUSE)

    def call(self, name: str, *operands: Any) -> Any:
        """One of LLVM's own vector functions, such as llvm.fma."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(operands))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, operands)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("fma", a, b, c)

    def entry(self, table: Any, index: int) -> Any:
        """The index-th address of a table of addresses."""
        pointer = self.builder.inttoptr(table, ADDRESS.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [_offset(index)]))


def _input_row(v: _Vectors, d: list[Any]) -> list[Any]:
    """B^T d: six samples to six points."""
    t0, t1 = v.scaled_add(-4, d[2], d[4]), v.scaled_add(-4, d[1], d[3])
    t2, half = v.sub(d[4], d[2]), v.sub(d[3], d[1])
    t3 = v.add(half, half)
    first = v.scaled_add(4, d[0], v.scaled_add(-5, d[2], d[4]))
    last = v.scaled_add(4, d[1], v.scaled_add(-5, d[3], d[5]))
    return [first, v.add(t0, t1), v.sub(t0, t1), v.add(t2, t3), v.sub(t2, t3), last]


def _output_row(v: _Vectors, m: list[Any]) -> list[Any]:
    """A^T m: six points to four samples."""
    a, b, c, d = v.add(m[1], m[2]), v.sub(m[1], m[2]), v.add(m[3], m[4]), v.sub(m[3], m[4])
    return [
        v.add(v.add(m[0], a), c),
        v.scaled_add(2, d, b),
        v.scaled_add(4, c, a),
        v.add(v.scaled_add(8, d, b), m[5]),
    ]


@intrinsic
def input_transform(_: Any, table: Any, offset: Any, target: Any, step: Any) -> Any:
    """B^T d B of one tile and LANES channels.

    table holds the addresses of the tile's 6x6 pixels, offset is the first channel's in bytes; the 36 points go to
    target, target + step, ...
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, offset, target, step = arguments
        v = _Vectors(builder)
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
        v = _Vectors(builder)
        m = []
        for _ in range(36):
            m.append(v.load(points))
            points = builder.add(points, step)
        columns = [_output_row(v, m[j::6]) for j in range(6)]
        shift = v.load(builder.add(bias, offset))
        rows = [_output_row(v, [columns[j][i] for j in range(6)]) for i in range(4)]
        pixels = [(v.add(value, shift), i) for i, value in enumerate(value for row in rows for value in row)]
        with builder.if_else(builder.icmp_signed("!=", add, _offset(0))) as (then, otherwise):
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
def copy_vector(_: Any, source: Any, target: Any) -> Any:
    """LANES floats from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = _Vectors(builder)
        v.store(v.load(arguments[0]), arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def store_zero(_: Any, address: Any) -> Any:
    """LANES zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Vectors(builder).store(_constant(0), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _weight_row(v: _Vectors, w: list[Any]) -> list[Any]:
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
def weight_transform(_: Any, source: Any, target: Any, step: Any) -> Any:
    """G w G^T for LANES pairs of channels: nine vectors in order, to 36 at target, target + step, ..."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, step = arguments
        v = _Vectors(builder)
        w = [v.load(builder.add(source, _offset(4 * LANES * i))) for i in range(9)]
        columns = [_weight_row(v, w[x::3]) for x in range(3)]
        for i in range(6):
            for point in _weight_row(v, [columns[x][i] for x in range(3)]):
                v.store(point, target)
                target = builder.add(target, step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def scale_shift_silu(_: Any, source: Any, target: Any, scale: Any, shift: Any, activate: Any) -> Any:
    """Store y = x * scale + shift, or y * sigmoid(y) where `activate` is not zero, for LANES channels of a pixel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, scale, shift, activate = arguments
        v = _Vectors(builder)
        y = v.fma(v.load(source), v.load(scale), v.load(shift))
        total = cgutils.alloca_once_value(builder, y)
        with builder.if_then(builder.icmp_signed("!=", activate, _offset(0))):
            builder.store(builder.fdiv(y, v.add(_constant(1), _exp(v, builder.fneg(y)))), total)
        v.store(builder.load(total), target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _exp(v: _Vectors, x: Any) -> Any:
    """e^x to 2 units in the last place: 2^n by the exponent's bits, 2^f on [-1/2, 1/2] by a polynomial.

    Clamped where the result would leave the normal numbers: SiLU is y or 0 there to the last bit.
    """
    builder = v.builder
    x = v.call("minnum", v.call("maxnum", x, _constant(-87.0)), _constant(88.0))
    n = v.call("rint", builder.fmul(x, _constant(1.4426950408889634)))
    f = v.fma(n, _constant(-0.693359375), x)  # ln 2 in two parts, the first exact in its product with n
    f = v.fma(n, _constant(2.12194440e-4), f)
    p = _constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = v.fma(p, f, _constant(coefficient))
    exponent = builder.shl(builder.fptosi(n, INTS), ir.Constant(INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, INTS), exponent), FLOATS)


@intrinsic
def multiply(_: Any, left: Any, right: Any, target: Any, num_chunks: Any) -> Any:
    """One register tile of a matrix product: (ROWS, K) times (K, 2 LANES), K = num_chunks * LANES.

    left is stored [chunk][ROWS][LANES], right [K][2 LANES], target [ROWS][2 LANES]; all sums run over K in order, so
    the result does not depend on how the tiles are shared out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, target, num_chunks = arguments
        v = _Vectors(builder)
        entry = builder.block
        outer, inner, outer_end, done = (builder.function.append_basic_block() for _ in range(4))
        builder.branch(outer)

        builder.position_at_end(outer)
        outer_state = [builder.phi(ADDRESS) for _ in range(3)] + [builder.phi(FLOATS) for _ in range(2 * ROWS)]
        builder.branch(inner)

        builder.position_at_end(inner)
        inner_state = [builder.phi(ADDRESS) for _ in range(3)] + [builder.phi(FLOATS) for _ in range(2 * ROWS)]
        turn, a, b, *sums = inner_state
        for k in range(UNROLL):
            low = v.load(builder.add(b, _offset(8 * LANES * k)))
            high = v.load(builder.add(b, _offset(8 * LANES * k + 4 * LANES)))
            for row in range(ROWS):
                value = v.broadcast(builder.add(a, _offset(4 * (LANES * row + k))))
                sums[2 * row] = v.fma(value, low, sums[2 * row])
                sums[2 * row + 1] = v.fma(value, high, sums[2 * row + 1])
        turn = builder.add(turn, _offset(1))
        a, b = builder.add(a, _offset(4 * UNROLL)), builder.add(b, _offset(8 * LANES * UNROLL))
        builder.cbranch(builder.icmp_signed("<", turn, _offset(LANES // UNROLL)), inner, outer_end)

        builder.position_at_end(outer_end)
        chunk = builder.add(outer_state[0], _offset(1))
        next_left = builder.add(outer_state[1], _offset(4 * LANES * ROWS))
        builder.cbranch(builder.icmp_signed("<", chunk, num_chunks), outer, done)

        start = [_offset(0), left, right] + [_constant(0)] * (2 * ROWS)
        for phi, initial, later in zip(outer_state, start, [chunk, next_left, b, *sums], strict=True):
            phi.add_incoming(initial, entry)
            phi.add_incoming(later, outer_end)
        for phi, initial, later in zip(inner_state, outer_state, [turn, a, b, *sums], strict=True):
            phi.add_incoming(_offset(0) if phi is inner_state[0] else initial, outer)
            phi.add_incoming(later, inner)

        builder.position_at_end(done)
        for index, total in enumerate(sums):
            v.store(total, builder.add(target, _offset(4 * LANES * index)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def atomic_add(_: Any, address: Any, value: Any) -> Any:
    """Add to the integer at an address, and return what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ADDRESS.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate
