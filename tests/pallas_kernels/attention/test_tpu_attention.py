"""Attention on TPU, interpreted, equals its reference in the result and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention, tpu

SEGMENTS = np.repeat([1, 2, 3], [100, 3, 197])[None]


@pytest.mark.parametrize(
    "mask",
    [
        Mask(),
        Mask(chunk=130),
        Mask(chunk=100),  # folded: three windows
        Mask(query_segment_ids=jnp.asarray(SEGMENTS)),
        Mask(query_segment_ids=jnp.asarray(SEGMENTS), causal=False),
    ],
    ids=["causal", "chunks", "windows", "documents", "both directions"],
)
def test_result_and_gradients(mask):
    rng = np.random.default_rng(0)
    shapes = (1, 300, 3, 128), (1, 300, 1, 128), (1, 300, 1, 128), (1, 300, 3, 128)
    *inputs, dout = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    @jax.jit
    def ours(inputs):
        return jax.vjp(lambda *x: tpu.attention(*x, mask, interpret=True), *inputs)[1](dout)

    @jax.jit
    def expected(inputs):
        return jax.vjp(lambda *x: attention(*x, mask, implementation="reference"), *inputs)[1](dout)

    for got, want in zip(ours(inputs), expected(inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_refuses_the_keys_of_a_cache_with_the_reason():
    q, k = jnp.zeros((1, 2, 1, 128)), jnp.zeros((1, 4, 1, 128))
    places = jnp.arange(4)[None]
    mask = Mask(query_positions=places[:, 2:], key_positions=places)
    with pytest.raises(NotImplementedError, match="not places of a cache"):
        attention(q, k, k, mask, implementation="tpu")
