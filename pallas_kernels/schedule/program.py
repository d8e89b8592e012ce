"""The compiler's listing of one kernel, as loops, guards and regions.

Two files describe a kernel after scheduling. `*-final_bundles.txt` has one line for each VLIW bundle, its address first, then
a mark where control flow arrives (LB: the body of a loop begins, PB and PF: a predicated region begins, or ends and what follows
it falls through), then the instructions. `*-final_hlo-static-per-bundle-utilization.txt` has one row for each bundle: how many
slots of each unit it fills.

    0x2c9 PF: > { ... } /* Start/End empty region 44 :: Start region 45 */
    0x2cb   : > { %757 = sbr.rel (%p37577_p9) target = $region48 }

A branch takes effect after four more bundles. A branch to a region that starts earlier closes a loop; one to a later region
is a guard, which skips what lies between.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter

DELAY_SLOTS = 4  # bundles after a branch that run all the same

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})? *: *>* *(\{.*|$)")
_REGION = re.compile(r"(?:Start/End empty|Start) region (\d+)")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)(%\w+)\) )?target = \$region(\d+)")
_MATMUL = re.compile(r"\bvmatmul\.(\S*mxu\d)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Unit:
    """The matrix units of a TensorCore.

    Attributes:
        size: rows and columns of the array.
        rows_per_cycle: of the left operand that one array takes, in bfloat16.
    """

    size: int
    rows_per_cycle: int


# The rates follow from the published peaks of v5e, v5p and v6e; tpu7x's is the largest that the compiler's slot counts allow.
UNITS = {"v5e": Unit(128, 1), "v5p": Unit(128, 1), "v6e": Unit(256, 2), "tpu7x": Unit(256, 4)}


@dataclasses.dataclass(frozen=True)
class Loop:
    """Attributes:
    start, stop: the bundles of its body.
    trips: how often the body runs, where the listing says so by constants.
    """

    start: int
    stop: int
    trips: int | float | None


@dataclasses.dataclass(frozen=True)
class Guard:
    """Bundles that a condition may skip."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles that run as one.

    Attributes:
        loops: those around it, outermost first; the first is the kernel's grid.
        guards: the conditions under which it runs, outermost first.
        slots: of each unit, as the compiler counts them.
        matmul_cycles: of each MXU, that its instructions here need at the hardware's rate.
        macs: multiply-accumulates that the MXUs do here when every row and column is in use.
    """

    start: int
    stop: int
    loops: tuple[Loop, ...]
    guards: tuple[Guard, ...]
    slots: dict[str, int]
    matmul_cycles: dict[str, int]
    macs: int

    @property
    def bundles(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Region:
    """The blocks from one mark, or one loop's end, to the next."""

    mark: str
    blocks: tuple[Block, ...]

    @property
    def start(self) -> int:
        return self.blocks[0].start

    @property
    def stop(self) -> int:
        return self.blocks[-1].stop


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel.

    Attributes:
        capacity: slots of each unit that a bundle has.
        regions: in the order of their addresses; every bundle is in one.
    """

    capacity: dict[str, int]
    regions: tuple[Region, ...]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for region in self.regions for block in region.blocks)


def parse(bundles: str, utilization: str, tpu: str) -> Program:
    """The program in the text of the two listings.

    Raises:
        ValueError: the two do not describe the same bundles: not the listings of one kernel.
    """
    lines = [match for line in _joined(bundles) if (match := _BUNDLE.match(line))]
    marks = [line[1] or "" for line in lines]
    texts = [line[2] for line in lines]
    units, capacity, rows = _utilization(utilization)
    if len(rows) != len(lines):
        raise ValueError(f"{len(lines)} bundles, but slots of {len(rows)}")
    loops, guards = _control_flow(texts)
    edges = {0, len(lines)}
    region_edges = edges | {i for i, mark in enumerate(marks) if mark} | {loop.stop for loop in loops}
    block_edges = region_edges | {i for span in (*loops, *guards) for i in (span.start, span.stop)}
    regions = []
    for start, stop in _pairs(region_edges):
        cuts = [edge for edge in block_edges if start <= edge <= stop]
        blocks = [_block(a, b, texts, rows, units, loops, guards, tpu) for a, b in _pairs(cuts)]
        regions.append(Region(marks[start], tuple(blocks)))
    return Program(dict(zip(units, capacity, strict=True)), tuple(regions))


def _joined(text: str) -> list[str]:
    """The lines, a bundle that was printed over several (its instructions quote the program) as one."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and not re.match(r"^ *(0x[0-9a-f]+|0) +([A-Z]{2})? *:", line):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return lines


def _utilization(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    lines = [line for line in text.splitlines() if line.strip()]
    names = next((i for i, line in enumerate(lines) if line.startswith("MXU")), None)
    if names is None:
        raise ValueError("no table of slots")
    units = [name.strip() for name in lines[names].split(",")]
    numbers = [[int(n) for n in line.split()] for line in lines[names + 1 :] if not line.startswith("==")]
    return units, numbers[0], numbers[1:]


def _control_flow(texts: list[str]) -> tuple[list[Loop], list[Guard]]:
    places = {region: i for i, text in enumerate(texts) for region in _REGION.findall(text)}
    loops, guards = [], []
    for i, text in enumerate(texts):
        for negated, predicate, region in _BRANCH.findall(text):
            place = places.get(region, len(texts) - 1)  # the exit bundle has another comment
            after = min(i + 1 + DELAY_SLOTS, len(texts))
            if place <= i:
                loops.append(Loop(place, after, _trips(texts, predicate) if negated else None))
            elif place > after:
                guards.append(Guard(after, place))
    return loops, guards


def _trips(texts: list[str], predicate: str) -> int | None:
    """How often a loop runs that ends when `predicate` holds: a counter from a constant by a constant up to a constant."""
    text = "\n".join(texts)

    def definition(name: str, pattern: str) -> re.Match | None:
        return re.search(rf"{re.escape(name)} = {pattern}", text)

    test = definition(predicate, r"scmp\.(ge|gt|eq)\.s32\.totalorder (%\w+), (-?\d+)")
    step = test and definition(test[2], r"sadd\.s32 (?:(\d+), (%\w+)|(%\w+), (\d+))")
    phi = step and definition(step[2] or step[3], r"sphi (%\w+),")
    first = phi and definition(phi[1], r"smov (-?\d+)")
    if not first:
        return None
    last = int(test[3]) + (test[1] == "gt")
    return math.ceil((last - int(first[1])) / int(step[1] or step[4]))


def _block(start, stop, texts, rows, units, loops, guards, tpu) -> Block:
    around = lambda spans: sorted((s for s in spans if s.start <= start and stop <= s.stop), key=lambda s: s.start - s.stop)  # noqa: E731
    unit = UNITS[tpu]
    cycles, macs = Counter(), 0
    for text in texts[start:stop]:
        for instruction in _MATMUL.findall(_COMMENT.sub("", text)):
            rows_16, rows_of_register = _rows(instruction)
            cycles[instruction[-4:]] += rows_16 // unit.rows_per_cycle
            macs += rows_of_register * unit.size**2
    slots = {name: sum(row[i] for row in rows[start:stop]) for i, name in enumerate(units)}
    return Block(start, stop, tuple(around(loops)), tuple(around(guards)), slots, dict(cycles), macs)


def _rows(instruction: str) -> tuple[int, int]:
    """Of a vmatmul's left operand, one register: in units of bfloat16's time, and as they are."""
    parts = instruction.split(".")
    if "f32" in parts:
        return 8, 8
    if "bf16" in parts:
        return 16, 16
    return 16, 32  # eight bits, at twice the rate


def _pairs(edges):
    return itertools.pairwise(sorted(edges))
