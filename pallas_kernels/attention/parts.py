"""Attention over a part of the keys, in a form that can be merged with the other parts.

softmax over all keys is known from the softmax over each part and the part's log-sum-exp (Flash attention, arXiv
2205.14135; Blockwise and Ring attention, arXiv 2310.01889).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def merge_over(part: Part, axis: str) -> Part:
    """Inside `jax.shard_map`: the attention over the keys of all shards of a mesh axis, float32."""
    most = jax.lax.pmax(part.lse, axis)
    weight = jnp.exp(part.lse - most)
    total = jax.lax.psum(weight, axis)
    return Part(jax.lax.psum(part.out * weight[..., None], axis) / total[..., None], most + jnp.log(total))
