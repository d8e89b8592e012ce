"""Real shapes, shared by the tests, the schedule tool and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.quantized import Quantized
from pallas_kernels.grouped_matmul.tiling import Tiling


@dataclasses.dataclass(frozen=True)
class Shape:
    """[M, D] x [G, D, F]; of a SwiGLU F counts one half."""

    M: int
    D: int
    F: int
    G: int


SHAPES = {
    "scout": Shape(8192, 5120, 8192, 16),  # Llama 4 Scout's 16 experts
    "scout_down": Shape(8192, 8192, 5120, 16),
    "maverick": Shape(8192, 5120, 8192, 128),  # Llama 4 Maverick's 128
}


def case(
    devices,
    shape: str,
    op: str = "grouped_matmul",
    gradients: bool = False,
    rows: int = 0,
    columns: int = 0,
    piece: int = 0,
    weights: str = "bfloat16",
    block: int = 0,
) -> Case:
    """The TPU kernel on one of SHAPES, for `aot.compile_for`.

    Args:
        op: grouped_matmul or grouped_swiglu.
        gradients: of both arguments, instead of the forward product.
        rows, columns, piece: a tiling other than the default.
        weights, block: dtype of the matrices, and of a quantised one the elements with one scale.
    """
    size = SHAPES[shape]
    tiling = Tiling(rows, columns, piece) if rows else None
    matrices = (2,) if op == "grouped_swiglu" else ()
    function = getattr(tpu, op)

    def forward(lhs, rhs, sizes):
        return function(lhs, rhs, sizes, jnp.int32(0), tiling=tiling)

    def backward(lhs, rhs, sizes, dout):
        if block:
            return jax.vjp(lambda lhs: forward(lhs, rhs, sizes), lhs)[1](dout)
        return jax.vjp(lambda lhs, rhs: forward(lhs, rhs, sizes), lhs, rhs)[1](dout)

    abstract = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    rhs = abstract(size.G, *matrices, size.D, size.F, dtype=jnp.dtype(weights))
    if block:
        rhs = Quantized(rhs, abstract(size.G, *matrices, size.D // block, size.F, dtype=jnp.float32))
    arguments = (abstract(size.M, size.D), rhs, abstract(size.G, dtype=jnp.int32))
    return Case(backward, (*arguments, abstract(size.M, size.F))) if gradients else Case(forward, arguments)
