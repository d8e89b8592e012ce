"""Attention on GPU equals its reference in the result and in every gradient: compiled where there is a GPU, else interpreted.

And it lowers for CUDA everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, Part, attention, gpu, merge
from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.lowering import lower_for_gpu

INTERPRET = jax.default_backend() != "gpu"
TILING = gpu.Tiling(queries=32, keys=16, warps=4, stages=2)
SEGMENTS = jnp.asarray(np.repeat([1, 2, 3], [50, 3, 47])[None].repeat(2, axis=0))


def inputs(T, N, K, H=16, S=None):
    rng = np.random.default_rng(0)
    shapes = (2, T, N, H), (2, S or T, K, H), (2, S or T, K, H), (2, T, N, H)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(chunk=37),
        Mask(chunk=50),  # folded: two windows
        Mask(query_segment_ids=SEGMENTS),
        Mask(query_segment_ids=SEGMENTS, causal=False),
    ],
    ids=["causal", "chunks", "windows", "documents", "both directions"],
)
def test_result_and_gradients(mask):
    *operands, dout = inputs(100, 4, 2)

    @jax.jit
    def ours(operands):
        out, back = jax.vjp(lambda *x: gpu.attention(*x, mask, tiling=TILING, interpret=INTERPRET), *operands)
        return out, *back(dout)

    @jax.jit
    def expected(operands):
        out, back = jax.vjp(lambda *x: attention(*x, mask, implementation="reference"), *operands)
        return out, *back(dout)

    for got, want in zip(ours(operands), expected(operands), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_pieces_of_the_keys_merge_to_all_and_queries_without_keys_find_nothing():
    q, k, v, _ = inputs(70, 2, 1, S=90)
    rng = np.random.default_rng(1)
    first = rng.integers(-20, 110, (2, 70))
    where = Intervals(jnp.asarray(first, jnp.int32), jnp.asarray(first + rng.integers(-5, 60, (2, 70)), jnp.int32))
    attend = lambda keys, offset: gpu.forward(  # noqa: E731
        q, k[:, keys], v[:, keys], where, key_offset=offset, dtype=jnp.float32, tiling=TILING, interpret=INTERPRET
    )
    whole = attend(slice(0, 90), 0)
    merged = merge(attend(slice(0, 33), 0), attend(slice(33, 90), jnp.int32(33)))
    reads = np.minimum(where.last, 89) >= np.maximum(where.first, 0)
    assert not reads.all() and reads.any()
    for part in (whole, merged):
        assert (
            isinstance(part, Part) and not np.asarray(part.out)[~reads].any() and (np.asarray(part.lse)[~reads] < -1e29).all()
        )
    np.testing.assert_allclose(merged.out, whole.out, atol=2e-6)
    np.testing.assert_allclose(np.asarray(merged.lse)[reads], np.asarray(whole.lse)[reads], atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 8192])
def test_lowers_for_cuda_at_scouts_shape_with_three_kernels(chunk):
    abstract = lambda heads: jax.ShapeDtypeStruct((1, 16384, heads, 128), jnp.bfloat16)  # noqa: E731

    def gradients(query, key, value, dout):
        return jax.vjp(lambda *x: gpu.attention(*x, Mask(chunk=chunk)), query, key, value)[1](dout)

    text = lower_for_gpu(gradients, abstract(40), abstract(8), abstract(8), abstract(40))
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3


def test_refuses_what_it_cannot_take_with_the_reason():
    q, k, v, _ = inputs(8, 1, 1, H=24)
    with pytest.raises(NotImplementedError, match="power of two from 16 on, not 24"):
        gpu.attention(q, k, v, Mask())
    q, k, v, _ = inputs(8, 1, 1)
    with pytest.raises(NotImplementedError, match="not bfloat16, float32"):
        gpu.attention(q, k.astype(jnp.bfloat16), v, Mask())
