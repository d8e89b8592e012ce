"""Expert FFN for CPU: a loop over the blocks of rows that are in use, each the rows of one expert.

Every expert's rows are padded to whole blocks, so a block is a plain matmul with one expert's weights, and the loop's
trip count is the number of blocks in use, not the worst case. XLA cannot differentiate such a loop, hence the custom
gradient; with it both directions of the permutation are gathers. `jax.lax.ragged_dot` takes four times as long on CPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

BLOCK = 128  # rows; fewer waste less on padding, more keep the matmul efficient


class Layout(NamedTuple):
    """Where each (token, choice) pair lies among the padded rows. Pairs are numbered token * X + choice."""

    row_of_pair: Int[Array, " pairs"]
    pair_of_row: Int[Array, " rows"]  # `pairs` where the row is padding
    expert_of_block: Int[Array, " blocks"]
    blocks_in_use: Int[Array, ""]


def expert_ffn(x, experts, scores, gate_up, down):
    """See `api.expert_ffn`."""
    E, D, _, F = gate_up.shape
    return _expert_ffn(x, experts, scores, gate_up.reshape(E, D, 2 * F), down)


def plan(experts: Int[Array, "M X"], num_experts: int) -> Layout:
    pairs = experts.size
    blocks = -(-pairs // BLOCK) + num_experts - 1  # at worst every expert but one ends in a block with one row
    chosen = experts.reshape(-1)
    running = jnp.cumsum(jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32), axis=0)  # [pairs, E]
    rank = jnp.take_along_axis(running, chosen[:, None], axis=1)[:, 0] - 1
    block_end = jnp.cumsum(-(-running[-1] // BLOCK))
    block_start = jnp.concatenate([jnp.zeros(1, jnp.int32), block_end[:-1]])
    row_of_pair = block_start[chosen] * BLOCK + rank
    pair_of_row = jnp.full(blocks * BLOCK, pairs, jnp.int32)
    pair_of_row = pair_of_row.at[row_of_pair].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    expert_of_block = jnp.searchsorted(block_end, jnp.arange(blocks), side="right")
    return Layout(row_of_pair, pair_of_row, jnp.minimum(expert_of_block, num_experts - 1), block_end[-1])


def _rows(tokens, layout: Layout, X: int):
    """tokens [M, D] laid out as blocks [blocks, BLOCK, D]; zero in padding."""
    rows = jnp.take(tokens, layout.pair_of_row // X, axis=0, mode="fill", fill_value=0)
    return rows.reshape(-1, BLOCK, tokens.shape[-1])


def _pairs(blocks, layout: Layout, X: int):
    """The inverse: [blocks, BLOCK, D] to [M, X, D]."""
    return jnp.take(blocks.reshape(-1, blocks.shape[-1]), layout.row_of_pair, axis=0, mode="clip").reshape(
        -1, X, blocks.shape[-1]
    )


def _at(array, index):
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _put(array, value, index):
    return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), index, 0)


def _swiglu(gate_up):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _expert_ffn(x, experts, scores, gate_up, down):
    return _forward(x, experts, scores, gate_up, down)[0]


def _forward(x, experts, scores, gate_up, down):
    X = experts.shape[1]
    layout = plan(experts, gate_up.shape[0])
    score_of_row = jnp.take(scores.reshape(-1), layout.pair_of_row, mode="fill", fill_value=0).astype(x.dtype)
    a = _rows(x, layout, X) * score_of_row.reshape(-1, BLOCK, 1)

    def block(i, carry):
        y, hidden = carry
        expert = layout.expert_of_block[i]
        z = _at(a, i) @ _at(gate_up, expert)
        return _put(y, _swiglu(z) @ _at(down, expert), i), _put(hidden, z, i)

    empty = jnp.zeros_like(a), jnp.zeros((*a.shape[:2], gate_up.shape[-1]), x.dtype)
    y, hidden = jax.lax.fori_loop(0, layout.blocks_in_use, block, empty)
    return _pairs(y, layout, X).sum(axis=1), (x, scores, a, hidden, gate_up, down, layout)


def _backward(residuals, dout):
    x, scores, a, hidden, gate_up, down, layout = residuals
    X = scores.shape[1]
    dy = _rows(dout, layout, X)

    def block(i, carry):
        da, dgate_up, ddown = carry
        expert = layout.expert_of_block[i]
        h, swiglu_vjp = jax.vjp(_swiglu, _at(hidden, i))
        dyi = _at(dy, i)
        (dz,) = swiglu_vjp(dyi @ _at(down, expert).T)
        da = _put(da, dz @ _at(gate_up, expert).T, i)
        dgate_up = _put(dgate_up, _at(dgate_up, expert) + _at(a, i).T @ dz, expert)
        return da, dgate_up, _put(ddown, _at(ddown, expert) + h.T @ dyi, expert)

    empty = jnp.zeros_like(a), jnp.zeros_like(gate_up), jnp.zeros_like(down)
    da, dgate_up, ddown = jax.lax.fori_loop(0, layout.blocks_in_use, block, empty)
    da = _pairs(da, layout, X)  # [M, X, D]
    dx = (da * scores[:, :, None].astype(x.dtype)).sum(axis=1)
    dscores = (da * x[:, None, :]).sum(axis=-1).astype(scores.dtype)
    return dx, None, dscores, dgate_up, ddown


_expert_ffn.defvjp(_forward, _backward)
