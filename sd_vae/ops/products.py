"""Register tiles of matrix products: what a processor's vector registers hold is multiplied through at once.

All sums run over K in order, so a result does not depend on how the tiles are shared out.

Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.
"""

from typing import Any

from numba import types
from numba.extending import intrinsic

from sd_vae.ops.vectors import ADDRESS, COLUMNS, FLOATS, LANES, ROWS, UNROLL, Vectors, constant, offset_of

__all__ = ["accumulate", "multiply"]


@intrinsic
def multiply(_: Any, left: Any, right: Any, target: Any, num_chunks: Any) -> Any:
    """One register tile of a matrix product: (ROWS, K) times (K, 2 LANES), K = num_chunks * LANES.

    left is stored [chunk][ROWS][LANES], right [K][2 LANES], target [ROWS][2 LANES]; all sums run over K in order, so
    the result does not depend on how the tiles are shared out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, target, num_chunks = arguments
        v = Vectors(builder)
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
            low = v.load(builder.add(b, offset_of(8 * LANES * k)))
            high = v.load(builder.add(b, offset_of(8 * LANES * k + 4 * LANES)))
            for row in range(ROWS):
                value = v.broadcast(builder.add(a, offset_of(4 * (LANES * row + k))))
                sums[2 * row] = v.fma(value, low, sums[2 * row])
                sums[2 * row + 1] = v.fma(value, high, sums[2 * row + 1])
        turn = builder.add(turn, offset_of(1))
        a, b = builder.add(a, offset_of(4 * UNROLL)), builder.add(b, offset_of(8 * LANES * UNROLL))
        builder.cbranch(builder.icmp_signed("<", turn, offset_of(LANES // UNROLL)), inner, outer_end)

        builder.position_at_end(outer_end)
        chunk = builder.add(outer_state[0], offset_of(1))
        next_left = builder.add(outer_state[1], offset_of(4 * LANES * ROWS))
        builder.cbranch(builder.icmp_signed("<", chunk, num_chunks), outer, done)

        start = [offset_of(0), left, right] + [constant(0)] * (2 * ROWS)
        for phi, initial, later in zip(outer_state, start, [chunk, next_left, b, *sums], strict=True):
            phi.add_incoming(initial, entry)
            phi.add_incoming(later, outer_end)
        for phi, initial, later in zip(inner_state, outer_state, [turn, a, b, *sums], strict=True):
            phi.add_incoming(offset_of(0) if phi is inner_state[0] else initial, outer)
            phi.add_incoming(later, inner)

        builder.position_at_end(done)
        for index, total in enumerate(sums):
            v.store(total, builder.add(target, offset_of(4 * LANES * index)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def accumulate(
    _: Any, left: Any, left_step: Any, right: Any, right_step: Any, target: Any, row_step: Any, num: Any
) -> Any:
    """Add a register tile of left^T right, (K, COLUMNS)^T (K, 2 LANES), to the target, for K = num.

    Steps are the bytes from one k to the next, and from one row of the target to the next.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, left_step, right, right_step, target, row_step, num = arguments
        v = Vectors(builder)
        rows = [builder.add(target, builder.mul(row_step, offset_of(row))) for row in range(COLUMNS)]
        places = [builder.add(row, offset_of(4 * LANES * half)) for row in rows for half in range(2)]
        start = [v.load(place) for place in places]
        entry = builder.block
        loop, done = (builder.function.append_basic_block() for _ in range(2))
        builder.branch(loop)

        builder.position_at_end(loop)
        state = [builder.phi(ADDRESS) for _ in range(3)] + [builder.phi(FLOATS) for _ in places]
        k, a, b, *sums = state
        low, high = v.load(b), v.load(builder.add(b, offset_of(4 * LANES)))
        for row in range(COLUMNS):
            value = v.broadcast(builder.add(a, offset_of(4 * row)))
            sums[2 * row] = v.fma(value, low, sums[2 * row])
            sums[2 * row + 1] = v.fma(value, high, sums[2 * row + 1])
        later = [builder.add(k, offset_of(1)), builder.add(a, left_step), builder.add(b, right_step), *sums]
        for phi, initial, following in zip(state, [offset_of(0), left, right, *start], later, strict=True):
            phi.add_incoming(initial, entry)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", later[0], num), loop, done)

        builder.position_at_end(done)
        for total, place in zip(sums, places, strict=True):
            v.store(total, place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate
