"""The gradient of the groups' matrices, products over the rows of each group, as a Pallas kernel for TPU."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul import tiling as tilings
from pallas_kernels.grouped_matmul import visits as planning
from pallas_kernels.grouped_matmul.rows import dot

TILING = tilings.Tiling(rows=512, columns=2048, piece=1024)  # the output's tile is piece x columns


def columns_product(
    lhs: Float[Array, "L M D"],
    dout: Float[Array, "O M F"],
    G: int,
    group_sizes: Int[Array, " E"],
    group_offset: Int[Array, ""],
    *,
    lhs_index: int = 0,
    count: int = 1,
    tiling: tilings.Tiling | None = None,
    interpret=False,
) -> Float[Array, "G count D F"]:
    """Of each group and each w < count, lhs^T dout_w over the group's rows.

    Args:
        lhs_index: which one of `lhs`.
        count: of `dout`, from its first.
    """
    (M, D), F, W = lhs.shape[1:], dout.shape[2], count
    tiling = tiling or TILING
    rows = tiling.rows
    plan = planning.by_group(*planning.spans(G, group_sizes, group_offset), M, rows)
    td, tf = tilings.divisor(D, tiling.piece), tilings.divisor(F, tiling.columns)
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((G, W, D, F), lhs.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(W, D // td, F // tf, plan.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((1, rows, td), lambda w, i, j, v, tile, group, source, *_: (lhs_index, source[v], i)),
                pl.BlockSpec((1, rows, tf), lambda w, i, j, v, tile, group, source, *_: (w, source[v], j)),
            ],
            out_specs=pl.BlockSpec((1, 1, td, tf), lambda w, i, j, v, tile, group, *_: (group[v], w, i, j)),
            scratch_shapes=[pltpu.VMEM((td, tf), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=tilings.VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * F * W,
            transcendentals=0,
            bytes_accessed=lhs.dtype.itemsize * W * (M * D * (F // tf) + M * F * (D // td) + G * D * F),
        ),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(*plan.arrays(), lhs, dout)


def _kernel(tile, group, source, source_group, start, stop, x, dy, out, total):
    rows = x.shape[1]
    visit = pl.program_id(3)
    top, begin, end = tile[visit] * rows, start[visit], stop[visit]
    first = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != group[visit])

    @pl.when(first & (begin >= end))
    def _clear():
        out[...] = jnp.zeros_like(out)

    @pl.when(begin < end)
    def _multiply():
        row = top + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= begin) & (row < end)
        zero = jnp.zeros((), x.dtype)  # other groups' rows, and whatever lies after the last row
        product = dot(jnp.where(mine, x[0], zero), jnp.where(mine, dy[0], zero), 0, 0)
        so_far = jnp.where(first, 0.0, total[...]) + product
        total[...] = so_far
        out[0, 0] = so_far.astype(out.dtype)  # each time, beside the product: by itself, after the last, it would wait for it
