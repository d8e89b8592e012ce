"""Which row tile meets which group, and in which order: what a grouped product's grid walks along.

Rows come in tiles of fixed size, groups end where they end; a tile with rows of two groups is visited twice. All of it is
computed on the device from the group sizes, as arrays with one entry for each visit, whose number is bounded by
tiles + groups - 1: visits without rows fill the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """Attributes:
    tile: of the output.
    group: whose rows, counted from the first of these groups.
    source: tile and group to have at hand: those of the last visit with rows, so that one without moves no data.
    source_group: likewise.
    start, stop: the rows of this visit; stop <= start: none.
    """

    tile: Int[Array, " V"]
    group: Int[Array, " V"]
    source: Int[Array, " V"]
    source_group: Int[Array, " V"]
    start: Int[Array, " V"]
    stop: Int[Array, " V"]

    def arrays(self) -> tuple[Array, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def spans(G: int, group_sizes: Int[Array, " E"], group_offset: Int[Array, ""]) -> tuple[Array, Array]:
    """First row of each of the G groups from `group_offset` on, and the row after its last."""
    stop = jnp.cumsum(group_sizes.astype(jnp.int32))
    pick = lambda x: jax.lax.dynamic_slice_in_dim(x, group_offset, G)  # noqa: E731
    return pick(stop - group_sizes), pick(stop)


def by_tile(start: Int[Array, " G"], stop: Int[Array, " G"], M: int, size: int) -> Visits:
    """Every tile at least once, with rows or without, tile after tile."""
    tiles, G = -(-M // size), start.shape[0]
    order = jnp.argsort(stop <= start, stable=True)  # groups with rows first; the others count as after the end
    count = jnp.sum(stop > start)
    used = jnp.arange(G) < count
    begins, ends = (jnp.where(used, x[order], M) for x in (start, stop))
    edge = jnp.arange(tiles) * size
    first = jnp.searchsorted(ends, edge, side="right")  # the first group that ends inside the tile or after it
    last = jnp.searchsorted(begins, jnp.minimum(edge + size, M), side="left")  # the first that begins after the tile
    end_of_tile = jnp.cumsum(jnp.maximum(last - first, 1))
    visit = jnp.arange(tiles + G - 1)
    tile = jnp.minimum(jnp.searchsorted(end_of_tile, visit, side="right"), tiles - 1)
    nth = visit - jnp.where(tile > 0, end_of_tile[tile - 1], 0)
    place = first[tile] + nth
    has_rows = place < last[tile]
    group = jnp.where(has_rows, order[jnp.minimum(place, G - 1)], 0)
    return _visits(tile, group, has_rows, start, stop, size)


def by_group(start: Int[Array, " G"], stop: Int[Array, " G"], M: int, size: int) -> Visits:
    """Every group at least once, with rows or without, group after group."""
    tiles, G = -(-M // size), start.shape[0]
    has_any = stop > start
    first = start // size
    count = jnp.where(has_any, (stop - 1) // size - first + 1, 0)
    end_of_group = jnp.cumsum(jnp.maximum(count, 1))
    visit = jnp.arange(tiles + G - 1)
    group = jnp.minimum(jnp.searchsorted(end_of_group, visit, side="right"), G - 1)
    nth = visit - jnp.where(group > 0, end_of_group[group - 1], 0)
    has_rows = nth < count[group]
    return _visits(first[group] + nth, group, has_rows, start, stop, size)


def _visits(tile, group, has_rows, start, stop, size: int) -> Visits:
    begin = jnp.maximum(start[group], tile * size)
    end = jnp.where(has_rows, jnp.minimum(stop[group], (tile + 1) * size), begin)
    latest = lambda x: jax.lax.cummax(jnp.where(has_rows, x, 0))  # noqa: E731
    return Visits(*(x.astype(jnp.int32) for x in (tile, group, latest(tile), latest(group), begin, end)))
