"""On a GPU, at the sizes and in the dtype that they are for, the kernels with their own tilings equal their definitions:

JAX_PLATFORMS=cuda ./launch/test.sh tests/pallas_kernels -k gpu
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, attention
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

ROUNDING = 1e-2  # of a norm, in bfloat16


def with_gradients(function, operands, dout):
    out, back = jax.vjp(function, *operands)
    return out, *back(dout.astype(out.dtype))


def check(ours, definition, operands, dout):
    """Results and gradients of `ours` in bfloat16 lie within its rounding of the definition's in float32."""
    got = jax.jit(lambda x, d: with_gradients(ours, x, d))(operands, dout)
    want = jax.jit(lambda x, d: with_gradients(definition, x, d))([x.astype(jnp.float32) for x in operands], dout)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):  # the result, then the gradient of each operand
        g, w = (np.asarray(x, np.float64) for x in (g, w))
        assert np.isfinite(g).all(), i
        assert np.linalg.norm(g - w) < ROUNDING * np.linalg.norm(w), (i, np.linalg.norm(g - w) / np.linalg.norm(w))


def draw(key, *shape, scale=1.0):
    return (scale * jax.random.normal(jax.random.key(key), shape)).astype(jnp.bfloat16)


DOCUMENTS = jnp.asarray(np.repeat([1, 2, 3, 0], [700, 1, 1200, 147])[None].repeat(2, axis=0))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "mask",
    [Mask(), Mask(chunk=512), Mask(chunk=768, query_segment_ids=DOCUMENTS), Mask(causal=False)],
    ids=["causal", "chunks", "documents", "both directions"],
)
def test_attention(mask, head_dim):
    T = 2048
    operands = [draw(i, 2, T, heads, head_dim) for i, heads in enumerate((10, 2, 2))]
    ours = lambda *x: attention(*x, mask, implementation="gpu")  # noqa: E731
    definition = lambda *x: attention(*x, mask, implementation="reference")  # noqa: E731
    check(ours, definition, operands, draw(3, 2, T, 10, head_dim))


@pytest.mark.parametrize("function", [grouped_matmul, grouped_swiglu], ids=["matmul", "swiglu"])
@pytest.mark.parametrize("sizes", [[513, 0, 127, 1, 896, 400], [0, 0, 2048, 0, 0, 0], [300, 300, 300, 300, 300, 301]])
def test_grouped_products(function, sizes):
    M, D, F, G = 2048, 512, 1024, len(sizes)
    halves = [2] * (function is grouped_swiglu)
    operands = [draw(0, M, D), draw(1, G, *halves, D, F, scale=D**-0.5)]
    ours, definition = (
        lambda *x, name=name: function(*x, jnp.asarray(sizes), implementation=name) for name in ("gpu", "reference")
    )
    check(ours, definition, operands, draw(2, M, F))
