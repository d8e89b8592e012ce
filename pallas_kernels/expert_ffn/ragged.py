"""Tokens moved to their experts, then grouped products: XLA's own `ragged_dot`, or this package's kernels."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.grouped_matmul import gpu, tpu, xla
from pallas_kernels.grouped_matmul.tiling import Tiling
from pallas_kernels.routing import rows, rows_tpu
from pallas_kernels.routing.reference import places


def expert_ffn(x, experts, scores, gate_up, down, order=None):
    """See `api.expert_ffn`."""
    ffn = _one_by_one(xla.grouped_swiglu, xla.grouped_matmul)
    return _moved(x, experts, scores, gate_up, down, order, rows.permute, ffn, rows.unpermute)


def expert_ffn_tpu(x, experts, scores, gate_up, down, order=None, *, tiling: Tiling | None = None, interpret=False):
    """See `api.expert_ffn`; `tiling`, `interpret` and what is refused as in `grouped_matmul.tpu`."""
    there, back = (partial(move, interpret=interpret) for move in (rows_tpu.permute, rows_tpu.unpermute))
    ffn = partial(tpu.grouped_ffn, tiling=tiling, interpret=interpret)
    return _moved(x, experts, scores, gate_up, down, order, there, ffn, back)


def expert_ffn_gpu(x, experts, scores, gate_up, down, order=None, *, tiling: gpu.Tiling | None = None, interpret=False):
    """See `api.expert_ffn`; `tiling`, `interpret` and what is refused as in `grouped_matmul.gpu`."""
    options = {"tiling": tiling, "interpret": interpret}
    ffn = _one_by_one(partial(gpu.grouped_swiglu, **options), partial(gpu.grouped_matmul, **options))
    return _moved(x, experts, scores, gate_up, down, order, rows.permute, ffn, rows.unpermute)


def _one_by_one(swiglu, matmul):
    return lambda x, gate_up, down, *groups: matmul(swiglu(x, gate_up, *groups), down, *groups)


def _moved(x, experts, scores, gate_up, down, order, permute, ffn, unpermute):
    place, group_sizes = order or places(experts, len(down))
    return unpermute(ffn(permute(x, scores, place), gate_up, down, group_sizes, jnp.zeros((), jnp.int32)), place)
