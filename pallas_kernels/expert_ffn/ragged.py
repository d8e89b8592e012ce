"""Tokens sorted by expert, then grouped products: XLA's own `ragged_dot`, or this package's TPU kernels."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.grouped_matmul import tpu, xla
from pallas_kernels.grouped_matmul.tiling import Tiling


def expert_ffn(x, experts, scores, gate_up, down):
    """See `api.expert_ffn`."""
    return _sorted(x, experts, scores, gate_up, down, xla.grouped_swiglu, xla.grouped_matmul)


def expert_ffn_tpu(x, experts, scores, gate_up, down, *, tiling: Tiling | None = None, interpret=False):
    """See `api.expert_ffn`; `tiling`, `interpret` and what is refused as in `grouped_matmul.tpu`."""
    options = {"tiling": tiling, "interpret": interpret}
    products = partial(tpu.grouped_swiglu, **options), partial(tpu.grouped_matmul, **options)
    return _sorted(x, experts, scores, gate_up, down, *products)


def _sorted(x, experts, scores, gate_up, down, swiglu, matmul):
    M, X = experts.shape
    E, D = len(down), x.shape[1]
    order = jnp.argsort(experts.reshape(-1))  # [M*X] stable, so that the tokens of an expert keep their order
    place = jnp.argsort(order)
    group_sizes = jnp.zeros(E, jnp.int32).at[experts.reshape(-1)].add(1)
    z = jnp.take(x, order // X, axis=0) * scores.reshape(-1)[order, None].astype(x.dtype)  # [M*X, D]
    first = jnp.zeros((), jnp.int32)
    y = matmul(swiglu(z, gate_up, group_sizes, first), down, group_sizes, first)
    return jnp.take(y, place, axis=0).reshape(M, X, D).sum(axis=1)
