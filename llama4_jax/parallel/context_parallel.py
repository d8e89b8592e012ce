"""Attention on a mesh: rows and heads each by themselves, and sequences that lie on several shards of `context`.

Layers with RoPE read within chunks. Where every chunk lies on one shard, which the packer's promise (Batch.document_window)
and a shard length that is a multiple of the chunk give, they send nothing. All others, the NoPE layers above all, need the
keys of other shards:

- ring: keys and values pass from shard to shard, and each shard merges what its queries find in them; see
  pallas_kernels/ring_attention.
- all-gather: every shard gets all keys and values at once, and computes the masked half of the logits as well.

The layout says which places of a row a shard holds. Contiguous: shard i holds the i-th of n pieces; in the ring it then has
nothing to do with keys of the shards after it, and the last shard works for n. Zigzag: of 2n pieces, shard i holds piece i
and piece 2n-1-i, and every shard has the same work in every hop.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.config import ExecutionConfig
from llama4_jax.parallel.mesh import current_mesh, gather
from llama4_jax.parallel.rules import BATCH_AXES, splits_batch
from pallas_kernels.attention import Mask
from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.ring_attention import ring_attention

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
        pieces: the place in the row of each piece of the layout, shard after shard.
    """

    length: int
    shards: int

    @property
    def pieces(self) -> Int[np.ndarray, " P"]:
        first = np.arange(self.shards)
        return np.stack([first, 2 * self.shards - 1 - first], axis=1).reshape(-1)

    def arrange(self, x: Array | None) -> Array | None:
        """[B, T, ...] from the row's order to the layout's."""
        return None if x is None else self._take(x, self.pieces)

    def restore(self, x: Array | None) -> Array | None:
        """The inverse."""
        return None if x is None else self._take(x, np.argsort(self.pieces))

    def places(self, positions: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Where the layout has these places of the row."""
        size = self.length // (2 * self.shards)
        return jnp.asarray(np.argsort(self.pieces), jnp.int32)[positions // size] * size + positions % size

    def _take(self, x, pieces):
        cut = x.reshape(x.shape[0], 2 * self.shards, -1, *x.shape[2:])
        return jnp.take(cut, pieces, axis=1).reshape(x.shape)


def zigzag_of(execution: ExecutionConfig, rows: int, positions: int) -> Zigzag | None:
    """How activations of [rows, positions] lie on the mesh of `use_mesh`; None: in the order of the row, contiguous.

    That is so without a mesh as well, and for shapes that the mesh does not divide (a prompt of one row).
    """
    mesh = current_mesh()
    if execution.context_layout == "contiguous" or mesh is None or mesh.shape["context"] == 1:
        return None
    shards = mesh.shape["context"]
    return Zigzag(positions, shards) if splits_batch(mesh, rows, positions) and positions % (2 * shards) == 0 else None


def spans_of(mask: Mask, rows: int, positions: int, zigzag: Zigzag | None) -> Intervals | None:
    """Which places of its row each token of [rows, positions] reads under `mask`, which is in the order of the row.

    The result is in the order of the layout. None where no shard has part of a row only.
    """
    mesh = current_mesh()
    if mesh is None or mesh.shape["context"] == 1 or not splits_batch(mesh, rows, positions):
        return None
    spans = intervals(mask, positions)
    return spans if zigzag is None else jax.tree.map(zigzag.arrange, spans)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    spans: Intervals | None,
    *,
    zigzag: Zigzag | None,
    local: Callable[..., Array],
    execution: ExecutionConfig,
) -> Float[Array, "B T N H"]:
    """Self-attention on the mesh of `use_mesh`; `local(query, key, value, mask)` is the attention of one device.

    Rows lie in the order of `zigzag`, and so do mask and `spans_of` it. Without a mesh, or for shapes that the mesh does
    not divide, it is `local`, which the compiler then splits as it sees fit.
    """
    mesh = current_mesh()
    B, T = query.shape[:2]
    if mesh is None or key.shape[2] % mesh.shape["tensor"] or not splits_batch(mesh, B, T):
        return local(query, key, value, mask)
    shards = mesh.shape["context"]
    piece = T // shards // (2 if zigzag else 1)
    exchange = execution.context_exchange
    exchange = _exchange(mesh, query, key) if exchange == "auto" else exchange
    if shards == 1 or (mask.chunks_are_windows and piece % mask.chunk == 0):
        attend, reads = local, mask
    elif exchange == "ring":
        attend = partial(ring_attention, axis="context", zigzag=zigzag is not None, implementation=execution.attention)
        reads = spans
    else:
        attend, reads = partial(_all_gather, local), _with_positions(mask, zigzag, T)
    rows = P(BATCH_AXES, "context", "tensor")
    places = jax.tree.map(lambda a: P(BATCH_AXES if a.shape[0] == B else None, "context"), reads)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(rows, rows, rows, places), out_specs=rows, check_vma=False)
    return mapped(query, key, value, reads)


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


def _with_positions(mask: Mask, zigzag: Zigzag | None, T: int) -> Mask:
    if mask.query_positions is not None:
        return mask
    places = jnp.arange(T, dtype=jnp.int32)[None]
    return Mask(zigzag.arrange(places) if zigzag else places, mask.query_segment_ids, chunk=mask.chunk)


def _all_gather(local, query, key, value, mask: Mask):
    """Inside shard_map. Causality goes by document and position, so any layout is right."""
    keys = key, value, mask.query_positions, mask.query_segment_ids
    key, value, *places = jax.tree.map(lambda a: gather(a, "context", 1), keys)
    return local(query, key, value, Mask(mask.query_positions, mask.query_segment_ids, *places, chunk=mask.chunk))
