"""Published rates of accelerators, and topologies by name.

A rate is what the vendor publishes for one JAX device: a TPU chip, half a TPU7x chip, or a GPU. Nothing here was measured.
"""

import dataclasses
import math
import re

from llama4_jax.errors import UserError
from llama4_jax.training.flops import PEAK_FLOPS

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind.

    Attributes:
        name: as topologies are called.
        flops: dense bfloat16 FLOP/s, of training/flops.py.
        ops_8bit: dense operations a second in int8 or fp8, whichever the chip has.
        hbm_bytes: its memory.
        hbm_bandwidth: bytes/s.
        links: number of links to neighbours in a torus, both directions of an axis counted; 0: a switch joins all devices of
            a node.
        link_bandwidth: bytes/s in one direction, of one link, or of the device into the switch.
        dcn_bandwidth: bytes/s in one direction of the network between slices or nodes, the device's share of it.
        devices: of JAX in a chip.
        source: of the numbers.
    """

    name: str
    flops: float
    ops_8bit: float
    hbm_bytes: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    dcn_bandwidth: float
    source: str
    devices: int = 1

    def core_seconds(self, flops: float, flops_8bit: float, hbm_bytes: float) -> float:
        """The slower of arithmetic and memory. `flops_8bit` are part of `flops`."""
        return max((flops - flops_8bit) / self.flops + flops_8bit / self.ops_8bit, hbm_bytes / self.hbm_bandwidth)

    @property
    def is_tpu(self) -> bool:
        return self.links > 0


_DOCS = "cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA datasheet"
# Google publishes the interconnect as both directions of all links together: 1,200 GB/s of v5p are 6 links of 100 GB/s each
# way, which in TPU7x two devices share. DCN is a chip's share, in the table of docs/tpu7x, and of the pod's 6.4 Tb/s for v5e.
# GPUs: one NIC for each, of 200 or 400 Gb/s, as in DGX systems.
_TABLE = (
    # name, device kind, 8-bit op/s, HBM and its bytes/s, links, bytes/s of a link, of the DCN, source, devices in a chip
    ("v4", "TPU v4", 275e12, 32 * GiB, 1228e9, 6, 50e9, 50e9 / 8, f"{_DOCS}/v4; arXiv 2304.01433, table 4", 1),
    ("v5e", "TPU v5 lite", 393e12, 16 * GiB, 819e9, 4, 50e9, 25e9 / 8, f"{_DOCS}/v5e", 1),
    ("v5p", "TPU v5", 918e12, 95 * GiB, 2765e9, 6, 100e9, 50e9 / 8, f"{_DOCS}/v5p, {_DOCS}/tpu7x", 1),
    ("v6e", "TPU v6 lite", 1836e12, 32 * GiB, 1638e9, 4, 100e9, 100e9 / 8, f"{_DOCS}/v6e, {_DOCS}/tpu7x", 1),
    ("tpu7x", "TPU7x", 4614e12 / 2, 96 * GiB, 7380e9 / 2, 6, 50e9, 50e9 / 8, f"{_DOCS}/tpu7x", 2),
    ("a100", "NVIDIA A100-SXM4-80GB", 624e12, 80e9, 2039e9, 0, 300e9, 200e9 / 8, _NVIDIA, 1),
    ("h100", "NVIDIA H100 80GB HBM3", 1979e12, 80e9, 3350e9, 0, 450e9, 400e9 / 8, _NVIDIA, 1),
    ("h200", "NVIDIA H200", 1979e12, 141e9, 4800e9, 0, 450e9, 400e9 / 8, _NVIDIA, 1),
    ("b200", "NVIDIA B200", 4500e12, 180e9, 8000e9, 0, 900e9, 400e9 / 8, _NVIDIA, 1),
)
CHIPS = {name: Chip(name, PEAK_FLOPS[kind], *rest) for name, kind, *rest in _TABLE}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some devices and how they are joined.

    Attributes:
        chip: what each device is.
        sizes: of the torus in chips, such as (4, 4, 8); of a GPU cluster (nodes, GPUs of a node).
        slices: of that size each, joined by the data-centre network.
    """

    chip: Chip
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"

    @property
    def chips(self) -> int:
        return math.prod(self.sizes) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    def __str__(self) -> str:
        return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


def parse_topology(text: str, slices: int = 1, hbm_bytes: float | None = None) -> Topology:
    """`v5p:4x4x8` or `h100:16x8`, as if its devices had `hbm_bytes` only. Raises UserError for an unknown chip, sizes that are
    none of its torus, or more memory than it has."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        raise UserError(f"topology {text!r}: write CHIP:SIZES, such as v5p:4x4x8 or h100:16x8; chips are {', '.join(CHIPS)}")
    chip, sizes = CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    wanted = chip.links // 2 if chip.is_tpu else 2
    if len(sizes) != wanted or not all(sizes):
        shape = "x".join("XYZ"[:wanted]) if chip.is_tpu else "NODESxGPUS"
        raise UserError(f"topology {text!r}: {chip.name} is written {chip.name}:{shape}")
    if slices < 1:
        raise UserError(f"--slices={slices} must be 1 or more")
    if slices > 1 and not chip.is_tpu:
        raise UserError(f"--slices={slices}: a GPU cluster has no slices; its nodes are in the topology")
    if hbm_bytes is not None and not 0 < hbm_bytes <= chip.hbm_bytes:
        raise UserError(f"--hbm_gb={hbm_bytes / 1e9:g}: a device of {chip.name} has {chip.hbm_bytes / 1e9:.0f}; say less")
    return Topology(dataclasses.replace(chip, hbm_bytes=hbm_bytes or chip.hbm_bytes), sizes, slices)
