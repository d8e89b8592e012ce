"""Attention over slots as a Pallas kernel for TPU, as fast as the slots can be read.

The slots of all KV heads lie side by side, and stay so: every query head meets the keys of all heads in one product, and the
logits of foreign heads are masked like those of slots that may not be read. That is K times the arithmetic, which the matrix
units do while the next slots arrive, and no shuffling of heads, which the vector units could not do in that time.

The grid walks along the blocks of slots of which some query of the row may read some slot, row after row; the list is made on
the device from the positions. No other block is fetched.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import Mask, Part
from pallas_kernels.decode_attention.quantized import parts

NEVER = -1e30  # the logit of a slot that may not be read: finite, so that no query makes a NaN
BLOCK = 4096  # keys, slots times heads
MAX_ROWS = 512  # queries times heads, whose logits lie in VMEM


def decode_attention(query, keys, values, mask: Mask, layer, *, block: int | None = None, interpret=False) -> Part:
    """See `api.decode_attention`.

    Args:
        block: slots that are fetched at once; chosen by shape if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: H is no multiple of 128, 128 no multiple of K, S no multiple of 128, more than MAX_ROWS query rows,
            or dtypes other than those said.
    """
    (k, key_scale), (v, value_scale) = parts(keys), parts(values)
    _check(query, k, v)
    B, T, N, H = query.shape
    L, _, S, K, _ = k.shape
    block = block or math.gcd(S, max(BLOCK // K, 128))
    first, last = _read_by(mask)  # [B, T]
    row, part, count = _visits(mask.key_positions, first, last, block)
    positions = jnp.repeat(mask.key_positions, K, axis=1).reshape(B, 1, S * K)
    layer = jnp.zeros((), jnp.int32) if layer is None else layer.astype(jnp.int32)
    scales = [] if key_scale is None else [x[layer].reshape(B, 1, S * K) for x in (key_scale, value_scale)]

    def of_row(v, row, *_):
        return row[v], 0, 0

    def of_slots(v, row, part, layer, *_):
        return layer[0], row[v], part[v], 0

    def along_slots(v, row, part, *_):
        return row[v], 0, part[v]

    rows = pl.BlockSpec((None, T * N, H), of_row)
    slots = pl.BlockSpec((None, None, block * K, H), of_slots)
    along = pl.BlockSpec((None, 1, block * K), along_slots)
    statistic = pltpu.VMEM((T * N, 128), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, T=T, K=K, G=N // K),
        out_shape=(jax.ShapeDtypeStruct((B, T * N, H), query.dtype), jax.ShapeDtypeStruct((B, T * N, 128), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(count,),
            in_specs=[rows, along, slots, slots, *[along] * len(scales)],
            out_specs=(rows, pl.BlockSpec((None, T * N, 128), of_row)),
            scratch_shapes=[statistic, statistic, pltpu.VMEM((T * N, H), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * S * K * T * N * H,
            transcendentals=B * S * K * T * N,
            bytes_accessed=B * S * K * (2 * H * k.dtype.itemsize + 4 + 4 * len(scales)),
        ),
        interpret=interpret,
        name="decode_attention",
    )(
        row,
        part,
        layer[None],
        first.reshape(-1),
        last.reshape(-1),
        (query * jnp.asarray(H**-0.5, query.dtype)).reshape(B, T * N, H),
        positions,
        k.reshape(L, B, S * K, H),
        v.reshape(L, B, S * K, H),
        *scales,
    )
    return Part(out.reshape(query.shape), lse[..., 0].reshape(B, T, N))


def _check(query, k, v) -> None:
    T, N, H = query.shape[1:]
    S, K = k.shape[-3:-1]
    if H % 128 or 128 % K or S % 128:
        raise NotImplementedError(
            f"decode_attention on TPU: H and S must be multiples of 128 and K divide it, not H={H}, S={S}, K={K}"
        )
    if T * N > MAX_ROWS:
        raise NotImplementedError(f"decode_attention on TPU: at most {MAX_ROWS} queries times heads, not {T} x {N}")
    if query.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != v.dtype or k.dtype not in (query.dtype, jnp.int8):
        raise NotImplementedError(
            f"decode_attention on TPU: bfloat16 or float32, slots of the same or int8, not {query.dtype} x {k.dtype}, {v.dtype}"
        )


def _read_by(mask: Mask):
    """The smallest and the largest position that each query reads."""
    last = mask.query_positions.astype(jnp.int32)
    return (jnp.zeros_like(last) if mask.chunk is None else last - last % mask.chunk), last


def _visits(positions, first, last, block: int):
    """Row and block of each block with a slot that some query of the row reads, row after row, and how many there are.

    A row with none has its first block, which writes its output.
    """
    readable = (positions >= first.min(axis=1, keepdims=True)) & (positions <= last.max(axis=1, keepdims=True))
    wanted = readable.reshape(readable.shape[0], -1, block).any(axis=2)  # [B, blocks]
    wanted = wanted.at[:, 0].set(wanted[:, 0] | ~wanted.any(axis=1))
    visits = jnp.argsort(~wanted.reshape(-1), stable=True).astype(jnp.int32)
    return visits // wanted.shape[1], visits % wanted.shape[1], jnp.sum(wanted, dtype=jnp.int32)


def _kernel(rows, part, layer, first, last, q, positions, k, v, *refs, T: int, K: int, G: int):
    *scales, out, lse, largest, total, sums = refs
    visit, final = pl.program_id(0), pl.num_programs(0) - 1
    row = rows[visit]

    @pl.when((visit == 0) | (row != rows[jnp.maximum(visit - 1, 0)]))
    def _begin():
        largest[...] = jnp.full_like(largest, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    logits = _dot(q[...], k[...].astype(q.dtype), 1)  # [T*N, s*K]
    if scales:
        logits *= scales[0][...]
    logits = jnp.where(_allowed(logits.shape, first, last, positions[...], row, T, K, G), logits, NEVER)
    before = largest[...]
    largest[...] = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    p = jnp.exp(logits - largest[:, :1])
    fade = jnp.exp(before - largest[...])
    total[...] = fade * total[...] + jnp.sum(p, axis=1, keepdims=True)
    if scales:
        p *= scales[1][...]
    sums[...] = fade[:, :1] * sums[...] + _dot(p.astype(q.dtype), v[...].astype(q.dtype), 0)

    @pl.when((visit == final) | (row != rows[jnp.minimum(visit + 1, final)]))
    def _end():
        out[...] = (sums[...] / total[:, :1]).astype(out.dtype)
        lse[...] = largest[...] + jnp.log(total[...])


def _allowed(shape: tuple[int, int], first, last, positions, row, T: int, K: int, G: int):
    """Which keys each query row reads: slots in the span of its token, of its own head. Rows lie by token, then head."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    token = jax.lax.div(rows, K * G)
    low, high = first[row * T], last[row * T]
    for t in range(1, T):
        low, high = (jnp.where(token == t, bound[row * T + t], so_far) for bound, so_far in ((first, low), (last, high)))
    columns = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    return (positions >= low) & (positions <= high) & (jax.lax.rem(columns, K) == jax.lax.div(jax.lax.rem(rows, K * G), G))


def _dot(a, b, b_axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
