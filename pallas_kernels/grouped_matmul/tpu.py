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


def grouped_ffn(lhs, gate_up, down, group_sizes, group_offset, *, tiling: Tiling | None = None, interpret=False):
    """`grouped_matmul` with `down` of `grouped_swiglu` with `gate_up`; arguments and errors as theirs.

    What lies between is not kept for the gradient. SwiGLU's gradient needs gate and up again, and writes their SwiGLU on the
    way: two products of a layer's thirteen less than the two operations one by one, where a layer is rematerialised.
    """
    down = down[:, None]
    for rows_, matrices in ((lhs, gate_up), (jax.ShapeDtypeStruct((*lhs.shape[:-1], down.shape[2]), lhs.dtype), down)):
        _refuse(rows_, matrices)
    if not lhs.shape[0]:
        return jnp.zeros((0, down.shape[3]), lhs.dtype)
    return _ffn(lhs, gate_up, down, group_sizes, group_offset, tiling, interpret)


def _grouped(lhs, matrices, group_sizes, group_offset, tiling, interpret):
    """With one matrix a group its product, with two their SwiGLU."""
    _refuse(lhs, matrices)
    if not lhs.shape[0]:
        return jnp.zeros((0, matrices.shape[3]), lhs.dtype)
    return _product(lhs, matrices, group_sizes, group_offset, tiling, interpret)


def _refuse(lhs, matrices):
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
    dlhs = _rows_gradient(dproduct, matrices, groups, options, lhs.dtype)
    return dlhs, _matrices_gradient(lhs[None], 0, dproduct, matrices, groups, options), *map(_none, groups)


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ffn(lhs, gate_up, down, group_sizes, group_offset, tiling, interpret):
    hidden = _product(lhs, gate_up, group_sizes, group_offset, tiling, interpret)
    return _product(hidden, down, group_sizes, group_offset, tiling, interpret)


def _ffn_forward(lhs, gate_up, down, group_sizes, group_offset, tiling, interpret):
    out = _ffn(lhs, gate_up, down, group_sizes, group_offset, tiling, interpret)
    return out, (lhs, gate_up, down, group_sizes, group_offset)


def _ffn_backward(tiling, interpret, residuals, dout):
    lhs, gate_up, down, *groups = residuals
    options = {"tiling": tiling, "interpret": interpret}
    dhidden = _rows_gradient(dout[None], down, groups, options, lhs.dtype)
    finish = {"finish": rows.swiglu_gradient_and_value, "beside": [dhidden[None]], "results": 3}
    dgate_dup_hidden = rows_product(lhs[None], gate_up, (0, 1), *groups, **finish, **options)
    dlhs = _rows_gradient(dgate_dup_hidden, gate_up, groups, options, lhs.dtype)
    dgate_up = _matrices_gradient(lhs[None], 0, dgate_dup_hidden, gate_up, groups, options)
    ddown = _matrices_gradient(dgate_dup_hidden, 2, dout[None], down, groups, options)
    return dlhs, dgate_up, ddown, *map(_none, groups)


_ffn.defvjp(_ffn_forward, _ffn_backward)


def _rows_gradient(dproduct, matrices, groups, options, dtype):
    """Of the rows, from that of their product with each matrix: the first of `dproduct`."""
    count, dlhs = matrices.shape[1], None
    for one in range(count):  # apart, since both at once would leave little VMEM for the matrices
        sum_ = {} if dlhs is None else {"finish": rows.add, "beside": [dlhs]}
        backward = {"dtype": jnp.dtype(dtype if one == count - 1 else jnp.float32), "lhs_index": one, "transposed": True}
        dlhs = rows_product(dproduct, matrices, (one,), *groups, **sum_, **backward, **options)
    return dlhs[0]


def _matrices_gradient(lhs, lhs_index, dproduct, matrices, groups, options):
    """None for quantised ones, which are frozen."""
    if isinstance(matrices, Quantized):
        return None
    groups_here, count = matrices.shape[:2]
    return columns_product(lhs, dproduct, groups_here, *groups, lhs_index=lhs_index, count=count, **options)


def _none(integers):
    return np.zeros(integers.shape, jax.dtypes.float0)
