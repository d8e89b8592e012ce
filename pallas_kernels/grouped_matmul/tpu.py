"""Grouped products as Pallas kernels for TPU: `rows.py` for the rows, `columns.py` for the matrices' gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import rows
from pallas_kernels.grouped_matmul.columns import columns_product
from pallas_kernels.grouped_matmul.quantized import Quantized
from pallas_kernels.grouped_matmul.rows import rows_product
from pallas_kernels.grouped_matmul.tiling import Tiling


def grouped_matmul(lhs, rhs, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_matmul`.

    Args:
        tiling: chosen by shape if None.
        interpret: as in `pl.pallas_call`.

    Raises:
        NotImplementedError: dtypes other than bfloat16 or float32 (the same of both, unless the matrices are quantised), D or F
            no multiple of 128, or blocks that are no multiple of 32.
    """
    return _grouped(lhs, rhs[:, None], group_sizes, group_offset, tiling, interpret)


def grouped_swiglu(lhs, gate_up, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """See `api.grouped_swiglu`; arguments and errors as `grouped_matmul`."""
    return _grouped(lhs, gate_up, group_sizes, group_offset, tiling, interpret)


def _grouped(lhs, matrices, group_sizes, group_offset, tiling, interpret):
    """With one matrix a group its product, with two their SwiGLU."""
    D, F = matrices.shape[2:]
    quantized = isinstance(matrices, Quantized)
    dtype = matrices.values.dtype if quantized else matrices.dtype
    if lhs.dtype not in (jnp.bfloat16, jnp.float32) or (dtype != lhs.dtype and not quantized):
        dtypes = f"{lhs.dtype} x {dtype}"
        raise NotImplementedError(f"grouped products on TPU: both in bfloat16 or in float32, not {dtypes}")
    if D % 128 or F % 128:
        raise NotImplementedError(f"grouped products on TPU: D and F must be multiples of 128, not {D} and {F}")
    if quantized and matrices.block % 32:
        raise NotImplementedError(f"grouped products on TPU: blocks must be a multiple of 32, not {matrices.block}")
    if not lhs.shape[0]:
        return jnp.zeros((0, F), lhs.dtype)
    return _product(lhs, matrices, group_sizes, group_offset, tiling, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(lhs, matrices, group_sizes, group_offset, tiling, interpret):
    which, finish = ((0,), rows.product) if matrices.shape[1] == 1 else ((0, 1), rows.swiglu)
    groups, options = (group_sizes, group_offset), {"tiling": tiling, "interpret": interpret}
    return rows_product(lhs[None], matrices, which, *groups, finish=finish, **options)[0]


def _forward(lhs, matrices, group_sizes, group_offset, tiling, interpret):
    out = _product(lhs, matrices, group_sizes, group_offset, tiling, interpret)
    return out, (lhs, matrices, group_sizes, group_offset)


def _backward(tiling, interpret, residuals, dout):
    lhs, matrices, *groups = residuals
    options = {"tiling": tiling, "interpret": interpret}
    dproduct = dout[None]  # of the product with each matrix
    if matrices.shape[1] == 2:
        finish = {"finish": rows.swiglu_gradient, "beside": [dproduct], "results": 2}
        dproduct = rows_product(lhs[None], matrices, (0, 1), *groups, **finish, **options)
    dlhs = None
    for one in range(len(dproduct)):  # apart, since both at once would leave little VMEM for the matrices
        sum_ = {} if dlhs is None else {"finish": rows.add, "beside": [dlhs]}
        dtype = lhs.dtype if one == len(dproduct) - 1 else jnp.float32
        backward = {"dtype": jnp.dtype(dtype), "lhs_index": one, "transposed": True}
        dlhs = rows_product(dproduct, matrices, (one,), *groups, **sum_, **backward, **options)
    frozen = isinstance(matrices, Quantized)
    dmatrices = None if frozen else columns_product(lhs, dproduct, matrices.shape[0], *groups, **options)
    return dlhs[0], dmatrices, *(np.zeros(x.shape, jax.dtypes.float0) for x in groups)


_product.defvjp(_forward, _backward)
