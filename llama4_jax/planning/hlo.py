"""The text of a compiled program as computations of instructions, with the turns of its loops.

XLA's text form changes between versions; what is read here is what TPU compilers of 2026 (libtpu 0.0.42 and 0.0.50) write,
and tests/planning compile known programs with the one installed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}  # others end in their bits: f32, s8, u4, f8e4m3fn


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's.

    Attributes:
        tile: the sizes to which its innermost dimensions are padded in memory, in the order of the layout; () for none.
        space: of memory: 0 is HBM, others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the values."""
        return self.size * bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """That they take in memory."""
        dims = [self.dims[i] for i in self.layout or reversed(range(len(self.dims)))]  # innermost first
        for i, tile in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // tile) * tile
        return math.prod(dims) * bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Attributes:
    shapes: of the result; of all arrays in it where it is a tuple.
    operands: names, of the same computation.
    text: what stands after the operands: attributes and metadata.
    literal: what stands in place of operands in a constant or parameter.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    literal: str

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the program's source it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of the pattern in its attributes."""
        match = re.search(pattern, self.text)
        return match and match[1]

    def called(self, role: str = "calls") -> str | None:
        return self.attribute(rf"\b{role}=%?([\w.\-]+)")


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, role: str = "calls") -> Computation | None:
        name = instruction.called(role)
        return None if name is None else self.computations[name]


def parse(text: str) -> Module:
    """Raises ValueError when the text is not a module."""
    computations, entry, current = {}, None, None
    for line in _lines(text):
        if line.startswith(" ") and current is not None:
            if instruction := _instruction(line.strip()):
                current.instructions[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    current.root = instruction.name
        elif line.startswith("}"):
            current = None
        elif match := _HEADER.match(line):
            current = computations[match[2]] = Computation(match[2])
            entry = current if match[1] else entry
    if entry is None:
        raise ValueError("no ENTRY computation in the text")
    if cut := [name for name, computation in computations.items() if not computation.root]:
        raise ValueError(f"no root in the computation {cut[0]}: what follows was not understood")
    return Module(computations, entry)


def _lines(text: str) -> list[str]:
    """With each instruction in one: what a kernel says of itself (`kernel_metadata`) may go over several."""
    lines, inside = [], False
    for line in text.splitlines():
        if inside and not (_NAME.match(line.strip()) or _END.match(line)):
            lines[-1] += line
        else:
            lines.append(line)
            inside = not _END.match(line) if inside else bool(_HEADER.match(line))
    return lines


_END = re.compile(r"\}(, execution_thread=.*)?$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    shapes = tuple(map(_shape, _SHAPE.finditer(line, start, end)))
    return Instruction(match[1], shapes, opcode[1], tuple(_OPERAND.findall(inside)), line[close + 1 :], inside)


def _closing(line: str, start: int) -> int:
    depth = 0
    for i in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing bracket: {line[:200]}")


def _shape(match: re.Match) -> Shape:
    dtype, dims, layout, rest = match.groups()
    numbers = lambda text: tuple(int(n) for n in text.replace("<=", "").split(",") if n)  # noqa: E731
    tile = re.search(r"T\(([\d,]+)\)", rest or "")
    space = re.search(r"S\((\d+)\)", rest or "")
    return Shape(dtype, numbers(dims), numbers(layout or ""), numbers(tile[1]) if tile else (), int(space[1]) if space else 0)


def bits(dtype: str) -> int:
    """Of one number."""
    if dtype in _ITEM_BITS:
        return _ITEM_BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0


# ------------------------------------------------------------------------------------------------------------------------
# Loops


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction outside of fusions, and how often it runs.

    Attributes:
        times: turns of all loops around it, multiplied.
        beside: whether it runs beside what follows: begun by one instruction (as tpu7x's sparse cores do) and awaited by another.
    """

    instruction: Instruction
    computation: Computation
    times: float
    beside: bool = False


UnknownLoop = Callable[[Instruction], float]  # the turns to take for a loop whose bound depends on data


def executions(module: Module, unknown: UnknownLoop, cost: Callable[[list[Execution]], float]) -> list[Execution]:
    """Every instruction that runs, with its turns. Of the branches of a conditional, the one of the highest `cost` runs."""

    def visit(computation: Computation, times: float, beside: bool = False) -> list[Execution]:
        found = []
        for instruction in computation:
            found.append(Execution(instruction, computation, times, beside))
            if instruction.opcode == "while":
                turns = trip_count(module, computation, instruction)
                turns = unknown(instruction) if turns is None else turns
                if turns:
                    found += visit(module.called(instruction, "body"), times * turns)
            elif instruction.opcode == "conditional":
                branches = [visit(branch, times) for branch in _branches(module, instruction)]
                found += max(branches, key=cost, default=[])
            elif instruction.opcode in ("call", "async-start", "call-start"):
                called = module.called(instruction) or module.called(instruction, "to_apply")
                found += visit(called, times, beside or instruction.opcode != "call")
        return found

    return visit(module.entry, 1.0)


def _branches(module: Module, instruction: Instruction) -> list[Computation]:
    listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    names = _OPERAND.findall(listed) if listed else [instruction.called(f"{side}_computation") for side in ("true", "false")]
    return [module.computations[name] for name in names]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a `while` that counts from a constant to a constant; None where data decide."""
    if known := loop.attribute(r"known_trip_count[^\d]*(\d+)"):
        return int(known)
    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    start = lambda index: _initial(module, computation, loop, index)  # noqa: E731
    compare, sides = _through_fusions(module, condition, condition.root, lambda i: i.opcode == "compare")
    if compare is None:
        return None
    values = [_counter_or_constant(condition, side) for side in sides]
    directions = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "NE": "<"}
    direction = directions.get(compare.attribute(r"direction=(\w+)") or "")
    if direction in (">", ">="):
        values, direction = values[::-1], direction.replace(">", "<")
    (counter, first), (bound_index, bound) = values
    if counter is None or direction is None:
        return None
    first, limit = start(counter), bound if bound_index is None else start(bound_index)
    step = _step(module, body, counter)
    if bound_index is not None and not _unchanged(body, bound_index):
        return None
    if None in (first, limit, step) or step <= 0:
        return None
    return max(0, -(-(limit + (direction == "<=") - first) // step))


def _initial(module: Module, computation: Computation, loop: Instruction, index: int) -> int | None:
    """The value with which a loop's variable starts, where that is a constant."""
    made = computation[loop.operands[0]]
    while made.opcode in ("copy", "opt-barrier") and made.operands:
        made = computation[made.operands[0]]
    return _constant(computation, made.operands[index]) if made.opcode == "tuple" else None


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


def _constant(computation: Computation, name: str) -> int | None:
    instruction = computation[name]
    while instruction.opcode in _SAME:
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    return None


def _counter_or_constant(computation: Computation, name: str) -> tuple[int | None, int | None]:
    """(index in the loop's variables, None) or (None, value); (None, None) for anything else."""
    instruction = computation[name]
    while instruction.opcode in _SAME:
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "get-tuple-element":
        return int(instruction.attribute(r"index=(\d+)")), None
    return None, _constant(computation, name)


def _through_fusions(module: Module, computation: Computation, name: str, wanted) -> tuple[Instruction | None, list[str]]:
    """The instruction that makes `name`, inside a fusion or not, and its operands as names of `computation`."""
    instruction, names = computation[name], None
    while instruction.opcode in _SAME:
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "fusion":
        fused, outer = module.called(instruction), instruction.operands
        inner = fused[fused.root]
        while inner.opcode in _SAME:
            inner = fused[inner.operands[0]]
        names = []
        for operand in inner.operands:
            source = fused[operand]
            while source.opcode in _SAME:
                source = fused[source.operands[0]]
            if source.opcode == "parameter":
                names.append(outer[int(source.literal)])
            elif source.opcode == "constant":
                computation.instructions.setdefault(source.name, source)
                names.append(source.name)
            else:
                return None, []
        instruction = inner
    return (instruction, list(names if names is not None else instruction.operands)) if wanted(instruction) else (None, [])


def _step(module: Module, body: Computation, index: int) -> int | None:
    """By how much a turn raises a loop's variable."""
    root = body[body.root]
    if root.opcode != "tuple":
        return None
    add, operands = _through_fusions(module, body, root.operands[index], lambda i: i.opcode == "add")
    if add is None:
        return None
    pairs = [_counter_or_constant(body, operand) for operand in operands]
    steps = [value for _, value in pairs if value is not None]
    return steps[0] if len(steps) == 1 and any(counter == index for counter, _ in pairs) else None


def _unchanged(body: Computation, index: int) -> bool:
    root = body[body.root]
    if root.opcode != "tuple":
        return False
    counter, _ = _counter_or_constant(body, root.operands[index])
    return counter == index
