"""The device mesh: six named axes, of which any may have size 1."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from llama4_jax.config import MeshConfig
from llama4_jax.errors import UserError

AXES = ("dcn_data", "data", "fsdp", "context", "expert", "tensor")  # outermost first: the slow network, then ever closer


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config` describes over `devices` (all devices of the job when None).

    Its axes are of type Auto: the compiler propagates shardings between the places where the model constrains them.
    (jax.make_mesh would make them Explicit, under which a contraction over a sharded dimension is an error.)

    Raises:
        UserError: the sizes do not multiply to the number of devices, or dcn_data is not the number of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    slices = _slices(devices)
    if len(slices) > 1 and sizes["dcn_data"] != len(slices):
        raise UserError(
            f"mesh {_written(config)}: the devices are {len(slices)} slices of {len(slices[0])}, joined by a slow network that only "
            f"dcn_data goes over; make dcn_data={len(slices)}"
        )
    within = (sizes["dcn_data"] // len(slices), *list(sizes.values())[1:])
    placed = np.concatenate([_placed(within, slice_devices) for slice_devices in slices])
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every axis over so many devices, outermost first. Raises UserError when they do not multiply to them."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    elif free or fixed != num_devices:
        hint = f"the sizes must divide {num_devices}" if free else f"make one axis -1, such as data, or have {fixed} devices"
        raise UserError(f"mesh {_written(config)} does not fit {num_devices} device(s): {hint}")
    return sizes


def resolved(config: MeshConfig, num_devices: int) -> MeshConfig:
    """The same over so many devices, with a number in place of -1. Raises UserError as `axis_sizes` does."""
    return dataclasses.replace(config, **axis_sizes(config, num_devices))


def _written(config: MeshConfig) -> str:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def _slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each TPU slice, in order of the slices; one list of all for other devices, whose machines are joined alike."""
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        on_tpu = getattr(device, "platform", None) == "tpu"
        slices.setdefault(getattr(device, "slice_index", 0) if on_tpu else 0, []).append(device)
    return [slices[index] for index in sorted(slices)]


def _placed(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array of `sizes`, each axis along links of its own where the hardware has that many; else axes share
    the links of one dimension."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `rules.use_mesh` at the time of tracing; None outside of one, and for a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def gather(x: jax.Array, mesh_axis: str, axis: int) -> jax.Array:
    """Inside shard_map: the shards of `mesh_axis`, joined along `axis` of x."""
    return x if jax.lax.axis_size(mesh_axis) == 1 else jax.lax.all_gather(x, mesh_axis, axis=axis, tiled=True)


def sum_and_scatter(x: jax.Array, mesh_axis: str, axis: int) -> jax.Array:
    """Inside shard_map: the sum over the shards of `mesh_axis`, of which each keeps its part along `axis`."""
    if jax.lax.axis_size(mesh_axis) == 1:
        return x
    return jax.lax.psum_scatter(x, mesh_axis, scatter_dimension=axis, tiled=True)
