"""Memory of a program on one device: by kind, what is large, and what is cut badly."""

import dataclasses
import math
from typing import Any

import jax

from llama4_jax.data.batch import Batch
from llama4_jax.model.cache import Cache
from llama4_jax.planning import hlo
from llama4_jax.planning.scopes import origin, scope_of
from llama4_jax.training.state import TrainState

PyTree = Any
TILE = 16  # rows of a bfloat16 tile


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device.

    Attributes:
        arguments: by kind (parameters, optimizer, batch, cache, ...), as they are padded there.
        temporaries: what the program needs meanwhile, at its peak: activations, gradients, gathered weights.
        results: that do not take the place of an argument.
        code: the program itself.
        allocated: for temporaries, with the gaps between them; the compiler packs no tighter than it has to. 0 in an estimate.
    """

    arguments: dict[str, float]
    temporaries: float
    results: float
    code: float
    allocated: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.arguments.values()) + self.temporaries + self.results + self.code


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large array that some instruction makes. Not all exist at one time, and some take another's place."""

    bytes: float
    shape: str
    scope: str


def memory_of(compiled, arguments: tuple[PyTree, ...]) -> Memory:
    stats = compiled.memory_analysis()
    by_kind = arguments_by_kind(arguments)
    rest = stats.argument_size_in_bytes - sum(by_kind.values())  # tiles' padding
    if rest > 0:
        by_kind["padding"] = float(rest)
    results = float(max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes))
    at_peak = stats.peak_memory_in_bytes - stats.argument_size_in_bytes - results
    return Memory(
        arguments=by_kind,
        temporaries=max(0.0, min(stats.temp_size_in_bytes, at_peak)),  # the peak has what lies on the chip in it
        results=results,
        code=float(stats.generated_code_size_in_bytes),
        allocated=float(stats.temp_size_in_bytes),
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

    The compiler then pads them to whole tiles, in memory and on the links.
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
    skipped = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "conditional", "opt-barrier"}
    for run in hlo.executions(module, lambda loop: 1.0, len):
        if run.instruction.opcode in skipped:
            continue
        for shape in run.instruction.shapes:
            if shape.space == 0 and shape.padded_bytes:
                name = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
                sizes[name, scope_of(origin(module, run))] = float(shape.padded_bytes)
    ranked = sorted(sizes.items(), key=lambda item: -item[1])[:number]
    return [Buffer(size, shape, scope) for (shape, scope), size in ranked]
