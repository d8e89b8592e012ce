"""The gradients of flash attention as one Pallas kernel for TPU.

For a block of queries, the heads that share a KV head lie below one another as rows, and a loop walks over the blocks of keys
that they read. Keys are in sublanes and rows in lanes, so that a row's statistics are broadcast down the sublanes and nothing
is ever reduced or transposed across lanes. The keys, the values and the float32 sums of their gradients stay in VMEM while all
queries pass by: five products for a tile, and each input and output moves once.

Matrix units 256 wide are half empty in a product whose result is one head wide. There the products are turned around, so that
the probabilities and their gradients are the stationary operand, which fills the unit, and the sums lie transposed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.intervals import Intervals

VMEM_BYTES = 56 * 2**20  # of the smallest VMEM, tpu7x's 64 MiB, less what the compiler needs for itself
ROWS, KEYS = 2560, 512  # of a tile: enough work for the matrix units to stay busy while the tile begins and ends
STRIP = 512  # while the vector units work on one strip, the matrix units multiply the next
NOBODY = 2**30  # more than any place


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Attributes:
    queries: of a tile, of each of the heads that share a KV head.
    keys: of a tile.
    resident: keys whose gradients are in VMEM at a time; a multiple of `keys`.
    strip: rows of a tile that are worked on at a time.
    """

    queries: int
    keys: int
    resident: int
    strip: int


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: Intervals,
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    delta: Float[Array, "B T N"],
    *,
    key_offset=0,
    before: Float[Array, "B T N H"] | None = None,
    out_dtype=None,
    tiling: Tiling | None = None,
    turned: bool | None = None,
    interpret=False,
    call=pl.pallas_call,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """What these keys contribute to the gradients of query, key and value.

    Args:
        intervals: the places of the keys that each query reads.
        lse: natural log-sum-exp of the scaled logits over all keys, be they here or not; any value where there are none.
        dout: the gradient of the attention over all keys, in the dtype of the query.
        delta: sum over h of dout * out, out over all keys; finite.
        key_offset: the place of the first key here; may be traced.
        before: float32, what other keys contributed to the gradient of the query, to be added to it.
        out_dtype: of the gradients; that of the query if None.
        tiling: chosen by shape if None.
        turned: whether the probabilities are the stationary operands; as fits the matrix units if None.
        interpret: as in `pl.pallas_call`.
        call: what stands in for `pl.pallas_call` (see `ring_attention/ride.py`); with one piece of keys only.

    Raises:
        NotImplementedError: dtypes other than bfloat16 or float32 (the same of query, key, value and dout), a head size
            that is no multiple of 128, or more query heads to a KV head than fit into VMEM (of size 128, over 48).
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    dtypes = {x.dtype for x in (query, key, value, dout)}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"attention on TPU: all in bfloat16 or in float32, not {', '.join(map(str, dtypes))}")
    if H % 128:
        raise NotImplementedError(f"attention on TPU: the head size must be a multiple of 128, not {H}")
    out_dtype = jnp.dtype(out_dtype or query.dtype)
    tiling = tiling or choose_tiling(T, S, N // K, H, query.dtype.itemsize, out_dtype.itemsize)
    turned = _wide_matrix_units() if turned is None else turned
    pieces = -(-S // tiling.resident)

    # Queries and keys that fill up the last tiles are zeros: nobody reads them, and 0 * 0 is no NaN.
    q, do = (_pad(x.reshape(B, T, N * H), tiling.queries) for x in (query, dout))
    k, v = (_pad(x.reshape(B, S, K * H), tiling.resident) for x in (key, value))
    first = _pad(intervals.first - key_offset, tiling.queries, NOBODY)
    last = _pad(intervals.last - key_offset, tiling.queries, -1)
    by_row = [_rows(_pad(x, tiling.queries), K, tiling.queries) for x in (lse * math.log2(math.e), delta)]

    def piece(dq, number):
        begin = number * tiling.resident
        here = jnp.maximum(first - begin, 0), jnp.minimum(last, S - 1) - begin
        return _piece(q, do, k, v, *by_row, *here, number, dq, (K, H), tiling, out_dtype, turned, interpret, call)

    dq = None if before is None else _pad(before.reshape(B, T, N * H), tiling.queries)
    if pieces == 1:
        dq, (dk, dv) = piece(dq, jnp.int32(0))
    else:
        dq, (dk, dv) = jax.lax.scan(
            piece, jnp.zeros(q.shape, jnp.float32) if dq is None else dq, jnp.arange(pieces, dtype=jnp.int32)
        )
        dk, dv = (x.swapaxes(0, 1).reshape(k.shape) for x in (dk, dv))  # [pieces, B, resident, K*H]
    dq = dq[:, :T].astype(out_dtype).reshape(query.shape)
    return dq, dk[:, :S].reshape(key.shape), dv[:, :S].reshape(value.shape)


def choose_tiling(T: int, S: int, G: int, H: int, bytes_: int, out_bytes: int) -> Tiling:
    """About ROWS rows, and as many resident keys as VMEM holds: all of them, or pieces of one size.

    Raises:
        NotImplementedError: the smallest tile does not fit into VMEM.
    """
    queries = min(max(128, 2 ** int(math.log2(ROWS * 2 // bytes_ / G))), 1024, -(-T // 128) * 128)
    keys = min(KEYS * 2 // bytes_, -(-S // 128) * 128)
    # Two buffers of each input (query, dout, dq so far; key, value) and output, the sums, the rows and a tile's values
    of_rows = G * queries * (H * (2 * (2 * bytes_ + 4 + 4) + 4 + 2 * bytes_) + keys * (2 * bytes_ + 4))
    of_a_key = H * (2 * (2 * bytes_ + 2 * out_bytes) + 2 * 4)
    at_most = (VMEM_BYTES - of_rows) // of_a_key // keys * keys
    if at_most <= 0:
        raise NotImplementedError(f"attention on TPU: {G} query heads of size {H} to a KV head do not fit into VMEM")
    pieces = -(-S // at_most)
    return Tiling(queries, keys, -(-S // pieces // keys) * keys, STRIP)


def _wide_matrix_units() -> bool:
    try:
        return pltpu.get_tpu_info().mxu_column_size > 128
    except ValueError:  # no TPU: interpreted
        return False


def _pad(x: Array, block: int, with_=0) -> Array:
    """Axis 1 filled up to a multiple of `block`."""
    padding = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)), constant_values=with_) if padding else x


def _rows(x: Float[Array, "B T N"], K: int, block: int) -> Float[Array, "B K blocks 1 rows"]:
    """By blocks of queries, the heads that share a KV head one after another."""
    B, T, N = x.shape
    return x.reshape(B, T // block, block, K, N // K).transpose(0, 3, 1, 4, 2).reshape(B, K, T // block, 1, -1)


def _runs(first, last, tiling: Tiling):
    """[4, #B, blocks]: of each block of queries the first block of keys that any query reads, the first that all of them read
    whole, the first after those, and the first after all that any reads; and [2, #B]: the first block of queries that reads
    any, and the first after the last one."""
    first, last = (x.reshape(x.shape[0], -1, tiling.queries) for x in (first, last))
    last = jnp.minimum(last, tiling.resident - 1)
    reads = first <= last
    first, last = jnp.where(reads, first, NOBODY), jnp.where(reads, last, -1)
    stop = last.max(-1) // tiling.keys + 1
    start = jnp.minimum(first.min(-1) // tiling.keys, stop)
    whole = jnp.clip((first.max(-1) + tiling.keys - 1) // tiling.keys, start, stop)
    after = jnp.clip((last.min(-1) + 1) // tiling.keys, whole, stop)
    busy = start < stop
    count = busy.shape[1]
    span = jnp.argmax(busy, axis=1), count - jnp.argmax(busy[:, ::-1], axis=1)
    span = jnp.where(busy.any(axis=1), jnp.stack(span), 0)
    return jnp.stack([start, whole, after, stop]).astype(jnp.int32), span.astype(jnp.int32)


def _piece(q, do, k, v, lse, delta, first, last, number, dq, heads, tiling, out_dtype, turned, interpret, call):
    """The gradients from one piece of the keys: dq, added to `dq` if that is given, and (dk, dv) of the piece.

    Args:
        q, do, k, v: [B, T, N*H] and [B, S, K*H].
        lse, delta: [B, K, blocks, 1, rows], lse in powers of two.
        first, last: [#B, T], counted from the piece's first key.
        number: of the piece.
        heads: K, H.
    """
    (K, H), (B, T, width) = heads, q.shape
    G, block, resident = width // H // K, tiling.queries, tiling.resident
    runs, span = _runs(first, last, tiling)
    per_row = first.shape[0] > 1
    edges = [jnp.tile(x.reshape(x.shape[0], T // block, 1, block), G) for x in (first, last)]  # [#B, blocks, 1, rows]

    def queries(b, i, span):
        """The block, or of those before or after all work, the nearest with work, which then is not fetched again."""
        row = b if per_row else 0
        return jnp.clip(i, span[0, row], jnp.maximum(span[1, row] - 1, span[0, row]))

    of_queries = pl.BlockSpec((None, block, G * H), lambda b, h, i, number, runs, span: (b, queries(b, i, span), h))
    of_rows = pl.BlockSpec((None, None, None, 1, G * block), lambda b, h, i, n, runs, span: (b, h, queries(b, i, span), 0, 0))
    edge = pl.BlockSpec((None, None, 1, G * block), lambda b, h, i, n, runs, span: (b * per_row, queries(b, i, span), 0, 0))
    of_keys = pl.BlockSpec((None, resident, H), lambda b, h, i, number, *_: (b, number[0], h))
    dq_out = of_queries if dq is not None else pl.BlockSpec((None, block, G * H), lambda b, h, i, *_: (b, i, h))
    dk_out = pl.BlockSpec((None, resident, H), lambda b, h, i, *_: (b, 0, h))
    turn = lambda *shape: shape[::-1] if turned else shape  # noqa: E731
    operands = [q, do, lse, delta, *edges, k, v]
    in_specs = [of_queries, of_queries, of_rows, of_rows, edge, edge, of_keys, of_keys]
    if dq is not None:
        operands, in_specs = [*operands, dq], [*in_specs, of_queries]
    pairs = B * T * width * resident // 2  # what a causal mask leaves, of one document a row
    dq, dk, dv = call(
        functools.partial(_kernel, tiling=tiling, heads=G, per_row=per_row, turned=turned, added=dq is not None),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, out_dtype if dq is None else jnp.float32),
            *[jax.ShapeDtypeStruct((B, resident, K * H), out_dtype)] * 2,
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, T // block),
            in_specs=in_specs,
            out_specs=[dq_out, dk_out, dk_out],
            scratch_shapes=[
                *[pltpu.VMEM(turn(G * block, H), q.dtype)] * 2,
                pltpu.VMEM(turn(G * block, H), jnp.float32),
                *[pltpu.VMEM(turn(resident, H), jnp.float32)] * 2,
            ],
        ),
        input_output_aliases={} if dq is None else {3 + len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES + 6 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * 5 * pairs,
            transcendentals=pairs // H,
            bytes_accessed=q.dtype.itemsize * (3 * B * T * width + 4 * B * resident * K * H),
        ),
        interpret=interpret,
        name="attention_backward",
    )(number[None], runs, span, *operands)
    return dq, (dk, dv)


def _kernel(number, runs, span, q, do, lse, delta, first, last, k, v, *refs, tiling, heads, per_row, turned, added):
    dq_before, (dq, dk, dv, q_rows, do_rows, dq_sum, dk_sum, dv_sum) = refs[:added], refs[added:]
    block, size, H = tiling.queries, tiling.keys, k.shape[1]
    row, i = pl.program_id(0) if per_row else 0, pl.program_id(2)
    start, whole, after, stop = (runs[n, row, i] for n in range(4))
    scale = H**-0.5
    turn = (lambda x: x.T) if turned else (lambda x: x)

    def part(x, along):
        """Of sums and operands that lie turned or not: some of the rows, or of the keys."""
        return x.at[:, along] if turned else x.at[along, :]

    def keys_of(j):
        return pl.ds(pl.multiple_of(j * size, size), size)

    @pl.when(i == 0)
    def _clear():
        def clear(j, _):
            for total in (dk_sum, dv_sum):
                here = part(total, keys_of(j))
                here[...] = jnp.zeros_like(here)

        jax.lax.fori_loop(0, tiling.resident // size, clear, None)

    dq_sum[...] = jnp.zeros_like(dq_sum)

    def tile(j, masked: bool):
        keys = keys_of(j)
        k_here, v_here, dk_here, dv_here = k[keys, :], v[keys, :], part(dk_sum, keys), part(dv_sum, keys)
        k_turned = turn(k_here)
        for begin in range(0, heads * block, tiling.strip):
            strip = slice(begin, min(begin + tiling.strip, heads * block))
            q_here, do_here, dq_here = part(q_rows, strip)[...], part(do_rows, strip)[...], part(dq_sum, strip)
            logits = _dot(k_here, q_here, 1, 0 if turned else 1)  # [keys, rows]
            exponents = logits * (scale * math.log2(math.e)) - lse[:, strip]
            if masked:
                place = j * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
                exponents = jnp.where((place >= first[:, strip]) & (place <= last[:, strip]), exponents, -jnp.inf)
            p = jnp.exp2(exponents)
            dp = _dot(v_here, do_here, 1, 0 if turned else 1)
            ds = (p * (dp - delta[:, strip])).astype(q_here.dtype)
            p = p.astype(q_here.dtype)
            if turned:
                dv_here[...] += _dot(do_here, p, 1, 1)
                dk_here[...] += _dot(q_here, ds, 1, 1)
                dq_here[...] += _dot(k_turned, ds, 1, 0)
            else:
                dv_here[...] += _dot(p, do_here, 1, 0)
                dk_here[...] += _dot(ds, q_here, 1, 0)
                dq_here[...] += _dot(ds, k_here, 0, 0)

    @pl.when(start < stop)
    def _multiply():
        for g in range(heads):
            rows, columns = slice(g * block, (g + 1) * block), slice(g * H, (g + 1) * H)
            part(q_rows, rows)[...] = turn(q[:, columns])
            part(do_rows, rows)[...] = turn(do[:, columns])

        def edge(n, _):
            tile(jnp.where(n < whole - start, start + n, after + n - (whole - start)), True)

        jax.lax.fori_loop(0, whole - start + stop - after, edge, None)
        jax.lax.fori_loop(whole, after, lambda j, _: tile(j, False), None)

    @pl.when((i == 0) | (i < span[1, row]) | (not added))  # what comes after all work would write the last block again
    def _write_dq():
        for g in range(heads):
            rows, columns = slice(g * block, (g + 1) * block), slice(g * H, (g + 1) * H)
            total = turn(part(dq_sum, rows)[...]) * scale
            if added:
                total += dq_before[0][:, columns]
            dq[:, columns] = total.astype(dq.dtype)

    @pl.when(i == pl.num_programs(2) - 1)
    def _write_dk_dv():
        def write(j, _):
            keys = keys_of(j)
            dk[keys, :] = (turn(part(dk_sum, keys)[...]) * scale).astype(dk.dtype)
            dv[keys, :] = turn(part(dv_sum, keys)[...]).astype(dv.dtype)

        jax.lax.fori_loop(0, tiling.resident // size, write, None)


def _dot(a, b, a_axis: int, b_axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
