"""Grouped products as Pallas kernels for GPU, by way of Triton.

A program multiplies one visit of `visits.py`, a tile of rows that belong to one group, by a tile of columns. Programs that run
at the same time share rows and matrices in the L2 cache: some visits go through all columns before the next ones begin. A tile
with rows of two groups is visited twice, and each visit writes its own rows; the tile's first one also writes zeros to those
that have no group here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.grouped_matmul import visits as planning
from pallas_kernels.grouped_matmul.quantized import Quantized

TOGETHER = 16  # visits whose programs run side by side


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Of one program.

    Attributes:
        rows, columns: of its tile of the output.
        piece: of the contraction, multiplied at a time.
        warps: threads, in units of 32.
        stages: pieces on their way from memory.
    """

    rows: int
    columns: int
    piece: int
    warps: int
    stages: int


MATMUL = Tiling(rows=128, columns=256, piece=64, warps=8, stages=3)
SWIGLU = Tiling(rows=128, columns=128, piece=64, warps=8, stages=3)  # two sums
GRADIENT = Tiling(rows=64, columns=256, piece=128, warps=8, stages=3)  # of the matrices: an output tile is piece x columns


def grouped_matmul(lhs, rhs, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_matmul`.

    Args:
        tiling: of the product and of both gradients; defaults if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: dtypes other than bfloat16, float16 or float32 (the same of both), or D or F no multiple of 16.
    """
    _check(lhs, rhs)
    if not lhs.shape[0]:
        return jnp.zeros((0, rhs.shape[2]), lhs.dtype)
    return _grouped_matmul(lhs, rhs, group_sizes, group_offset, tiling, interpret)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_swiglu`; arguments and errors as `grouped_matmul`."""
    _check(lhs, gate_up)
    if not lhs.shape[0]:
        return jnp.zeros((0, gate_up.shape[3]), lhs.dtype)
    return _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret)


def _check(lhs, rhs) -> None:
    if isinstance(rhs, Quantized):
        raise NotImplementedError("grouped products on GPU: no quantised matrices; implementation='xla' takes them")
    if lhs.dtype != rhs.dtype or lhs.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"grouped products on GPU: both in bfloat16, float16 or float32, not {lhs.dtype} x {rhs.dtype}"
        )
    if rhs.shape[-1] % 16 or rhs.shape[-2] % 16:
        raise NotImplementedError(f"grouped products on GPU: D and F must be multiples of 16, not {rhs.shape[-2:]}")


# ------------------------------------------------------------------------------------------------------------------------
# Gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_matmul(lhs, rhs, group_sizes, group_offset, tiling, interpret):
    return _rows_product(lhs[None], rhs[:, None], group_sizes, group_offset, MATMUL_TERMS, tiling or MATMUL, interpret)


def _matmul_forward(lhs, rhs, group_sizes, group_offset, tiling, interpret):
    out = _grouped_matmul(lhs, rhs, group_sizes, group_offset, tiling, interpret)
    return out, (lhs, rhs, group_sizes, group_offset)


def _matmul_backward(tiling, interpret, residuals, dout):
    lhs, rhs, group_sizes, group_offset = residuals
    dlhs, drhs = _gradients(lhs, rhs[:, None], dout[None], MATMUL_TERMS, group_sizes, group_offset, tiling, interpret)
    return dlhs, drhs[:, 0], _no_gradient(group_sizes), _no_gradient(group_offset)


_grouped_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret):
    terms = ((0, 0, 0), (0, 1, 1))
    return _rows_product(lhs[None], gate_up, group_sizes, group_offset, terms, tiling or SWIGLU, interpret)


def _swiglu_forward(lhs, gate_up, group_sizes, group_offset, tiling, interpret):
    out = _grouped_swiglu(lhs, gate_up, group_sizes, group_offset, tiling, interpret)
    return out, (lhs, gate_up, group_sizes, group_offset)


def _swiglu_backward(tiling, interpret, residuals, dout):
    lhs, gate_up, group_sizes, group_offset = residuals
    half = lambda i: _rows_product(  # noqa: E731
        lhs[None], gate_up, group_sizes, group_offset, ((0, i, 0),), tiling or MATMUL, interpret
    ).astype(jnp.float32)
    gate, up = half(0), half(1)
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dhidden = jnp.stack([dgate, dout * gate * sigmoid]).astype(lhs.dtype)  # [2, M, F]
    terms = ((0, 0, 0), (1, 1, 0))
    dlhs, dgate_up = _gradients(lhs, gate_up, dhidden, terms, group_sizes, group_offset, tiling, interpret)
    return dlhs, dgate_up, _no_gradient(group_sizes), _no_gradient(group_offset)


_grouped_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _gradients(lhs, matrices, dout, terms, group_sizes, group_offset, tiling, interpret):
    """Of lhs [M, D] and matrices [G, halves, D, F], from dout [halves, M, F]."""
    groups = group_sizes, group_offset
    dlhs = _rows_product(dout, matrices, *groups, terms, tiling or MATMUL, interpret, transposed=True)
    return dlhs, _columns_product(lhs, dout, matrices.shape[0], *groups, tiling or GRADIENT, interpret)


def _no_gradient(integers):
    return np.zeros(integers.shape, jax.dtypes.float0)


# ------------------------------------------------------------------------------------------------------------------------
# Rows times the matrices of their group

# A term (i, half, sum): the rows lhs[i] times the group's matrix `half`, added to that sum. Two sums are gate and up.
MATMUL_TERMS = ((0, 0, 0),)


def _rows_product(lhs, matrices, group_sizes, group_offset, terms, tiling: Tiling, interpret, transposed: bool = False):
    """[M, F] from lhs [X, M, D] and matrices [G, halves, D, F]; or, transposed, [M, D] from [X, M, F]."""
    _, M, contraction = lhs.shape
    G, N = matrices.shape[0], matrices.shape[2 if transposed else 3]
    columns, piece = _divisor(N, tiling.columns), _divisor(contraction, tiling.piece)
    start, stop = planning.spans(G, group_sizes, group_offset)
    plan = planning.by_tile(start, stop, M, tiling.rows)
    V = plan.tile.shape[0]
    plan = jnp.stack([plan.tile, plan.group, plan.start, plan.stop])
    plan = jnp.pad(plan, ((0, 0), (0, -V % TOGETHER)), mode="edge")
    kernel = functools.partial(
        _rows_kernel, V=V, rows=tiling.rows, columns=columns, piece=piece, terms=terms, transposed=transposed
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((M, N), lhs.dtype),
        grid=(plan.shape[1] * (N // columns),),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="grouped_swiglu" if terms[-1][2] else "grouped_matmul_transposed" if transposed else "grouped_matmul",
    )(plan, jnp.stack([start[0], stop[-1]]), lhs, matrices)


def _rows_kernel(plan, ours, x, w, out, *, V: int, rows: int, columns: int, piece: int, terms, transposed: bool):
    M, N = out.shape
    block, place = _divmod(pl.program_id(0), TOGETHER * (N // columns))
    visit = block * TOGETHER + jax.lax.rem(place, TOGETHER)
    column = jax.lax.div(place, TOGETHER) * columns
    tile, group, begin, end = (plan[i, visit] for i in range(4))
    first = (visit == 0) | (plan[0, jnp.maximum(visit - 1, 0)] != tile)
    row, at = tile * rows + jnp.arange(rows), pl.ds(tile * rows, rows)

    def multiply(step, sums):
        sums, k = list(sums), pl.ds(step * piece, piece)
        for i, half, total in terms:
            matrix = w[group, half, pl.ds(column, columns), k] if transposed else w[group, half, k, pl.ds(column, columns)]
            sums[total] += _dot(_load(x.at[np.int32(i), at, k], row < M), matrix.T if transposed else matrix)
        return tuple(sums)

    zeros = (jnp.zeros((rows, columns), jnp.float32),) * (1 + terms[-1][2])
    sums = jax.lax.fori_loop(0, jnp.where(begin < end, x.shape[2] // piece, 0), multiply, zeros)
    result = sums[0] if len(sums) == 1 else jax.nn.silu(sums[0]) * sums[1]
    mine = (row >= begin) & (row < end)
    nobodys = first & ((row < ours[0]) | (row >= ours[1]))
    writes = (mine | nobodys) & (row < M) & (visit < V)
    result = jnp.where(mine[:, None], result, 0.0).astype(out.dtype)
    plt.store(out.at[at, pl.ds(column, columns)], result, mask=jnp.broadcast_to(writes[:, None], result.shape))


# ------------------------------------------------------------------------------------------------------------------------
# The matrices' gradient: products over the rows of each group


def _columns_product(lhs, dout, G: int, group_sizes, group_offset, tiling: Tiling, interpret):
    """[G, halves, D, F]: of each group, lhs^T dout[half] over its rows."""
    (_, D), (halves, _, F) = lhs.shape, dout.shape
    td, tf = _divisor(D, tiling.piece), _divisor(F, tiling.columns)
    spans = jnp.stack(planning.spans(G, group_sizes, group_offset))
    return pl.pallas_call(
        functools.partial(_columns_kernel, td=td, tf=tf, rows=tiling.rows),
        out_shape=jax.ShapeDtypeStruct((G, halves, D, F), lhs.dtype),
        grid=((D // td) * (F // tf), G * halves),
        compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(spans, lhs, dout)


def _columns_kernel(spans, x, dy, out, *, td: int, tf: int, rows: int):
    F = dy.shape[2]
    group, half = _divmod(pl.program_id(1), dy.shape[0])
    i, j = _divmod(pl.program_id(0), F // tf)
    begin, end = spans[0, group], spans[1, group]
    d, f = pl.ds(i * td, td), pl.ds(j * tf, tf)

    def multiply(step, total):
        row = begin + step * rows
        mine, at = row + jnp.arange(rows) < end, pl.ds(row, rows)
        return total + _dot(_load(x.at[at, d], mine).T, _load(dy.at[half, at, f], mine))

    steps = jax.lax.div(end - begin + rows - 1, rows)
    total = jax.lax.fori_loop(0, steps, multiply, jnp.zeros((td, tf), jnp.float32))
    out[group, half, d, f] = total.astype(out.dtype)


# ------------------------------------------------------------------------------------------------------------------------


def _load(tile, rows):
    """Zeros where `rows` is false."""
    return plt.load(tile, mask=jnp.broadcast_to(rows[:, None], tile.shape), other=0)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _divmod(a, b: int):
    """Of integers that are not negative."""
    return jax.lax.div(a, b), jax.lax.rem(a, b)


def _divisor(n: int, at_most: int) -> int:
    """The largest power of two that divides n, up to `at_most`: the sizes that Triton knows."""
    return min(n & -n, at_most)
