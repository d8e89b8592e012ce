"""The ring on TPU: keys and values travel by remote DMA while the attention kernels compute.

In a hop each piece of the keys at hand is read by one call of the kernel of `attention/tpu_forward.py`, which goes on from what was
found before, and on which the piece itself rides to the next shard (`ride.py`). A piece travels no further than to the last
shard that reads it, and the ring ends with the last hop that any shard needs. In the backward pass the gradients of keys and
values ride one hop after them, and go home the shorter way round.

A ride keeps its kernel on one core. Where a device has two, pieces pass by `ppermute` instead, around the same kernels.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import Part, empty_part, tpu_backward, tpu_forward
from pallas_kernels.ring_attention.layout import Layout, reach
from pallas_kernels.ring_attention.ride import COLLECTIVE_ID, Permuted, Ride


@dataclasses.dataclass(frozen=True)
class _Setting:
    """The arguments of `ring_attention` that are no arrays."""

    axis: str
    zigzag: bool
    remote: bool
    tiling: tpu_forward.Tiling | None
    backward_tiling: tpu_backward.Tiling | None
    interpret: Any

    def reaches(self, intervals, layout: Layout):
        """How many hops each piece of each shard goes; with `ppermute` all of them go round."""
        return reach(intervals, layout) if self.remote else jnp.full((layout.shards, layout.pieces), layout.shards - 1)

    def send(self, arrays, sends, receives, distance: int = 1) -> Ride | Permuted:
        if not self.remote:
            return Permuted(arrays, self.axis, distance)
        return Ride(arrays, sends, receives, self.axis, distance, COLLECTIVE_ID if distance == 1 else COLLECTIVE_ID + 1)


def ring_attention(
    query,
    key,
    value,
    intervals,
    *,
    axis: str,
    zigzag: bool,
    remote: bool | None = None,
    tiling: tpu_forward.Tiling | None = None,
    backward_tiling: tpu_backward.Tiling | None = None,
    interpret=False,
):
    """See `api.ring_attention`.

    Args:
        remote: by remote DMA, else by `ppermute`; the former if None, but for devices with two cores.
        tiling, backward_tiling: of the two kernels; chosen by shape if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: as the kernels.
    """
    tpu_forward.check(query, key, value)
    remote = _one_core() if remote is None else remote
    return _ring(query, key, value, intervals, _Setting(axis, zigzag, remote, tiling, backward_tiling, interpret))


def _one_core() -> bool:
    try:
        return pltpu.get_tpu_info().num_cores == 1
    except ValueError:  # no TPU: interpreted
        return True


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(query, key, value, intervals, setting: _Setting):
    return _forward(query, key, value, intervals, setting)[0]


def _forward(query, key, value, intervals, setting: _Setting):
    layout, heads = Layout(setting.axis, setting.zigzag, query.shape[1]), _heads(query.shape[-1])
    reaches = setting.reaches(intervals, layout)  # [shards, pieces]
    q = _flat(query)

    def hop(index, carry):
        out, lse, pieces = carry
        owner, coming = layout.owner(index), layout.owner(index + 1)
        arrived = []
        for i, (piece, start) in enumerate(zip(pieces, layout.starts(owner), strict=True)):
            ride = setting.send(piece, [reaches[owner, i] > index] * 2, [reaches[coming, i] > index] * 2)
            found = tpu_forward.forward(
                heads(q),
                *map(heads, piece),
                intervals,
                key_offset=start,
                before=Part(heads(out), lse.swapaxes(1, 2)),
                dtype=jnp.float32,
                tiling=setting.tiling,
                interpret=setting.interpret,
                call=ride.pallas_call,
            )
            out, lse = _flat(found.out), found.lse.swapaxes(1, 2)
            arrived.append(ride.arrived)
        return out, lse, arrived

    nothing = empty_part(query)
    carry = _flat(nothing.out), nothing.lse.swapaxes(1, 2), [list(map(_flat, piece)) for piece in layout.cut((key, value))]
    out, lse, _ = jax.lax.fori_loop(0, jnp.max(reaches) + 1, hop, carry)
    out = heads(out.astype(query.dtype))
    return out, (query, key, value, intervals, out, lse.swapaxes(1, 2))


def _backward(setting: _Setting, residuals, dout):
    query, key, value, intervals, out, lse = residuals
    layout, heads = Layout(setting.axis, setting.zigzag, query.shape[1]), _heads(query.shape[-1])
    reaches = setting.reaches(intervals, layout)
    last = jnp.max(reaches)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q, do = _flat(query), _flat(dout.astype(query.dtype))
    parts = _parts(query, key, layout, setting.backward_tiling)

    def hop(index, carry):
        dquery, pieces = carry
        owner, coming = layout.owner(index), layout.owner(index + 1)
        size = layout.length // parts
        arrived = []
        for i, piece in enumerate(pieces):
            whole, nth = divmod(i, parts // layout.pieces)
            goes, comes, later = reaches[owner, whole] > index, reaches[coming, whole] > index, index > 0
            ride = setting.send(piece, [goes, goes, later, later], [comes, comes, later, later])
            dquery, *sums = tpu_backward.backward(
                heads(q),
                *map(heads, piece[:2]),
                intervals,
                lse,
                heads(do),
                delta,
                key_offset=layout.starts(owner)[whole] + nth * size,
                before=heads(dquery),
                out_dtype=jnp.float32,
                tiling=setting.backward_tiling,
                interpret=setting.interpret,
                call=ride.pallas_call,
            )
            dquery = _flat(dquery)
            keys, before = ride.arrived[:2], ride.arrived[2:]
            sums = [_flat(a) + jnp.where(index > 0, b, 0) for a, b in zip(sums, before, strict=True)]
            arrived.append([*keys, *sums])
        return dquery, arrived

    pieces = [list(map(_flat, piece)) for piece in layout.cut((key, value), parts)]
    pieces = [[*piece, *(jnp.zeros(x.shape, jnp.float32) for x in piece)] for piece in pieces]
    dquery, pieces = jax.lax.fori_loop(0, last + 1, hop, (jnp.zeros(q.shape, jnp.float32), pieces))
    dkey, dvalue = (jnp.concatenate(x, axis=1) for x in zip(*(piece[2:] for piece in pieces), strict=True))
    dkey, dvalue = _home([dkey, dvalue], last, layout.shards, setting)
    gradients = zip((dquery, dkey, dvalue), (query, key, value), strict=True)
    return *(heads(x.astype(like.dtype)) for x, like in gradients), None


_ring.defvjp(_forward, _backward)


def _parts(query, key, layout: Layout, tiling) -> int:
    """In how many parts a shard's keys pass, each of which the backward kernel keeps in VMEM as a whole."""
    N, K, H = query.shape[2], key.shape[2], query.shape[3]
    for parts in range(layout.pieces, layout.length + 1, layout.pieces):
        size = layout.length // parts
        chosen = tiling or tpu_backward.choose_tiling(layout.length, size, N // K, H, query.dtype.itemsize, 4)
        if layout.length % parts == 0 and chosen.resident >= size:
            break
    return parts


def _flat(x):
    """[B, T, heads, H] as [B, T, heads*H]: as the kernels take it, so that no hop rearranges anything."""
    return x.reshape(*x.shape[:2], -1)


def _heads(H: int):
    """And back."""
    return lambda x: x.reshape(*x.shape[:2], -1, H)


def _home(sums, hops, shards: int, setting: _Setting):
    """Back from where they are after `hops` hops, the shorter way."""
    onward, yes = 2 * hops > shards, [jnp.bool(True)] * 2

    def by(distance: int):
        return lambda _, sums: setting.send(sums, yes, yes, distance).alone(interpret=setting.interpret)

    sums = jax.lax.fori_loop(0, jnp.where(onward, shards - hops, 0), by(1), sums)
    return jax.lax.fori_loop(0, jnp.where(onward, 0, hops), by(-1), sums)
