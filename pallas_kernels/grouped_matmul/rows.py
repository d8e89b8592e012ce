"""Rows times the matrix of their group, as a Pallas kernel for TPU.

The grid walks along the visits of `visits.py` for each tile of columns. The whole contraction lies in VMEM, so that the
matrices of a group are read once for all of its row tiles, and an output is written once. Inside, a loop over pieces of the
contraction keeps the sums in VMEM; the last piece masks what belongs to other groups and writes.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import tiling as tilings
from pallas_kernels.grouped_matmul import visits as planning
from pallas_kernels.grouped_matmul.quantized import Quantized

# What becomes of a tile: from the products with each matrix, and the tiles that were asked for besides, in float32.
Finish = Callable[..., tuple[Array, ...]]


def product(total):
    return (total,)


def add(total, other):
    return (total + other,)


def swiglu(gate, up):
    return (jax.nn.silu(gate) * up,)


def swiglu_gradient(gate, up, dout):
    """Of gate and of up."""
    sigmoid = jax.nn.sigmoid(gate)
    return dout * up * sigmoid * (1 + gate * (1 - sigmoid)), dout * gate * sigmoid


def swiglu_gradient_and_value(gate, up, dout):
    """Of gate and of up, then SwiGLU itself."""
    return *swiglu_gradient(gate, up, dout), *swiglu(gate, up)


def rows_product(
    lhs: Float[Array, "L M K"],
    matrices: Float[Array, "G W D F"] | Quantized,
    which: Sequence[int],
    group_sizes: Int[Array, " E"],
    group_offset: Int[Array, ""],
    *,
    finish: Finish = product,
    beside: Sequence[Float[Array, "1 M N"]] = (),
    results: int = 1,
    dtype=None,
    lhs_index: int = 0,
    transposed: bool = False,
    tiling: tilings.Tiling | None = None,
    interpret=False,
) -> Float[Array, "results M N"]:
    """finish(lhs_m W_1, lhs_m W_2, ..) for each row m, with the matrices W_i = matrices[g, which[i]] of its group g, or with
    their transposes.

    Args:
        finish: what becomes of the products of a tile.
        beside: further arguments of `finish`, row by row and column by column.
        results: that `finish` returns.
        dtype: of the results; None: as `lhs`.
        lhs_index: which one of `lhs`.
    """
    M, contraction = lhs.shape[1:]
    N = matrices.shape[2 if transposed else 3]
    block = matrices.block if isinstance(matrices, Quantized) else None
    parts = (matrices.values, matrices.scales) if block else (matrices,)
    stored = sum(part.dtype.itemsize * part.size for part in parts) / parts[0].size
    if parts[0].dtype == jnp.int4:
        stored -= 0.5
    unit = math.lcm(128, 8 * block) if block else 128  # of D: eight rows of scales
    units = (128, unit) if transposed else (unit, 128)
    dtype = dtype or lhs.dtype
    bytes_ = lhs.dtype.itemsize
    if tiling is None:
        tiles = sum(x.dtype.itemsize for x in beside) // bytes_ + results * dtype.itemsize // bytes_
        tiling = tilings.choose(
            M, contraction, N, bytes_, matrices=len(which), tiles=tiles, stored=stored if block else None, units=units
        )
    plan = planning.by_tile(*planning.spans(matrices.shape[0], group_sizes, group_offset), M, tiling.rows)
    columns = tilings.divisor(N, tiling.columns, units[1])
    pieces = contraction // tilings.divisor(contraction, tiling.piece, units[0])

    def matrix_index(one, n, v, tile, group, source, source_group, *_):
        return (source_group[v], one, n, 0) if transposed else (source_group[v], one, 0, n)

    def matrix_block(part):
        D = (columns if transposed else contraction) // (1 if part is parts[0] else block)
        return (1, 1, D, contraction if transposed else columns)

    tile = (tiling.rows, columns)
    sums = [pltpu.VMEM(tile, jnp.float32)] * (len(which) if pieces > 1 else 0)
    kernel = functools.partial(
        _kernel,
        matrices=len(which),
        beside=len(beside),
        pieces=pieces,
        transposed=transposed,
        finish=finish,
        block=block,
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((results, M, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(N // columns, plan.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((1, tiling.rows, contraction), lambda n, v, tile, group, source, *_: (lhs_index, source[v], 0)),
                *(pl.BlockSpec(matrix_block(x), functools.partial(matrix_index, one)) for one in which for x in parts),
                *(pl.BlockSpec((1, *tile), lambda n, v, tile, group, source, *_: (0, source[v], n)) for _ in beside),
            ],
            out_specs=pl.BlockSpec((results, *tile), lambda n, v, tile, *_: (0, tile[v], n)),
            scratch_shapes=sums,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tilings.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * contraction * N * len(which),
            transcendentals=M * N * (len(which) - 1),
            bytes_accessed=bytes_ * M * contraction * (N // columns)
            + int(stored * len(which) * parts[0][:, 0].size)
            + dtype.itemsize * results * M * N
            + sum(x.nbytes for x in beside),
        ),
        interpret=interpret,
        name=f"grouped_{'matmul' if finish is product else finish.__name__}" + "_transposed" * transposed,
    )(*plan.arrays(), lhs, *parts * len(which), *beside)


def _kernel(tile, group, source, source_group, start, stop, x, *refs, matrices, beside, pieces, transposed, finish, block):
    """`refs`: as many matrices, tiles beside, one output, and a sum for each matrix if there are several pieces. A quantised
    matrix is two: values and scales."""
    parts = 2 if block else 1
    weights, refs = [refs[parts * i :][:parts] for i in range(matrices)], refs[parts * matrices :]
    others, out, sums = refs[:beside], refs[beside], refs[beside + 1 :]
    _, rows, contraction = x.shape
    visit = pl.program_id(1)
    top, begin, end = tile[visit] * rows, start[visit], stop[visit]
    first = (visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != tile[visit])

    @pl.when(first & (begin >= end))
    def _clear():
        out[...] = jnp.zeros_like(out)

    def multiply(weight, piece):
        size = contraction // pieces
        part = pl.ds(pl.multiple_of(piece * size, size), size)
        matrix = weight[0][(0, 0, slice(None), part) if transposed else (0, 0, part, slice(None))]
        if block and transposed:
            matrix = _scaled(matrix, weight[1][0, 0, :, part], block).astype(x.dtype)
        elif block:
            some = size // block
            scales = weight[1][0, 0, pl.ds(pl.multiple_of(piece * some, some), some), :]
            matrix = _scaled(matrix, scales, block).astype(x.dtype)
        return dot(x[0, :, part], matrix, 1, 1 if transposed else 0)

    @pl.when(begin < end)
    def _multiply():
        if pieces > 1:

            def add_piece(piece, _):
                for total, weight in zip(sums, weights, strict=True):
                    total[...] = jnp.where(piece == 0, 0.0, total[...]) + multiply(weight, piece)

            jax.lax.fori_loop(0, pieces - 1, add_piece, None)
        totals = [multiply(weight, pieces - 1) for weight in weights]
        if pieces > 1:
            totals = [total + earlier[...] for total, earlier in zip(totals, sums, strict=True)]
        row = top + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= begin) & (row < end)
        for i, result in enumerate(finish(*totals, *(other[0].astype(jnp.float32) for other in others))):
            before = jnp.where(first, 0.0, out[i].astype(jnp.float32))  # what earlier visits wrote of this tile
            out[i] = jnp.where(mine, result, before).astype(out.dtype)


def _scaled(values, scales, block: int):
    """values [D, F] times scales [D / block, F], float32."""
    D, F = values.shape
    blocks = values.astype(jnp.float32).reshape(D // block, block, F)
    return (blocks * scales.astype(jnp.float32)[:, None]).reshape(D, F)


def dot(a, b, a_axis: int, b_axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
