"""What a compiled program is, in numbers of one device: memory by kind, FLOPs, bytes, exchanges."""

import collections
import dataclasses
import math
from typing import Any

import jax

from llama4_jax.data.batch import Batch
from llama4_jax.model.cache import Cache
from llama4_jax.planning import hlo
from llama4_jax.planning.chips import Topology
from llama4_jax.planning.network import Network
from llama4_jax.planning.roofline import Exchange, Roofline, roofline
from llama4_jax.planning.work import work
from llama4_jax.training.state import TrainState

PyTree = Any
TILE = 16  # rows of a bfloat16 tile


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device.

    Attributes:
        arguments: by kind (parameters, optimizer, batch, cache, ...), as they are padded there.
        temporaries: what the program needs meanwhile: activations, gradients, gathered weights.
        results: that do not take the place of an argument.
        code: the program itself.
    """

    arguments: dict[str, float]
    temporaries: float
    results: float
    code: float

    @property
    def total(self) -> float:
        return sum(self.arguments.values()) + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large array that some instruction makes. Not all exist at one time, and some take another's place."""

    bytes: float
    shape: str
    scope: str


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
    module, chip = hlo.parse(compiled.as_text()), topology.chip
    network = Network.of(topology, mesh)
    loops: dict[str, Loop] = {}

    def turns(loop: hlo.Instruction) -> float:
        scope = scope_of(loop.op_name)
        loops[scope] = Loop(scope, turns_by_scope(loop.op_name, network.axes))
        return loops[scope].turns

    def work_of(run: hlo.Execution):
        return work(module, run, topology.devices, topology.slices)

    def cost(runs: list[hlo.Execution]) -> float:
        works = [(run.times, work_of(run)) for run in runs]
        return sum(times * chip.core_seconds(w.flops, w.flops_8bit, w.hbm_bytes) for times, w in works)

    flops = kernel_flops = hbm_bytes = core = matmul = 0.0
    scopes: collections.Counter[str] = collections.Counter()
    sums: dict[tuple, list] = {}
    for run in hlo.executions(module, turns, cost):
        w, scope = work_of(run), scope_of(origin(module, run))
        seconds = run.times * chip.core_seconds(w.flops, w.flops_8bit, w.hbm_bytes)
        matmul += run.times * chip.core_seconds(w.flops, w.flops_8bit, 0.0)
        flops, hbm_bytes, core = flops + run.times * w.flops, hbm_bytes + run.times * w.hbm_bytes, core + seconds
        kernel_flops += run.times * w.flops * (run.instruction.opcode == "custom-call")
        scopes[scope] += seconds
        for collective in w.collectives:
            took = run.times * network.seconds(collective)
            scopes[scope] += 0 if collective.overlapped else took
            axes = network.axes_of(collective)
            key = collective.kind, "+".join(axes) or "none", collective.overlapped, network.is_slow(collective)
            entry = sums.setdefault(key, [0.0, 0.0, 0.0, collections.Counter()])
            for i, value in enumerate((run.times, run.times * collective.sent, took)):
                entry[i] += value
            entry[3][scope] += run.times * collective.sent
    exchanges = [
        Exchange(kind, axes, count, sent, seconds, overlapped, slow, by_scope.most_common(1)[0][0])
        for (kind, axes, overlapped, slow), (count, sent, seconds, by_scope) in sums.items()
    ]
    return Measurement(
        memory=memory_of(compiled, arguments),
        flops=flops,
        kernel_flops=kernel_flops,
        hbm_bytes=hbm_bytes,
        roofline=roofline(chip, matmul, hbm_bytes, core, exchanges),
        exchanges=sorted(exchanges, key=lambda e: -e.seconds),
        scopes=dict(scopes.most_common()),
        loops=list(loops.values()),
        buffers=largest_buffers(module),
        misaligned=misaligned(arguments),
    )


def turns_by_scope(op_name: str, axes: dict[str, int]) -> float:
    """The turns that are counted of a loop that data bound: later rounds of the experts' exchange do not happen while the
    router is balanced; a ring of attention goes all the way round; of decoding, one token is taken."""
    if "/experts/" in op_name:
        return 0.0
    return float(axes["context"]) if "/attention/" in op_name else 1.0


def origin(module: hlo.Module, run: hlo.Execution) -> str:
    """The op_name of an instruction; of one that the compiler made without, that of what it feeds, or is made of."""
    instruction, computation = run.instruction, run.computation
    for _ in range(4):
        if instruction.op_name:
            return instruction.op_name
        inner = module.called(instruction) if instruction.opcode == "fusion" else None
        if inner is not None and (names := [i.op_name for i in inner if i.op_name]):
            return names[-1]
        users = computation.users.get(instruction.name, ())
        if not users:
            return ""
        instruction = next((user for user in users if user.op_name), users[0])
    return ""


_MODULES = {"embed", "lm_head", "final_norm", "vision", "attention_norm", "ffn_norm"}


def scope_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to; of the backward pass after a "d"."""
    parts = [part for part in op_name.split("/") if part]
    backward = any(part.startswith("transpose(") for part in parts)
    differentiated = backward or any(part.startswith("jvp(") for part in parts)
    found = next((part for part in parts if part in _MODULES), None)
    if "feed_forward" in parts:
        inner = parts[parts.index("feed_forward") + 1 :][:1]
        found = inner[0] if inner and inner[0] in ("experts", "router", "shared_expert") else "feed_forward"
    elif "attention" in parts:
        found = "attention"
    elif found is None and "layers" in parts:
        found = "layers, other"
    elif found is None:
        found = "head and loss" if differentiated else ("update" if parts[:1] == ["jit(train_step)"] else "other")
    return f"d {found}" if backward else found


# ------------------------------------------------------------------------------------------------------------------------
# Memory


def memory_of(compiled, arguments: tuple[PyTree, ...]) -> Memory:
    stats = compiled.memory_analysis()
    by_kind = arguments_by_kind(arguments)
    rest = stats.argument_size_in_bytes - sum(by_kind.values())  # tiles' padding
    if rest > 0:
        by_kind["padding"] = float(rest)
    return Memory(
        arguments=by_kind,
        temporaries=float(stats.temp_size_in_bytes),
        results=float(max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)),
        code=float(stats.generated_code_size_in_bytes),
    )


def arguments_by_kind(arguments: tuple[PyTree, ...]) -> dict[str, float]:
    """Bytes on a device of the arrays in a program's arguments, by what they are."""
    kinds: dict[str, float] = {}

    def add(kind: str, tree: PyTree) -> None:
        kinds[kind] = kinds.get(kind, 0.0) + sum(map(shard_bytes, jax.tree.leaves(tree)))

    for argument in arguments:
        if isinstance(argument, TrainState):
            add("parameters", argument.params)
            add("optimizer", argument.opt_state)
            add("other", (argument.step, argument.model_state))
        elif isinstance(argument, Batch):
            add("batch", argument)
        elif isinstance(argument, dict) and "params" in argument:
            add("parameters", argument)
        else:
            for leaf in jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, Cache)):
                add("cache" if isinstance(leaf, Cache) else "batch", leaf)
    return {kind: size for kind, size in kinds.items() if size}


def shard_bytes(leaf) -> float:
    """Of an array on one device."""
    itemsize = getattr(leaf.dtype, "itemsize", 8)
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize)


def misaligned(arguments: tuple[PyTree, ...]) -> dict[str, float]:
    """Weights that a mesh cuts into pieces that are no multiples of a tile: path and shard to the shard's bytes.

    The compiler then gathers such a weight by an all-reduce of zero-filled copies, which sends twice as much and holds more.
    """
    found = {}
    for argument in arguments:
        if not isinstance(argument, TrainState):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument.params):
            shard = leaf.sharding.shard_shape(leaf.shape)
            if any(is_misaligned(mine, whole) for mine, whole in zip(shard, leaf.shape, strict=True)):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                found[f"{name} [{', '.join(map(str, shard))}]"] = shard_bytes(leaf)
    return found


def is_misaligned(shard: int, whole: int) -> bool:
    """Of one dimension. Heads and experts, which are few, lie outside of tiles."""
    return shard != whole and whole > 8 * TILE and shard % TILE != 0


def largest_buffers(module: hlo.Module, number: int = 8) -> list[Buffer]:
    """The largest arrays that instructions make in HBM outside of fusions."""
    sizes: dict[tuple[str, str], float] = {}
    skipped = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "conditional", "optimization-barrier"}
    for run in hlo.executions(module, lambda loop: 1.0, len):
        if run.instruction.opcode in skipped:
            continue
        for shape in run.instruction.shapes:
            if shape.space == 0 and shape.padded_bytes:
                name = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
                sizes[name, scope_of(origin(module, run))] = float(shape.padded_bytes)
    ranked = sorted(sizes.items(), key=lambda item: -item[1])[:number]
    return [Buffer(size, shape, scope) for (shape, scope), size in ranked]
