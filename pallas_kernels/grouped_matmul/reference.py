"""Every group's matrix on every row: G times the work, and no way to get it wrong."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.quantized import Quantized, dequantize


def rows_of_groups(M: int, G: int, group_sizes, group_offset):
    """Which rows belong to each of the G groups from `group_offset` on: [G, M]."""
    stop = jnp.cumsum(group_sizes)
    index = jnp.arange(G) + group_offset
    rows = jnp.arange(M)
    return (rows >= (stop - group_sizes)[index][:, None]) & (rows < stop[index][:, None])


def grouped_matmul(lhs, rhs, group_sizes, group_offset):
    """See `api.grouped_matmul`."""
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    rhs = dequantize(rhs, wide) if isinstance(rhs, Quantized) else rhs

    def add(total, group):
        rows, matrix = group
        product = jnp.dot(lhs.astype(wide), matrix.astype(wide), precision="highest")
        return total + jnp.where(rows[:, None], product, 0), None

    rows = rows_of_groups(lhs.shape[0], rhs.shape[0], group_sizes, group_offset)
    total, _ = jax.lax.scan(add, jnp.zeros((lhs.shape[0], rhs.shape[2]), wide), (rows, rhs))
    return total.astype(lhs.dtype)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset):
    """See `api.grouped_swiglu`."""
    wide = lhs.astype(jnp.promote_types(lhs.dtype, jnp.float32))
    gate, up = (grouped_matmul(wide, gate_up[:, half], group_sizes, group_offset) for half in range(2))
    return (jax.nn.silu(gate) * up).astype(lhs.dtype)
