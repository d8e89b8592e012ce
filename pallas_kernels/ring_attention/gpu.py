"""The ring with `ppermute` around the GPU kernels."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.attention import gpu
from pallas_kernels.ring_attention import xla


def ring_attention(query, key, value, intervals, *, axis: str, zigzag: bool, tiling: gpu.Tiling | None = None, interpret=False):
    """See `api.ring_attention`.

    Args:
        tiling: of all kernels; defaults if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: as the kernels.
    """
    local = xla.Local(partial(_attend, tiling, interpret), partial(_gradients, tiling, interpret))
    return xla.ring_attention(query, key, value, intervals, axis=axis, zigzag=zigzag, local=local)


def _attend(tiling, interpret, query, key, value, intervals, start):
    options = {"tiling": tiling, "interpret": interpret, "dtype": jnp.float32}
    return gpu.forward(query, key, value, intervals, key_offset=start, **options)


def _gradients(tiling, interpret, query, key, value, intervals, start, *statistics):
    options = {"tiling": tiling, "interpret": interpret, "dtype": jnp.float32}
    return gpu.backward(query, key, value, intervals, *statistics, key_offset=start, **options)
