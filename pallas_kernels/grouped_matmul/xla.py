"""What others offer: XLA's `jax.lax.ragged_dot`, and tokamax's, which picks among its own kernels."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.quantized import Quantized, dequantize


def grouped_matmul(lhs, rhs, group_sizes, group_offset, *, ragged_dot=jax.lax.ragged_dot):
    """See `api.grouped_matmul`."""
    rhs = dequantize(rhs, lhs.dtype) if isinstance(rhs, Quantized) else rhs
    if group_sizes.shape[0] == rhs.shape[0]:
        return ragged_dot(lhs, rhs, group_sizes)
    before = jnp.where(jnp.arange(group_sizes.shape[0]) < group_offset, group_sizes, 0).sum()
    sizes = jax.lax.dynamic_slice_in_dim(group_sizes, group_offset, rhs.shape[0])
    return jnp.roll(ragged_dot(jnp.roll(lhs, -before, axis=0), rhs, sizes), before, axis=0)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset, *, ragged_dot=jax.lax.ragged_dot):
    """See `api.grouped_swiglu`."""
    matmul = functools.partial(grouped_matmul, ragged_dot=ragged_dot)
    gate, up = (matmul(lhs, gate_up[:, half], group_sizes, group_offset) for half in range(2))
    return jax.nn.silu(gate) * up


def tokamax_ragged_dot(lhs, rhs, group_sizes):
    """Raises NotImplementedError where tokamax is not installed."""
    try:
        import tokamax
    except ImportError as error:
        raise NotImplementedError("grouped products by tokamax: it is not installed (pip install tokamax)") from error
    return tokamax.ragged_dot(lhs, rhs, group_sizes)
