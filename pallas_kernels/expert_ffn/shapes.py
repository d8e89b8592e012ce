"""Real shapes, shared by the tests and the schedule tool."""

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.expert_ffn import ragged
from pallas_kernels.grouped_matmul.shapes import SHAPES


def case(devices, shape: str = "scout", gradients: bool = False) -> Case:
    """The TPU implementation on 8,192 tokens with one expert each, for `aot.compile_for`.

    Args:
        gradients: of everything but the choice, as well as the forward pass.
    """
    M, D, F, E = (getattr(SHAPES[shape], name) for name in "MDFG")

    def backward(x, experts, scores, gate_up, down, dy):
        y, pull_back = jax.vjp(lambda x, s, g, d: ragged.expert_ffn_tpu(x, experts, s, g, d), x, scores, gate_up, down)
        return y, pull_back(dy)

    abstract = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    choice = abstract(M, 1, dtype=jnp.int32), abstract(M, 1, dtype=jnp.float32)
    arguments = (abstract(M, D), *choice, abstract(E, 2, D, F), abstract(E, F, D))
    return Case(backward, (*arguments, abstract(M, D))) if gradients else Case(ragged.expert_ffn_tpu, arguments)
