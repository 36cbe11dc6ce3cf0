"""Vectors in numba: LLVM IR for what its own loop vectoriser does at a third of the speed.

LANES floats make a vector; a product's register tile is ROWS x 2 vectors of accumulators. Both follow the processor.
Addresses are plain integers; `sd_vae.ops.winograd` checks shapes and layout before any is made.
"""

from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "ADDRESS",
    "COLUMNS",
    "FLOATS",
    "LANES",
    "ROWS",
    "Vectors",
    "atomic_add",
    "constant",
    "copy_vector",
    "has_fused_vectors",
    "offset_of",
    "scale_shift_silu",
    "store_zero",
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
COLUMNS = ROWS // 3 * 2  # of the other product, whose rows must divide LANES
UNROLL = 4  # steps of the inner product in one turn of its loop

FLOATS = ir.VectorType(ir.FloatType(), LANES)
INTS = ir.VectorType(ir.IntType(32), LANES)
ADDRESS = ir.IntType(64)
FUSE = ("contract", "nsz")


def constant(value: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(FLOATS, [float(value)] * LANES)


def offset_of(value: int) -> ir.Constant:
    """A number of bytes, or an index."""
    return ir.Constant(ADDRESS, value)


class Vectors:
    """The handful of vector operations that the formulas below are written in."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def load(self, address: Any) -> Any:
        """LANES floats from an address."""
        return self.builder.load(self.builder.inttoptr(address, FLOATS.as_pointer()), align=4)

    def store(self, value: Any, address: Any) -> None:
        """LANES floats to an address."""
        self.builder.store(value, self.builder.inttoptr(address, FLOATS.as_pointer()), align=4)

    def broadcast(self, address: Any) -> Any:
        """One float, in all lanes."""
        value = self.builder.load(self.builder.inttoptr(address, ir.FloatType().as_pointer()), align=4)
        first = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, ir.Constant(FLOATS, ir.Undefined), ir.Constant(INTS, [0] * LANES))

    def add(self, a: Any, b: Any) -> Any:
        """The sum a + b."""
        return self.builder.fadd(a, b, flags=FUSE)

    def sub(self, a: Any, b: Any) -> Any:
        """The difference a - b."""
        return self.builder.fsub(a, b, flags=FUSE)

    def scale(self, factor: float, a: Any) -> Any:
        """The product factor * a."""
        return self.builder.fmul(constant(factor), a, flags=FUSE)

    def scaled_add(self, factor: float, a: Any, b: Any) -> Any:
        """Factor * a + b."""
        return self.builder.fadd(self.scale(factor, a), b, flags=FUSE)

    def call(self, name: str, *operands: Any) -> Any:
        """One of LLVM's own vector functions, such as llvm.fma."""
        kind = ir.FunctionType(FLOATS, [FLOATS] * len(operands))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, operands)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """The product and sum a * b + c, rounded once."""
        return self.call("fma", a, b, c)

    def entry(self, table: Any, index: int) -> Any:
        """The index-th address of a table of addresses."""
        pointer = self.builder.inttoptr(table, ADDRESS.as_pointer())
        return self.builder.load(self.builder.gep(pointer, [offset_of(index)]))


@intrinsic
def copy_vector(_: Any, source: Any, target: Any) -> Any:
    """LANES floats from one address to another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(builder)
        v.store(v.load(arguments[0]), arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def store_zero(_: Any, address: Any) -> Any:
    """LANES zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        Vectors(builder).store(constant(0), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def scale_shift_silu(_: Any, source: Any, target: Any, scale: Any, shift: Any, activate: Any) -> Any:
    """Store y = x * scale + shift, or y * sigmoid(y) where `activate` is not zero, for LANES channels of a pixel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, scale, shift, activate = arguments
        v = Vectors(builder)
        y = v.fma(v.load(source), v.load(scale), v.load(shift))
        total = cgutils.alloca_once_value(builder, y)
        with builder.if_then(builder.icmp_signed("!=", activate, offset_of(0))):
            builder.store(builder.fdiv(y, v.add(constant(1), _exp(v, builder.fneg(y)))), total)
        v.store(builder.load(total), target)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


def _exp(v: Vectors, x: Any) -> Any:
    """e^x to 2 units in the last place: 2^n by the exponent's bits, 2^f on [-1/2, 1/2] by a polynomial.

    Clamped where the result would leave the normal numbers: SiLU is y or 0 there to the last bit.
    """
    builder = v.builder
    x = v.call("minnum", v.call("maxnum", x, constant(-87.0)), constant(88.0))
    n = v.call("rint", builder.fmul(x, constant(1.4426950408889634)))
    f = v.fma(n, constant(-0.693359375), x)  # ln 2 in two parts, the first exact in its product with n
    f = v.fma(n, constant(2.12194440e-4), f)
    p = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = v.fma(p, f, constant(coefficient))
    exponent = builder.shl(builder.fptosi(n, INTS), ir.Constant(INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, INTS), exponent), FLOATS)


@intrinsic
def atomic_add(_: Any, address: Any, value: Any) -> Any:
    """Add to the integer at an address, and return what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ADDRESS.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate
