"""Expert FFN for CPU: a loop over the blocks of rows that are in use, each the rows of one expert.

Every expert's rows are padded to whole blocks, so a block is a plain matmul with one expert's weights, and the loop's
trip count is the number of blocks in use, not the worst case. XLA cannot differentiate such a loop, hence the custom
gradient; with it both directions of the permutation are gathers. `jax.lax.ragged_dot` takes four times as long on CPU.

The few tokens of a decoding step fill no block: there every expert in use reads all of them, with a score of zero where it was
not chosen (f(0) = 0), and nothing is permuted.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MIN_BLOCK, MAX_BLOCK = 32, 128  # rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each (token, choice) pair lies among the padded rows. Pairs are numbered token * X + choice.

    Attributes:
        row_of_pair: row of each pair; the number of rows where no expert takes it.
        pair_of_row: the inverse; the number of pairs where the row is padding.
        expert_of_block: whose rows a block holds.
        blocks_in_use: the other blocks come after these.
        shape: blocks, and rows of each.
    """

    row_of_pair: Int[Array, " pairs"]
    pair_of_row: Int[Array, " rows"]
    expert_of_block: Int[Array, " blocks"]
    blocks_in_use: Int[Array, ""]
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})


def expert_ffn(x, experts, scores, gate_up, down, order=None):
    """See `api.expert_ffn`."""
    del order  # rows lie in padded blocks here
    return _expert_ffn(x, experts, scores, gate_up, down)


def block_size(pairs: int, num_experts: int) -> int:
    """Rows of a block: half an even share. Larger blocks make the matmuls more efficient, smaller ones pad less."""
    half = -(-pairs // (2 * num_experts))
    return min(max(MIN_BLOCK, -(-half // 32) * 32), MAX_BLOCK)


def plan(experts: Int[Array, "M X"], num_experts: int) -> Layout:
    pairs = experts.size
    size = block_size(pairs, num_experts)
    blocks = -(-pairs // size) + num_experts - 1  # at worst every expert but one ends in a block with one row
    chosen = experts.reshape(-1)
    running = jnp.cumsum(jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32), axis=0)  # [pairs, E]
    rank = jnp.take_along_axis(running, chosen[:, None], axis=1, mode="clip")[:, 0] - 1
    block_end = jnp.cumsum(-(-running[-1] // size))
    block_start = jnp.concatenate([jnp.zeros(1, jnp.int32), block_end[:-1]])
    row_of_pair = jnp.where(chosen < num_experts, block_start[chosen] * size + rank, blocks * size)
    pair_of_row = jnp.full(blocks * size, pairs, jnp.int32)
    pair_of_row = pair_of_row.at[row_of_pair].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    expert_of_block = jnp.minimum(jnp.searchsorted(block_end, jnp.arange(blocks), side="right"), num_experts - 1)
    return Layout(row_of_pair, pair_of_row, expert_of_block, block_end[-1], (blocks, size))


def _rows(tokens, layout: Layout, X: int):
    """tokens [M, D] laid out as blocks [blocks, block, D]; zero in padding."""
    rows = jnp.take(tokens, layout.pair_of_row // X, axis=0, mode="fill", fill_value=0)
    return rows.reshape(*layout.shape, tokens.shape[-1])


def _pairs(rows, layout: Layout, X: int):
    """The inverse: [blocks, block, ...] to [M, X, ...]."""
    flat = rows.reshape(-1, *rows.shape[2:])
    return jnp.take(flat, layout.row_of_pair, axis=0, mode="fill", fill_value=0).reshape(-1, X, *rows.shape[2:])


def _at(array, index):
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array, value, index):
    return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), index, 0)


def _gate_and_up(x, gate_up, expert):
    return x @ gate_up[expert, 0], x @ gate_up[expert, 1]


def _swiglu(gate, up):
    return jax.nn.silu(gate) * up


def _swiglu_and_gradient(gate, up, dh):
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up, dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu


@jax.custom_vjp
def _expert_ffn(x, experts, scores, gate_up, down):
    forward = _few_tokens if x.shape[0] <= MIN_BLOCK else lambda *args: _forward(*args)[0]
    return forward(x, experts, scores, gate_up, down)


def _few_tokens(x, experts, scores, gate_up, down):
    chosen = jax.nn.one_hot(experts, down.shape[0])  # [M, X, E]
    weights = jnp.einsum("mxe,mx->em", chosen, scores).astype(x.dtype)
    in_use = jnp.any(chosen, axis=(0, 1))
    order = jnp.argsort(~in_use)  # experts in use first

    def expert(i, y):
        e = order[i]
        return y + _swiglu(*_gate_and_up(x * _at(weights, e)[:, None], gate_up, e)) @ _at(down, e)

    return jax.lax.fori_loop(0, in_use.sum(), expert, jnp.zeros_like(x))


def _forward(x, experts, scores, gate_up, down):
    X = experts.shape[1]
    layout = plan(experts, down.shape[0])
    rows = _rows(x, layout, X)
    score = jnp.take(scores.reshape(-1), layout.pair_of_row, mode="fill", fill_value=0).astype(x.dtype)
    score = score.reshape(*layout.shape, 1)

    def block(i, carry):
        y, gates, ups = carry
        expert = layout.expert_of_block[i]
        gate, up = _gate_and_up(_at(rows, i) * _at(score, i), gate_up, expert)
        return _put(y, _swiglu(gate, up) @ _at(down, expert), i), _put(gates, gate, i), _put(ups, up, i)

    hidden = jnp.zeros((*layout.shape, down.shape[1]), x.dtype)
    y, gates, ups = jax.lax.fori_loop(0, layout.blocks_in_use, block, (jnp.zeros_like(rows), hidden, hidden))
    return _pairs(y, layout, X).sum(axis=1), (rows, score, gates, ups, gate_up, down, layout)


def _backward(residuals, dout):
    rows, score, gates, ups, gate_up, down, layout = residuals
    X = layout.row_of_pair.size // dout.shape[0]
    dy = _rows(dout, layout, X)

    def block(i, carry):
        drows, dscore, dgate_up, ddown = carry
        expert, x, s, dyi = layout.expert_of_block[i], _at(rows, i), _at(score, i), _at(dy, i)
        h, *halves = _swiglu_and_gradient(_at(gates, i), _at(ups, i), dyi @ _at(down, expert).T)
        da = sum(dz @ gate_up[expert, half].T for half, dz in enumerate(halves))
        products = jnp.stack([(x * s).T @ dz for dz in halves])
        dgate_up = _put(dgate_up, _at(dgate_up, expert) + products, expert)
        ddown = _put(ddown, _at(ddown, expert) + h.T @ dyi, expert)
        return _put(drows, da * s, i), _put(dscore, (da * x).sum(axis=-1), i), dgate_up, ddown

    empty = jnp.zeros_like(rows), jnp.zeros(layout.shape, jnp.float32), jnp.zeros_like(gate_up), jnp.zeros_like(down)
    drows, dscore, dgate_up, ddown = jax.lax.fori_loop(0, layout.blocks_in_use, block, empty)
    return _pairs(drows, layout, X).sum(axis=1), None, _pairs(dscore, layout, X), dgate_up, ddown


_expert_ffn.defvjp(_forward, _backward)
