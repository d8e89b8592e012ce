"""What a compiled program is, in numbers of one device: memory by kind, FLOPs, bytes, exchanges."""

import collections
import dataclasses
from typing import Any

from llama4_jax.planning import hlo
from llama4_jax.planning.chips import Topology
from llama4_jax.planning.memory import Buffer, Memory, largest_buffers, memory_of, misaligned
from llama4_jax.planning.network import Network
from llama4_jax.planning.roofline import Exchange, Roofline, roofline
from llama4_jax.planning.scopes import origin, scope_of, turns_by_scope
from llama4_jax.planning.work import Work, work

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop whose turns depend on data.

    Attributes:
        scope: where in the program.
        turns: that were counted.
    """

    scope: str
    turns: float


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one device and one run of a program.

    Attributes:
        memory: see there.
        flops: of matrix products and kernels; see work.py.
        kernel_flops: of them those of Pallas kernels.
        hbm_bytes: read and written.
        roofline: seconds.
        exchanges: the most seconds first.
        scopes: seconds at the roofline by part of the model, exchanges that nothing runs beside included.
        loops: whose turns depend on data.
        buffers: the largest.
        misaligned: see the function of that name.
    """

    memory: Memory
    flops: float
    kernel_flops: float
    hbm_bytes: float
    roofline: Roofline
    exchanges: list[Exchange]
    scopes: dict[str, float]
    loops: list[Loop]
    buffers: list[Buffer]
    misaligned: dict[str, float]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Measurement":
        """The inverse of `dataclasses.asdict`."""
        lists = {"exchanges": Exchange, "loops": Loop, "buffers": Buffer}
        made = {name: [kind(**item) for item in fields[name]] for name, kind in lists.items()}
        return cls(**fields | made | {"memory": Memory(**fields["memory"]), "roofline": Roofline(**fields["roofline"])})


def measure(compiled, arguments: tuple[PyTree, ...], topology: Topology, mesh) -> Measurement:
    """Args:
    compiled: what `jax.jit(...).lower(...).compile()` gave.
    arguments: what it was lowered for: ShapeDtypeStructs with shardings.
    mesh: the jax mesh it is for.
    """
    module, network, chip = hlo.parse(compiled.as_text()), Network.of(topology, mesh), topology.chip
    loops: dict[str, Loop] = {}

    def turns(loop: hlo.Instruction) -> float:
        scope = scope_of(loop.op_name)
        loops[scope] = Loop(scope, turns_by_scope(loop.op_name, network.axes))
        return loops[scope].turns

    def sum_of(runs: list[hlo.Execution]) -> _Sum:
        total = _Sum(network)
        for run in runs:
            total.add(run.times, work(module, run, topology.devices, topology.slices), scope_of(origin(module, run)))
        return total

    total = sum_of(hlo.executions(module, turns, cost=lambda branch: sum_of(branch).core))
    exchanges = total.exchanges()
    return Measurement(
        memory=memory_of(compiled, arguments),
        flops=total.flops,
        kernel_flops=total.kernel_flops,
        hbm_bytes=total.hbm_bytes,
        roofline=roofline(chip, total.matmul, total.hbm_bytes, total.core, exchanges),
        exchanges=exchanges,
        scopes=dict(total.scopes.most_common()),
        loops=list(loops.values()),
        buffers=largest_buffers(module),
        misaligned=misaligned(arguments),
    )


@dataclasses.dataclass
class _Sum:
    """Of the work of several instructions."""

    network: Network
    flops: float = 0.0
    kernel_flops: float = 0.0
    hbm_bytes: float = 0.0
    matmul: float = 0.0
    core: float = 0.0
    scopes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sent: dict[tuple, "_Sent"] = dataclasses.field(default_factory=dict)

    def add(self, times: float, work: Work, scope: str) -> None:
        chip = self.network.topology.chip
        core = times * chip.core_seconds(work.flops, work.flops_8bit, work.hbm_bytes)
        self.flops += times * work.flops
        self.kernel_flops += times * work.flops * work.is_kernel
        self.hbm_bytes += times * work.hbm_bytes
        self.matmul += times * chip.core_seconds(work.flops, work.flops_8bit, 0.0)
        self.core += core
        self.scopes[scope] += core
        for collective in work.collectives:
            seconds = times * self.network.seconds(collective)
            self.scopes[scope] += 0 if collective.overlapped else seconds
            axes, slow = "+".join(self.network.axes_of(collective)) or "none", self.network.is_slow(collective)
            entry = self.sent.setdefault((collective.kind, axes, collective.overlapped, slow), _Sent())
            entry.count += times
            entry.seconds += seconds
            entry.bytes_by_scope[scope] += times * collective.sent

    def exchanges(self) -> list[Exchange]:
        """The most seconds first."""
        found = [
            Exchange(
                kind, axes, sent.count, sum(sent.bytes_by_scope.values()), sent.seconds, overlapped, slow,
                sent.bytes_by_scope.most_common(1)[0][0],
            )
            for (kind, axes, overlapped, slow), sent in self.sent.items()
        ]  # fmt: skip
        return sorted(found, key=lambda exchange: -exchange.seconds)


@dataclasses.dataclass
class _Sent:
    count: float = 0.0
    seconds: float = 0.0
    bytes_by_scope: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
