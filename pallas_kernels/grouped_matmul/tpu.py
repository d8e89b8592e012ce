"""Grouped products as Pallas kernels for TPU.

The grid walks along the visits of `visits.py` for each tile of columns. The whole contraction lies in VMEM, so that the
matrices of a group are read once for all of its row tiles, and an output is written once. Inside, a loop over pieces of the
contraction keeps the sums in VMEM; the last piece masks what belongs to other groups and writes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import visits as planning

VMEM_BYTES = 56 * 2**20  # of the smallest VMEM, tpu7x's 64 MiB, less what the compiler needs for itself
TILES = ((512, 1024), (384, 1024), (512, 512), (256, 512), (512, 256), (256, 256), (128, 128))  # rows, columns; the best first
PIECE_WORK = 512 * 2560 * 1024  # multiply-accumulates; smaller pieces begin and end more often, larger ones make more code


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Attributes:
    rows: of a tile.
    columns: of a tile of the output.
    piece: of the contraction, multiplied at a time.
    """

    rows: int
    columns: int
    piece: int


def grouped_matmul(lhs, rhs, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_matmul`.

    Args:
        tiling: chosen by shape if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 or float32 (the same of both), or D or F no multiple of 128.
    """
    _check(lhs, rhs)
    if not lhs.shape[0]:
        return jnp.zeros((0, rhs.shape[2]), lhs.dtype)
    return _grouped_matmul(lhs, rhs, group_sizes, group_offset, tiling, interpret)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_swiglu`; arguments and errors as `grouped_matmul`."""
    _check(lhs, gate_up)
    if gate_up.shape[2] % 256:
        raise NotImplementedError(f"grouped_swiglu on TPU: F must be a multiple of 128, not {gate_up.shape[2] // 2}")
    if not lhs.shape[0]:
        return jnp.zeros((0, gate_up.shape[2] // 2), lhs.dtype)
    return _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret)


def _check(lhs, rhs) -> None:
    if lhs.dtype != rhs.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"grouped products on TPU: both in bfloat16 or in float32, not {lhs.dtype} x {rhs.dtype}")
    if rhs.shape[1] % 128 or rhs.shape[2] % 128:
        raise NotImplementedError(f"grouped products on TPU: D and F must be multiples of 128, not {rhs.shape[1:]}")


# ------------------------------------------------------------------------------------------------------------------------
# Gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_matmul(lhs, rhs, group_sizes, group_offset, tiling, interpret):
    return _rows_product(lhs, [rhs], group_sizes, group_offset, tiling, interpret)


def _matmul_forward(lhs, rhs, group_sizes, group_offset, tiling, interpret):
    out = _rows_product(lhs, [rhs], group_sizes, group_offset, tiling, interpret)
    return out, (lhs, rhs, group_sizes, group_offset)


def _matmul_backward(tiling, interpret, residuals, dout):
    lhs, rhs, group_sizes, group_offset = residuals
    dlhs = _rows_product(dout, [rhs], group_sizes, group_offset, tiling, interpret, transposed=True)
    drhs = _columns_product(lhs, dout, rhs, group_sizes, group_offset, tiling, interpret)
    return dlhs, drhs, _no_gradient(group_sizes), _no_gradient(group_offset)


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret):
    return _rows_product(lhs, [gate_up, gate_up], group_sizes, group_offset, tiling, interpret)


def _swiglu_forward(lhs, gate_up, group_sizes, group_offset, tiling, interpret):
    out = _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret)
    return out, (lhs, gate_up, group_sizes, group_offset)


def _swiglu_backward(tiling, interpret, residuals, dout):
    lhs, gate_up, group_sizes, group_offset = residuals
    hidden = _rows_product(lhs, [gate_up], group_sizes, group_offset, tiling, interpret)
    gate, up = jnp.split(hidden.astype(jnp.float32), 2, axis=-1)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dhidden = jnp.concatenate([dgate, dout * gate * sigmoid], axis=-1).astype(lhs.dtype)
    return _matmul_backward(tiling, interpret, residuals, dhidden)


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _no_gradient(integers):
    return np.zeros(integers.shape, jax.dtypes.float0)


# ------------------------------------------------------------------------------------------------------------------------
# Rows times the matrix of their group


def _rows_product(lhs, matrices, group_sizes, group_offset, tiling, interpret, transposed: bool = False):
    """[M, D] of lhs times [D, F] of each group; or [M, F] times its transpose. Two matrices are the halves of a SwiGLU."""
    M, contraction = lhs.shape
    G, halves = matrices[0].shape[0], len(matrices)
    N = matrices[0].shape[1 if transposed else 2] // halves
    tiling = tiling or choose_tiling(M, contraction, N, halves, lhs.dtype.itemsize)
    plan = planning.by_tile(*planning.spans(G, group_sizes, group_offset), M, tiling.rows)
    columns = _divisor(N, tiling.columns)
    pieces = contraction // _divisor(contraction, tiling.piece)

    def lhs_index(n, v, tile, group, source, *_):
        return source[v], 0

    def matrix_index(half, n, v, tile, group, source, source_group, *_):
        column = n + half * (N // columns)
        return (source_group[v], column, 0) if transposed else (source_group[v], 0, column)

    block = (1, columns, contraction) if transposed else (1, contraction, columns)
    sums = [pltpu.VMEM((tiling.rows, columns), jnp.float32)] * (halves if pieces > 1 else 0)
    bytes_ = lhs.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_rows_kernel, halves=halves, pieces=pieces, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((M, N), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(N // columns, plan.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((tiling.rows, contraction), lhs_index),
                *(pl.BlockSpec(block, functools.partial(matrix_index, half)) for half in range(halves)),
            ],
            out_specs=pl.BlockSpec((tiling.rows, columns), lambda n, v, tile, *_: (tile[v], n)),
            scratch_shapes=sums,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 6 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * contraction * N * halves,
            transcendentals=M * N * (halves - 1),
            bytes_accessed=bytes_ * (M * contraction * (N // columns) + G * contraction * N * halves + M * N),
        ),
        interpret=interpret,
        name="grouped_swiglu" if halves == 2 else "grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(*plan.arrays(), lhs, *matrices)


def _rows_kernel(tile, group, source, source_group, start, stop, x, *refs, halves: int, pieces: int, transposed: bool):
    matrices, out, sums = refs[:halves], refs[halves], refs[halves + 1 :]
    rows, contraction = x.shape
    visit = pl.program_id(1)
    top, begin, end = tile[visit] * rows, start[visit], stop[visit]
    first = (visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != tile[visit])

    @pl.when(first & (begin >= end))
    def _clear():
        out[...] = jnp.zeros_like(out)

    def product(matrix, piece):
        size = contraction // pieces
        part = pl.ds(pl.multiple_of(piece * size, size), size)
        operands = (x[:, part], matrix[0, :, part]) if transposed else (x[:, part], matrix[0, part, :])
        return _dot(*operands, 1, 1 if transposed else 0)

    @pl.when(begin < end)
    def _multiply():
        if pieces > 1:

            def add(piece, _):
                for total, matrix in zip(sums, matrices, strict=True):
                    total[...] = jnp.where(piece == 0, 0.0, total[...]) + product(matrix, piece)

            jax.lax.fori_loop(0, pieces - 1, add, None)
        totals = [product(matrix, pieces - 1) for matrix in matrices]
        if pieces > 1:
            totals = [total + earlier[...] for total, earlier in zip(totals, sums, strict=True)]
        result = totals[0] if halves == 1 else jax.nn.silu(totals[0]) * totals[1]
        row = top + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= begin) & (row < end)
        others = jnp.where(first, 0.0, out[...].astype(jnp.float32))  # what earlier visits wrote of this tile
        out[...] = jnp.where(mine, result, others).astype(out.dtype)


# ------------------------------------------------------------------------------------------------------------------------
# The matrices' gradient: products over the rows of each group


GRADIENT_TILING = Tiling(rows=512, columns=2048, piece=1024)  # the output's tile is piece x columns


def _columns_product(lhs, dout, rhs, group_sizes, group_offset, tiling, interpret):
    """[G, D, F]: of each group, lhs^T dout over its rows."""
    (M, D), F, G = lhs.shape, dout.shape[1], rhs.shape[0]
    tiling = tiling or GRADIENT_TILING
    rows = tiling.rows
    plan = planning.by_group(*planning.spans(G, group_sizes, group_offset), M, rows)
    td, tf = _divisor(D, tiling.piece), _divisor(F, tiling.columns)
    return pl.pallas_call(
        _columns_kernel,
        out_shape=jax.ShapeDtypeStruct((G, D, F), rhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(D // td, F // tf, plan.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((rows, td), lambda i, j, v, tile, group, source, *_: (source[v], i)),
                pl.BlockSpec((rows, tf), lambda i, j, v, tile, group, source, *_: (source[v], j)),
            ],
            out_specs=pl.BlockSpec((1, td, tf), lambda i, j, v, tile, group, *_: (group[v], i, j)),
            scratch_shapes=[pltpu.VMEM((td, tf), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 6 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * F,
            transcendentals=0,
            bytes_accessed=lhs.dtype.itemsize * (M * D * (F // tf) + M * F * (D // td) + G * D * F),
        ),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(*plan.arrays(), lhs, dout)


def _columns_kernel(tile, group, source, source_group, start, stop, x, dy, out, total):
    rows = x.shape[0]
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    top, begin, end = tile[visit] * rows, start[visit], stop[visit]

    first = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != group[visit])

    @pl.when(first & (begin >= end))
    def _clear():
        total[...] = jnp.zeros_like(total)

    @pl.when(begin < end)
    def _multiply():
        row = top + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= begin) & (row < end)
        zero = jnp.zeros((), x.dtype)  # other groups' rows, and whatever lies after the last row
        product = _dot(jnp.where(mine, x[...], zero), jnp.where(mine, dy[...], zero), 0, 0)
        total[...] = jnp.where(first, 0.0, total[...]) + product

    @pl.when((visit == last) | (group[jnp.minimum(visit + 1, last)] != group[visit]))
    def _write():
        out[0] = total[...].astype(out.dtype)


# ------------------------------------------------------------------------------------------------------------------------


def choose_tiling(M: int, contraction: int, N: int, halves: int, bytes_: int) -> Tiling:
    """The first of TILES whose blocks, two of each, fit into VMEM; the smallest one if none does."""
    for rows, columns in TILES:
        rows, columns = min(rows, -(-M // 16) * 16), _divisor(N, columns)
        piece = _divisor(contraction, PIECE_WORK // (rows * columns * halves))
        blocks = rows * contraction + halves * contraction * columns + rows * columns
        if 2 * bytes_ * blocks + 4 * halves * rows * columns * (contraction > piece) <= VMEM_BYTES:
            break
    return Tiling(rows, columns, piece)


def _divisor(size: int, at_most: int) -> int:
    """The largest multiple of 128 up to `at_most` that divides `size`, itself one."""
    return next(d for d in range(max(at_most // 128, 1) * 128, 0, -128) if size % d == 0)


def _dot(a, b, a_axis: int, b_axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
