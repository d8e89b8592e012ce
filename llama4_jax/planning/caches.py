"""Caches as shapes."""

import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llama4_jax.config import ModelConfig
from llama4_jax.inference.decoding import slots_for
from llama4_jax.model.cache import Cache
from llama4_jax.parallel.cache_parallel import cache_shardings, layer_chunks, slots_spec


def abstract_cache(model: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh) -> Cache:
    """Of rows of `length` tokens, as decoding has it on `mesh`."""
    length = _slots(length, mesh)
    shapes = jax.eval_shape(lambda: Cache.create(model, rows, length, dtype))
    shardings = cache_shardings(shapes, model, mesh)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)


def cache_bytes(model: ModelConfig, rows: int, length: int, dtype: str, mesh: Mesh | AbstractMesh | None = None) -> float:
    """Of the keys and values of rows of `length` tokens; with a mesh, those that one device holds, as `abstract_cache` has them."""
    length = length if mesh is None else _slots(length, mesh)
    found = 0.0
    stacks = jax.eval_shape(lambda: Cache.create(model, rows, length, dtype).keys)
    for keys, chunk in zip(stacks, layer_chunks(model), strict=True):
        shape = keys.shape if mesh is None else NamedSharding(mesh, slots_spec(mesh, keys.shape, chunk)).shard_shape(keys.shape)
        found += 2 * math.prod(shape) * keys.dtype.itemsize
    return found


def _slots(length: int, mesh: Mesh | AbstractMesh) -> int:
    """That the generator makes for rows of `length` tokens; those over `context` fill theirs."""
    return length if mesh.shape["context"] > 1 else slots_for(length)
