"""Attention over slots as two batched matmuls, in which the query heads that share a KV head are rows."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Mask, Part
from pallas_kernels.decode_attention.quantized import parts


def decode_attention(query, keys, values, mask: Mask, layer) -> Part:
    """See `api.decode_attention`."""
    B, T, N, H = query.shape
    S, K = keys.shape[-3:-1]
    q = query.reshape(B, T, K, -1).transpose(0, 2, 1, 3).reshape(B * K, -1, H) * jnp.asarray(H**-0.5, query.dtype)
    (k, key_scale), (v, value_scale) = (parts(_one_layer(x, layer)) for x in (keys, values))
    k, v = (x.astype(query.dtype).transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k, v))
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)  # [B*K, T*G, S]
    by_head = _scaled(scores, key_scale).reshape(B, K, T, N // K, S)
    allowed = mask.allowed(slice(0, T), slice(0, S))  # [B, T, S]
    scores = jnp.where(allowed[:, None, :, None], by_head, -1e30).reshape(scores.shape)
    probabilities = _scaled(jax.nn.softmax(scores, axis=-1), value_scale).astype(query.dtype)
    out = jax.lax.dot_general(probabilities, v, (((2,), (1,)), ((0,), (0,))))  # [B*K, T*G, H]
    lse = jax.nn.logsumexp(scores, axis=-1)
    return Part(_by_query(out, B, T).reshape(query.shape), _by_query(lse, B, T).reshape(B, T, N))


def _one_layer(x, layer):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, 0 if layer is None else layer, keepdims=False), x)


def _scaled(rows, scale):
    """[B*K, T*G, S] times the scale [B, S, K] of each slot and head, if there is one."""
    return rows if scale is None else rows * scale.swapaxes(1, 2).reshape(rows.shape[0], 1, -1)


def _by_query(x, B: int, T: int):
    """[B*K, T*G, ...] as [B, T, K, G*...]."""
    return x.reshape(B, x.shape[0] // B, T, -1).swapaxes(1, 2)
