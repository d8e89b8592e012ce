"""Tokens moved to their experts, then grouped products: XLA's own `ragged_dot`, or this package's kernels."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.grouped_matmul import gpu, tpu, xla
from pallas_kernels.grouped_matmul.tiling import Tiling
from pallas_kernels.routing import rows, rows_tpu
from pallas_kernels.routing.reference import places


def expert_ffn(x, experts, scores, gate_up, down, order=None):
    """See `api.expert_ffn`."""
    steps = rows.permute, xla.grouped_swiglu, xla.grouped_matmul, rows.unpermute
    return _moved(x, experts, scores, gate_up, down, order, *steps)


def expert_ffn_tpu(x, experts, scores, gate_up, down, order=None, *, tiling: Tiling | None = None, interpret=False):
    """See `api.expert_ffn`; `tiling`, `interpret` and what is refused as in `grouped_matmul.tpu`."""
    options = {"tiling": tiling, "interpret": interpret}
    there, back = (partial(move, interpret=interpret) for move in (rows_tpu.permute, rows_tpu.unpermute))
    products = partial(tpu.grouped_swiglu, **options), partial(tpu.grouped_matmul, **options)
    return _moved(x, experts, scores, gate_up, down, order, there, *products, back)


def expert_ffn_gpu(x, experts, scores, gate_up, down, order=None, *, tiling: gpu.Tiling | None = None, interpret=False):
    """See `api.expert_ffn`; `tiling`, `interpret` and what is refused as in `grouped_matmul.gpu`."""
    options = {"tiling": tiling, "interpret": interpret}
    products = partial(gpu.grouped_swiglu, **options), partial(gpu.grouped_matmul, **options)
    return _moved(x, experts, scores, gate_up, down, order, rows.permute, *products, rows.unpermute)


def _moved(x, experts, scores, gate_up, down, order, permute, swiglu, matmul, unpermute):
    place, group_sizes = order or places(experts, len(down))
    first = jnp.zeros((), jnp.int32)
    hidden = swiglu(permute(x, scores, place), gate_up, group_sizes, first)
    return unpermute(matmul(hidden, down, group_sizes, first), place)
