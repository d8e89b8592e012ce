"""The TPU's attention gradients against those of dense attention, under any interval of keys for each query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.attention import Mask, tpu_backward
from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.attention.tpu_backward import Tiling, backward

H = 128
T = 40
DOCUMENTS = jnp.repeat(jnp.array([0, 1, 2, 3]), jnp.array([1, 19, 4, 16]), total_repeat_length=T)
IN_DOCUMENT = jnp.concatenate([jnp.arange(n) for n in (1, 19, 4, 16)])
PACKED = {"query_segment_ids": DOCUMENTS[None], "query_positions": IN_DOCUMENT[None]}
EVERY_THIRD = np.arange(T)[None] % 3 == 0


def spans(first, last):
    return Intervals(jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32))


MASKS = {
    "causal": intervals(Mask(), T),
    "chunks": intervals(Mask(chunk=12), T),
    "full": intervals(Mask(causal=False), T),
    "documents": intervals(Mask(**PACKED), T),
    "documents in chunks": intervals(Mask(**PACKED, chunk=7), T),
    "documents, both ways": intervals(Mask(**PACKED, causal=False), T),
    "queries without keys": spans(np.where(EVERY_THIRD, 5, 0), np.where(EVERY_THIRD, 4, np.arange(T))),
    "keys that nobody reads": spans(np.full((1, T), 17), np.full((1, T), 22)),
    "nobody reads anything": spans(np.full((1, T), T), np.full((1, T), -1)),
}
SMALL = Tiling(queries=16, keys=8, resident=40, strip=24)
PIECES = Tiling(queries=8, keys=8, resident=16, strip=8)


@functools.partial(jax.jit, static_argnames="dtype")
def dense(q, k, v, first, last, dout, dtype=jnp.float32):
    """Log-sum-exp, sum over h of dout * out, and the gradients, by autodiff; operands rounded to `dtype` first."""
    q, k, v, dout = (x.astype(dtype).astype(jnp.float32) for x in (q, k, v, dout))
    place = jnp.arange(k.shape[1])
    allowed = ((place >= first[..., None]) & (place <= last[..., None]))[:, None]  # [#B, 1, T, S]

    def attend(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
        top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.where(allowed, jnp.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total > 0, total, 1), v, precision="highest")
        return out, jnp.where(total > 0, top + jnp.log(total), -1e30)[..., 0].swapaxes(1, 2)

    out, back, lse = jax.vjp(attend, q, k, v, has_aux=True)
    return lse, (dout * out).sum(-1), back(dout)


@functools.cache
def kernel(dtype, out_dtype, tiling, turned, interpret=True):
    def function(q, k, v, first, last, lse, dout, delta, key_offset):
        q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
        options = {"out_dtype": out_dtype, "tiling": tiling, "turned": turned, "interpret": interpret}
        return backward(q, k, v, Intervals(first, last), lse, dout, delta, key_offset=key_offset, **options)

    return jax.jit(function)


def operands(seed, N, K, T=T, S=T, B=1, H=H):
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)  # noqa: E731
    return draw(seed, B, T, N, H), draw(seed + 1, B, S, K, H), draw(seed + 2, B, S, K, H), draw(seed + 3, B, T, N, H)


def close(got, want, tolerance):
    for name, a, b in zip(("query", "key", "value"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * (np.abs(b).max(initial=0) + 1), rtol=0, err_msg=name)


def check(mask, N=4, K=2, *, tiling=SMALL, turned=False, dtype="float32", out_dtype=None, tolerance=2e-5, seed=0, **options):
    """All three gradients are those of dense attention, and exactly zero where there is nothing to read or to be read by."""
    interpret = options.pop("interpret", True)
    q, k, v, dout = operands(seed, N, K, **options)
    lse, delta, want = dense(q, k, v, mask.first, mask.last, dout, dtype)
    run = kernel(dtype, out_dtype, tiling, turned, interpret)
    got = run(q, k, v, mask.first, mask.last, lse, dout, delta, 0)
    assert all(x.dtype == (out_dtype or dtype) for x in got)
    close(got, want, tolerance)
    place = jnp.arange(k.shape[1])
    reads = (place >= mask.first[..., None]) & (place <= mask.last[..., None])  # [#B, T, S]
    for gradient, used in zip(got, (reads.any(2), reads.any(1), reads.any(1)), strict=True):
        used = jnp.broadcast_to(used, gradient.shape[:2])
        assert not np.asarray(gradient, np.float32)[~np.asarray(used)].any()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_dense_attention(name, turned):
    check(MASKS[name], turned=turned)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_the_queries_add_up_over_pieces_of_the_keys(name, turned):
    check(MASKS[name], turned=turned, tiling=PIECES)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 1), (3, 3)])
def test_heads_that_share_keys_add_up(N, K):
    """In rows that share a mask."""
    check(MASKS["documents"], N, K, B=2, turned=N == 5)


def test_rows_have_masks_of_their_own():
    first = np.stack([np.zeros(T), np.full(T, 30), np.arange(T)])
    last = np.stack([np.arange(T), np.full(T, 33), np.arange(T) - 1])  # causal, a few keys, none
    check(spans(first, last), 2, 1, B=3)
    check(spans(first, last), 2, 1, B=3, tiling=PIECES, turned=True)


def test_sizes_that_no_tile_divides():
    """In tiles larger than the row, and in tiles that do not divide it."""
    mask = intervals(Mask(chunk=12), 37)
    check(mask, 2, 1, T=37, S=37, H=256, turned=True, tiling=Tiling(queries=64, keys=48, resident=48, strip=80))
    check(mask, 2, 1, T=37, S=29, tiling=Tiling(queries=16, keys=8, resident=24, strip=32))


@pytest.mark.parametrize(("out_dtype", "turned", "tiling"), [("bfloat16", False, SMALL), ("float32", True, PIECES)])
def test_bfloat16_differs_by_rounding_alone(out_dtype, turned, tiling):
    tolerance = 2e-2
    check(MASKS["documents"], 5, 1, dtype="bfloat16", out_dtype=out_dtype, tolerance=tolerance, turned=turned, tiling=tiling)


@pytest.mark.parametrize("name", ["causal", "documents in chunks", "full", "queries without keys"])
def test_parts_of_a_ring_add_up(name):
    """Keys at two places of the row, which no tile divides: dq adds up, dk and dv are the parts'; the place is traced."""
    mask = MASKS[name]
    q, k, v, dout = operands(7, 4, 2)
    lse, delta, want = dense(q, k, v, mask.first, mask.last, dout)
    run = kernel("float32", None, PIECES, False)
    parts = []
    for start in (0, 20):
        keys = slice(start, start + 20)
        parts.append(run(q, k[:, keys], v[:, keys], mask.first, mask.last, lse, dout, delta, jnp.int32(start)))
    dq, dk, dv = zip(*parts, strict=True)
    close((sum(dq), jnp.concatenate(dk, 1), jnp.concatenate(dv, 1)), want, 2e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_intervals(data):
    """Drawn so that a few compilations serve all: each query any interval, empty ones and ones beyond the row too."""
    place = st.integers(-3, T + 3)
    drawn = data.draw(st.lists(st.tuples(place, place), min_size=1, max_size=T))
    drawn = (drawn * T)[:T]
    if data.draw(st.booleans()):
        drawn = [(min(pair), max(pair)) for pair in drawn]
    first, last = np.array(drawn).T[:, None]
    tiling = data.draw(st.sampled_from([SMALL, PIECES]))
    check(spans(first, last), tiling=tiling, turned=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_runs_say_which_blocks_of_keys_are_read_and_which_whole(data):
    """Against a walk in plain Python: no block outside the runs is read, and those called whole are."""
    place = st.integers(0, 31)
    drawn = data.draw(st.lists(st.tuples(place, place), min_size=8, max_size=8))
    first, last = np.array(drawn).T
    runs, span = (np.asarray(x)[..., 0, :] if x.ndim == 3 else np.asarray(x)[:, 0] for x in _runs(first[None], last[None]))
    for block in range(2):
        rows = range(block * 4, block * 4 + 4)
        reads = [[sum(first[t] <= s <= last[t] for s in range(n * 4, n * 4 + 4)) for n in range(8)] for t in rows]
        start, whole, after, stop = runs[:, block]
        some = [n for n in range(8) if any(row[n] for row in reads)]
        assert [start, stop] == [some[0], some[-1] + 1] if some else start == stop
        assert list(range(whole, after)) == [n for n in range(8) if all(row[n] == 4 for row in reads)]
    busy = [block for block in range(2) if runs[0, block] < runs[3, block]]
    assert list(span) == ([busy[0], busy[-1] + 1] if busy else [0, 0])


_runs = jax.jit(lambda first, last: tpu_backward._runs(first, last, Tiling(4, 4, 32, 0)))


@pytest.mark.parametrize(("turned", "tiling"), [(False, SMALL), (True, PIECES)])
def test_nothing_is_read_before_it_is_written_and_no_copy_races(turned, tiling):
    """In the interpreter that simulates a TPU's memories, where what nobody wrote is NaN."""
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(MASKS["documents"], 2, 1, tiling=tiling, turned=turned, interpret=strict)


def test_padding_takes_no_garbage_where_nobody_has_keys():
    """The log-sum-exp of a query without keys may be anything, NaN and infinities too."""
    mask = MASKS["queries without keys"]
    q, k, v, dout = operands(3, 4, 2)
    lse, delta, want = dense(q, k, v, mask.first, mask.last, dout)
    for nonsense in (jnp.nan, jnp.inf, -jnp.inf):
        lse = jnp.where(EVERY_THIRD[..., None], nonsense, lse)
        close(kernel("float32", None, SMALL, False)(q, k, v, mask.first, mask.last, lse, dout, delta, 0), want, 2e-5)


def test_what_cannot_be_done_is_refused():
    q, k, v, dout = operands(0, 2, 1, H=64)
    zeros = jnp.zeros(q.shape[:3])
    with pytest.raises(NotImplementedError, match="multiple of 128, not 64"):
        backward(q, k, v, MASKS["causal"], zeros, dout, zeros)
    with pytest.raises(NotImplementedError, match="all in bfloat16 or in float32, not"):
        backward(q, k.astype(jnp.bfloat16), v, MASKS["causal"], zeros, dout, zeros)
    with pytest.raises(NotImplementedError, match="100 query heads of size 128 to a KV head do not fit"):
        tpu_backward.choose_tiling(T, T, 100, 128, 2, 2)


@pytest.mark.parametrize("H", [128, 256])
@pytest.mark.parametrize("G", [1, 3, 5, 8, 16])
@pytest.mark.parametrize("bytes_", [2, 4])
def test_the_default_tiling_fits_into_vmem(bytes_, G, H):
    """And keys of any number are pieces of one size, whole tiles all, with less than a tile to spare in each."""
    for length in (1, 300, 8192, 100_000):
        tiling = tpu_backward.choose_tiling(length, length, G, H, bytes_, 4)
        rows = G * tiling.queries
        blocks = 2 * (2 * rows * H * bytes_ + 2 * rows * H * 4 + 2 * tiling.resident * H * (bytes_ + 4))
        scratch = rows * H * (2 * bytes_ + 4) + 2 * tiling.resident * H * 4
        assert blocks + scratch <= tpu_backward.VMEM_BYTES
        assert not (tiling.queries % 128 or tiling.keys % 128 or tiling.resident % tiling.keys)
        pieces = -(-length // tiling.resident)
        assert pieces * tiling.resident < length + pieces * tiling.keys


needs_libtpu = pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")
BUILDER = "pallas_kernels.attention.shapes:backward_case"


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5p", "v6e"])
def test_the_main_shape_compiles_for_a_tpu(chip):
    (outcome,) = aot.compile_for(chip, [aot.Request(BUILDER)])
    assert outcome.error is None, outcome.error


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_every_form_compiles_for_every_tpu(chip):
    """Scout's heads; a ring's part in float32; more keys than VMEM holds; sizes that no tile divides; other heads."""
    forms = [
        {"N": 40, "K": 8, "B": 2},
        {"N": 40, "K": 8, "out_dtype": "float32"},
        {"N": 40, "K": 8, "S": 32768},
        {"dtype": "float32"},
        {"T": 1000, "S": 300, "N": 3, "H": 256},
        {"N": 1, "S": 65536},
        {"N": 16},
    ]
    for outcome in aot.compile_for(chip, [aot.Request(BUILDER, form) for form in forms]):
        assert outcome.error is None, (outcome.request, outcome.error)
