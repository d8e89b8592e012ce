"""The routed experts on a mesh: how tokens and experts meet. No token is dropped, whatever the router does.

Experts live on `expert`, their width F on `tensor`, and their D is gathered over `fsdp` for the time of one layer. Tokens
lie on every axis but `tensor`, so most of them are on another shard of `expert` than their experts:

- all-to-all: each shard sends each other shard a bucket with the rows that its experts need, and gets their answers back.
- all-gather: every shard gets all tokens of its `expert` group, picks the rows of its own experts, and the answers are
  added up where the tokens came from (a reduce-scatter).
- gather-weights: tokens stay, and every shard gets all experts for the time of one layer. All devices then do the same
  work, however uneven the router is.

The first two put rows into buffers of a fixed size, `SPARE` times an even share. What does not fit waits for another round,
of `LATER` even shares, and rounds go on until no device of the group has a row left: so the worst case takes time, not
memory. The first round keeps what its gradient needs; the others compute it again.

With `tensor`, a row travels over `expert` in slices of D / tensor, one by each tensor shard, and is put together there.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import current_mesh, gather, sum_and_scatter
from llama4_jax.parallel.rules import BATCH_AXES, partition, splits_batch

Exchange = Literal["all_to_all", "all_gather", "gather_weights"]
LocalFFN = Callable[..., Array]  # (x [M D], experts [M X], scores [M X], gate_up, down) -> [M D]

SPARE = 1.1  # buffers of the first round over the even share of rows; routers that are kept balanced stay near it
LATER = 0.25  # those of each later round
ROW_MULTIPLE = 8  # a buffer's rows are a multiple of this, a tile's height


@dataclasses.dataclass(frozen=True)
class BufferRows:
    """Rows of the buffer for one receiver, in the first round and in each later one."""

    first: int
    later: int


def buffer_rows(rows: int, shards: int) -> BufferRows:
    """For `rows` rows that go to `shards` receivers: at most SPARE and LATER even shares, in whole tiles.

    The first has room for an even share at least, and neither is ever above all rows.
    """
    share, tile = rows / shards, ROW_MULTIPLE
    first = max(math.ceil(share / tile) * tile, int(SPARE * share) // tile * tile)
    later = max(tile, int(LATER * share) // tile * tile)
    return BufferRows(min(rows, first), min(rows, later))


def exchange_bytes(
    exchange: Exchange,
    *,
    tokens: int,
    hidden_size: int,
    experts_per_token: int,
    num_experts: int,
    expert_ffn_size: int,
    expert_shards: int,
    tensor_shards: int,
    itemsize: int,
) -> int:
    """Bytes that one device sends for one layer's forward and backward pass, beyond what `expert=1` would send.

    With M' tokens on a device, X experts a token, E experts, R shards of `expert`, t of `tensor` and b bytes a number:

        all-to-all       4 (R - 1) bucket (D / t) b,  bucket = SPARE M' X / R, in whole tiles
        all-gather       4 (R - 1) M' (D / t) b
        gather-weights   3 (R - 1) (E / R) 3 D (F / t) b

    Rows and their answers travel in both passes; weights are gathered in both, and their gradients scattered. Expert indices
    and scores, 8 bytes a row, are left out, and so is a second round, which a skewed router needs.
    """
    if exchange == "gather_weights":
        numbers, journeys = num_experts // expert_shards * 3 * hidden_size * -(-expert_ffn_size // tensor_shards), 3
    else:
        to_one = exchange == "all_to_all"
        rows = buffer_rows(tokens * experts_per_token, expert_shards).first if to_one else tokens
        numbers, journeys = rows * -(-hidden_size // tensor_shards), 4
    return journeys * (expert_shards - 1) * numbers * itemsize


def choose_exchange(**sizes: int) -> Exchange:
    """The exchange that sends the fewest bytes, `exchange_bytes` of the same arguments; of equal ones the simpler.

    That is gather-weights where a device has many tokens for each expert (about E F tokens and more), else all-to-all where
    a bucket is smaller than all of a device's tokens: SPARE * X < R, and more than a few tokens. It counts bytes, not links:
    on hosts whose all-to-all is slow, or for a router that is not balanced, override it with ExecutionConfig.expert_exchange.
    """
    return min(("gather_weights", "all_gather", "all_to_all"), key=lambda exchange: exchange_bytes(exchange, **sizes))


def routed_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T X"],
    scores: Float[Array, "B T X"],
    gate_up: Float[Array, "E 2 D F"],
    down: Float[Array, "E F D"],
    order: Any = None,
    *,
    ffn: LocalFFN,
    exchange: Literal["auto", "all_to_all", "all_gather", "gather_weights"] = "auto",
) -> Float[Array, "B T D"]:
    """sum over x of expert_{e_x}(s_x * x) for every token, on the mesh of `use_mesh`; `ffn` computes it on one device.

    Without a mesh, or for rows that the mesh does not divide (one prompt on eight devices), it is `ffn`, which the compiler
    then splits as it sees fit. Positions that `context` does not divide (the one of a decoded token) are on all its shards.

    Raises:
        UserError: the mesh does not divide the experts or the model's width.
    """
    mesh = current_mesh()
    if mesh is None or not splits_batch(mesh, len(x), positions=0):
        return _on_rows(partial(ffn, order=order), x, experts, scores, gate_up, down)
    sizes = mesh.shape
    rows = P(BATCH_AXES, "context" if splits_batch(mesh, *x.shape[:2]) else None)
    gate_up_spec = partition("gate_up", gate_up.shape, P("experts", None, "embed", "ffn"), mesh)
    down_spec = partition("down", down.shape, P("experts", "ffn", "embed"), mesh)
    shards = math.prod(sizes[axis] for axis in (*BATCH_AXES, rows[1]) if axis)
    form = _cheapest(mesh, x, shards, experts.shape[-1], gate_up) if exchange == "auto" else exchange
    if form == "gather_weights" or sizes["expert"] == 1:
        # Each tensor shard answers with a part of the sum; adding outside leaves the all-reduce to the compiler, which can
        # join it with the shared expert's.
        form, columns, out = "gather_weights", None, P("tensor", *rows)
    else:
        if x.shape[-1] % sizes["tensor"]:
            raise UserError(f"hidden_size={x.shape[-1]} is not a multiple of the mesh's tensor={sizes['tensor']}")
        columns, out = "tensor", P(*rows, "tensor")

    def on_shard(x, experts, scores, gate_up, down):
        if form == "gather_weights":
            gate_up, down = gather(gate_up, "expert", 0), gather(down, "expert", 0)  # before `fsdp`: most bytes go there
        gate_up = gather(gate_up, "fsdp", 2)  # [E', 2, D, F']
        down = gather(down, "fsdp", 2)  # [E', F', D]
        return _EXCHANGES[form](ffn, x, experts, scores, gate_up, down)

    # Gathered weights are as large as all shards together, so the backward pass gathers them again.
    gathers = sizes["fsdp"] > 1 or (form == "gather_weights" and sizes["expert"] > 1)
    on_shard = jax.checkpoint(on_shard) if gathers else on_shard
    in_specs = (P(*rows, columns), rows, rows, gate_up_spec, down_spec)
    mapped = jax.shard_map(on_shard, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=False)
    y = mapped(x, experts, scores, gate_up, down)
    return y.sum(axis=0) if form == "gather_weights" else y


def _cheapest(mesh: AbstractMesh, x: Array, shards: int, experts_per_token: int, gate_up: Array) -> Exchange:
    """The cost rule's choice for tokens [B, T, D] that lie in so many shards."""
    return choose_exchange(
        tokens=x.shape[0] * x.shape[1] // shards,
        hidden_size=x.shape[2],
        experts_per_token=experts_per_token,
        num_experts=gate_up.shape[0],
        expert_ffn_size=gate_up.shape[-1],
        expert_shards=mesh.shape["expert"],
        tensor_shards=mesh.shape["tensor"],
        itemsize=x.dtype.itemsize,
    )


def _on_rows(ffn: LocalFFN, x, experts, scores, gate_up, down):
    """`ffn` on [B, T, ...] as rows."""
    return ffn(*(a.reshape(-1, a.shape[-1]) for a in (x, experts, scores)), gate_up, down).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------------------
# The exchanges, inside shard_map: x [B', T', D'] with D' = D / tensor (all of D where the weights travel), experts and
# scores [B', T', X]


def _gather_weights(ffn: LocalFFN, x, experts, scores, gate_up, down):
    return _on_rows(ffn, x, experts, scores, gate_up, down)[None]


def _all_to_all(ffn: LocalFFN, x, experts, scores, gate_up, down):
    shards, local_experts = jax.lax.axis_size("expert"), gate_up.shape[0]
    size = buffer_rows(experts.size, shards)
    queue = line_up(experts // local_experts, shards)
    longest = jax.lax.pmax(jnp.max(queue.lengths), "expert")  # agreed on: each round is a collective

    def one_round(first, size, queue_and_experts, x, scores, gate_up, down):
        queue, experts = queue_and_experts
        slots = queue.slots(first, size)

        def travel(rows):
            return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)

        rows = gather(travel(to_slots(x, slots)), "tensor", 1)  # [R * size, D]
        expert = travel(slots.of_pairs(experts % local_experts, empty=local_experts))
        score = travel(slots.of_pairs(scores))
        y = sum_and_scatter(ffn(rows, expert, score, gate_up, down), "tensor", 1)  # [R * size, D']
        return from_slots(travel(y), slots)

    rows = x.reshape(-1, x.shape[-1])
    y = sum_of_rounds(one_round, size, longest, (queue, experts), rows, scores, gate_up, down)
    return y.reshape(x.shape)


def _all_gather(ffn: LocalFFN, x, experts, scores, gate_up, down):
    shards, local_experts = jax.lax.axis_size("expert"), gate_up.shape[0]
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, experts, scores)]
    all_rows, all_experts, all_scores = (gather(a, "expert", 0) for a in rows)  # [R * M', D' or X]
    local = all_experts - jax.lax.axis_index("expert") * local_experts
    here = (local >= 0) & (local < local_experts)
    size = buffer_rows(all_experts.size, shards)
    queue = line_up(jnp.where(here, 0, 1), 1)

    def one_round(first, size, queue_and_experts, rows, scores, gate_up, down):
        queue, local = queue_and_experts
        slots = queue.slots(first, size)
        rows = gather(to_slots(rows, slots), "tensor", 1)  # [size, D]
        y = ffn(rows, slots.of_pairs(local, empty=local_experts), slots.of_pairs(scores), gate_up, down)
        return from_slots(sum_and_scatter(y, "tensor", 1), slots)

    # The number of rounds is equal on the tensor shards, which alone talk inside one.
    y = sum_of_rounds(
        one_round, size, jnp.max(queue.lengths), (queue, local), all_rows, all_scores, gate_up, down
    )  # [R * M', D']
    return sum_and_scatter(y, "expert", 0).reshape(x.shape)


_EXCHANGES = {"all_to_all": _all_to_all, "all_gather": _all_gather, "gather_weights": _gather_weights}


# ------------------------------------------------------------------------------------------------------------------------
# Rows in buffers of a fixed size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which (token, choice) pair has which slot of a round's buffer. Pairs are numbered token * X + choice.

    Attributes:
        pair: of each slot; the number of pairs where it is empty.
        slot: of each pair; the number of slots where it waits for another round, or has no place here.
    """

    pair: Int[Array, " slots"]
    slot: Int[Array, "M X"]

    def of_pairs(self, values: Array, empty: int = 0) -> Array:
        """[slots, 1]: the value of each slot's pair, of as many values as there are pairs; `empty` in empty slots."""
        return jnp.take(values.reshape(-1), self.pair, mode="fill", fill_value=empty)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """Pairs in line before their receivers.

    Attributes:
        receiver: of each pair; `receivers` and more for pairs that go nowhere.
        place: of each pair in its line.
        lengths: of the lines.
    """

    receiver: Int[Array, "M X"]
    place: Int[Array, "M X"]
    lengths: Int[Array, " receivers"]

    def slots(self, first: Int[Array, ""] | int, size: int) -> Slots:
        """The places `first` and on of each line, in buffers of `size` that lie one after another."""
        receivers, pairs = self.lengths.size, self.receiver.size
        place = self.place - first
        now = (place >= 0) & (place < size) & (self.receiver < receivers)
        slot = jnp.where(now, self.receiver * size + place, receivers * size)
        pair = jnp.full(receivers * size, pairs, jnp.int32).at[slot.reshape(-1)].set(jnp.arange(pairs), mode="drop")
        return Slots(pair, slot)


def line_up(receiver: Int[Array, "*M X"], receivers: int) -> Queue:
    """Every pair queues for its receiver, in the order of tokens."""
    chosen = receiver.reshape(-1)
    running = jnp.cumsum(jax.nn.one_hot(chosen, receivers, dtype=jnp.int32), axis=0)  # [pairs, receivers]
    place = jnp.take_along_axis(running, chosen[:, None], axis=1, mode="clip")[:, 0] - 1
    shape = (-1, receiver.shape[-1])
    return Queue(chosen.reshape(shape), place.reshape(shape), running[-1])


# Each is the transpose of the other, so that both directions and both gradients are gathers.


@jax.custom_vjp
def to_slots(tokens: Float[Array, "M D"], slots: Slots) -> Float[Array, "slots D"]:
    """The token of each slot; zeros in empty ones."""
    return jnp.take(tokens, slots.pair // slots.slot.shape[1], axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def from_slots(rows: Float[Array, "slots D"], slots: Slots) -> Float[Array, "M D"]:
    """The sum over each token's slots."""
    return jnp.take(rows, slots.slot, axis=0, mode="fill", fill_value=0).sum(axis=1)


to_slots.defvjp(lambda x, slots: (to_slots(x, slots), slots), lambda slots, d: (from_slots(d, slots), None))
from_slots.defvjp(lambda x, slots: (from_slots(x, slots), slots), lambda slots, d: (to_slots(d, slots), None))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_of_rounds(
    one_round: Callable[..., Array], size: BufferRows, longest: Int[Array, ""], index: Any, *args: Array
) -> Array:
    """The sum of one_round(first, size, index, *args) over pieces of lines of up to `longest`, each from `first` on.

    The first piece, of size.first places, is always there; others, of size.later, until the line ends. The gradient with
    respect to `args` keeps the residuals of the first and computes those of the others again, so memory does not grow.
    """
    return _sum_forward(one_round, size, longest, index, *args)[0]


def _sum_forward(one_round, size, longest, index, *args):
    first, pullback = jax.vjp(partial(one_round, 0, size.first, index), *args)
    y = _with_later(size, longest, first, lambda start: one_round(start, size.later, index, *args))
    return y, (pullback, longest, index, args)


def _sum_backward(one_round, size, residuals, dy):
    pullback, longest, index, args = residuals

    def later(start):
        return jax.vjp(partial(one_round, start, size.later, index), *args)[1](dy)

    return None, None, *_with_later(size, longest, pullback(dy), later)


def _with_later(size, longest, first, one_round):
    def add(carry):
        start, total = carry
        return start + size.later, jax.tree.map(jnp.add, total, one_round(start))

    return jax.lax.while_loop(lambda carry: carry[0] < longest, add, (jnp.int32(size.first), first))[1]


sum_of_rounds.defvjp(_sum_forward, _sum_backward)
