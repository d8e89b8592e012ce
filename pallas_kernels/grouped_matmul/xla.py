"""What XLA itself offers: `jax.lax.ragged_dot`."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.quantized import Quantized, dequantize


def grouped_matmul(lhs, rhs, group_sizes, group_offset):
    """See `api.grouped_matmul`."""
    rhs = dequantize(rhs, lhs.dtype) if isinstance(rhs, Quantized) else rhs
    if group_sizes.shape[0] == rhs.shape[0]:
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)
    before = jnp.where(jnp.arange(group_sizes.shape[0]) < group_offset, group_sizes, 0).sum()
    sizes = jax.lax.dynamic_slice_in_dim(group_sizes, group_offset, rhs.shape[0])
    return jnp.roll(jax.lax.ragged_dot(jnp.roll(lhs, -before, axis=0), rhs, sizes), before, axis=0)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset):
    """See `api.grouped_swiglu`."""
    gate, up = (grouped_matmul(lhs, gate_up[:, half], group_sizes, group_offset) for half in range(2))
    return jax.nn.silu(gate) * up
