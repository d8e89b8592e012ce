"""What each instruction of a compiled program does: matrix FLOPs, bytes of HBM, bytes sent to other devices.

FLOPs are those of matrix products (convolutions, as TPU compilers write them) with multiply and add counted apart, and what
Pallas kernels give as their cost estimate; elementwise arithmetic is not counted. Bytes are those of operands and results
that lie in HBM, as padded there; of what a slice, gather or update touches alone, that part. Sent bytes are what one device
has to send when every byte takes the shortest way (a ring): see `Collective`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from llama4_jax.planning.hlo import Computation, Execution, Instruction, Module, Shape, bits

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "call-start",
    "call-done", "copy-done", "slice-done", "send", "recv",
    "send-done", "recv-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
}  # fmt: skip
_KINDS = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange among groups of n devices, of which each holds b bytes of the operand.

    Attributes:
        kind: as XLA calls it; "remote-dma" for what a Pallas kernel sends itself.
        sent: bytes that a device sends: all-gather (n-1) b; reduce-scatter and all-to-all (n-1)/n b; all-reduce
            2 (n-1)/n b; collective-permute b.
        group: places in the mesh, in row-major order, of one of the groups; the pairs of a permute as two groups' worth,
            (source, target, source, target, ...).
        overlapped: whether the program computes meanwhile: begun by one instruction and awaited by another.
        slow: over the network between slices.
    """

    kind: str
    sent: float
    group: tuple[int, ...]
    overlapped: bool
    slow: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one execution of an instruction on one device.

    Attributes:
        flops_8bit: those of `flops` whose operands are int8 or fp8.
        is_kernel: whether it is a Pallas kernel.
    """

    flops: float = 0.0
    flops_8bit: float = 0.0
    hbm_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    is_kernel: bool = False


def work(module: Module, execution: Execution, devices: int, slices: int = 1) -> Work:
    """Args:
    devices: of the whole program.
    slices: of the topology; groups of devices are numbered within one.
    """
    instruction, computation = execution.instruction, execution.computation
    if instruction.opcode in ("send", "recv"):
        return Work(collectives=_between_slices(instruction, computation, slices))
    collectives = _collectives(module, instruction, computation, devices // slices)
    if execution.beside:
        collectives = tuple(dataclasses.replace(collective, overlapped=True) for collective in collectives)
    estimate = kernel_estimate(instruction)
    if estimate is not None:
        remote = estimate.get("remote_bytes_transferred", 0)
        if remote:
            collectives = (Collective("remote-dma", remote, (), True),)
        return Work(estimate["flops"], 0.0, _kernel_bytes(computation, instruction, estimate), collectives, is_kernel=True)
    return Work(*flops(module, computation, instruction), _bytes(module, computation, instruction), collectives)


def kernel_estimate(instruction: Instruction) -> dict[str, float] | None:
    """A Pallas kernel's cost estimate; None for anything else. Zeros where the kernel gives none."""
    if instruction.opcode != "custom-call" or instruction.attribute(r'custom_call_target="(\w+)"') != "tpu_custom_call":
        return None
    estimate = dict(re.findall(r'"(\w+)":"(\d+)"', instruction.attribute(r'"cost_estimate":\{([^}]*)\}') or ""))
    return {name: float(estimate.get(name, 0)) for name in ("flops", "bytes_accessed", "remote_bytes_transferred")}


# ------------------------------------------------------------------------------------------------------------------------
# FLOPs


def flops(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, float]:
    """Of the matrix products in an instruction, those inside a fusion included; and of them those of 8-bit operands."""
    if instruction.opcode == "fusion":
        fused = module.called(instruction)
        found = [flops(module, fused, inner) for inner in fused]
        return sum(f for f, _ in found), sum(f for _, f in found)
    if instruction.opcode not in ("convolution", "dot"):
        return 0.0, 0.0
    left, right = (computation[name].shapes[0] for name in instruction.operands[:2])
    count = _dot(instruction, left) if instruction.opcode == "dot" else _convolution(instruction, left, right)
    return count, count * (bits(left.dtype) == bits(right.dtype) == 8)


def _dot(instruction: Instruction, left: Shape) -> float:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return 2.0 * instruction.shapes[0].size * math.prod(left.dims[int(i)] for i in contracted.split(",") if i)


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> float:
    """2 for each place of a window that lies on a value, not on padding: batch dimensions of a product may become windows."""
    inputs, kernels, outputs = re.match(r"([^_]+)_([^-]+)->(.+)", instruction.attribute(r"dim_labels=([\w\->]+)")).groups()
    result, window = instruction.shapes[0], _window(instruction)
    features = right.dims[kernels.index("i")]
    groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    total = 2.0 * features * result.dims[outputs.index("b")] * result.dims[outputs.index("f")] / groups
    for n, label in enumerate(label for label in sorted(outputs) if label.isdigit()):
        sizes = left.dims[inputs.index(label)], right.dims[kernels.index(label)], result.dims[outputs.index(label)]
        total *= _places(*sizes, *(window[key][n] if key in window else default for key, default in _WINDOW.items()))
    return total


_WINDOW = {"stride": 1, "pad": (0, 0), "lhs_dilate": 1, "rhs_dilate": 1}


def _window(instruction: Instruction) -> dict[str, list]:
    """The window's attributes by spatial dimension."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = {key: value.split("x") for key, _, value in (item.partition("=") for item in text.split())}
    numbers = {key: [int(v) for v in fields[key]] for key in ("stride", "lhs_dilate", "rhs_dilate") if key in fields}
    if "pad" in fields:
        numbers["pad"] = [tuple(map(int, v.split("_"))) for v in fields["pad"]]
    return numbers


@functools.lru_cache(maxsize=10_000)
def _places(size: int, kernel: int, result: int, stride: int, pad: tuple[int, int], dilation: int, kernel_dilation: int) -> int:
    """Pairs of a result and a kernel element along one dimension that meet a value of the input."""
    if size == 1 and kernel == 1:
        return result
    places = np.arange(result) * stride - pad[0]
    last = (size - 1) * dilation
    total = 0
    for element in range(kernel):
        at = places + element * kernel_dilation
        total += int(np.sum((at >= 0) & (at <= last) & (at % dilation == 0)))
    return total


# ------------------------------------------------------------------------------------------------------------------------
# Bytes of HBM


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or instruction.attribute(r'custom_call_target="(\w+)"') in ("AllocateBuffer", "ConcatBitcast"):
        return 0.0
    if opcode in ("copy-start", "slice-start"):  # (destination, source, ...): what moves is as large as the smaller
        moved = min(shape.padded_bytes for shape in instruction.shapes[:2])
        return float(sum(moved for shape in instruction.shapes[:2] if shape.space == 0))
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    results = sum(_in_hbm(shape) for shape in instruction.shapes)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * results if _in_hbm(computation[instruction.operands[0]].shapes[0]) else results
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * _in_hbm(computation[instruction.operands[-1 if opcode == "scatter" else 1]].shapes[0])
    if opcode.endswith("-start"):
        results /= 2  # operand and result
    return float(results + sum(_in_hbm(shape) for name in set(instruction.operands) for shape in computation[name].shapes))


def _kernel_bytes(computation: Computation, instruction: Instruction, estimate: dict[str, float]) -> float:
    """What a kernel says that it moves, of which operands and results that lie on the chip have their part for nothing."""
    shapes = [*instruction.shapes, *(shape for name in instruction.operands for shape in computation[name].shapes)]
    in_hbm = float(sum(map(_in_hbm, shapes)))
    share = in_hbm / max(1, sum(shape.padded_bytes for shape in shapes))
    return estimate["bytes_accessed"] * share or in_hbm


def _in_hbm(shape: Shape) -> int:
    return shape.padded_bytes if shape.space == 0 else 0


def _fusion_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    fused = module.called(instruction)
    total = 0.0
    for index, name in enumerate(instruction.operands):
        shapes = computation[name].shapes
        if shapes and _in_hbm(shapes[0]) and index in fused.parameters:
            total += min(sum(map(_in_hbm, shapes)), _read(module, fused, fused.parameters[index]))
    roots = [fused[fused.root]]
    if roots[0].opcode == "tuple":
        roots = [fused[name] for name in roots[0].operands]
    if len(roots) != len(instruction.shapes):
        return total + sum(map(_in_hbm, instruction.shapes))
    for root, shape in zip(roots, instruction.shapes, strict=True):
        if _in_hbm(shape):
            total += _written(fused, root, shape)
    return total


def _read(module: Module, fused: Computation, value: Instruction) -> float:
    """Bytes that a fusion reads of one of its values."""
    whole = float(sum(shape.padded_bytes for shape in value.shapes))
    total = 0.0
    for user in fused.users.get(value.name, ()):
        if user.opcode == "bitcast":
            total += _read(module, fused, user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += user.shapes[0].padded_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif user.opcode == "fusion":
            inner = module.called(user)
            for index, name in enumerate(user.operands):
                if name == value.name and index in inner.parameters:
                    total += _read(module, inner, inner.parameters[index])
        elif user.opcode == "tuple":
            continue  # passed on
        else:
            return whole
    return min(whole, total)


def _written(fused: Computation, root: Instruction, shape: Shape) -> float:
    while root.opcode == "bitcast":
        root = fused[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return fused[root.operands[1]].shapes[0].padded_bytes
    return 0.0 if root.opcode == "parameter" else shape.padded_bytes


# ------------------------------------------------------------------------------------------------------------------------
# Collectives


def _collectives(module: Module, instruction: Instruction, computation: Computation, devices: int) -> tuple[Collective, ...]:
    kind = instruction.opcode.removesuffix("-start")
    if kind in _KINDS:
        operands = [shape for name in instruction.operands for shape in computation[name].shapes]
        return (_collective(kind, instruction, operands, instruction.opcode.endswith("-start"), devices),)
    if instruction.opcode != "fusion":
        return ()
    # A collective that runs beside other work appears in the fusion that begins it, in each that it runs beside, and in the
    # one that awaits it; it is counted in the first.
    fused = module.called(instruction)
    inner = [i for i in fused if i.opcode in _KINDS]
    if not inner:
        return ()
    targets = {i.attribute(r'custom_call_target="(\w+)"') for i in fused if i.opcode == "custom-call"}
    begins = "AsyncCollectiveStart" in targets
    if not begins and ("AsyncCollectiveDone" in targets or fused.name.startswith("async_collective_fusion")):
        return ()
    found = []
    for i in inner:
        operands = [shape for name in i.operands for shape in fused[name].shapes]
        scattered = i.opcode == "all-reduce" and "all-reduce-scatter" in fused.name
        found.append(_collective("reduce-scatter" if scattered else i.opcode, i, operands, begins, devices))
    return tuple(found)


def _collective(kind: str, instruction: Instruction, operands: Sequence[Shape], overlapped: bool, devices: int) -> Collective:
    held = float(sum(shape.bytes for shape in operands))
    if kind == "collective-permute":
        pairs = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", instruction.text)]
        sent = held if any(source != target for source, target in pairs) else 0.0
        return Collective(kind, sent, tuple(place for pair in pairs for place in pair), overlapped)
    group = replica_group(instruction.text, devices)
    n = len(group)
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-broadcast": 1}.get(kind, (n - 1) / n)
    return Collective(kind, share * held, group, overlapped)


def replica_group(text: str, devices: int) -> tuple[int, ...]:
    """The first of an instruction's groups, in any of the forms that XLA writes them."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in match.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(order) if order else ids
        return tuple(ids.reshape(shape)[0].tolist())
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(axes.values()))
        if match[2]:
            ids = ids.reshape(tuple(map(int, match[2].split(","))))
            ids = ids.transpose(tuple(map(int, match[3].split(",")))) if match[3] else ids
        chosen = re.findall(r"'([^']+)'", match[4])
        ids = ids.reshape(tuple(axes.values()))
        first = tuple(slice(None) if name in chosen else 0 for name in axes)
        return tuple(ids[first].reshape(-1).tolist())
    return tuple(range(devices))  # no groups: all devices are one


def _between_slices(instruction: Instruction, computation: Computation, slices: int) -> tuple[Collective, ...]:
    """A `send` of the slices' network is one side of a collective, whose kind its attributes tell."""
    transfer = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if instruction.opcode != "send" or transfer is None:
        return ()
    kind = transfer.lower().replace("_", "-")
    held = float(computation[instruction.operands[0]].shapes[0].bytes)
    share = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1}.get(kind, 1.0)
    return (Collective(kind, share * held, (), True, slow=True),)
