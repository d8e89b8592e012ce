"""Who may read whom, as intervals of places: what the kernels on accelerators know of a mask.

In self-attention a query reads adjacent places of its row: from the start of its document or chunk up to itself, or all of its
document. Two integers for each query say it all. Nothing is stored for keys, whose places are counted, so a block of queries
finds the blocks of keys that it meets, and those that it reads whole, from the smallest and largest of its integers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.mask import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intervals:
    """Attributes:
    first, last: the places in the row of the first and the last key that a query reads; none where last < first.
    """

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]


def intervals(mask: Mask, length: int) -> Intervals:
    """Of the queries of rows of `length` tokens. The rows of the result are one where all are alike.

    Raises:
        NotImplementedError: the mask has key positions: its keys lie in any order.
    """
    if not mask.is_self_attention:
        raise NotImplementedError("attention on accelerators: keys are the queries' own tokens, not places of a cache")
    place = jnp.arange(length, dtype=jnp.int32)[None]
    start, stop = jnp.zeros_like(place), jnp.full_like(place, length)
    if mask.query_segment_ids is not None:
        start, stop = _documents(mask.query_segment_ids, place)
    first = start
    if mask.chunk is not None:
        positions = place if mask.query_positions is None else mask.query_positions
        first = jnp.maximum(first, place - positions % mask.chunk)
    last = place if mask.causal else stop - 1
    return Intervals(*jnp.broadcast_arrays(first, last))


def _documents(segment_ids: Int[Array, "B T"], place: Int[Array, "1 T"]) -> tuple[Array, Array]:
    """The place where each token's document starts, and the place after its end."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    edge = jnp.ones_like(segment_ids[:, :1], bool)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), place, 0), axis=1)
    stop = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], axis=1), place + 1, place.shape[1]), axis=1, reverse=True)
    return start, stop
