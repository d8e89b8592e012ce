"""The stated roofline: what a program would take if every unit ran at its published rate.

One device computes its instructions one after another, each as long as the slower of its matrix FLOPs and its HBM bytes
takes; exchanges that nothing runs beside come on top, others are hidden as far as there is work to hide them:

    step = max(core + waiting exchanges, all exchanges over ICI, all exchanges over DCN)
    core = sum over instructions of max(FLOPs / peak, bytes / HBM bandwidth)

Elementwise arithmetic, latencies, pipeline bubbles inside kernels, the host, and contention between exchanges are left out,
so real steps are slower: see calibration.py for by how much in published runs. Two programs may be compared under it; a
speed it does not promise.
"""

import dataclasses
from typing import Literal

from llama4_jax.planning.chips import Chip


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same mesh axes, in a step, of one device.

    Attributes:
        kind: of XLA, or "remote-dma".
        axes: of the mesh, joined by "+".
        count: how many run.
        sent: bytes.
        seconds: at published rates.
        overlapped: whether the program computes meanwhile.
        slow: over the network between slices or nodes.
        scope: the part of the model with most of the bytes.
    """

    kind: str
    axes: str
    count: float
    sent: float
    seconds: float
    overlapped: bool
    slow: bool
    scope: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one device.

    Attributes:
        matmul: FLOPs at the peak of their number format.
        hbm: bytes at the HBM's rate.
        core: sum over instructions of the slower of the two.
        waiting: exchanges that nothing runs beside.
        ici, dcn: all exchanges over the fast and the slow network.
    """

    matmul: float
    hbm: float
    core: float
    waiting: float
    ici: float
    dcn: float

    @property
    def step(self) -> float:
        return max(self.core + self.waiting, self.ici, self.dcn)

    @property
    def bound(self) -> Literal["matrix units", "HBM", "waiting for exchanges", "ICI", "DCN"]:
        """What takes most of the step's time."""
        if self.step in (self.ici, self.dcn) and self.step > self.core + self.waiting:
            return "DCN" if self.dcn >= self.ici else "ICI"
        if self.waiting > self.core:
            return "waiting for exchanges"
        return "matrix units" if self.matmul >= self.core / 2 else "HBM"


def roofline(chip: Chip, matmul: float, hbm_bytes: float, core: float, exchanges: list[Exchange]) -> Roofline:
    def seconds(wanted) -> float:
        return sum(exchange.seconds for exchange in exchanges if wanted(exchange))

    return Roofline(
        matmul=matmul,
        hbm=hbm_bytes / chip.hbm_bandwidth,
        core=core,
        waiting=seconds(lambda e: not e.overlapped),
        ici=seconds(lambda e: not e.slow),
        dcn=seconds(lambda e: e.slow),
    )
