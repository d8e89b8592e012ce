"""What a tile costs, from a kernel's program: the figures, the table and the JSON."""

import contextlib
import dataclasses
import importlib.metadata
import re
import tempfile
from collections import Counter
from pathlib import Path

from pallas_kernels import aot
from pallas_kernels.schedule.kernels import KERNELS, Kernel
from pallas_kernels.schedule.program import Block, Guard, Program, Region, parse

_SHOWN = {"VALU": "VALU", "VLOAD": "load", "VSTORE": "store", "VLOAD:FILL": "fill", "VSTORE:SPILL": "spill"}


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one tile costs on one way through the kernel.

    Attributes:
        way: address of the guarded bundles that this way takes and the others do not; None where there is one way only.
        bundles: of everything that runs for the tile, times its trips; what runs once in a while by its share.
        slots: used by those bundles, likewise.
        mxu_busy: share of the MXU slots of those bundles that are in use.
        mxu_minimum: cycles that the busiest MXU needs at the hardware's rate.
        cycles: a floor of the time, DMA waits apart: of each block, the larger of its bundles and its MXU minimum.
        efficiency: what the tile asks for over what the MXUs could do in that time.
    """

    way: int | None
    bundles: float
    slots: dict[str, float]
    mxu_busy: float
    mxu_minimum: float
    cycles: float
    efficiency: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Attributes:
    regions: those inside the grid's loop; what runs before and after it is no tile's.
    runs: for each of their blocks, how often it runs for a tile (a share, where that is less than once); None where the
        ways differ in it.
    """

    op: str
    tpu: str
    tile: str
    versions: dict[str, str]
    capacity: dict[str, int]
    regions: tuple[Region, ...]
    runs: dict[int, float | None]
    tiles: tuple[Tile, ...]

    def region_figures(self, region: Region) -> dict:
        slots = sum((Counter(block.slots) for block in region.blocks), Counter())
        cycles = sum((Counter(block.matmul_cycles) for block in region.blocks), Counter())
        bundles = region.stop - region.start
        inner = region.blocks[0].loops[1:]
        return {
            "start": region.start,
            "mark": region.mark or "-",
            "trips": [loop.trips for loop in inner],
            "bundles": bundles,
            "conditional": sum(block.bundles for block in region.blocks if self.runs[block.start] != _trips(block)),
            "slots": {unit: slots[unit] for unit in self.capacity},
            "mxu_busy": slots["MXU"] / (bundles * self.capacity["MXU"]),
            "mxu_minimum": max(cycles.values(), default=0),
            "blocks": [{"start": b.start, "bundles": b.bundles, "runs": self.runs[b.start]} for b in region.blocks],
        }

    def json(self) -> dict:
        return {
            "op": self.op,
            "tpu": self.tpu,
            "tile": self.tile,
            "versions": self.versions,
            "capacity": self.capacity,
            "regions": [self.region_figures(region) for region in self.regions],
            "tiles": [dataclasses.asdict(tile) for tile in self.tiles],
        }

    def table(self) -> str:
        head = f"{'region':>8} mark {'trips':>6} {'bundles':>8} {'cond.':>6} {'MXU':>6} {'busy':>6} {'MXU min':>8}"
        rows = [head + "".join(f"{name:>7}" for name in _SHOWN.values())]
        for region in self.regions:
            figures = self.region_figures(region)
            trips = "x".join("?" if trips is None else str(trips) for trips in figures["trips"]) or "1"
            rows.append(
                f"{figures['start']:>#8x} {figures['mark']:>4} {trips:>6} {figures['bundles']:>8} {figures['conditional']:>6} "
                f"{figures['slots']['MXU']:>6} {figures['mxu_busy']:>6.1%} {figures['mxu_minimum']:>8}"
                + "".join(f"{figures['slots'].get(unit, 0):>7}" for unit in _SHOWN)
            )
        for tile in self.tiles:
            way = "" if tile.way is None else f" by way of {tile.way:#x}"
            rows.append(
                f"tile{way}: {tile.bundles:.0f} bundles, MXU slots {tile.mxu_busy:.1%} busy; the MXU's own minimum "
                f"{tile.mxu_minimum:.0f} cycles; floor {tile.cycles:.0f} cycles, {tile.efficiency:.1%} of peak"
            )
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([f"{self.op} on {self.tpu}: tile {self.tile} ({versions})", *rows])


def measure(op: str, tpu: str, dump: Path | None = None) -> Report:
    """Compiles the kernel called `op` for `tpu` in a child process and reads its schedule.

    Args:
        dump: keeps the compiler's listings in this folder.

    Raises:
        ValueError: there is no such kernel or TPU, or the listings hold no kernel of that name.
        RuntimeError: it does not compile.
    """
    if op not in KERNELS:
        raise ValueError(f"no kernel {op!r}; choose from {', '.join(KERNELS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(dump or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        request = aot.Request("pallas_kernels.schedule.kernels:case", {"op": op})
        (outcome,) = aot.compile_for(tpu, [request], dump=folder)
        if outcome.error:
            raise RuntimeError(f"{op} does not compile for {tpu}: {outcome.error}")
        return read(folder, op, tpu, KERNELS[op])


def read(folder: Path, op: str, tpu: str, kernel: Kernel) -> Report:
    """The report on `kernel` from the newest listings of it in `folder`."""
    listings = _listings(folder, "final_hlo-static-per-bundle-utilization", kernel.listing)
    if not listings:
        raise ValueError(f"no listing of a kernel {kernel.listing!r} in {folder}")
    name, utilization = listings[-1]
    bundles = next(path for other, path in _listings(folder, "final_bundles", kernel.listing) if other == name)
    program = parse(bundles.read_text(), utilization.read_text(), tpu)
    return report(op, tpu, kernel, program)


def report(op: str, tpu: str, kernel: Kernel, program: Program) -> Report:
    program = _with_trips(program, kernel)
    body = [block for block in program.blocks if block.loops]
    ways, asides = _ways(body, kernel)
    runs: dict[int, float | None] = {}
    for block in body:
        share = _share(block, asides, kernel)
        way = any(guard in ways for guard in block.guards)
        runs[block.start] = None if way and len(ways) > 1 else share * _trips(block)
    choices = ways if len(ways) > 1 else [None]
    tiles = tuple(_tile(body, way, ways, asides, kernel, program.capacity) for way in choices)
    regions = tuple(region for region in program.regions if region.blocks[0].loops)
    return Report(op, tpu, kernel.tile, _versions(), program.capacity, regions, runs, tiles)


def _with_trips(program: Program, kernel: Kernel) -> Program:
    """With the kernel's own figures for loops whose length the listing does not say; those inside the grid's."""
    unknown = sorted(
        {loop for block in program.blocks for loop in block.loops[1:] if loop.trips is None}, key=lambda loop: loop.start
    )
    if not kernel.trips:
        return program
    if len(unknown) != len(kernel.trips):
        raise ValueError(f"{kernel.listing}: {len(unknown)} loops of unknown length, figures for {len(kernel.trips)}")
    known = {loop: dataclasses.replace(loop, trips=trips) for loop, trips in zip(unknown, kernel.trips, strict=True)}

    def renew(block: Block) -> Block:
        return dataclasses.replace(block, loops=tuple(known.get(loop, loop) for loop in block.loops))

    regions = (dataclasses.replace(region, blocks=tuple(map(renew, region.blocks))) for region in program.regions)
    return dataclasses.replace(program, regions=tuple(regions))


def _ways(body: list[Block], kernel: Kernel) -> tuple[list[Guard], list[Guard]]:
    """The guards that lead to alternatives of a tile's work, and those to what is done once in a while.

    A guard around all of the matrix work asks whether there is a tile at all, and is left out. Of the others, one around
    none of it is an aside. Those around a part of it are alternatives if together they hold more than a tile asks for.
    """
    macs = {guard: sum(b.macs * _trips(b) for b in body if guard in b.guards) for block in body for guard in block.guards}
    total = sum(block.macs * _trips(block) for block in body)
    inside = {guard: work for guard, work in macs.items() if work < total}
    asides = [guard for guard, work in inside.items() if not work]
    parts = [guard for guard, work in inside.items() if work]
    parts = [guard for guard in parts if not any(o.start <= guard.start and guard.stop <= o.stop for o in parts if o != guard)]
    # An array wider than the head size is used in part, so instructions may do up to twice what was asked for.
    # A kernel that says how often its loops run has said which of them do.
    alternatives = not kernel.trips and len(parts) > 1 and sum(macs[guard] for guard in parts) >= 2 * kernel.macs
    return (parts if alternatives else []), asides


def _tile(body, way, ways, asides, kernel: Kernel, capacity) -> Tile:
    bundles, floor, slots, cycles, macs = 0.0, 0.0, Counter(), Counter(), 0.0
    for block in body:
        if any(guard in ways and guard != way for guard in block.guards):
            continue
        share = _trips(block) * _share(block, asides, kernel)
        bundles += share * block.bundles
        floor += share * max(block.bundles, *block.matmul_cycles.values(), 0)
        for unit, used in block.slots.items():
            slots[unit] += share * used
        for mxu, busy in block.matmul_cycles.items():
            cycles[mxu] += share * busy
        macs += share * block.macs
    total = sum(cycles.values())
    rate = macs / total if total else 0.0  # multiply-accumulates of one MXU in a cycle
    return Tile(
        way=way.start if way else None,
        bundles=bundles,
        slots=dict(slots),
        mxu_busy=slots["MXU"] / (bundles * capacity["MXU"]),
        mxu_minimum=max(cycles.values(), default=0.0),
        cycles=floor,
        efficiency=kernel.macs / (floor * rate * capacity["MXU"]) if rate else 0.0,
    )


def _share(block: Block, asides: list[Guard], kernel: Kernel) -> float:
    """Of the tiles for which a block runs."""
    if not any(guard in asides for guard in block.guards):
        return 1.0
    return 1 / kernel.steps if kernel.steps else 0.0


def _trips(block: Block) -> int | float:
    """Of the loops inside the grid's, times one another; a loop of unknown length counts once."""
    trips = 1
    for loop in block.loops[1:]:
        trips *= loop.trips or 1
    return trips


def _listings(folder: Path, kind: str, kernel: str) -> list[tuple[str, Path]]:
    """Listings of one kind of the kernels of that name, oldest first, each with what is common to a kernel's listings.

    A kernel called while differentiating has its name in transpose_jvp_..._.
    """
    pattern = re.compile(rf"(\d+-(?:transpose_|jvp_)*{re.escape(kernel)}_*(?:\.\d+)?)-\d+-{kind}\.txt")
    return sorted((match[1], path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))


def _versions() -> dict[str, str]:
    """Of what is installed: listings can be read without the compiler that wrote them."""
    versions = {}
    for name in ("jax", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
