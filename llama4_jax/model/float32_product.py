"""Products of float32 accuracy, of a weight with few outputs: the router's.

Of float32 operands a TPU makes six products of bfloat16, and compiles them slowly. Rows in bfloat16 need three: a float32 is
the sum of three bfloat16 (24 bits of mantissa are 3 x 8), and products of two bfloat16 are exact in the float32 that adds
them up. The three stand side by side as outputs of one matmul, where a matrix unit has more columns than there are experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32


def float32_product(x: Float[Array, "*M D"], weight: Float[Array, "D N"]) -> Float32[Array, "*M N"]:
    """x @ weight with products and sums in float32, whatever `jax_default_matmul_precision` says."""
    if x.dtype == jnp.bfloat16 and weight.dtype == jnp.float32:
        return _of_bfloat16(x, weight)
    return jnp.matmul(x, weight, precision="highest", preferred_element_type=jnp.float32)


def pieces(x: Float32[Array, "*A"]) -> tuple[BFloat16[Array, "*A"], ...]:
    """Three that sum to x, each the rounding of what those before it leave over. What is below bfloat16's smallest normal
    number is lost."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a pair of casts is "simplified" away
        parts.append(part.astype(jnp.bfloat16))
        x -= part
    return tuple(parts)


@jax.custom_vjp
def _of_bfloat16(x, weight):
    return _smallest_first(jnp.matmul(x, jnp.concatenate(pieces(weight), axis=1), preferred_element_type=jnp.float32))


def _smallest_first(y):
    """[..., 3 N] to the sum [..., N]."""
    first, second, third = jnp.split(y, 3, axis=-1)
    return third + second + first


def _backward(residuals, dy):
    """The weight's gradient as exactly; that of x to 2^-16, and rounded to x's 2^-8."""
    x, weight = residuals
    d1, d2, d3 = pieces(dy)
    w1, w2, _ = pieces(weight)
    tokens = tuple(range(x.ndim - 1))
    by_piece = jax.lax.dot_general(
        x, jnp.concatenate([d1, d2, d3], axis=-1), ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32
    )  # [D, 3 N]
    dx = jnp.matmul(
        jnp.concatenate([d1, d1, d2], axis=-1),
        jnp.concatenate([w1, w2, w1], axis=-1).T,
        preferred_element_type=jnp.float32,
    )
    return dx.astype(x.dtype), _smallest_first(by_piece)


_of_bfloat16.defvjp(lambda x, weight: (_of_bfloat16(x, weight), (x, weight)), _backward)
