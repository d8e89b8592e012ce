"""The slices and GPU machines that can be had, under the names that Google's clouds give them.

Slice shapes and names: "Plan TPUs in GKE" and "TPU versions" (Google Cloud documentation).
"""

import dataclasses
import difflib
import functools
import itertools
import math

from llama4_jax.errors import UserError

_CHIPS_OF_HOST = 4
_CUBE = 4  # three-dimensional slices above 2x4x4 are built of cubes of 4x4x4 chips
_LONGEST = 256
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class TpuType:
    """Attributes:
    gke_name: node label cloud.google.com/gke-tpu-accelerator.
    max_cubes: of 4x4x4 chips in one slice; 0 for a type whose slices are flat.
    devices_per_chip: JAX devices.
    vm_name, vm_units_per_chip: the accelerator type of queued resources, such as v5p-256 for 128 chips of two units;
        None where queued resources have no such TPU.
    vm_runtime: the VM's software.
    """

    gke_name: str
    max_cubes: int
    devices_per_chip: int = 1
    vm_name: str | None = None
    vm_units_per_chip: int = 1
    vm_runtime: str | None = None


TPUS = {
    "v4": TpuType("tpu-v4-podslice", 64, vm_name="v4", vm_units_per_chip=2, vm_runtime="tpu-ubuntu2204-base"),
    "v5e": TpuType("tpu-v5-lite-podslice", 0, vm_name="v5litepod", vm_runtime="v2-alpha-tpuv5-lite"),
    "v5p": TpuType("tpu-v5p-slice", 140, vm_name="v5p", vm_units_per_chip=2, vm_runtime="v2-alpha-tpuv5"),
    "v6e": TpuType("tpu-v6e-slice", 0, vm_name="v6e", vm_runtime="v2-alpha-tpuv6e"),
    "tpu7x": TpuType("tpu7x", 144, devices_per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class GpuType:
    """Attributes:
    gke_name: node label cloud.google.com/gke-accelerator.
    per_node: GPUs of one machine.
    """

    gke_name: str
    per_node: int = 8


GPUS = {
    "a100": GpuType("nvidia-tesla-a100"),
    "a100-80gb": GpuType("nvidia-a100-80gb"),
    "h100": GpuType("nvidia-h100-80gb"),
    "h100-mega": GpuType("nvidia-h100-mega-80gb"),
    "h200": GpuType("nvidia-h200-141gb"),
    "b200": GpuType("nvidia-b200"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are wired to each other."""

    type_name: str
    shape: tuple[int, ...]

    @property
    def type(self) -> TpuType:
        return TPUS[self.type_name]

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        return min(_CHIPS_OF_HOST, self.chips)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.type.devices_per_chip


def read_slice(text: str) -> Slice:
    """The slice that `v5p:4x4x8` names.

    Raises:
        UserError: an unknown type, or a shape that is not sold; the nearest ones are named.
    """
    type_name, colon, topology = text.partition(":")
    if not colon or type_name not in TPUS:
        raise UserError(f"--topology={text}: write TYPE:SHAPE, such as v5p:4x4x8; types are {', '.join(TPUS)}")
    try:
        shape = tuple(int(size) for size in topology.split("x"))
    except ValueError:
        shape = ()
    shapes = slice_shapes(type_name)
    if shape not in shapes:
        raise UserError(f"--topology={text}: there is no such slice; {_nearest(shape, shapes)}")
    return Slice(type_name, shape)


@functools.cache
def slice_shapes(type_name: str) -> tuple[tuple[int, ...], ...]:
    """Every shape of the type, smallest first."""
    cubes = TPUS[type_name].max_cubes
    if cubes == 0:
        return _FLAT
    whole = [
        tuple(_CUBE * size for size in sizes)
        for sizes in itertools.combinations_with_replacement(range(1, _LONGEST // _CUBE + 1), 3)
        if math.prod(sizes) <= cubes
    ]
    return tuple(sorted((*_BELOW_A_CUBE, *whole), key=lambda shape: (math.prod(shape), sum(shape))))


def default_shape(type_name: str, chips: int) -> tuple[int, ...]:
    """The shape that a request for a number of chips gets: the nearest to a cube."""
    return next(shape for shape in slice_shapes(type_name) if math.prod(shape) == chips)


def _nearest(wanted: tuple[int, ...], shapes: tuple[tuple[int, ...], ...]) -> str:
    names = {"x".join(map(str, shape)): shape for shape in shapes}
    if tuple(sorted(wanted)) in shapes:
        return f"did you mean {'x'.join(map(str, sorted(wanted)))}?"
    if not wanted:
        return f"write one such as {', '.join(list(names)[:6])}"
    by_size = sorted(names, key=lambda name: abs(math.log(math.prod(names[name]) / max(1, math.prod(wanted)))))
    near = difflib.get_close_matches("x".join(map(str, wanted)), by_size[:8], n=3, cutoff=0.0)
    return f"near it are {', '.join(near)}"
