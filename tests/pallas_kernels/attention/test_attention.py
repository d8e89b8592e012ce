"""Attention equals a float64 evaluation of its definition under every kind of mask, forward and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import Mask, attention


def inputs(B, T, S, N=4, K=2, H=8, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def rows_of_documents(lengths, T):
    """Positions and segment ids, [1, T], of one row: documents of these lengths, padded at the end."""
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(T - sum(lengths), int)])
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(T - sum(lengths), int)])
    return positions[None].astype(np.int32), segments[None].astype(np.int32)


def by_definition(q, k, v, allowed):
    """float64, one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            group = n // (q.shape[2] // k.shape[2])
            scores = q[b, :, n] @ k[b, :, group].T / np.sqrt(q.shape[-1])
            scores = np.where(allowed[b], scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, n] = p / p.sum(-1, keepdims=True) @ v[b, :, group]
    return out


def allowed_by_definition(positions, segments, chunk):
    """[B, T, T], pair by pair."""
    B, T = positions.shape
    allowed = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(t + 1):
                same_chunk = chunk is None or positions[b, t] // chunk == positions[b, s] // chunk
                allowed[b, t, s] = segments[b, t] == segments[b, s] and same_chunk
    return allowed


attend = jax.jit(attention, static_argnames="implementation")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
class TestAttention:
    @pytest.mark.parametrize("T", [1, 64, 65, 130])
    @pytest.mark.parametrize("chunk", [None, 1, 13, 65, 1000])
    def test_causal_and_chunks_around_the_block_size(self, implementation, T, chunk):
        q, k, v = inputs(2, T, T)
        plain = np.tile(np.arange(T), (2, 1)), np.ones((2, T), int)
        got = attend(q, k, v, Mask(chunk=chunk), implementation=implementation)
        np.testing.assert_allclose(got, by_definition(q, k, v, allowed_by_definition(*plain, chunk)), atol=2e-6)

    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(1, 32), min_size=1, max_size=3), st.sampled_from([None, 7, 16]))
    def test_packed_documents(self, implementation, lengths, chunk):
        positions, segments = rows_of_documents(lengths, 96)
        q, k, v = inputs(1, 96, 96)
        got = attend(q, k, v, Mask(jnp.asarray(positions), jnp.asarray(segments), chunk=chunk), implementation=implementation)
        want = by_definition(q, k, v, allowed_by_definition(positions, segments, chunk))
        np.testing.assert_allclose(got[:, : sum(lengths)], want[:, : sum(lengths)], atol=2e-6)

    def test_windows_promised_by_the_packer(self, implementation):
        """Chunk 8: documents of 8 or fewer inside a window, longer ones on one. The promise changes no number."""
        positions, segments = rows_of_documents([3, 5, 20], 32)  # 3 + 5 share a window; 20 takes three, padded
        q, k, v = inputs(1, 32, 32)
        masks = [Mask(jnp.asarray(positions), jnp.asarray(segments), chunk=8, document_window=w) for w in (None, 8)]
        assert masks[1].chunks_are_windows and not masks[0].chunks_are_windows
        without, promised = (attention(q, k, v, mask, implementation=implementation)[:, :28] for mask in masks)
        np.testing.assert_allclose(promised, without, atol=2e-6)

    def test_keys_in_slots_of_any_order_with_empty_ones(self, implementation):
        """A ring of 8 slots whose positions are 8..11, 4..7: queries at 10 and 11, chunk 8."""
        q, k, v = inputs(1, 2, 8)
        slots = np.array([[8, 9, 10, 11, 4, 5, -1, 7]], np.int32)
        mask = Mask(jnp.array([[10, 11]], jnp.int32), key_positions=jnp.asarray(slots), chunk=8)
        allowed = np.array([[[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]], bool)
        np.testing.assert_allclose(
            attention(q, k, v, mask, implementation=implementation), by_definition(q, k, v, allowed), atol=2e-6
        )
        full = Mask(mask.query_positions, key_positions=mask.key_positions)
        allowed = np.array([[[1, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 1]]], bool)
        np.testing.assert_allclose(
            attention(q, k, v, full, implementation=implementation), by_definition(q, k, v, allowed), atol=2e-6
        )

    def test_a_chunk_boundary_cuts_all_influence(self, implementation):
        """The first token of a chunk reads itself alone, and no gradient crosses."""
        q, k, v = inputs(1, 24, 24)
        mask = Mask(chunk=8)
        np.testing.assert_allclose(attention(q, k, v, mask, implementation=implementation)[0, 16, 0], v[0, 16, 0], atol=1e-6)
        dv = jax.grad(lambda v: attention(q, k, v, mask, implementation=implementation)[0, 16:].sum())(v)
        assert np.all(np.asarray(dv[0, :16]) == 0) and np.any(np.asarray(dv[0, 16:]) != 0)

    def test_gradients(self, implementation):
        positions, segments = rows_of_documents([30, 45], 80)
        mask = Mask(jnp.asarray(positions), jnp.asarray(segments), chunk=16)
        arrays = inputs(1, 80, 80)
        weights = jnp.asarray(segments > 0)[..., None, None] * inputs(1, 80, 80, seed=1)[0]

        def grads(name):
            loss = lambda *a: jnp.sum(attention(*a, mask, implementation=name) * weights)  # noqa: E731
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

        for got, want in zip(grads(implementation), grads("reference"), strict=True):
            np.testing.assert_allclose(got, want, atol=5e-6)


def test_heads_that_do_not_group_are_refused():
    q, k, v = inputs(1, 4, 4, N=5, K=2)
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2"):
        attention(q, k, v, Mask())
