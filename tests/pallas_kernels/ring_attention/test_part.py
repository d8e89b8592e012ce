"""Parts of the keys, merged, are attention over all of them: forward and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention, empty_part, merge
from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.ring_attention import part as parts
from pallas_kernels.ring_attention.part import attend_part, part_gradients

B, T, N, K, H = 2, 24, 4, 2, 8


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    positions = np.array([[sum(row[:i] == row[i]) for i in range(T)] for row in segments], np.int32)
    return *arrays, jnp.asarray(positions), jnp.asarray(segments)


def cut(array, start, stop):
    return array[:, start:stop]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("max_block", [512, 8, 7])
def test_merged_parts_and_their_gradients(chunk, max_block, monkeypatch):
    monkeypatch.setattr(parts, "MAX_BLOCK", max_block)
    q, k, v, dout, positions, segments = inputs()
    whole = Mask(positions, segments, chunk=chunk)
    want, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, whole, implementation="reference"), q, k, v)

    spans = intervals(whole, T)
    edges = [(8, 24), (0, 1), (1, 8)]  # in any order
    found = empty_part(q)
    for edge in edges:
        found = merge(found, attend_part(q, cut(k, *edge), cut(v, *edge), spans, edge[0]))
    np.testing.assert_allclose(found.out, want, atol=2e-6)

    delta = jnp.sum(found.out * dout, axis=-1)
    gradients = {
        edge: part_gradients(q, cut(k, *edge), cut(v, *edge), spans, edge[0], found.lse, dout, delta) for edge in sorted(edges)
    }
    dq, dk, dv = pullback(dout)
    np.testing.assert_allclose(sum(g.query for g in gradients.values()), dq, atol=5e-6)
    np.testing.assert_allclose(jnp.concatenate([g.key for g in gradients.values()], axis=1), dk, atol=5e-6)
    np.testing.assert_allclose(jnp.concatenate([g.value for g in gradients.values()], axis=1), dv, atol=5e-6)


def test_a_part_with_nothing_to_read_changes_nothing():
    q, k, v, _, positions, segments = inputs()
    spans = intervals(Mask(positions, segments), T)
    own = attend_part(q, k, v, spans, 0)
    empty = attend_part(q, k, v, spans, T)  # all of these keys come after every query
    merged = merge(empty, own)
    np.testing.assert_array_equal(merged.out, own.out)
    np.testing.assert_array_equal(merged.lse, own.lse)


def test_bfloat16_inputs_give_float32_statistics():
    q, k, v, dout, positions, segments = inputs(jnp.bfloat16)
    mask = Mask(positions, segments)
    part = attend_part(q, k, v, intervals(mask, T), 0)
    assert part.out.dtype == part.lse.dtype == jnp.float32
    np.testing.assert_allclose(part.out, attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask), atol=0.02)
    delta = jnp.sum(part.out * dout.astype(jnp.float32), axis=-1)
    gradients = part_gradients(q, k, v, intervals(mask, T), 0, part.lse, dout, delta)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_a_query_without_any_key_gives_zeros_and_no_gradients():
    q, k, v, dout, _, _ = inputs()
    place = jnp.arange(T)[None]
    spans = Intervals(jnp.zeros_like(place), jnp.where(place % 3 == 0, -1, place))
    part = attend_part(q, k, v, spans, 0)
    assert not part.out[:, ::3].any() and part.out[:, 1::3].all()
    lonely = jnp.where((place % 3 == 0)[..., None, None], dout, 0)
    gradients = part_gradients(q, k, v, spans, 0, part.lse, lonely, jnp.zeros_like(part.lse))
    assert not any(x.any() for x in jax.tree.leaves(gradients))
