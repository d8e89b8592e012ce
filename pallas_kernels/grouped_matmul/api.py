"""Matrix products whose right side changes from one group of rows to the next: the experts of a sparse model."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import gpu, reference, tpu, xla
from pallas_kernels.grouped_matmul.quantized import Quantized

AUTO = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}
_tokamax = {"ragged_dot": xla.tokamax_ragged_dot}
MATMUL = {
    "reference": reference.grouped_matmul,
    "xla": xla.grouped_matmul,
    "tpu": tpu.grouped_matmul,
    "gpu": gpu.grouped_matmul,
    "tokamax": partial(xla.grouped_matmul, **_tokamax),
}
SWIGLU = {
    "reference": reference.grouped_swiglu,
    "xla": xla.grouped_swiglu,
    "tpu": tpu.grouped_swiglu,
    "gpu": gpu.grouped_swiglu,
    "tokamax": partial(xla.grouped_swiglu, **_tokamax),
}


def grouped_matmul(
    lhs: Float[Array, "M D"],
    rhs: Float[Array, "G D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    group_offset: Int[Array, ""] | int = 0,
    *,
    implementation: str = "auto",
) -> Float[Array, "M F"]:
    """out_m = lhs_m rhs_g for each row m of group g, in the dtype of `lhs`, with float32 sums.

    The rows lie in the order of their groups. `rhs` holds the matrices of groups group_offset to group_offset + G - 1, all of
    them or an expert shard's; a row of any other group, or after the last group, gives zeros.

    Args:
        rhs: quantised matrices are frozen: the rows get a gradient, the matrices none.
        group_sizes: rows of each group, of any size from nothing to all; together at most M.

    Raises:
        ValueError: `rhs` holds more groups than there are, or there is no such implementation.
        NotImplementedError: the implementation cannot take these shapes or dtypes; it says why.
    """
    _check("grouped_matmul", rhs, group_sizes)
    function = dispatch.choose("grouped_matmul", MATMUL, AUTO, implementation)
    return function(lhs, rhs, group_sizes, jnp.asarray(group_offset, jnp.int32))


def grouped_swiglu(
    lhs: Float[Array, "M D"],
    gate_up: Float[Array, "G 2 D F"] | Quantized,
    group_sizes: Int[Array, " E"],
    group_offset: Int[Array, ""] | int = 0,
    *,
    implementation: str = "auto",
) -> Float[Array, "M F"]:
    """silu(lhs gate_g) * (lhs up_g), with gate_g at index 0 of `gate_up[g]` and up_g at 1; else as `grouped_matmul`.

    The tokens are read once and the two halves are not written. Its gradient computes them again.

    Raises:
        ValueError, NotImplementedError: as `grouped_matmul`.
    """
    _check("grouped_swiglu", gate_up, group_sizes)
    function = dispatch.choose("grouped_swiglu", SWIGLU, AUTO, implementation)
    return function(lhs, gate_up, group_sizes, jnp.asarray(group_offset, jnp.int32))


def _check(operation: str, rhs, group_sizes) -> None:
    if rhs.shape[0] > group_sizes.shape[0]:
        raise ValueError(f"{operation}: matrices of {rhs.shape[0]} groups, sizes of only {group_sizes.shape[0]}")
