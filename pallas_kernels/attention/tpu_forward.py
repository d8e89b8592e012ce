"""Flash attention as a Pallas kernel for TPU, forward: arXiv 2205.14135, with the masks of `intervals.py`.

The grid walks over rows, query heads, blocks of queries, and spans of keys, which lie in VMEM. Of a span, the keys that every
query of the block reads are multiplied in large tiles without a mask; what is left at both ends goes in small masked tiles, of
which those that nobody reads are skipped. Spans that nobody reads are not fetched.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.attention.parts import NEVER, Part

Ref = Any  # of an array in VMEM
LANES = 128
NOWHERE = 2**30  # a place that no key has


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Attributes:
    queries: of a block.
    keys: multiplied at a time where no mask is needed.
    edge: queries and keys of a masked tile; divides both.
    span: keys in VMEM at a time, a multiple of `keys`.
    """

    queries: int = 1024
    keys: int = 2048
    edge: int = 512
    span: int = 8192

    def fit(self, T: int, S: int) -> "Tiling":
        """No larger than the inputs need."""
        up = lambda n, multiple: -(-n // multiple) * multiple  # noqa: E731
        edge = min(self.edge, max(up(T, LANES), up(S, LANES)))
        queries, span = min(self.queries, up(T, edge)), min(self.span, up(S, edge))
        return Tiling(queries, min(self.keys, span), edge, span)


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: Intervals,
    *,
    key_offset: Int[Array, ""] | int = 0,
    reach: int | None = None,
    before: Part | None = None,
    dtype=None,
    tiling: Tiling | None = None,
    interpret=False,
    call=pl.pallas_call,
) -> Part:
    """Attention over these keys, joined with what was found among others before.

    Args:
        intervals: of the queries, whose row of keys begins at place `key_offset`.
        reach: the most keys that one query reads, where that is known: spans beyond it are not walked over.
        before: over other keys.
        dtype: of the result, the query's if None.
        interpret: as in `pl.pallas_call`.
        call: what stands in for `pl.pallas_call` (see `ring_attention/ride.py`).

    Raises:
        NotImplementedError: H is no multiple of 128, or the dtypes are not all bfloat16 or all float32.
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    check(query, key, value)
    tiling = (tiling or Tiling()).fit(T, S)
    blocks, edges = pl.cdiv(T, tiling.queries), pl.cdiv(T, tiling.queries) * tiling.queries // tiling.edge
    first, last = places(intervals, key_offset, blocks * tiling.queries, S)  # [B or 1, T]
    bounds = edge_bounds(first, last, tiling.edge)  # [B or 1, edges] each
    spans = pl.cdiv(S, tiling.span)
    walked = spans if reach is None else min(spans, pl.cdiv(reach + tiling.queries, tiling.span) + 1)
    row = lambda b: b if first.shape[0] > 1 else 0  # noqa: E731

    def span_of(b, i, s, lo, hi):
        span, end = _span(lo, hi, row(b) * edges + i * (tiling.queries // tiling.edge), tiling)
        return jnp.minimum(span + s, end)

    def keys_index(b, n, i, s, lo, hi, *_):
        return b, span_of(b, i, s, lo, hi), jax.lax.div(n, N // K)

    query_spec = pl.BlockSpec((1, tiling.queries, H), lambda b, n, i, s, *_: (b, i, n))
    place_spec = pl.BlockSpec((1, 1, tiling.queries), lambda b, n, i, s, *_: (row(b), 0, i))
    key_spec = pl.BlockSpec((1, tiling.span, H), keys_index)
    lse_spec = pl.BlockSpec((1, 1, tiling.queries), lambda b, n, i, s, *_: (b * N + n, 0, i))
    flat = lambda x: x.reshape(*x.shape[:2], -1)  # [B, T, N*H]  # noqa: E731
    earlier, earlier_specs, aliases = (), (), {}
    if before is not None:
        earlier = flat(before.out), before.lse.swapaxes(1, 2).reshape(B * N, 1, T)
        earlier_specs = query_spec, lse_spec
        if before.out.dtype == (dtype or query.dtype):
            aliases = {9: 0, 10: 1}
    statistics = pltpu.VMEM((tiling.queries, LANES), jnp.float32)
    read = B * N * T * min(S, reach or S) // 2  # what a causal mask leaves, of one document a row
    out, lse = call(
        functools.partial(_kernel, S=S, scale=H**-0.5, tiling=tiling, rows=first.shape[0], has_before=before is not None),
        out_shape=[
            jax.ShapeDtypeStruct((B, T, N * H), dtype or query.dtype),
            jax.ShapeDtypeStruct((B * N, 1, T), jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, N, blocks, walked),
            in_specs=[place_spec, place_spec, query_spec, key_spec, key_spec, *earlier_specs],
            out_specs=[query_spec, lse_spec],
            scratch_shapes=[
                statistics,
                statistics,
                pltpu.VMEM((tiling.queries, H), jnp.float32),
                pltpu.VMEM((2, tiling.queries, LANES), jnp.int32),
            ],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=60 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * read * H,
            transcendentals=read,
            bytes_accessed=query.dtype.itemsize * (2 * query.size + 2 * key.size * (1 if spans == 1 else blocks * N // K)),
        ),
        interpret=interpret,
        name="attention",
    )(*bounds, first[:, None], last[:, None], flat(query), flat(key), flat(value), *earlier)
    return Part(out.reshape(B, T, N, H), lse.reshape(B, N, T).swapaxes(1, 2))


def check(query, key, value) -> None:
    """Raises NotImplementedError for what the TPU kernels cannot take."""
    if query.shape[-1] % LANES:
        raise NotImplementedError(f"attention on TPU: the head size must be a multiple of {LANES}, not {query.shape[-1]}")
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"attention on TPU: all in bfloat16 or all in float32, not {', '.join(sorted(map(str, dtypes)))}"
        )


# ------------------------------------------------------------------------------------------------------------------------
# Places, counted from the first of the keys at hand


def places(intervals: Intervals, key_offset, T: int, S: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and last of S keys for each query, for T queries: those past the end, and those without keys, read nothing."""
    first = jnp.maximum(intervals.first - key_offset, 0)
    last = jnp.minimum(intervals.last - key_offset, S - 1)
    first, last = jnp.where(last < first, NOWHERE, first), jnp.where(last < first, -1, last)
    extra = ((0, 0), (0, T - first.shape[1]))
    return jnp.pad(first, extra, constant_values=NOWHERE), jnp.pad(last, extra, constant_values=-1)


def edge_bounds(first: Int[Array, "B T"], last: Int[Array, "B T"], edge: int) -> tuple[Int[Array, " n"], ...]:
    """Of every `edge` queries, by rows: the first key that any reads, the one after the last that any reads; and of the keys
    that all read, the first and the one after the last. Where one reads nothing there are none that all read."""
    first, last = (x.reshape(-1, edge).astype(jnp.int32) for x in (first, last))
    return first.min(1), last.max(1) + 1, first.max(1), last.min(1) + 1


def _span(lo, hi, place, tiling: Tiling):
    """The first span that a block reads, and the last."""
    begin, end = _extent(lo, hi, place, tiling)
    span = jax.lax.div(begin, tiling.span)
    return span, jax.lax.div(jnp.maximum(end - 1, begin), tiling.span)


def _extent(lo, hi, place, tiling: Tiling):
    """The first key that a block of queries reads, and the one after the last; 0 and 0 where it reads none."""
    count = tiling.queries // tiling.edge
    begin = functools.reduce(jnp.minimum, [lo[place + i] for i in range(count)])
    end = functools.reduce(jnp.maximum, [hi[place + i] for i in range(count)])
    return jnp.where(end > begin, begin, 0), jnp.where(end > begin, end, 0)


# ------------------------------------------------------------------------------------------------------------------------
# The kernel


def _kernel(lo, hi, all_from, all_to, first, last, q, k, v, *refs, S, scale, tiling, rows, has_before):
    earlier, (out, lse, m, l, acc, bounds) = refs[: 2 * has_before], refs[2 * has_before :]  # noqa: E741
    b, i, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    pieces = tiling.queries // tiling.edge
    place = ((b if rows > 1 else 0) * pl.num_programs(2) + i) * pieces
    begin, end = _extent(lo, hi, place, tiling)
    base = (_span(lo, hi, place, tiling)[0] + s) * tiling.span  # the place of the span's first key
    block = _Block(q, k, v, m, l, acc, bounds, base, S, scale, tiling)

    @pl.when(s == 0)
    def _start():
        bounds[0], bounds[1] = _column(first[0]), _column(last[0])
        if has_before:
            acc[...] = earlier[0][0].astype(jnp.float32)
            m[...] = _column(earlier[1][0]) / scale
            l[...] = jnp.full_like(l, 1 / LANES)
        else:
            acc[...] = jnp.zeros_like(acc)
            m[...] = jnp.full_like(m, NEVER)
            l[...] = jnp.zeros_like(l)

    @pl.when(base < end)
    def _read():
        all_begin = functools.reduce(jnp.maximum, [all_from[place + piece] for piece in range(pieces)])
        all_end = functools.reduce(jnp.minimum, [all_to[place + piece] for piece in range(pieces)])
        edges, wholes = _walk(begin - base, end - base, all_begin - base, all_end - base, tiling)
        wholes(block.read_whole)

        @edges
        def _read_edge(start):
            for piece in range(pieces):
                reads = (lo[place + piece] < base + start + tiling.edge) & (hi[place + piece] > base + start)
                pl.when(reads)(functools.partial(block.read_masked, piece, start))

    @pl.when(s == pl.num_programs(3) - 1)
    def _finish():
        total = jnp.sum(l[...], axis=1, keepdims=True)
        out[0] = (acc[...] / jnp.where(total == 0, 1.0, total)).astype(out.dtype)
        log = jnp.where(total == 0, NEVER, m[...] * scale + jnp.log(jnp.where(total == 0, 1.0, total)))  # [queries, LANES]
        lse[0] = log.T[:1]


def _walk(begin, end, all_begin, all_end, tiling: Tiling) -> tuple[Callable, Callable]:
    """Loops over masked tiles and over large tiles that need none, each given the tile's first key; together they cover
    [begin, end) of the span, of which every query reads [all_begin, all_end)."""
    tile = lambda key, up=0: jax.lax.div(jnp.clip(key, 0, tiling.span) + up * (tiling.edge - 1), tiling.edge)  # noqa: E731
    begin, all_begin, all_end, end = tile(begin), tile(all_begin, 1), tile(all_end), tile(end, 1)
    size = tiling.keys // tiling.edge
    count = jax.lax.div(jnp.maximum(all_end - all_begin, 0), size)
    before = jnp.where(count > 0, all_begin, end) - begin
    after = jnp.where(count > 0, all_begin + count * size, end)

    def edges(read):
        start = lambda j: jnp.where(j < before, begin + j, after + j - before) * tiling.edge  # noqa: E731
        jax.lax.fori_loop(0, before + end - after, lambda j, _: read(start(j)), None)

    def wholes(read):
        jax.lax.fori_loop(0, count, lambda j, _: read((all_begin + j * size) * tiling.edge), None)

    return edges, wholes


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of queries, a span of keys, and what was found so far.

    Attributes:
        m: in every lane the largest logit of the query, unscaled.
        l: sums of exp(scale * (logit - m)), whose lanes are added up at the end.
        acc: sums of the values, with the same weights.
        bounds: the first and the last place that a query reads, in every lane.
        base: the place of the span's first key, of S.
    """

    q: Ref
    k: Ref
    v: Ref
    m: Ref
    l: Ref  # noqa: E741
    acc: Ref
    bounds: Ref
    base: Any
    S: int
    scale: float
    tiling: Tiling

    def read_whole(self, start) -> None:
        """The `tiling.keys` keys from `start` of the span on."""
        keys = self.keys(start, self.tiling.keys)
        pieces = [self.queries(i) for i in range(self.tiling.queries // self.tiling.edge)]
        logits = [self.logits(queries, keys) for queries in pieces]  # of all first: work for the MXUs during the softmax
        for queries, s in zip(pieces, logits, strict=True):
            self.add(queries, s, self.v[0, keys, :])

    def read_masked(self, piece: int, start) -> None:
        """The `tiling.edge` keys from `start` of the span on, for one piece of the queries."""
        queries, keys, place = self.queries(piece), self.keys(start, self.tiling.edge), self.base + start
        v = self.v[0, keys, :]
        if self.S % self.tiling.edge:  # what lies after the last key may be anything, and 0 times it too
            exists = place + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < self.S
            v = jnp.where(exists, v, jnp.zeros((), v.dtype))
        s = self.logits(queries, keys)
        place += jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        first, last = (_over_lanes(self.bounds[i, queries, :], s.shape[1]) for i in range(2))
        self.add(queries, jnp.where((place >= first) & (place <= last), s, -jnp.inf), v)

    def queries(self, piece: int) -> slice:
        return slice(piece * self.tiling.edge, (piece + 1) * self.tiling.edge)

    def keys(self, start, size: int):
        return pl.ds(pl.multiple_of(start, self.tiling.edge), size)

    def logits(self, queries: slice, keys) -> jax.Array:
        return _dot(self.q[0, queries, :], self.k[0, keys, :], 1)  # [queries, keys]

    def add(self, queries: slice, s, v) -> None:
        """Reads values [keys, H] by their logits [queries, keys]."""
        m, to_log2 = self.m[queries, :], self.scale * math.log2(math.e)
        top = functools.reduce(jnp.maximum, [m, *_tiles(s)])
        top = jnp.broadcast_to(jnp.max(top, axis=1, keepdims=True), m.shape)
        p = jnp.exp2((s - _over_lanes(top, s.shape[1])) * to_log2)
        shrink = jnp.exp2((m - top) * to_log2)
        self.m[queries, :] = top
        self.l[queries, :] = self.l[queries, :] * shrink + _sum(_tiles(p))
        acc = self.acc[queries, :]
        self.acc[queries, :] = acc * _over_lanes(shrink, acc.shape[1]) + _dot(p.astype(v.dtype), v, 0)


def _tiles(x) -> list:
    """[rows, width] as pieces of [rows, LANES]."""
    return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def _over_lanes(x, width: int):
    """[rows, LANES] as [rows, width]."""
    return jnp.tile(x, (1, width // LANES))


def _column(x):
    """[1, rows] as [rows, LANES]."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def _sum(parts: list):
    """By pairs, so that no sum waits for a long row of others."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def _dot(a, b, b_axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
