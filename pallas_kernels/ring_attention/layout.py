"""Which places of a row lie where, and which shard reads what."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.attention.intervals import Intervals

NOWHERE = 2**30  # a place that no key has


@dataclasses.dataclass(frozen=True)
class Layout:
    """Inside shard_map. A shard's pieces are adjacent places of the row, and follow one another in its arrays.

    Attributes:
        axis: of the mesh.
        zigzag: of 2n pieces a shard has two, the i-th and the (2n-1-i)-th; else it has one of n.
        length: places on a shard.
    """

    axis: str
    zigzag: bool
    length: int

    @property
    def pieces(self) -> int:
        return 2 if self.zigzag else 1

    @property
    def size(self) -> int:
        """Places of a piece."""
        return self.length // self.pieces

    @property
    def shards(self) -> int:
        return jax.lax.axis_size(self.axis)

    def starts(self, shard: Int[Array, "*n"] | int) -> list[Int[Array, "*n"]]:
        """The first place of each piece of that shard."""
        pieces = [shard, 2 * self.shards - 1 - shard] if self.zigzag else [shard]
        return [piece * self.size for piece in pieces]

    def owner(self, hop: Int[Array, ""] | int) -> Int[Array, ""]:
        """Whose keys this shard has after `hop` hops: the shard's that is so far before it, round the ring."""
        return (jax.lax.axis_index(self.axis) - hop) % self.shards

    def cut(self, tree, parts: int | None = None) -> list:
        """Arrays [B, T, ...] piece by piece, or in `parts` equal parts."""
        size = self.length // (parts or self.pieces)
        at = lambda i: jax.tree.map(lambda x: x[:, i * size : (i + 1) * size], tree)  # noqa: E731
        return [at(i) for i in range(parts or self.pieces)]


def reads(intervals: Intervals, start: Int[Array, "*n"], size: int) -> Bool[Array, "*n"]:
    """Whether some of these queries may read some of the `size` places from `start` on; never falsely no."""
    first, last = _extent(intervals)
    return (first < start + size) & (last >= start)


def reach(intervals: Intervals, layout: Layout) -> Int[Array, "shards pieces"]:
    """After how many hops a piece of a shard has come to the last one that reads it; the same on all shards.

    Found from the first and last key that each piece of queries reads: four integers a shard, gathered.
    """
    extents = jnp.stack([jnp.stack(_extent(piece)) for piece in layout.cut(intervals)])  # [pieces, 2]
    first, last = jnp.moveaxis(jax.lax.all_gather(extents, layout.axis), 2, 0)[..., None, None]  # [reader, pieces, 1, 1]
    shard = jnp.arange(layout.shards)
    start = jnp.stack(layout.starts(shard), axis=-1)  # [owner, pieces]
    needed = ((first < start + layout.size) & (last >= start)).any(axis=1)  # [reader, owner, pieces]
    distance = (shard[:, None] - shard) % layout.shards
    return jnp.max(jnp.where(needed, distance[..., None], 0), axis=0)


def _extent(intervals: Intervals) -> tuple[Array, Array]:
    """The first and the last place that any of these queries reads."""
    none = intervals.last < intervals.first
    return jnp.min(jnp.where(none, NOWHERE, intervals.first)), jnp.max(jnp.where(none, -1, intervals.last))
