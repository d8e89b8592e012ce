"""Grouped-query attention, as its definition says it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask


def attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + mask) v in float32; query head n reads KV head n // (N / K)."""
    groups = query.shape[2] // key.shape[2]
    k = jnp.repeat(key, groups, axis=2).astype(jnp.float32)
    v = jnp.repeat(value, groups, axis=2).astype(jnp.float32)
    q = query.astype(jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    allowed = mask.allowed(slice(0, query.shape[1]), slice(0, key.shape[1]))  # [#B, T, S]
    probabilities = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", probabilities, v, precision="highest").astype(query.dtype)
