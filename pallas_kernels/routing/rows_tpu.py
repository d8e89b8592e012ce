"""Rows to their experts and back as a Pallas kernel for TPU: each row by a copy of its own, a tile's copies all under way
while the tile before is worked on.

In bfloat16 the rows 2i and 2i + 1 share 32-bit words, and a copy moves both; the half that was meant is taken out on the way
through the registers, where the score is multiplied in and the rows of a token are added up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.tiling import VMEM_LIMIT, divisor
from pallas_kernels.routing.rows import inverse

BUFFER_BYTES = 6 * 2**20  # of VMEM, for each of the two tiles of rows under way
STEP = 16  # rows that are worked on together: what a tile of bfloat16 holds
MAX_COLUMNS = 1280  # likewise
NOWHERE = -1  # in place of a row's number


def permute(x, scores, place, *, interpret=False):
    """See `api.permute`.

    Args:
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 or float32, or a width that is no multiple of 128.
    """
    return _permute(x, scores, place, interpret) if x.size else jnp.zeros((place.size, x.shape[1]), x.dtype)


def unpermute(rows, place, *, interpret=False):
    """See `api.unpermute`; arguments and errors as `permute`."""
    return _unpermute(rows, place, interpret) if rows.size else jnp.zeros((len(place), rows.shape[1]), rows.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _permute(x, scores, place, interpret):
    pair = inverse(place)
    score = jnp.take(scores.reshape(-1), pair, mode="fill", fill_value=0)
    return gather_sum(x, _tokens(pair, place)[:, None], score[:, None], interpret=interpret)


def _permute_forward(x, scores, place, interpret):
    return _permute(x, scores, place, interpret), (x, scores, place)


def _permute_backward(interpret, residuals, drows):
    x, scores, place = residuals
    dx, dscores = gather_sum(drows, _rows(place, drows), scores, beside=x, interpret=interpret)
    return dx, dscores, np.zeros(place.shape, jax.dtypes.float0)


_permute.defvjp(_permute_forward, _permute_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unpermute(rows, place, interpret):
    return gather_sum(rows, _rows(place, rows), jnp.ones(place.shape), interpret=interpret)


def _unpermute_forward(rows, place, interpret):
    return _unpermute(rows, place, interpret), (place, rows.shape[0])


def _unpermute_backward(interpret, residuals, dout):
    place, count = residuals
    token = _tokens(inverse(place, count), place)[:, None]
    return gather_sum(dout, token, jnp.ones(token.shape), interpret=interpret), np.zeros(place.shape, jax.dtypes.float0)


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _tokens(pair, place):
    return jnp.where(pair < place.size, pair // place.shape[1], NOWHERE)


def _rows(place, rows):
    return jnp.where(place < rows.shape[0], place, NOWHERE)


# ------------------------------------------------------------------------------------------------------------------------


def gather_sum(
    source: Float[Array, "N D"],
    index: Int[Array, "R X"],
    scale: Float[Array, "R X"],
    *,
    beside: Float[Array, "R D"] | None = None,
    interpret=False,
):
    """sum over x of scale_rx * source[index_rx], each with float32 products and sums; where an index is NOWHERE, nothing.

    Returns:
        [R, D]; with `beside` also the scales' gradient [R, X]: of each source row that was added the inner product with
        `beside`'s row.
    """
    (N, D), (R, X) = source.shape, index.shape
    packing = 4 // source.dtype.itemsize
    if source.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"moving rows on TPU: bfloat16 or float32, not {source.dtype}")
    if D % 128:
        raise NotImplementedError(f"moving rows on TPU: their width must be a multiple of 128, not {D}")
    if N % packing:
        source = jnp.pad(source, ((0, 1), (0, 0)))
    tile = max(16, min(256, BUFFER_BYTES // (4 * D * X) // 16 * 16, -(-R // 16) * 16))
    tiles = -(-R // tile)
    padded = jnp.full((tiles * tile, X), NOWHERE, jnp.int32).at[:R].set(index)
    wanted = jnp.clip(padded, 0, N - 1) // packing
    halves = jnp.where(padded < 0, NOWHERE, padded % packing).astype(jnp.float32)
    # Beside each row: its scales, then which half of the words is meant.
    notes = jnp.concatenate([jnp.zeros((tiles * tile, X)).at[:R].set(scale), halves], axis=1)
    rows = pl.BlockSpec((tile, D), lambda i: (i, 0))
    numbers = lambda next_: pl.BlockSpec(  # noqa: E731
        (1, 1, tile * X), lambda i: (jnp.minimum(i + next_, tiles - 1), 0, 0), memory_space=pltpu.SMEM
    )
    inner = [] if beside is None else [beside]
    outs = [jax.ShapeDtypeStruct((R, D), source.dtype)] + [jax.ShapeDtypeStruct((R, X), jnp.float32) for _ in inner]
    wanted = wanted.T.reshape(X, tiles, tile).swapaxes(0, 1).reshape(tiles, 1, X * tile)
    out = pl.pallas_call(
        functools.partial(_kernel, packing=packing, X=X),
        out_shape=outs,
        grid=(tiles,),
        in_specs=[
            numbers(0),
            numbers(1),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec((tile, 2 * X), lambda i: (i, 0)),
            *(rows for _ in inner),
        ],
        out_specs=[rows, *(pl.BlockSpec((tile, X), lambda i: (i, 0)) for _ in inner)],
        scratch_shapes=[
            pltpu.VMEM((2, X * tile, D), source.dtype if packing == 1 else jnp.uint32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,  # they take more bundles than the copies; `wanted` is in bounds by its construction
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * X * D * (1 + len(inner)),
            transcendentals=0,
            bytes_accessed=source.dtype.itemsize * D * R * (X * packing + 1 + len(inner)),
        ),
        interpret=interpret,
        name="move_rows_and_scores_gradient" if inner else "move_rows",
    )(wanted, wanted, source, notes, *inner)
    return out if inner else out[0]


def _kernel(numbers, next_numbers, source, notes, *refs, packing: int, X: int):
    beside, outs, (buffer, arrived) = refs[: (len(refs) - 3) // 2], refs[(len(refs) - 3) // 2 : -2], refs[-2:]
    i, last = pl.program_id(0), pl.num_programs(0) - 1
    words = source if packing == 1 else source.bitcast(jnp.uint32)  # [N / packing, D]
    copies, D = buffer.shape[1:]
    tile, width = copies // X, divisor(D, MAX_COLUMNS)

    def fetch(which, slot):
        def some(group, _):
            for k in range(STEP):
                r = group * STEP + k
                row = words.at[pl.ds(which[0, 0, r], 1)]
                pltpu.make_async_copy(row, buffer.at[slot, pl.ds(r, 1)], arrived.at[slot]).start()

        jax.lax.fori_loop(0, copies // STEP, some, None)

    @pl.when(i == 0)
    def _first():
        fetch(numbers, 0)

    @pl.when(i < last)
    def _ahead():
        fetch(next_numbers, (i + 1) % 2)

    slot = i % 2
    pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], arrived.at[slot]).wait()  # for as many bytes

    def work(step, _):
        at = pl.ds(pl.multiple_of(step * STEP, STEP), STEP)
        scales, halves = notes[at, :X], notes[at, X:]

        def chunk(c, inner):
            columns = pl.ds(pl.multiple_of(c * width, width), width)
            total = jnp.zeros((STEP, width), jnp.float32)
            for x in range(X):
                value = buffer[slot, pl.ds(pl.multiple_of(x * tile + step * STEP, STEP), STEP), columns]
                half = halves[:, x : x + 1]
                if packing == 2:
                    bits = jnp.where(half == 1, value & jnp.uint32(0xFFFF0000), value << 16)
                    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
                value = jnp.where(half >= 0, value, 0.0)
                total += value * scales[:, x : x + 1]
                if beside:
                    inner[x] += jnp.sum(value * beside[0][at, columns].astype(jnp.float32), axis=1, keepdims=True)
            outs[0][at, columns] = total.astype(outs[0].dtype)
            return inner

        inner = jax.lax.fori_loop(0, D // width, chunk, [jnp.zeros((STEP, 1))] * (X if beside else 0))
        for x, products in enumerate(inner):
            outs[1][at, x : x + 1] = products

    jax.lax.fori_loop(0, tile // STEP, work, None)
