"""The ring with `ppermute`, around matmuls or whatever reads one piece: one hop is in the air while the one before is read."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Part, empty_part, merge
from pallas_kernels.attention.parts import PartGradients
from pallas_kernels.ring_attention.layout import Layout, reads
from pallas_kernels.ring_attention.part import attend_part, part_gradients


@dataclasses.dataclass(frozen=True)
class Local:
    """What one device does, as `part.attend_part` and `part.part_gradients`."""

    attend: Callable[..., Part]
    gradients: Callable[..., PartGradients]


MATMULS = Local(attend_part, part_gradients)


def ring_attention(query, key, value, intervals, *, axis: str, zigzag: bool, local: Local = MATMULS):
    """See `api.ring_attention`."""
    return _ring(query, key, value, intervals, axis, zigzag, local)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(query, key, value, intervals, axis, zigzag, local):
    return _forward(query, key, value, intervals, axis, zigzag, local)[0]


def _forward(query, key, value, intervals, axis, zigzag, local: Local):
    layout = Layout(axis, zigzag, query.shape[1])
    queries = layout.cut((query, intervals))

    def read(found: list[Part], keys, hop):
        for (k, v), start in zip(layout.cut(keys), layout.starts(layout.owner(hop)), strict=True):
            found = [
                _unless_none_reads(partial(_attend, local), *each, k, v, start) for each in zip(found, queries, strict=True)
            ]
        return found

    def hop(carry, index):
        found, keys = carry
        coming = _pass_on(keys, layout)  # depends on nothing that is computed here
        return (read(found, keys, index), coming), None

    last = layout.shards - 1
    (found, keys), _ = jax.lax.scan(hop, ([empty_part(own) for own, _ in queries], (key, value)), jnp.arange(last))
    part = jax.tree.map(lambda *pieces: jnp.concatenate(pieces, axis=1), *read(found, keys, last))
    out = part.out.astype(query.dtype)
    return out, (query, key, value, intervals, out, part.lse)


def _backward(axis, zigzag, local: Local, residuals, dout):
    query, key, value, intervals, out, lse = residuals
    layout = Layout(axis, zigzag, query.shape[1])
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    queries = layout.cut((query, intervals, lse, dout.astype(query.dtype), delta))

    def read(dqueries: list, dkeys: list, keys, hop):
        dqueries, dkeys = list(dqueries), list(dkeys)
        for j, ((k, v), start) in enumerate(zip(layout.cut(keys), layout.starts(layout.owner(hop)), strict=True)):
            for i, own in enumerate(queries):
                sums = dqueries[i], *dkeys[j]
                dqueries[i], *dkeys[j] = _unless_none_reads(partial(_add_gradients, local), sums, own, k, v, start)
        return dqueries, dkeys

    def hop(carry, index):
        dqueries, dkeys, keys = carry
        coming = _pass_on(keys, layout)
        dqueries, dkeys = read(dqueries, dkeys, keys, index)
        return (dqueries, _pass_on(dkeys, layout), coming), None

    last = layout.shards - 1
    zeros = lambda x: [jnp.zeros(piece.shape, jnp.float32) for piece in layout.cut(x)]  # noqa: E731
    dkeys = [list(pair) for pair in zip(zeros(key), zeros(value), strict=True)]
    carry, _ = jax.lax.scan(hop, (zeros(query), dkeys, (key, value)), jnp.arange(last))
    dqueries, dkeys = read(*carry, last)
    dkeys = _pass_on(dkeys, layout)  # home
    dquery, dkey, dvalue = (jnp.concatenate(pieces, axis=1) for pieces in (dqueries, *zip(*dkeys, strict=True)))
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_ring.defvjp(_forward, _backward)


def _unless_none_reads(function, so_far, own, key, value, start):
    """function(so_far, ...), or `so_far` itself where no query reads any of these keys. `own` are queries, their intervals, and
    more."""

    def read(so_far):
        return function(so_far, own, key, value, start)

    return jax.lax.cond(reads(own[1], start, key.shape[1]), read, lambda so_far: so_far, so_far)


def _attend(local: Local, part: Part, own, key, value, start) -> Part:
    query, intervals = own
    return merge(part, local.attend(query, key, value, intervals, start))


def _add_gradients(local: Local, so_far, own, key, value, start):
    query, intervals, *statistics = own
    found = local.gradients(query, key, value, intervals, start, *statistics)
    return tuple(a + b for a, b in zip(so_far, (found.query, found.key, found.value), strict=True))


def _pass_on(tree, layout: Layout):
    """To the next shard of the ring."""
    shards = layout.shards
    return jax.tree.map(lambda x: jax.lax.ppermute(x, layout.axis, [(i, (i + 1) % shards) for i in range(shards)]), tree)
