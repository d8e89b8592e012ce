"""Attention over gathered keys, as its definition says it."""

import jax
import jax.numpy as jnp

from pallas_kernels.ring_attention.layout import Layout


def ring_attention(query, key, value, intervals, *, axis: str, zigzag: bool):
    """See `api.ring_attention`; all of [T, S] exists."""
    layout = Layout(axis, zigzag, query.shape[1])
    groups = query.shape[2] // key.shape[2]
    k, v = (jnp.repeat(jax.lax.all_gather(x, axis, axis=1, tiled=True), groups, axis=2) for x in (key, value))
    starts = jnp.stack(layout.starts(jnp.arange(layout.shards)), axis=-1)  # [shards, pieces]
    place = (starts[..., None] + jnp.arange(layout.size)).reshape(-1)  # of each key
    allowed = (place >= intervals.first[..., None]) & (place <= intervals.last[..., None])  # [#B, T, S]
    k, v, q = (x.astype(jnp.float32) for x in (k, v, query))
    scores = jnp.einsum("btnh,bsnh->bnts", q * q.shape[-1] ** -0.5, k, precision="highest")
    scores = jnp.where(allowed[:, None], scores, -1e30)
    probabilities = jnp.where(allowed[:, None], jax.nn.softmax(scores, axis=-1), 0)
    return jnp.einsum("bnts,bsnh->btnh", probabilities, v, precision="highest").astype(query.dtype)
