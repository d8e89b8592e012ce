"""What lies where, as plain text."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

PyTree = Any


def sharding_table(params: PyTree, mesh: Mesh) -> str:
    """The mesh, and a line for each parameter: path, shape, dtype, PartitionSpec, bytes on a device; then their sum.

    Args:
        params: arrays, or ShapeDtypeStructs with shardings as `abstract_state` gives them.
        mesh: of `make_mesh`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for _, x in leaves]
    rows = [("parameter", "shape", "dtype", "sharding", "bytes a device")]
    for (path, x), size in zip(leaves, sizes, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = ", ".join(_axes(axes) for axes in x.sharding.spec) or "replicated"
        rows.append((name, " x ".join(map(str, x.shape)), str(x.dtype), spec, f"{size:,}"))
    rows.append(("total", "", "", "", f"{sum(sizes):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    split = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "no axis above 1"
    lines = [f"mesh: {split}, {mesh.size} device(s)"]
    for *columns, size in rows:
        lines.append("  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)) + f"  {size:>16}")
    return "\n".join(lines)


def _axes(axes: str | tuple[str, ...] | None) -> str:
    if axes is None:
        return "-"
    return axes if isinstance(axes, str) else "+".join(axes)
