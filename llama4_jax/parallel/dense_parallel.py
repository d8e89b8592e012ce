"""Weights that every token reads, on a mesh: they lie in shards over `fsdp` and `expert`, and come together for one product.

The compiler's partitioner would do it too, but not well: shards that are no whole tiles (five heads, a width of 40) it gathers
by an all-reduce of zeros, and gradients it adds up in full before it cuts them. Here both directions are said: an all-gather
in the dtype of the product, whose transpose is a reduce-scatter. What was gathered is never kept for the backward pass.
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from llama4_jax.parallel.mesh import current_mesh, gather
from llama4_jax.parallel.rules import BATCH_AXES, partition, splits_batch

ROWS = P(BATCH_AXES, "context")


def gathering_mesh(rows: int, positions: int, *, with_tensor: bool = True) -> AbstractMesh | None:
    """The mesh of `use_mesh`, where activations [rows, positions, ...] should gather the weight that they meet; else None.

    One token of a row is not worth a weight's journey: how a decoding step meets its weights is left to the compiler. So is
    a weight that `tensor` splits too, for operations that do not know how to put their parts together (`with_tensor`).
    """
    mesh = current_mesh()
    if mesh is None or positions == 1 or not splits_batch(mesh, rows, positions):
        return None
    if mesh.shape["tensor"] > 1 and not with_tensor:
        return None
    return mesh if mesh.shape["fsdp"] * mesh.shape["expert"] > 1 else None


def gathered(weight: Array, spec: P) -> Array:
    """Inside shard_map: a weight that lies as `spec` says, whole but for its split over `tensor`."""
    for axis, names in enumerate(map(_axes, spec)):
        for name in reversed(names):
            if name != "tensor":
                weight = gather(weight, name, axis)
    return weight


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension; PartitionSpec writes one of them without a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()


def on_rows(
    function: Callable[..., Array], mesh: AbstractMesh, weight: Array, axes: Sequence[str | None], *rows: Array
) -> Array:
    """`function(weight, *rows)`, each device with the whole weight and its own part of the arrays [B, T, ...].

    For a weight that `tensor` does not split: see `gathering_mesh`.
    """
    spec = partition("weight", weight.shape, P(*axes), mesh)

    def on_shard(weight, *rows):
        return function(gathered(weight, spec), *rows)

    in_specs = (spec, *[ROWS] * len(rows))
    mapped = jax.shard_map(jax.checkpoint(on_shard), mesh=mesh, in_specs=in_specs, out_specs=ROWS, check_vma=False)
    return mapped(weight, *rows)


def product_with_gathered(
    product: Callable[[Array, Array], Array],
    mesh: AbstractMesh,
    x: Float[Array, "B T ..."],
    weight: Float[Array, "..."],
    axes: Sequence[str | None],
    in_axes: int,
) -> Float[Array, "B T ..."]:
    """`product(x, weight)`, which contracts the first `in_axes` axes of the weight, on `gathering_mesh`'s mesh.

    Args:
        axes: logical names of the weight's axes.

    Raises:
        UserError: the mesh does not divide the weight.
    """
    spec = partition("projection", weight.shape, P(*axes), mesh)
    spec = P(*spec, *[None] * (weight.ndim - len(spec)))
    split = ["tensor" if "tensor" in _axes(entry) else None for entry in spec]
    contracted, kept = split[:in_axes], split[in_axes:]

    def on_shard(x, weight):
        y = product(x, gathered(weight, spec))
        return y[None] if "tensor" in contracted else y

    # A part of the sum from each tensor shard: adding outside leaves the all-reduce to the compiler.
    parts = ["tensor"] if "tensor" in contracted else []
    mapped = jax.shard_map(
        jax.checkpoint(on_shard), mesh=mesh, in_specs=(P(*ROWS, *contracted), spec), out_specs=P(*parts, *ROWS, *kept), check_vma=False
    )  # fmt: skip
    y = mapped(x, weight)
    return y.sum(axis=0) if parts else y
