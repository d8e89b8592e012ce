"""How long an exchange among devices takes at published link rates, by where its devices sit.

In a torus, the devices of a group vary along some of its axes. Along an axis of e chips, bytes flow in both directions if the
axis is a ring (wraps around), else in one at the ends; groups that interleave with others share their links. Then, with S
bytes sent by a device, k axes, d directions and link rate w:

    all-gather, reduce-scatter, all-reduce      S / (k d w)
    all-to-all, of n S / (n - 1) bytes held     held * e / (4 d w), of the longest axis: the middle of the ring is what bounds
    collective-permute                          S * hops / w, of the farthest pair

Latency, which dominates exchanges of a few kilobytes, is not in it. Inside a GPU node every device sends at its link rate
through the switch; across nodes and slices at its share of the data-centre network.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from llama4_jax.planning.chips import Topology
from llama4_jax.planning.work import Collective

ON_CHIP = 6  # the link between the two devices of a TPU7x chip, over one of its ICI links: cloud.google.com/tpu/docs/tpu7x


@dataclasses.dataclass(frozen=True)
class Network:
    """Where each device of a mesh sits.

    Attributes:
        axes: sizes of the mesh's axes by name, in order.
        places: of each device in the order of the mesh: its torus coordinates, the device in the chip, and the slice; for a
            GPU (node, 0, 0).
    """

    topology: Topology
    axes: dict[str, int]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, topology: Topology, mesh) -> "Network":
        """Of a jax mesh over the devices of a TPU topology."""
        dimensions = len(topology.sizes)
        places = (
            (*device.coords[:dimensions], device.core_on_chip, getattr(device, "slice_index", 0) or 0)
            for device in mesh.devices.flat
        )
        return cls(topology, dict(mesh.shape), tuple(places))

    @classmethod
    def in_order(cls, topology: Topology, axes: dict[str, int]) -> "Network":
        """Of a mesh whose last axes are the nearest: without a compiler, so without its placement."""
        return cls(topology, dict(axes), _in_order(topology))

    def axes_of(self, collective: Collective) -> tuple[str, ...]:
        """The mesh axes along which an exchange goes."""
        if collective.slow and not collective.group:
            return ("dcn_data",)
        if not collective.group:
            return ("context",) if self.axes.get("context", 1) > 1 else ("unknown",)  # the one axis that kernels send along
        at = np.array(np.unravel_index(self._in_mesh(collective.group), tuple(self.axes.values()))).T  # [members, axes]
        if collective.kind == "collective-permute":
            differ = np.any(at[0::2] != at[1::2], axis=0)
        else:
            differ = np.any(at != at[0], axis=0)
        return tuple(name for name, moves in zip(self.axes, differ, strict=True) if moves)

    def is_slow(self, collective: Collective) -> bool:
        """Whether an exchange goes over the data-centre network."""
        if collective.slow or not collective.group:
            return collective.slow
        places = [self.places[place] for place in self._in_mesh(collective.group)]
        return len({place[-1] if self.topology.chip.is_tpu else place[0] for place in places}) > 1

    def _in_mesh(self, group: Sequence[int]) -> list[int]:
        return [place % len(self.places) for place in group]

    def seconds(self, collective: Collective) -> float:
        chip = self.topology.chip
        if self.is_slow(collective):
            return collective.sent / chip.dcn_bandwidth
        if not collective.sent or (not collective.group and collective.kind != "remote-dma"):
            return 0.0
        if collective.kind == "remote-dma":
            return collective.sent / chip.link_bandwidth
        places = np.array([self.places[place] for place in self._in_mesh(collective.group)])
        if not chip.is_tpu:
            return collective.sent / chip.link_bandwidth
        chips = places[:, : len(self.topology.sizes)]
        if collective.kind == "collective-permute":
            return collective.sent * self._hops(chips) / chip.link_bandwidth
        lanes = [lane for axis in range(chips.shape[1]) if (lane := self._lane(chips[:, axis], axis))]
        if not lanes:  # the devices of one chip
            return collective.sent / (ON_CHIP * chip.link_bandwidth)
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            n = len(places)
            return (
                collective.sent * n / (n - 1) * max(lane.extent / (4 * lane.directions) for lane in lanes) / chip.link_bandwidth
            )
        return collective.sent / (sum(lane.directions for lane in lanes) * chip.link_bandwidth)

    def _lane(self, coordinates: np.ndarray, axis: int) -> "_Lane | None":
        """What a group has of one axis of the torus; None where it does not extend along it."""
        along = np.unique(coordinates)
        if len(along) == 1:
            return None
        step = np.diff(along).min()  # groups whose chips are `step` apart interleave, and share the links
        ring = self._wraps(axis) and len(along) * step == self.topology.sizes[axis] and len(along) > 2
        return _Lane(len(along), (2 if ring else 1) / float(step))

    def _wraps(self, axis: int) -> bool:
        """Full tori only: 16 chips on v5e and v6e, cubes of 4 x 4 x 4 on the others."""
        sizes = self.topology.sizes
        return sizes[axis] == 16 if len(sizes) == 2 else all(size % 4 == 0 for size in sizes)

    def _hops(self, chips: np.ndarray) -> int:
        distance = np.abs(chips[0::2] - chips[1::2])
        for axis, size in enumerate(self.topology.sizes):
            if self._wraps(axis):
                distance[:, axis] = np.minimum(distance[:, axis], size - distance[:, axis])
        return int(distance.sum(axis=1).max())


@functools.lru_cache(maxsize=8)
def _in_order(topology: Topology) -> tuple[tuple[int, ...], ...]:
    if not topology.chip.is_tpu:
        return tuple((i // topology.sizes[-1], 0, 0) for i in range(topology.devices))
    ranges = [range(topology.slices), *map(range, topology.sizes), range(topology.chip.devices)]
    return tuple((*chip, core, slice_) for slice_, *chip, core in itertools.product(*ranges))


@dataclasses.dataclass(frozen=True)
class _Lane:
    extent: int
    directions: float
