"""Attention over a part of the keys, in a form that can be merged with the other parts.

softmax over all keys is known from the softmax over each part and the part's log-sum-exp (Flash attention, arXiv
2205.14135; Blockwise and Ring attention, arXiv 2310.01889). Queries go in blocks, so that [T, S] never exists at once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask

MAX_BLOCK = 512  # queries
NEVER = -1e30  # the logit of a key that may not be read: finite, so that no query makes a NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Attributes:
    out: the attention over the part's keys alone.
    lse: log of the sum of exp(logits) over those keys; about NEVER where there were none to read.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartGradients:
    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


def empty_part(query: Float[Array, "B T N H"]) -> Part:
    """The attention over no keys."""
    return Part(jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], NEVER, jnp.float32))


def merge(a: Part, b: Part) -> Part:
    """The attention over the keys of both."""
    lse = jnp.logaddexp(a.lse, b.lse)
    weigh = lambda part: part.out * jnp.exp(part.lse - lse)[..., None]  # noqa: E731
    return Part(weigh(a) + weigh(b), lse)


def attend_part(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], mask: Mask
) -> Part:
    """Attention over these keys, which the mask places by explicit key positions; float32."""
    k, v = _by_kv_head(key, 1), _by_kv_head(value, 1)  # [B*K, S, H]

    def block(inputs):
        q, places = inputs
        logits = _logits(q, k, places, mask, key.shape)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return _dot(jnp.exp(logits - lse[..., None]).astype(v.dtype), v, 2, 1), lse

    out, lse = jax.lax.map(block, (_blocks(query, key.shape[2]), _places(mask)))
    return Part(_join(out, query.shape), _join(lse[..., None], (*query.shape[:3], 1))[..., 0])


def part_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N H"],
    delta: Float[Array, "B T N"],
) -> PartGradients:
    """What these keys contribute to the gradients of attention over all keys; float32.

    Args:
        lse: over all keys.
        dout: the gradient of the attention over all keys.
        delta: sum over h of dout * out, out over all keys.
    """
    K = key.shape[2]
    k, v = _by_kv_head(key, 1), _by_kv_head(value, 1)  # [B*K, S, H]

    def block(carry, inputs):
        dk, dv = carry
        q, lse, dout, delta, places = inputs
        p = jnp.exp(_logits(q, k, places, mask, key.shape) - lse)  # [B*K, t*G, S]; lse is over all keys, so unread ones give 0
        ds = (p * (_dot(dout, v, 2, 2) - delta)).astype(k.dtype)
        return (dk + _dot(ds, q, 1, 1), dv + _dot(p.astype(v.dtype), dout, 1, 1)), _dot(ds, k, 2, 1)

    rows = [_blocks(a, K) for a in (query, lse[..., None], dout.astype(query.dtype), delta[..., None])]
    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (zeros, zeros), (*rows, _places(mask)))
    scale = query.shape[-1] ** -0.5
    from_kv_head = lambda x: x.reshape(x.shape[0] // K, K, *x.shape[1:]).swapaxes(1, 2)  # noqa: E731
    return PartGradients(_join(dq, query.shape) * scale, from_kv_head(dk) * scale, from_kv_head(dv))


# ------------------------------------------------------------------------------------------------------------------------
# The layout of xla.py: query heads that share a KV head are rows of one batched matmul


def _by_kv_head(x: Array, groups: int) -> Array:
    """[B, T, K*G, H] as [B*K, T*G, H]."""
    B, T, N, H = x.shape
    K = N // groups
    return x.reshape(B, T, K, groups * H).transpose(0, 2, 1, 3).reshape(B * K, T * groups, H)


def _blocks(x: Float[Array, "B T N H"], K: int) -> Array:
    """Blocks of at most MAX_BLOCK queries: [blocks, B*K, t*G, H]."""
    return jax.vmap(lambda x: _by_kv_head(x, x.shape[2] // K))(_split(x))


def _split(x: Array) -> Array:
    """[B, T, ...] as [blocks, B, t, ...]."""
    B, T = x.shape[:2]
    blocks = next(n for n in range(-(-T // MAX_BLOCK), T + 1) if T % n == 0)
    return x.reshape(B, blocks, T // blocks, *x.shape[2:]).swapaxes(0, 1)


def _places(mask: Mask):
    """Positions and segment ids of each block of queries."""
    return jax.tree.map(_split, (mask.query_positions, mask.query_segment_ids))


def _join(rows: Array, shape: tuple[int, ...]) -> Array:
    """[blocks, B*K, t*G, H] as `shape`, [B, T, N, H]."""
    B, T, _, H = shape
    blocks, BK = rows.shape[:2]
    return rows.reshape(blocks, B, BK // B, T // blocks, -1, H).transpose(1, 0, 3, 2, 4, 5).reshape(shape)


def _logits(q: Array, k: Array, places, mask: Mask, key_shape: tuple[int, ...]) -> Float[Array, "BK tG S"]:
    """Of one block of queries, whose positions and segment ids are `places`."""
    B, S, K, H = key_shape
    block = Mask(*places, mask.key_positions, mask.key_segment_ids, chunk=mask.chunk)
    allowed = block.allowed(slice(0, places[0].shape[1]), slice(0, S))  # [#B, t, S]
    logits = _dot(q, k, 2, 2).reshape(B, K, allowed.shape[1], -1, S) * H**-0.5
    return jnp.where(allowed[:, None, :, None], logits, NEVER).reshape(q.shape[0], -1, S)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
