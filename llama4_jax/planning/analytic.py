"""A training step's, prefill's or decoded token's cost from shapes alone: in milliseconds, without a compiler.

Parameters and optimizer are exact. The rest follows the way the model is written (decoder.py, expert_parallel.py,
context_parallel.py) with these simplifications, which README.md sets beside compiled programs:

- the backward pass keeps of each layer its input (remat=layer), that and the results of products with dense weights
  (projections), or everything (none), and holds one layer's gathered weights, their gradients and its activations besides;
- weights are gathered in the compute dtype once in each pass and read from HBM after they were written there; gradients are
  reduced in it; activations are written and read once by every product;
- routed rows that travel fill their buffers, SPARE over the even share, and routers are balanced.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.config import Experiment, ModelConfig
from llama4_jax.model.llama4 import Llama4, abstract_params, logical_axes
from llama4_jax.parallel.expert_parallel import SPARE, choose_exchange, exchange_bytes
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import AXES, axis_sizes, resolved
from llama4_jax.parallel.rules import BATCH_AXES, partition
from llama4_jax.planning.caches import cache_bytes
from llama4_jax.planning.chips import Topology
from llama4_jax.planning.measure import Measurement
from llama4_jax.planning.memory import Memory, is_misaligned
from llama4_jax.planning.model_flops import keys_seen, tokens_of
from llama4_jax.planning.network import Network
from llama4_jax.planning.roofline import Exchange, roofline
from llama4_jax.planning.work import Collective
from pallas_kernels.attention.tpu_backward import choose_tiling
from pallas_kernels.attention.tpu_forward import Tiling as ForwardTiling
from pallas_kernels.grouped_matmul.tiling import TILES as GROUPED_TILES


def estimate(experiment: Experiment, topology: Topology, program: str = "train") -> Measurement:
    """Raises UserError when the mesh does not fit the topology or does not divide the model."""
    return _estimate(experiment, topology, program).measurement()


def tile_padding(experiment: Experiment, topology: Topology) -> float:
    """FLOPs of a device in an update that its kernels do and nobody counts: see `_Estimate.tile_padding`. 0 for GPUs, whose
    kernels are others. Raises what `estimate` does."""
    return _estimate(experiment, topology, "train").tile_padding() if topology.chip.is_tpu else 0.0


def _estimate(experiment: Experiment, topology: Topology, program: str) -> "_Estimate":
    sizes = axis_sizes(experiment.mesh, topology.devices)
    experiment = dataclasses.replace(experiment, mesh=resolved(experiment.mesh, topology.devices))
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if program == "train":
        check_fit(mesh, experiment.model, experiment.execution, experiment.data)
    return _Estimate(experiment, topology, program, sizes, mesh)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Attributes:
    local: numbers of it on a device.
    gathered: numbers of it on a device while it is used.
    group: mesh axes over which it is gathered for that.
    shard: the shape of `local`.
    misaligned: see measure.misaligned.
    """

    path: str
    local: int
    gathered: int
    group: tuple[str, ...]
    shard: tuple[int, ...]
    misaligned: bool


@functools.lru_cache(maxsize=8)
def _shapes(model: ModelConfig) -> list[tuple[str, tuple[int, ...], Any]]:
    instance = Llama4(model)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(instance))
    logical = jax.tree.leaves(logical_axes(instance), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return [(name, leaf.shape, spec) for name, (_, leaf), spec in zip(names, leaves, logical, strict=True)]


_Sent = tuple[str, tuple[str, ...], float, float, str, bool]


@dataclasses.dataclass
class _Estimate:
    experiment: Experiment
    topology: Topology
    program: str
    sizes: dict[str, int]
    mesh: AbstractMesh

    def __post_init__(self):
        e = self.experiment
        self.model, self.run = e.model, e.execution
        self.item = 2 if self.run.compute_dtype == "bfloat16" else 4
        self.train = self.program == "train"
        rows = math.prod(self.sizes[axis] for axis in BATCH_AXES)
        if not self.train and e.data.batch_size % rows:
            rows = 1  # every device does all rows
        tokens = tokens_of(e, self.program)
        self.context = self.sizes["context"] if self.program != "decode" else 1
        self.parts = self.run.microbatches if self.train else 1
        self.tokens = max(1.0, tokens / rows / self.context / self.parts)  # on a device at one time
        self.rows = max(1.0, e.data.batch_size / rows)
        self.expert_exchange = self._expert_exchange()
        rows_travel = self.expert_exchange in ("all_to_all", "all_gather")
        self.spare = SPARE if rows_travel else 1.0
        self.experts_gather = ("fsdp",) if rows_travel else ("fsdp", "expert")
        self.weights = [self._weight(*entry) for entry in _shapes(self.model)]
        self.network = Network.in_order(self.topology, self.sizes)

    def _expert_exchange(self) -> str:
        if self.sizes["expert"] == 1:
            return "gather_weights"
        chosen = self.run.expert_exchange
        return choose_exchange(**self._routed_sizes()) if chosen == "auto" else chosen

    def _routed_sizes(self) -> dict[str, int]:
        m = self.model
        return {
            "tokens": int(self.tokens), "hidden_size": m.hidden_size, "experts_per_token": m.experts_per_token,
            "num_experts": m.num_experts, "expert_ffn_size": m.expert_ffn_size, "expert_shards": self.sizes["expert"],
            "tensor_shards": self.sizes["tensor"], "itemsize": self.item,
        }  # fmt: skip

    def _weight(self, path: str, shape: tuple[int, ...], logical) -> Weight:
        spec = partition(path, shape, logical, self.mesh)
        used_whole = self.experts_gather if "/experts/" in path else ("fsdp", "expert")  # what is gathered for its use
        split = [axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ())]
        count = lambda axes: math.prod(self.sizes[axis] for axis in axes)  # noqa: E731
        group = tuple(axis for axis in split if axis in used_whole and self.sizes[axis] > 1)
        whole = math.prod(shape)
        shard = tuple(
            size // count((axes,) if isinstance(axes, str) else axes or ())
            for size, axes in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True)
        )
        misaligned = any(is_misaligned(mine, all_) for mine, all_ in zip(shard, shape, strict=True))
        return Weight(path, whole // count(split), whole // count(split) * count(group), group, shard, misaligned)

    # -- memory --------------------------------------------------------------------------------------------------------

    def memory(self) -> Memory:
        e, model = self.experiment, self.model
        parameters = sum(w.local for w in self.weights)
        if not self.train:
            arguments = {"parameters": self.item * parameters, "cache": self._cache_bytes()}
            temporaries = self.item * self._layer_weights() + self.item * self.tokens * max(self._activations())
            temporaries += 4 * self.rows * model.vocab_size / self.sizes["tensor"]
            return Memory({k: float(v) for k, v in arguments.items()}, float(temporaries), 0.0, 0.0)
        moments = 2 if e.optimizer.rule == "adamw" else 1
        batch = 20 * e.data.batch_size * e.data.sequence_length / (e.data.batch_size / self.rows) / self.context
        arguments = {"parameters": 4 * parameters, "optimizer": 4 * moments * parameters, "batch": batch}
        kept = {"layer": 0.0, "projections": self._projections(), "none": sum(self._activations())}[self.run.remat]
        layers = self.item * self.tokens * (model.num_layers * model.hidden_size + kept)
        gradients = 4 * parameters * (2 if self.parts > 1 else 1)
        layer = self.item * self.tokens * 2.5 * max(self._activations()) + (self.item + 4) * self._layer_weights()
        block = min(self.run.loss_block_size, e.data.sequence_length / self.context)
        head = (self.item + 4) * model.hidden_size * model.vocab_size / self.sizes["tensor"]
        logits = 3 * 4 * self.rows * block * model.vocab_size / self.sizes["tensor"] + head
        return Memory({k: float(v) for k, v in arguments.items()}, float(layers + gradients + max(layer, logits)), 0.0, 0.0)

    def _activations(self) -> list[float]:
        """Numbers a token that each layer computes."""
        m, t = self.model, self.sizes["tensor"]
        attention = m.hidden_size + (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim / t
        routed = self.spare * m.experts_per_token * (3 * m.expert_ffn_size / t + 2 * m.hidden_size)
        moe = routed + 2 * m.num_experts + (3 * m.expert_ffn_size / t if m.shared_expert else 0)
        dense = 3 * m.dense_ffn_size / t
        return [2 * m.hidden_size + attention + (moe if kind.is_moe else dense) for kind in m.layer_kinds]

    def _projections(self) -> float:
        """Numbers a token that remat=projections keeps of all layers beside their inputs."""
        m, t = self.model, self.sizes["tensor"]
        attention = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim / t + m.hidden_size
        shared = 2 * m.expert_ffn_size / t + m.hidden_size + m.num_experts
        return sum(attention + (shared if k.is_moe else 2 * m.dense_ffn_size / t + m.hidden_size) for k in m.layer_kinds)

    def _layer_weights(self) -> float:
        """The most numbers of weights gathered for one layer."""
        blocks = self.model.num_layers // len(self.model.block_kinds)
        by_layer: dict[str, float] = {}
        for w in self.weights:
            if w.path.startswith("layers/"):
                layer = w.path.split("/")[1]
                by_layer[layer] = by_layer.get(layer, 0.0) + (w.gathered if w.group else 0) / blocks
        return max(by_layer.values(), default=0.0)

    def _cache_bytes(self) -> float:
        data = self.experiment.data
        return cache_bytes(self.model, data.batch_size, data.sequence_length, self.run.compute_dtype, self.mesh)

    # -- work ----------------------------------------------------------------------------------------------------------

    def passes(self, routed: bool) -> float:
        """Forward passes that a step's matrix products come to: a backward pass is two, and one more recomputes. What is
        made of gathered experts is always computed again, see parallel/README.md."""
        if not self.train:
            return 1.0
        if routed and any(self.sizes[axis] > 1 for axis in self.experts_gather):
            return 4.0
        return {"none": 3.0, "projections": 3.4, "layer": 4.0}[self.run.remat]

    def products(self) -> list[tuple[float, float]]:
        """FLOPs and bytes of HBM of all passes over a part of the batch, by product."""
        m, e, t = self.model, self.experiment, self.sizes["tensor"]
        D, N, K, H = m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim
        M, found = self.tokens, []

        def add(flops: float, numbers: float, routed: bool = False) -> None:
            times = self.passes(routed)
            found.append((times * flops, times * self.item * numbers))

        def product(rows: float, into: float, out: float, weights: float | None = None) -> None:
            add(2 * rows * into * out, rows * (into + out) + (weights or into * out), weights is not None)

        before = 0 if self.train else e.data.sequence_length - (tokens_of(e, self.program) // e.data.batch_size)
        piece = e.data.sequence_length if self.train else tokens_of(e, self.program) // e.data.batch_size
        for kind, keys in zip(m.layer_kinds, keys_seen(m, before, piece), strict=True):
            product(M, D, (N + 2 * K) * H / t)
            here = self.sizes["context"] if self.program == "decode" and not kind.uses_rope else 1  # share of a shard's slots
            read = 2 * self.rows * K * H / t * (keys if not self.train else e.data.sequence_length) / here
            add(4 * M * N * H / t * keys / here, read + 2 * M * N * H / t)
            product(M, N * H / t, D)
            if kind.is_moe:
                shards = 1 if "expert" in self.experts_gather else self.sizes["expert"]
                local = m.num_experts / shards
                used = min(local, M * m.experts_per_token * shards) if not self.train else local
                rows, F = self.spare * M * m.experts_per_token, m.expert_ffn_size / t
                product(M, D, m.num_experts)
                product(rows, D, 2 * F, used * D * 2 * F)
                product(rows, F, D, used * D * F)
            F = m.expert_ffn_size / t if kind.is_moe else m.dense_ffn_size / t
            if m.shared_expert or not kind.is_moe:
                product(M, D, 2 * F)
                add(0.0, 3 * M * F)  # swiglu
                product(M, F, D)
            add(0.0, 6 * M * D)  # norms and residual sums
        return found

    def tile_padding(self) -> float:
        """What a step's kernels for TPU multiply beyond `products`, because they multiply whole tiles; one document a row.

        A query of a causal window meets keys of half a tile that it may not read, on average, however wide the window.
        Where one expert's rows end and another's begin, a tile is multiplied for both.
        """
        m, T = self.model, self.experiment.data.sequence_length
        passes, t = self.passes(routed=False), self.sizes["tensor"]
        backward = choose_tiling(T, T, m.num_heads // m.num_kv_heads, m.head_dim, self.item, self.item)
        keys = (passes - 2) * ForwardTiling().edge / 2 + 2.5 * max(backward.queries, backward.keys) / 2
        attention = 4 * self.tokens * m.num_heads * m.head_dim / t * keys
        rows = GROUPED_TILES[0][0]
        groups = m.num_experts / (1 if "expert" in self.experts_gather else self.sizes["expert"])
        routed = 2 * rows * (groups - 1) * 3 * m.hidden_size * m.expert_ffn_size / t * self.passes(routed=True)
        return self.parts * sum(attention + (routed if kind.is_moe else 0.0) for kind in m.layer_kinds)

    def exchanges(self) -> list[Exchange]:
        """The most seconds first."""
        sums: dict[tuple, list[float]] = {}
        for kind, axes, held, count, scope, overlapped in (
            *self._of_weights(), *self._of_tensor(), *self._of_experts(), *self._of_context()
        ):  # fmt: skip
            axes = tuple(axis for axis in AXES if axis in axes and self.sizes[axis] > 1)
            if axes:
                total = sums.setdefault((kind, axes, overlapped, scope), [0.0, 0.0])
                total[0] += count
                total[1] += count * held
        found = [self._exchange(*key, *total) for key, total in sums.items()]
        return sorted(found, key=lambda exchange: -exchange.seconds)

    def _exchange(self, kind: str, axes: tuple[str, ...], overlapped: bool, scope: str, count: float, held: float) -> Exchange:
        n = math.prod(self.sizes[axis] for axis in axes)
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
        all_of_them = Collective(kind, share * held, self._group(axes), overlapped)
        seconds, slow = self.network.seconds(all_of_them), self.network.is_slow(all_of_them)
        return Exchange(kind, "+".join(axes), count, all_of_them.sent, seconds, overlapped, slow, scope)

    # Each yields (kind, mesh axes, bytes held, times, part of the model, whether it runs beside work).

    def _of_weights(self) -> Iterator[_Sent]:
        passes = 2 * self.parts if self.train else 1
        for w in self.weights:
            scope = "experts" if "/experts/" in w.path else "layers" if w.path.startswith("layers/") else "embed and head"
            layers = self.model.num_layers // len(self.model.block_kinds) if w.path.startswith("layers/") else 1
            yield "all-gather", w.group, self.item * w.local / layers, layers * passes, scope, True
            if self.train:
                yield "reduce-scatter", w.group, self.item * w.gathered / layers, layers * self.parts, f"d {scope}", True
                used_whole = self.experts_gather if "/experts/" in w.path else ("fsdp", "expert")
                whole = ("data", "context", *used_whole)
                yield "all-reduce", tuple(axis for axis in whole if axis not in w.group), 4 * w.local, 1, "update", True
                yield "all-reduce", ("dcn_data",), 4 * w.local, 1, "update", True

    def _of_tensor(self) -> Iterator[_Sent]:
        recomputed = self.run.remat == "layer"
        passes = (2 + recomputed) * self.parts if self.train else 1
        stream = self.item * self.tokens * self.model.hidden_size
        yield "all-reduce", ("tensor",), stream, 2 * self.model.num_layers * passes, "layers", False

    def _of_experts(self) -> Iterator[_Sent]:
        form, n = self.expert_exchange, self.sizes["expert"]
        if form == "gather_weights":  # among the weights
            return
        sent = exchange_bytes(form, **self._routed_sizes()) / 2  # of one pass
        kind, held = ("all-to-all", sent * n / (n - 1)) if form == "all_to_all" else ("all-gather", sent / (n - 1))
        again = 0.5 * (self.run.remat != "none" or self.sizes["fsdp"] > 1)  # rows travel again, answers do not
        passes = (2 + again) * self.parts if self.train else 1
        yield kind, ("expert",), held, sum(kind.is_moe for kind in self.model.layer_kinds) * passes, "experts", False

    def _of_context(self) -> Iterator[_Sent]:
        if self.context == 1:
            return
        m = self.model
        piece, chunk = self.experiment.data.sequence_length // self.context, m.attention_chunk_size
        local = chunk is not None and piece % chunk == 0  # layers with RoPE send nothing
        layers = sum(not kind.uses_rope or not local for kind in m.layer_kinds)
        keys = self.item * self.tokens * 2 * m.num_kv_heads * m.head_dim / self.sizes["tensor"]
        passes = (3 + (self.run.remat == "layer")) * self.parts if self.train else 1  # keys again, and their gradients
        yield "all-gather", ("context",), keys, layers * passes, "attention", True

    def _group(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The devices that the first device exchanges with along these axes."""
        strides, stride = {}, 1
        for axis in reversed(AXES):
            strides[axis] = stride
            stride *= self.sizes[axis]
        places = [0]
        for axis in axes:
            places = [place + i * strides[axis] for place in places for i in range(self.sizes[axis])]
        return tuple(sorted(places))

    def measurement(self) -> Measurement:
        chip = self.topology.chip
        update = 28 * sum(w.local for w in self.weights) if self.train else 0  # AdamW: 4 arrays read, 3 written, float32
        head_rows = self.tokens if self.train else self.rows
        D, V = self.model.hidden_size, self.model.vocab_size / self.sizes["tensor"]
        head = (2 * head_rows * D * V, self.item * D * V + 8 * head_rows * V)  # float32 logits, written and read
        work = [(self.parts * f, self.parts * b) for f, b in self.products()]
        work += [((3 + 1) * self.parts * head[0], 4 * self.parts * head[1]) if self.train else head, (0.0, float(update))]
        gathered = sum(w.gathered for w in self.weights if w.group) * self.item * self.parts
        work.append((0.0, 2.0 * gathered * (3 if self.train else 1)))
        flops, hbm = (sum(column) for column in zip(*work, strict=True))
        core = sum(max(f / chip.flops, b / chip.hbm_bandwidth) for f, b in work)
        exchanges = self.exchanges()
        narrow = {f"{w.path} [{', '.join(map(str, w.shard))}]": 4.0 * w.local for w in self.weights if w.misaligned}
        return Measurement(
            memory=self.memory(),
            flops=flops,
            kernel_flops=0.0,
            hbm_bytes=hbm,
            roofline=roofline(chip, flops / chip.flops, hbm, core, exchanges),
            exchanges=exchanges,
            scopes={},
            loops=[],
            buffers=[],
            misaligned=narrow,
        )
