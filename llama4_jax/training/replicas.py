"""Whether devices that should hold the same numbers do.

A chip that computes wrongly, or a bit that flips in memory, gives one copy of a parameter other bits than the rest; training goes on,
and every later step and checkpoint is wrong. Nothing in JAX compares the copies.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

PyTree = Any


class ReplicasDiffer(RuntimeError):
    """Copies of one array are not the same bits: a fault of the hardware, for which another try, elsewhere, is the answer."""


class Replicas:
    """The checksums of a state, as each device computes them of its own copy."""

    def __init__(self, mesh: Mesh, state: PyTree):
        """`state` may be abstract; shardings are read from it."""
        self._mesh = mesh
        leaves = jax.tree_util.tree_leaves_with_path(state)
        self._paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        self._specs = [x.sharding.spec for _, x in leaves]
        axes = mesh.axis_names
        on_device = jax.shard_map(
            lambda *shards: jnp.stack([checksum(x) for x in shards]).reshape(-1, *(1 for _ in axes)),
            mesh=mesh,
            in_specs=tuple(self._specs),
            out_specs=P(None, *axes),
            check_vma=False,  # copies are taken for what they are, not for equal
        )
        self._sums = jax.jit(on_device, out_shardings=NamedSharding(mesh, P()))  # all processes see all

    @property
    def exist(self) -> bool:
        """Whether any array has more than one copy."""
        return any(self._replicated_axes(spec) for spec in self._specs)

    def checksums(self, state: PyTree) -> UInt32[np.ndarray, "leaves *mesh"]:
        """Of each array, the checksum of every device's shard."""
        return np.asarray(jax.device_get(self._sums(*jax.tree.leaves(state))))

    def require_equal(self, state: PyTree, what: str) -> None:
        """Raises ReplicasDiffer that names the arrays and devices in question. All processes call it, and all raise it."""
        odd = list(self._odd_ones(self.checksums(state)))
        if odd:
            shown = "; ".join(f"{path} on {', '.join(map(self._describe, devices))}" for path, devices in odd[:3])
            more = f"; and {len(odd) - 3} more arrays" if len(odd) > 3 else ""
            raise ReplicasDiffer(f"copies of one array differ between devices {what}: {shown}{more}. Nothing of it was saved")

    def differences(self, one: np.ndarray, two: np.ndarray) -> dict[str, list[str]]:
        """Arrays whose checksums are not the same in two results of `checksums`, and the devices that hold such shards."""
        unequal = {path: self._mesh.devices[a != b] for path, a, b in zip(self._paths, one, two, strict=True)}
        return {path: [self._describe(device) for device in devices] for path, devices in unequal.items() if devices.size}

    def _odd_ones(self, sums: np.ndarray) -> Iterator[tuple[str, list[jax.Device]]]:
        """Arrays whose copies differ, and the devices in the minority; all of them where there is none."""
        for path, spec, values in zip(self._paths, self._specs, sums, strict=True):
            axes = self._replicated_axes(spec)
            copies = np.moveaxis(values, axes, range(len(axes))).reshape(-1, values.size // self._copies(axes))
            devices = np.moveaxis(self._mesh.devices, axes, range(len(axes))).reshape(copies.shape)
            wrong = []
            for of_shard, holders in zip(copies.T, devices.T, strict=True):
                ranked = Counter(of_shard.tolist()).most_common()
                tie = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
                wrong += holders[of_shard != ranked[0][0]].tolist() if not tie else holders.tolist()
            if wrong:
                yield path, wrong

    def _replicated_axes(self, spec: P) -> list[int]:
        """Indices of the mesh axes over which an array is copied."""
        used = {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
        return [i for i, axis in enumerate(self._mesh.axis_names) if axis not in used and self._mesh.shape[axis] > 1]

    def _copies(self, axes: list[int]) -> int:
        return int(np.prod([self._mesh.devices.shape[axis] for axis in axes], dtype=int))

    def _describe(self, device: jax.Device) -> str:
        return f"device {device.id} of process {device.process_index}"


def checksum(x: Array) -> UInt32[Array, ""]:
    """The sum of an array's bits as whole numbers, modulo 2^32: any one flipped bit changes it."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    unsigned = jnp.dtype(f"uint{8 * min(bits.dtype.itemsize, 4)}")
    return jnp.sum(jax.lax.bitcast_convert_type(bits, unsigned), dtype=jnp.uint32)
