"""Attention on a mesh: rows and heads each by themselves, and sequences that lie on several shards of `context`.

Layers with RoPE read within chunks. Where every chunk lies on one shard, which the packer's promise (Batch.document_window)
and a shard length that is a multiple of the chunk give, they send nothing. All others, the NoPE layers above all, need the
keys of other shards:

- ring: keys and values pass from shard to shard, and each shard merges what its queries find in them (arXiv 2310.01889).
  One hop is in the air while the one before is read. The backward pass is a ring too, in which the gradients of keys and
  values travel with them and come home; it computes the logits again and keeps nothing of a hop.
- all-gather: every shard gets all keys and values at once, and computes the masked half of the logits as well.

The layout says which places of a row a shard holds. Contiguous: shard i holds the i-th of n pieces; in the ring it then has
nothing to do with keys of the shards after it, and the last shard works for n. Zigzag: of 2n pieces, shard i holds piece i
and piece 2n-1-i, and every shard has the same work in every hop.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.config import ExecutionConfig
from llama4_jax.parallel.mesh import current_mesh, gather
from llama4_jax.parallel.rules import BATCH_AXES, splits_batch
from pallas_kernels.attention import Mask, attend_part, empty_part, merge, part_gradients

Exchange = Literal["ring", "all_gather"]

HIDING_INTENSITY = 32_768  # FLOPs over a byte of keys and values received, from which on a hop hides behind its work
GATHERED_BYTES = 2**31  # keys and values of one layer that may lie gathered on a device


def choose_exchange(
    *, rows: int, shard_length: int, context_shards: int, num_heads: int, num_kv_heads: int, head_dim: int, itemsize: int
) -> Exchange:
    """Ring where it hides its transfers or where gathered keys and values would not fit; all-gather below that.

    Sizes are a device's own: B' rows of T' places, R shards of `context`, N' and K' heads of H, b bytes a number.

        a hop:     4 B' T'^2 N' H FLOPs for 2 B' T' K' H b bytes, an intensity of 2 T' N' / (K' b) FLOPs a byte
        gathered:  2 B' R T' K' H b bytes

    Both send the same number of bytes, but the ring in R - 1 hops, each of which waits for its transfer unless the
    intensity is above HIDING_INTENSITY: several times the FLOPs that today's accelerators do while their interconnect
    moves a byte. (Published measurements of others agree: on TPU v5p the ring was half as fast as all-gather with 2,048
    places on a shard and as fast with 16,384.) Memory decides where gathering needs more than GATHERED_BYTES.
    """
    hidden = 2 * shard_length * num_heads >= HIDING_INTENSITY * num_kv_heads * itemsize
    gathered = 2 * rows * context_shards * shard_length * num_kv_heads * head_dim * itemsize
    return "ring" if hidden or gathered > GATHERED_BYTES else "all_gather"


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """The order in which rows of `length` places lie over `shards` shards.

    Attributes:
        order: the place in the row of each place of the layout, shard after shard.
    """

    length: int
    shards: int

    @property
    def order(self) -> Int[np.ndarray, " T"]:
        pieces = np.arange(self.length).reshape(2 * self.shards, -1)
        return np.concatenate([pieces[[i, 2 * self.shards - 1 - i]].reshape(-1) for i in range(self.shards)])

    def arrange(self, x: Array | None) -> Array | None:
        """[B, T, ...] from the row's order to the layout's."""
        return None if x is None else jnp.take(x, self.order, axis=1)

    def restore(self, x: Array | None) -> Array | None:
        """The inverse."""
        return None if x is None else jnp.take(x, np.argsort(self.order), axis=1)


def zigzag_of(execution: ExecutionConfig, rows: int, positions: int) -> Zigzag | None:
    """How activations of [rows, positions] lie on the mesh of `use_mesh`; None: in the order of the row, contiguous.

    That is so without a mesh as well, and for shapes that the mesh does not divide (a prompt of one row).
    """
    mesh = current_mesh()
    if execution.context_layout == "contiguous" or mesh is None or mesh.shape["context"] == 1:
        return None
    shards = mesh.shape["context"]
    return Zigzag(positions, shards) if splits_batch(mesh, rows, positions) and positions % (2 * shards) == 0 else None


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    local: Callable[..., Array],
    execution: ExecutionConfig,
) -> Float[Array, "B T N H"]:
    """Self-attention on the mesh of `use_mesh`; `local(query, key, value, mask)` is the attention of one device.

    Rows lie in the order of `zigzag_of`. Without a mesh, or for shapes that the mesh does not divide, it is `local`, which
    the compiler then splits as it sees fit.
    """
    mesh = current_mesh()
    B, T = query.shape[:2]
    if mesh is None or key.shape[2] % mesh.shape["tensor"] or not splits_batch(mesh, B, T):
        return local(query, key, value, mask)
    shards, zigzag = mesh.shape["context"], zigzag_of(execution, B, T)
    piece = T // shards // (2 if zigzag else 1)
    if shards == 1 or (mask.chunks_are_windows and piece % mask.chunk == 0):
        attend = local
    else:
        if mask.query_positions is None:
            order = zigzag.order if zigzag else np.arange(T)
            mask = Mask(jnp.asarray(order, jnp.int32)[None], mask.query_segment_ids, chunk=mask.chunk)
        exchange = execution.context_exchange
        exchange = _exchange(mesh, query, key) if exchange == "auto" else exchange
        attend = partial(_ring, zigzag is not None) if exchange == "ring" else partial(_all_gather, local)
    rows = P(BATCH_AXES, "context", "tensor")
    places = jax.tree.map(lambda a: P(BATCH_AXES if a.shape[0] == B else None, "context"), mask)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(rows, rows, rows, places), out_specs=rows, check_vma=False)
    return mapped(query, key, value, mask)


def _exchange(mesh: AbstractMesh, query: Array, key: Array) -> Exchange:
    """The cost rule's choice for these shapes."""
    B, T, N, H = query.shape
    return choose_exchange(
        rows=B // math.prod(mesh.shape[axis] for axis in BATCH_AXES),
        shard_length=T // mesh.shape["context"],
        context_shards=mesh.shape["context"],
        num_heads=N // mesh.shape["tensor"],
        num_kv_heads=key.shape[2] // mesh.shape["tensor"],
        head_dim=H,
        itemsize=key.dtype.itemsize,
    )


# ------------------------------------------------------------------------------------------------------------------------
# Inside shard_map: the keys of other shards. Causality goes by document and position, so any layout is right.


class Keys(NamedTuple):
    """What travels."""

    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None


def _all_gather(local, query, key, value, mask: Mask):
    keys = Keys(key, value, mask.query_positions, mask.query_segment_ids)
    keys = jax.tree.map(lambda a: gather(a, "context", 1), keys)
    return local(query, keys.key, keys.value, _over(mask, keys))


def _over(mask: Mask, keys: Keys) -> Mask:
    """The queries' mask over these keys."""
    return Mask(mask.query_positions, mask.query_segment_ids, keys.positions, keys.segment_ids, chunk=mask.chunk)


class Read(NamedTuple):
    """Which of a shard's queries read which of the keys at hand."""

    queries: slice
    keys: slice


def _reads(length: int, zigzag: bool) -> list[Read | None]:
    """What a shard may have to do in a hop: with its own keys, those of a shard before it, those of one after it."""
    everything, first, second = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    own = Read(everything, everything)
    return [own, Read(everything, first), Read(second, everything)] if zigzag else [own, own, None]


def _which_read(hop: Int[Array, ""] | int) -> Int[Array, ""]:
    """After `hop` hops a shard has the keys of the shard `hop` before it, round the ring."""
    return jnp.where(hop == 0, 0, jnp.where(hop <= jax.lax.axis_index("context"), 1, 2))


def _pass_on(tree):
    """To the next shard of the ring."""
    shards = jax.lax.axis_size("context")
    return jax.tree.map(lambda a: jax.lax.ppermute(a, "context", [(i, (i + 1) % shards) for i in range(shards)]), tree)


def _at(places: slice, tree):
    return jax.tree.map(lambda a: a[:, places], tree)


def _add_at(places: slice, total, part):
    return jax.tree.map(lambda a, b: a.at[:, places].add(b), total, part)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(zigzag: bool, query, key, value, mask: Mask):
    return _ring_forward(zigzag, query, key, value, mask)[0]


def _ring_forward(zigzag, query, key, value, mask):
    def read(what: Read | None, part, keys: Keys):
        if what is None:
            return part
        keys, places = _at(what.keys, keys), _at(what.queries, mask)
        found = merge(_at(what.queries, part), attend_part(_at(what.queries, query), keys.key, keys.value, _over(places, keys)))
        return jax.tree.map(lambda a, b: a.at[:, what.queries].set(b), part, found)

    branches = [partial(read, what) for what in _reads(query.shape[1], zigzag)]

    def hop(carry, index):
        part, keys = carry
        coming = _pass_on(keys)  # depends on nothing that is computed here
        return (jax.lax.switch(_which_read(index), branches, part, keys), coming), None

    keys, last = Keys(key, value, mask.query_positions, mask.query_segment_ids), jax.lax.axis_size("context") - 1
    (part, keys), _ = jax.lax.scan(hop, (empty_part(query), keys), jnp.arange(last))
    part = jax.lax.switch(_which_read(last), branches, part, keys)
    out = part.out.astype(query.dtype)
    return out, (query, key, value, mask, out, part.lse)


def _ring_backward(zigzag, residuals, dout):
    query, key, value, mask, out, lse = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def read(what: Read | None, dquery, dkeys, keys: Keys):
        if what is None:
            return dquery, dkeys
        keys = _at(what.keys, keys)
        q, places, *statistics = _at(what.queries, (query, mask, lse, dout, delta))
        found = part_gradients(q, keys.key, keys.value, _over(places, keys), *statistics)
        return _add_at(what.queries, dquery, found.query), _add_at(what.keys, dkeys, (found.key, found.value))

    branches = [partial(read, what) for what in _reads(query.shape[1], zigzag)]

    def hop(carry, index):
        dquery, dkeys, keys = carry
        coming = _pass_on(keys)
        dquery, dkeys = jax.lax.switch(_which_read(index), branches, dquery, dkeys, keys)
        return (dquery, _pass_on(dkeys), coming), None

    keys, last = Keys(key, value, mask.query_positions, mask.query_segment_ids), jax.lax.axis_size("context") - 1
    zeros = [jnp.zeros(a.shape, jnp.float32) for a in (query, key, value)]
    carry, _ = jax.lax.scan(hop, (zeros[0], tuple(zeros[1:]), keys), jnp.arange(last))
    dquery, dkeys = jax.lax.switch(_which_read(last), branches, *carry)
    dkey, dvalue = _pass_on(dkeys)  # home
    return dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
