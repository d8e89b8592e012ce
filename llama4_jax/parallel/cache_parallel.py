"""A cache of keys and values on a mesh: rows over the axes of the batch, heads over `tensor`, NoPE slots over `context`.

A prompt for several shards of `context` is read at once, by an empty cache with a slot for each place of the row. Each shard
then stores what it has read, and sends nothing; of layers with RoPE, which keep one chunk, all get the row's last chunk. A new
token is stored by the shard that has its slot, and reads on every shard what lies there: the parts merge by their log-sum-exp.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.config import ModelConfig
from llama4_jax.parallel.mesh import current_mesh
from llama4_jax.parallel.rules import BATCH_AXES, splits_batch
from pallas_kernels.attention import Mask, merge_over
from pallas_kernels.decode_attention import decode_attention

PyTree = Any


def rows_axes(mesh: Mesh | AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """The mesh axes over which so many rows lie; None: they lie on every device."""
    return None if rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) else BATCH_AXES


def slots_spec(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], chunk: int | None) -> P:
    """Of the slots [Lb, B, S, K, H] of layers that read within chunks of so many tokens, or everything (None)."""
    _, B, S, K, _ = shape
    context = "context" if chunk is None and S % mesh.shape["context"] == 0 else None
    return P(None, rows_axes(mesh, B), context, None if K % mesh.shape["tensor"] else "tensor")


def layer_chunks(config: ModelConfig) -> list[int | None]:
    """Of the layers of the repeating block."""
    return [config.attention_chunk_size if kind.uses_rope else None for kind in config.block_kinds]


def cache_shardings(cache: PyTree, config: ModelConfig, mesh: Mesh | AbstractMesh) -> PyTree:
    """Of a `model.cache.Cache` or its shapes."""
    stacks = zip(cache.keys, layer_chunks(config), strict=True)
    per_layer = tuple(NamedSharding(mesh, slots_spec(mesh, keys.shape, chunk)) for keys, chunk in stacks)
    of_rows = NamedSharding(mesh, P(rows_axes(mesh, len(cache.lengths))))
    return jax.tree.map(lambda _: of_rows, cache).replace(keys=per_layer, values=per_layer)


def reads_whole_rows(rows: int, positions: int) -> bool:
    """Whether a prompt [rows, positions] lies over `context` on the mesh of `use_mesh`."""
    mesh = current_mesh()
    return mesh is not None and mesh.shape["context"] > 1 and positions > 1 and splits_batch(mesh, rows, positions)


def holds_windows(positions: int, size: int, pieces_per_shard: int) -> bool:
    """Whether no window of `size` places of rows that lie over `context` has parts on two shards, or in two of their pieces."""
    return positions % (current_mesh().shape["context"] * pieces_per_shard * size) == 0


def store(
    slots: Float[Array, "Lb B S K H"],
    new: Float[Array, "B T K H"],
    places: Int[Array, "B T"],
    layer: Int[Array, ""],
    mask: Mask,
    last_chunk: Int[Array, " B"] | None = None,
) -> Float[Array, "Lb B S K H"]:
    """The slots of a stack of layers with the keys, or values, of new tokens in one of them.

    Args:
        places: the slot of each token; S for one that is not kept.
        mask: of those who will read the slots.
        last_chunk: of each row that lies over `context` and begins here, the place where its last chunk begins; only where
            `holds_windows`.
    """
    mesh, T, S = current_mesh(), places.shape[1], slots.shape[2]
    spec = P() if mesh is None else slots_spec(mesh, slots.shape, mask.chunk)
    split = mesh is not None and mesh.shape["context"] > 1 and spec[2] is not None
    if last_chunk is not None and mask.chunk is None and split and T == S:
        put, given, extra = _all_of_mine, "context", ()
    elif last_chunk is not None and mask.chunk is not None:
        put, given, extra = _last_chunk, "context", (last_chunk,)
    elif split and T == 1:
        put, given, extra = _if_mine, None, (places,)
    else:
        return _scatter(slots, new, places, layer)
    rows, heads = spec[1], spec[3]
    in_specs = spec, P(rows, given, heads), P(), *[P(rows)] * len(extra)
    mapped = jax.shard_map(put, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    return mapped(slots, new.astype(slots.dtype), layer, *extra)


def _scatter(slots, new, places, layer):
    rows = jnp.arange(len(new))[:, None]
    return slots.at[layer, rows, places].set(new.astype(slots.dtype), mode="drop")


def _all_of_mine(slots, new, layer):
    return jax.lax.dynamic_update_index_in_dim(slots, new, layer, axis=0)


def _if_mine(slots, new, layer, places):
    S = slots.shape[2]
    mine = places - jax.lax.axis_index("context") * S
    return _scatter(slots, new, jnp.where((mine >= 0) & (mine < S), mine, S), layer)


def _last_chunk(slots, new, layer, first):
    """Every chunk lies on one shard, which gives it to all."""
    T, S = new.shape[1], slots.shape[2]
    mine = first - jax.lax.axis_index("context") * T  # [B]
    chunk = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, S))(new, jnp.clip(mine, 0, T - S))
    chunk = jnp.where(((mine >= 0) & (mine < T))[:, None, None, None], chunk, 0)
    return _all_of_mine(slots, jax.lax.psum(chunk, "context"), layer)


def decode(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "Lb B S K H"],
    values: Float[Array, "Lb B S K H"],
    mask: Mask,
    layer: Int[Array, ""],
    *,
    implementation: str,
) -> Float[Array, "B T N H"]:
    """A row's newest tokens over its cache, of which `mask` knows the slots, on the mesh of `use_mesh`."""
    attend = partial(decode_attention, implementation=implementation)
    mesh = current_mesh()
    if mesh is None:
        return attend(query, keys, values, mask, layer=layer).out
    slots = slots_spec(mesh, keys.shape, mask.chunk)
    _, rows, context, heads = slots
    of_rows = lambda a, *rest: P(rows if a.shape[0] == len(query) else None, *rest)  # noqa: E731
    places = jax.tree.map(of_rows, mask)
    places = dataclasses.replace(places, key_positions=of_rows(mask.key_positions, context))

    def on_shard(query, keys, values, mask, layer):
        part = attend(query, keys, values, mask, layer=layer)
        return part.out if context is None else merge_over(part, context).out.astype(query.dtype)

    specs = P(rows, None, heads), slots, slots, places, P()
    mapped = jax.shard_map(on_shard, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(query, keys, values, mask, layer)
