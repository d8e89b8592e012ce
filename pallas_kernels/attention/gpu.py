"""Flash attention as Pallas kernels for GPU, by way of Triton, with the masks of `intervals.py`: arXiv 2205.14135, 2307.08691.

A program of the forward pass, and of the query's gradient, has one block of queries of one head and walks over the keys that
they read; one of the gradients of key and value has a block of keys and walks over the queries that read them, of all heads
that share it. What every query of a block reads goes without a mask.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.attention.mask import Mask, by_windows
from pallas_kernels.attention.parts import NEVER, Part, PartGradients

NOWHERE = 2**30  # a place that no key has
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Of one program: queries and keys of a tile of logits, threads in units of 32, and tiles on their way from memory."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = Tiling(queries=128, keys=64, warps=8, stages=3)
QUERY_GRADIENT = Tiling(queries=128, keys=64, warps=8, stages=2)
KEY_GRADIENT = Tiling(queries=64, keys=64, warps=4, stages=2)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    tiling: Tiling | None = None,
    interpret=False,
) -> Float[Array, "B T N H"]:
    """See `api.attention`.

    Args:
        tiling: of all three kernels; defaults if None.

    Raises:
        NotImplementedError: keys of a cache, a head size that is no power of two from 16 on, or dtypes other than bfloat16,
            float16 or float32.
    """
    _check(query, key, value)

    def attend(query, key, value, mask):
        where = intervals(mask, query.shape[1])
        return _attend(query, key, value, where.first, where.last, tiling, interpret)

    return by_windows(attend, query, key, value, mask)


def _check(query, key, value) -> None:
    H, dtypes = query.shape[-1], {x.dtype for x in (query, key, value)}
    if H & (H - 1) or H < 16:
        raise NotImplementedError(f"attention on GPU: the head size must be a power of two from 16 on, not {H}")
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        names = ", ".join(sorted(map(str, dtypes)))
        raise NotImplementedError(f"attention on GPU: all in bfloat16, in float16 or in float32, not {names}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, first, last, tiling, interpret):
    return forward(query, key, value, Intervals(first, last), tiling=tiling, interpret=interpret).out


def _attend_forward(query, key, value, first, last, tiling, interpret):
    where = Intervals(first, last)
    part = forward(query, key, value, where, tiling=tiling, interpret=interpret)
    return part.out, (query, key, value, where, part)


def _attend_backward(tiling, interpret, residuals, dout):
    query, key, value, where, part = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * part.out.astype(jnp.float32), axis=-1)
    found = backward(query, key, value, where, part.lse, dout, delta, tiling=tiling, interpret=interpret)
    return found.query, found.key, found.value, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: Intervals,
    *,
    key_offset: Int[Array, ""] | int = 0,
    dtype=None,
    tiling: Tiling | None = None,
    interpret=False,
) -> Part:
    """Attention over these keys alone.

    Args:
        where: of the queries, whose row of keys begins at place `key_offset`.
        dtype: of the result, the query's if None.
        interpret: as in `pl.pallas_call`.
    """
    B, T, N, _ = query.shape
    _check(query, key, value)
    tiling = tiling or FORWARD
    first, last = _places(where, key_offset, key.shape[1], tiling.queries)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, tiling=tiling),
        out_shape=[jax.ShapeDtypeStruct(query.shape, dtype or query.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        grid=(pl.cdiv(T, tiling.queries), B * N),
        compiler_params=_parameters(tiling),
        interpret=interpret,
        name="attention",
    )(first, last, query, key, value)
    return Part(out, lse.swapaxes(1, 2))


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    where: Intervals,
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    delta: Float[Array, "B T N"],
    *,
    key_offset: Int[Array, ""] | int = 0,
    dtype=None,
    tiling: Tiling | None = None,
    interpret=False,
) -> PartGradients:
    """What these keys contribute to the gradients of attention over all keys; see `parts.part_gradients`.

    Args:
        dtype: of the gradients, the query's if None.
    """
    B, T, N, _ = query.shape
    S, K = key.shape[1:3]
    dtype = dtype or query.dtype
    lse, delta = (x.astype(jnp.float32).swapaxes(1, 2) for x in (lse * LOG2_E, delta))  # [B, N, T]
    tile = tiling or QUERY_GRADIENT
    first, last = _places(where, key_offset, S, tile.queries)
    dquery = pl.pallas_call(
        functools.partial(_query_kernel, tiling=tile),
        out_shape=jax.ShapeDtypeStruct(query.shape, dtype),
        grid=(pl.cdiv(T, tile.queries), B * N),
        compiler_params=_parameters(tile),
        interpret=interpret,
        name="attention_query_gradient",
    )(first, last, query, key, value, dout, lse, delta)
    tile = tiling or KEY_GRADIENT
    first, last = _places(where, key_offset, S, tile.queries)
    dkey, dvalue = pl.pallas_call(
        functools.partial(_key_kernel, tiling=tile),
        out_shape=[jax.ShapeDtypeStruct(key.shape, dtype)] * 2,
        grid=(pl.cdiv(S, tile.keys), B * K),
        compiler_params=_parameters(tile),
        interpret=interpret,
        name="attention_key_gradient",
    )(first, last, *_readers(first, last, S, tile), query, key, value, dout, lse, delta)
    return PartGradients(dquery, dkey, dvalue)


def _parameters(tiling: Tiling):
    return plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages)


def _places(where: Intervals, key_offset, S: int, multiple: int):
    """First and last of S keys that each query reads, filled up to a multiple of queries; NOWHERE and -1 for none."""
    first, last = jnp.maximum(where.first - key_offset, 0), jnp.minimum(where.last - key_offset, S - 1)
    first, last = jnp.where(last < first, NOWHERE, first), jnp.where(last < first, -1, last)
    extra = ((0, 0), (0, -first.shape[1] % multiple))
    return jnp.pad(first, extra, constant_values=NOWHERE), jnp.pad(last, extra, constant_values=-1)


def _readers(first, last, S: int, tiling: Tiling):
    """For each block of keys the first block of queries that may read any of it, and the one after the last: [#B, blocks]."""
    blocks = pl.cdiv(S, tiling.keys)
    begin = first.reshape(len(first), -1, tiling.queries).min(-1) // tiling.keys  # of each block of queries, in blocks of keys
    end = last.reshape(len(last), -1, tiling.queries).max(-1) // tiling.keys  # the last one; -1 where there is none
    reads = end >= 0
    index = jnp.broadcast_to(jnp.arange(begin.shape[1], dtype=jnp.int32), begin.shape)
    row, nobody = jnp.arange(len(first))[:, None], begin.shape[1]
    to = jnp.full((len(first), blocks), nobody).at[row, jnp.where(reads, end, blocks)].min(index, mode="drop")
    since = jnp.full((len(first), blocks), -1).at[row, jnp.where(reads, begin, blocks)].max(index, mode="drop")
    return jax.lax.cummin(to, axis=1, reverse=True).astype(jnp.int32), jax.lax.cummax(since, axis=1).astype(jnp.int32) + 1


# ------------------------------------------------------------------------------------------------------------------------
# The kernels


def _forward_kernel(first, last, q, k, v, out, lse, *, tiling: Tiling):
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    b, n, queries, row = _my_queries(N, tiling)
    head = jax.lax.div(n, N // K)
    mine = _Reads(first, last, b, queries)
    x = _load(q.at[b, queries, n, :], row < T)

    def read(masked: bool, j, carry):
        m, total, acc = carry
        keys, exists = _tile(j, tiling.keys, S, masked)
        s = _dot(x, _load(k.at[b, keys, head, :], exists).T) * (H**-0.5 * LOG2_E)
        s = jnp.where(mine.allowed(j * tiling.keys, tiling.keys), s, NEVER) if masked else s
        top = jnp.maximum(m, s.max(axis=1))
        p = jnp.exp2(s - top[:, None])
        p = jnp.where(mine.allowed(j * tiling.keys, tiling.keys), p, 0.0) if masked else p
        shrink = jnp.exp2(m - top)
        acc = acc * shrink[:, None] + _dot(p.astype(v.dtype), _load(v.at[b, keys, head, :], exists))
        return top, total * shrink + p.sum(axis=1), acc

    zeros = jnp.zeros(tiling.queries, jnp.float32)
    start = (zeros + NEVER, zeros, jnp.zeros((tiling.queries, H), jnp.float32))
    m, total, acc = _walk(mine, tiling.keys, read, start)
    some = jnp.where(total == 0, 1.0, total)
    _store(out.at[b, queries, n, :], acc / some[:, None], row < T)
    plt.store(lse.at[b, n, queries], jnp.where(total == 0, NEVER, (m + jnp.log2(some)) / LOG2_E), mask=row < T)


def _query_kernel(first, last, q, k, v, do, lse, delta, dq, *, tiling: Tiling):
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    b, n, queries, row = _my_queries(N, tiling)
    head = jax.lax.div(n, N // K)
    mine = _Reads(first, last, b, queries)
    x, dy = (_load(a.at[b, queries, n, :], row < T) for a in (q, do))
    lse, delta = (plt.load(a.at[b, n, queries], mask=row < T, other=0.0) for a in (lse, delta))

    def read(masked: bool, j, total):
        keys, exists = _tile(j, tiling.keys, S, masked)
        key = _load(k.at[b, keys, head, :], exists)
        p = jnp.exp2(_dot(x, key.T) * (H**-0.5 * LOG2_E) - lse[:, None])
        p = jnp.where(mine.allowed(j * tiling.keys, tiling.keys), p, 0.0) if masked else p
        ds = p * (_dot(dy, _load(v.at[b, keys, head, :], exists).T) - delta[:, None])
        return total + _dot(ds.astype(k.dtype), key)

    total = _walk(mine, tiling.keys, read, jnp.zeros((tiling.queries, H), jnp.float32))
    _store(dq.at[b, queries, n, :], total * H**-0.5, row < T)


def _key_kernel(first, last, begin, end, q, k, v, do, lse, delta, dk, dv, *, tiling: Tiling):
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    b, head = jax.lax.div(pl.program_id(1), K), jax.lax.rem(pl.program_id(1), K)
    block, row = pl.program_id(0), jax.lax.rem(b, first.shape[0])
    keys, exists = _tile(block, tiling.keys, S, True)
    key, value = (_load(a.at[b, keys, head, :], exists) for a in (k, v))
    since, blocks = begin[row, block], jnp.maximum(end[row, block] - begin[row, block], 0)

    def read(step, sums):
        dk, dv = sums
        n = head * (N // K) + jax.lax.div(step, blocks)
        j = since + jax.lax.rem(step, blocks)
        queries, there = _tile(j, tiling.queries, T, True)
        x, dy = (_load(a.at[b, queries, n, :], there) for a in (q, do))
        of_query = [plt.load(a.at[b, n, queries], mask=there, other=0.0)[:, None] for a in (lse, delta)]
        p = jnp.exp2(_dot(x, key.T) * (H**-0.5 * LOG2_E) - of_query[0])
        p = jnp.where(_Reads(first, last, b, queries).allowed(block * tiling.keys, tiling.keys), p, 0.0)
        ds = p * (_dot(dy, value.T) - of_query[1])
        return dk + _dot(ds.astype(x.dtype).T, x), dv + _dot(p.astype(dy.dtype).T, dy)

    zeros = jnp.zeros((tiling.keys, H), jnp.float32)
    dk_sum, dv_sum = jax.lax.fori_loop(0, blocks * (N // K), read, (zeros, zeros))
    _store(dk.at[b, keys, head, :], dk_sum * H**-0.5, exists)
    _store(dv.at[b, keys, head, :], dv_sum, exists)


class _Reads:
    """Which keys a block of queries reads."""

    def __init__(self, first, last, b, queries):
        row = jax.lax.rem(b, first.shape[0])
        self.first, self.last = first[row, queries], last[row, queries]

    def allowed(self, start, size: int):
        place = start + jnp.arange(size)[None, :]
        return (place >= self.first[:, None]) & (place <= self.last[:, None])


def _my_queries(N: int, tiling: Tiling):
    b, n = jax.lax.div(pl.program_id(1), N), jax.lax.rem(pl.program_id(1), N)
    start = pl.program_id(0) * tiling.queries
    return b, n, pl.ds(start, tiling.queries), start + jnp.arange(tiling.queries)


def _walk(reads: _Reads, size: int, read, carry):
    """`carry = read(masked, j, carry)` for each block j of keys that any query reads."""
    begin, end = reads.first.min(), reads.last.max() + 1
    start, stop = jax.lax.div(jnp.where(end > begin, begin, 0), size), jax.lax.div(end + size - 1, size)
    whole = jax.lax.div(jnp.minimum(reads.first.max(), end) + size - 1, size)  # the first block that all read
    whole_stop = jnp.maximum(jax.lax.div(reads.last.min() + 1, size), whole)
    carry = jax.lax.fori_loop(start, whole, functools.partial(read, True), carry)
    carry = jax.lax.fori_loop(whole, whole_stop, functools.partial(read, False), carry)
    return jax.lax.fori_loop(whole_stop, stop, functools.partial(read, True), carry)


def _tile(j, size: int, length: int, masked: bool):
    """The places of block j, and which of them exist; None: all."""
    return pl.ds(j * size, size), (j * size + jnp.arange(size) < length) if masked else None


def _load(tile, exists):
    """[rows, H], with zeros for rows that do not exist."""
    if exists is None:
        return plt.load(tile)
    return plt.load(tile, mask=jnp.broadcast_to(exists[:, None], tile.shape), other=0)


def _store(tile, x, exists) -> None:
    plt.store(tile, x.astype(tile.dtype), mask=jnp.broadcast_to(exists[:, None], x.shape))


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
