"""The TPU kernel, interpreted, finds what a float64 evaluation finds, for intervals of every kind and parts of the keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, Part, tpu_forward
from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.attention.tpu_forward import Tiling

H = 128
forward = jax.jit(tpu_forward.forward, static_argnames=("reach", "dtype", "tiling", "interpret"))
TILING = Tiling(queries=256, keys=256, edge=128, span=512)


def inputs(B, T, S, N, K, dtype=jnp.float32):
    rng = np.random.default_rng(T + S)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def by_definition(q, k, v, where: Intervals, offset: int = 0) -> Part:
    """float64. Queries without keys get zeros."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    logits = np.einsum("btnh,bsnh->btns", q, np.repeat(k, groups, 2)) / np.sqrt(H)
    places = offset + np.arange(k.shape[1])
    allowed = (places >= np.asarray(where.first)[..., None]) & (places <= np.asarray(where.last)[..., None])
    p = np.exp(logits) * allowed[:, :, None]
    total = p.sum(-1)
    out = np.einsum("btns,bsnh->btnh", p, np.repeat(v, groups, 2)) / np.where(total, total, 1)[..., None]
    lse = np.where(total, np.log(np.where(total, total, 1)), -1e30)
    return Part(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))


def assert_equal(got: Part, want: Part, atol: float):
    np.testing.assert_allclose(got.out, want.out, atol=atol)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)


class TestForward:
    @settings(max_examples=8, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([(1, 1, 333, 700), (4, 2, 128, 128), (2, 1, 1, 129)]))
    def test_any_intervals_those_without_keys_and_those_past_both_ends(self, seed, shape):
        N, K, T, S = shape
        rng = np.random.default_rng(seed)
        first = rng.integers(-300, 900, (2, T)) // rng.choice([1, 500])
        where = Intervals(*(jnp.asarray(x, jnp.int32) for x in (first, first + rng.integers(-5, 700, (2, T)))))
        q, k, v = inputs(2, T, S, N, K)
        assert_equal(forward(q, k, v, where, tiling=TILING, interpret=True), by_definition(q, k, v, where), 4e-6)

    @pytest.mark.parametrize("chunk", [None, 128, 200, 700])
    def test_causal_and_chunked_over_several_spans_with_a_bound_on_the_spans_walked(self, chunk):
        q, k, v = inputs(1, 1300, 1300, 2, 1)
        where = intervals(Mask(chunk=chunk), 1300)
        got = forward(q, k, v, where, reach=chunk, tiling=TILING, interpret=True)
        assert_equal(got, by_definition(q, k, v, where), 4e-6)

    @pytest.mark.parametrize("causal", [True, False])
    def test_packed_documents_in_one_direction_and_in_both(self, causal):
        segments = np.repeat([1, 2, 3, 4, 0], [1, 3, 500, 200, 90])[None]
        q, k, v = inputs(1, 794, 794, 1, 1)
        where = intervals(Mask(query_segment_ids=jnp.asarray(segments), causal=causal), 794)
        index = np.arange(794)
        for t in (0, 3, 4, 503, 504, 703):
            same = index[segments[0] == segments[0, t]]
            assert (where.first[0, t], where.last[0, t]) == (same[0], t if causal else same[-1])
        assert_equal(forward(q, k, v, where, tiling=TILING, interpret=True), by_definition(q, k, v, where), 4e-6)

    def test_pieces_of_the_keys_one_after_another_give_what_all_give(self):
        q, k, v = inputs(2, 300, 600, 2, 1)
        where = intervals(Mask(chunk=250), 300)
        where = Intervals(where.first + 290, where.last + 290)  # the last 300 of a row whose keys begin at place -10
        part = None
        for begin, end in ((400, 600), (0, 150), (150, 400)):
            piece = k[:, begin:end], v[:, begin:end]
            part = forward(
                q, *piece, where, key_offset=begin - 10, before=part, dtype=jnp.float32, tiling=TILING, interpret=True
            )
        assert_equal(part, by_definition(q, k, v, where, -10), 4e-6)

    def test_the_default_tile_in_bfloat16(self):
        q, k, v = inputs(1, 2100, 2100, 1, 1, jnp.bfloat16)
        where = intervals(Mask(), 2100)
        got = forward(q, k, v, where, dtype=jnp.float32, interpret=True)
        assert_equal(got, by_definition(q, k, v, where), 1e-2)

    def test_refuses_other_head_sizes_and_mixed_dtypes_with_the_reason(self):
        q, k, v = inputs(1, 8, 8, 1, 1)
        with pytest.raises(NotImplementedError, match="multiple of 128, not 64"):
            forward(q[..., :64], k[..., :64], v[..., :64], intervals(Mask(), 8))
        with pytest.raises(NotImplementedError, match="bfloat16, float32"):
            forward(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), intervals(Mask(), 8))
