"""Attention in blocks of queries, as matmuls that XLA runs well, above all on CPU.

The query heads that share a KV head become rows of one batched matmul, [B*K, T*G, H] x [B*K, S, H], which XLA:CPU runs
four times as fast as the einsum over separate heads. Each block of queries reads only the keys that index order and the
chunk leave to it, so the upper triangle is never computed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask, by_windows

MIN_BLOCK = 64  # queries; smaller blocks skip more of the triangle but starve the matmul
MAX_BLOCKS = 16  # of one row: each is compiled by itself


def attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """See `api.attention`."""
    return by_windows(_attention, query, key, value, mask)


def _attention(query, key, value, mask: Mask):
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    G = N // K
    q = query.reshape(B, T, K, G * H).transpose(0, 2, 1, 3).reshape(B * K, T * G, H) * jnp.asarray(H**-0.5, query.dtype)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (key, value))
    block = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    blocks = []
    for start in range(0, T, block):
        queries = slice(start, min(start + block, T))
        keys = _visible_keys(queries, S, mask)
        allowed = mask.allowed(queries, keys)  # [#B, t, s]
        blocks.append(_attend(q[:, queries.start * G : queries.stop * G], k[:, keys], v[:, keys], allowed, B, G))
    out = jnp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0]  # [B*K, T*G, H]
    return out.reshape(B, K, T, G * H).transpose(0, 2, 1, 3).reshape(query.shape)


def _visible_keys(queries: slice, S: int, mask: Mask) -> slice:
    """The span of keys outside which nothing can be read: index order above, the chunk's length below."""
    if not mask.is_self_attention or not mask.causal:
        return slice(0, S)
    first = 0 if mask.chunk is None else max(0, queries.start - mask.chunk + 1)
    return slice(first, queries.stop)


def _attend(q, k, v, allowed, B: int, G: int):
    """One block: q [B*K, t*G, H], k and v [B*K, s, H], allowed [#B, t, s]."""
    scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)  # [B*K, t*G, s]
    by_head = scores.reshape(B, -1, allowed.shape[1], G, allowed.shape[2])  # [B, K, t, G, s]
    scores = jnp.where(allowed[:, None, :, None], by_head, -1e30).reshape(scores.shape)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jax.lax.dot_general(probabilities, v, (((2,), (1,)), ((0,), (0,))))
