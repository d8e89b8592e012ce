"""Where every dimension of every array lives: the one table from logical axes to mesh axes.

The model names dimensions by what they are (`embed`, `heads`, `batch`); this table alone says which mesh axes split them.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from llama4_jax.data.batch import Batch
from llama4_jax.errors import UserError

PyTree = Any

# In order of preference. The first rule of a logical axis whose mesh axes are still free in that array (and, for weights,
# divide the dimension) applies. A dense weight is so split over two of its dimensions, fsdp on one and expert (with
# tensor) on the other, which keeps the shards of large meshes multiples of 128; an expert weight spends `expert` on its
# experts. The minor place of `expert` lets it be gathered while `tensor` stays split.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Activations
    ("batch", ("dcn_data", "data", "fsdp", "expert")),
    ("seq", ("context",)),
    ("act_heads", ("tensor",)),
    ("act_embed", ()),
    # Weights
    ("experts", ("expert",)),
    ("heads", ("tensor", "expert")),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor", "expert")),
    ("kv_heads", ("tensor",)),
    ("ffn", ("tensor", "expert")),
    ("ffn", ("tensor",)),
    ("vocab", ("tensor", "expert")),
    ("vocab", ("tensor",)),
    ("embed", ("fsdp", "expert")),
    ("embed", ("fsdp",)),
    ("head_dim", ()),
    ("router_experts", ()),
    ("norm", ()),
    ("layers", ()),
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Inside, the model's logical constraints bind to `mesh` by the table."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def named_shardings(params: PyTree, logical_axes: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each parameter.

    Args:
        params: arrays or ShapeDtypeStructs.
        logical_axes: the same tree of PartitionSpecs that hold logical names, as `model.logical_axes` gives.
        mesh: of `make_mesh`.

    Raises:
        UserError: no rule of some dimension divides it.
    """

    def one(path, param, logical):
        return NamedSharding(
            mesh, partition(jax.tree_util.keystr(path, simple=True, separator="/"), param.shape, logical, mesh)
        )

    return jax.tree_util.tree_map_with_path(one, params, logical_axes)


def partition(path: str, shape: tuple[int, ...], logical: P, mesh: Mesh | AbstractMesh) -> P:
    """The mesh axes of each dimension of one parameter. Raises UserError as `named_shardings` does."""
    names = tuple(logical) + (None,) * (len(shape) - len(logical))
    chosen: list[tuple[str, ...] | None] = [None] * len(shape)
    refused: dict[int, tuple[str, ...]] = {}
    for name, axes in RULES:
        taken = {axis for axes_ in chosen for axis in axes_ or ()}
        if name not in names or taken.intersection(axes):
            continue
        i = names.index(name)
        if chosen[i] is not None:
            continue
        if shape[i] % math.prod(mesh.shape[axis] for axis in axes):
            refused[i] = axes
        else:
            chosen[i] = axes
    unknown = set(names) - {name for name, _ in RULES} - {None}
    if unknown:
        raise ValueError(f"parameter {path}: no rule for logical axes {sorted(unknown)}")
    for i, axes in refused.items():
        if chosen[i] is None:
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise UserError(
                f"parameter {path}: dimension {i} ({names[i]}, {shape[i]}) is not a multiple of the mesh's {sizes}; "
                f"change the mesh or the model"
            )
    return P(*(axes or None for axes in chosen))


BATCH_AXES = dict(RULES)["batch"]


def splits_batch(mesh: Mesh | AbstractMesh, rows: int, positions: int) -> bool:
    """Whether every device gets as many rows and positions as the others."""
    return rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 and positions % mesh.shape["context"] == 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every [B, T] array of a Batch."""
    return NamedSharding(mesh, P(BATCH_AXES, "context"))


def places_here(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "n"]:
    """Which rows of a global batch the devices of this process hold, ascending.

    Those of two processes are the same where `context` or `tensor` goes across them.
    """
    row = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in row.values()]))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The global batch on the mesh, of which this process gives the rows of `places_here` as NumPy arrays."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    batch_size = len(batch.tokens) * shards // len(places_here(mesh, shards))
    places = places_here(mesh, batch_size)
    rows, images = batch_sharding(mesh), NamedSharding(mesh, P(BATCH_AXES))

    def put(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            return x[slice(*np.searchsorted(places, (first, last))), *index[1:]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), rows if x.ndim == 2 else images, shard)

    return jax.tree.map(put, batch)
