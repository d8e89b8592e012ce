"""Attention over the keys of one piece of the rows, and its gradients, as matmuls: in blocks of queries, so that [T, S] never
exists at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.attention.parts import NEVER, Part, PartGradients

MAX_BLOCK = 512  # queries


def attend_part(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: Intervals,
    start: Int[Array, ""] | int,
) -> Part:
    """Attention over the keys at places `start`, `start` + 1, ... of the rows; float32. Zeros where there is none to read."""
    k, v = _by_kv_head(key, 1), _by_kv_head(value, 1)  # [B*K, S, H]

    def block(inputs):
        q, here = inputs
        logits = _logits(q, k, here, start, key.shape)
        lse = jax.nn.logsumexp(logits, axis=-1)
        out = _dot(jnp.exp(logits - lse[..., None]).astype(v.dtype), v, 2, 1)
        return jnp.where(lse[..., None] > NEVER / 2, out, 0), lse

    out, lse = jax.lax.map(block, (_blocks(query, key.shape[2]), _split((intervals.first, intervals.last))))
    return Part(_join(out, query.shape), _join(lse[..., None], (*query.shape[:3], 1))[..., 0])


def part_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    intervals: Intervals,
    start: Int[Array, ""] | int,
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    delta: Float[Array, "B T N"],
) -> PartGradients:
    """What these keys contribute to the gradients of attention over all keys; float32.

    Args:
        lse: over all keys; about NEVER where there are none to read.
        dout: the gradient of the attention over all keys.
        delta: sum over h of dout * out, out over all keys.
    """
    K = key.shape[2]
    k, v = _by_kv_head(key, 1), _by_kv_head(value, 1)  # [B*K, S, H]

    def block(carry, inputs):
        dk, dv = carry
        q, lse, dout, delta, here = inputs
        p = jnp.exp(_logits(q, k, here, start, key.shape) - lse)  # [B*K, t*G, S]; lse is over all keys, so unread ones give 0
        ds = (p * (_dot(dout, v, 2, 2) - delta)).astype(k.dtype)
        return (dk + _dot(ds, q, 1, 1), dv + _dot(p.astype(v.dtype), dout, 1, 1)), _dot(ds, k, 2, 1)

    lse = jnp.where(lse > NEVER / 2, lse, 0)  # exp(NEVER - 0) is 0
    rows = [_blocks(a, K) for a in (query, lse[..., None], dout.astype(query.dtype), delta[..., None])]
    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), (*rows, _split((intervals.first, intervals.last))))
    scale = query.shape[-1] ** -0.5
    from_kv_head = lambda x: x.reshape(x.shape[0] // K, K, *x.shape[1:]).swapaxes(1, 2)  # noqa: E731
    return PartGradients(_join(dq, query.shape) * scale, from_kv_head(dk) * scale, from_kv_head(dv))


# ------------------------------------------------------------------------------------------------------------------------
# Query heads that share a KV head are rows of one batched matmul


def _by_kv_head(x: Array, groups: int) -> Array:
    """[B, T, K*G, H] as [B*K, T*G, H]."""
    B, T, N, H = x.shape
    K = N // groups
    return x.reshape(B, T, K, groups * H).transpose(0, 2, 1, 3).reshape(B * K, T * groups, H)


def _blocks(x: Float[Array, "B T N H"], K: int) -> Array:
    """Blocks of at most MAX_BLOCK queries: [blocks, B*K, t*G, H]."""
    return jax.vmap(lambda x: _by_kv_head(x, x.shape[2] // K))(_split(x))


def _split(tree):
    """Arrays [B, T, ...] as [blocks, B, t, ...]."""

    def split(x):
        B, T = x.shape[:2]
        blocks = next(n for n in range(-(-T // MAX_BLOCK), T + 1) if T % n == 0)
        return x.reshape(B, blocks, T // blocks, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _join(rows: Array, shape: tuple[int, ...]) -> Array:
    """[blocks, B*K, t*G, H] as `shape`, [B, T, N, H]."""
    B, T, _, H = shape
    blocks, BK = rows.shape[:2]
    return rows.reshape(blocks, B, BK // B, T // blocks, -1, H).transpose(1, 0, 3, 2, 4, 5).reshape(shape)


def _logits(q: Array, k: Array, places: tuple[Array, Array], start, key_shape: tuple[int, ...]) -> Float[Array, "BK tG S"]:
    """Of one block of queries, and the places that they read."""
    B, S, K, H = key_shape
    (first, last), place = places, start + jnp.arange(S)
    allowed = (place >= first[..., None]) & (place <= last[..., None])  # [#B, t, S]
    logits = _dot(q, k, 2, 2).reshape(B, K, allowed.shape[1], -1, S) * H**-0.5
    return jnp.where(allowed[:, None, :, None], logits, NEVER).reshape(q.shape[0], -1, S)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
